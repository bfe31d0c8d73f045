"""The alignment tasks: which examples of each there are, and how each is written.   After GREAM, section 2.

Every task has one text that asks and one that answers (`recllm.mixtures.templates.FIELDS`). Its examples are numbered:
by window for those of a user, by item for those of an item. A weight chooses among the numbers.
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from recllm.mixtures.alignment_facts import ItemFacts, Windows
from recllm.mixtures.store import FEATURES
from recllm.mixtures.templates import FIELDS, Template

WEIGHTS = {  # the default: each family has its say, and the task that the model is asked most is most of the mixture
    "next_item": 1.0,
    "sequence": 0.0,  # all of next_item's targets of a user in one row: cheap, and for one wording only
    "next_item_from_titles": 0.25,
    "next_title": 0.25,
    "item_from_text": 1.0,
    "title_of_item": 1.0,
    "description_of_item": 1.0,
    "attributes_of_item": 1.0,
    "items_of_category": 1.0,
    "preference_summary": 1.0,
    "item_from_preference": 1.0,
    "item_from_intent": 1.0,
}
SEQUENTIAL = ("next_item", "next_item_from_titles", "next_title")
PREFERENCE = ("preference_summary", "item_from_preference")
PER_CATEGORY = 8  # most examples of one category
BATCH = 10_000  # examples held in memory at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The examples of one task that are written: E of them, in order."""

    number: np.ndarray  # (E,) of the window, the item or the group
    template: np.ndarray  # (E,)

    @classmethod
    def draw(cls, numbers: np.ndarray, weight: float, templates: int, random: np.random.Generator) -> "Choice":
        """Each number floor(weight) times, and a random share of the numbers, weight − floor(weight), once more.

        The copies of one number have different templates, as long as there are so many.
        """
        whole, share = int(weight), weight - int(weight)
        start = random.integers(templates, size=len(numbers))
        more = random.permutation(len(numbers))[: round(share * len(numbers))]
        place = np.concatenate([np.tile(np.arange(len(numbers)), whole), more])
        copy = np.concatenate([np.repeat(np.arange(whole), len(numbers)), np.full(len(more), whole)])
        order = np.lexsort([copy, place])
        place, copy = place[order], copy[order]
        return cls(numbers[place], (start[place] + copy) % templates)

    def __len__(self) -> int:
        return len(self.number)


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """All that examples are written from. An item is a row of the catalogue, a window a place in `windows`."""

    facts: ItemFacts
    windows: Windows
    summarised: np.ndarray  # windows whose history has a summary
    groups: list[tuple[str, list[int]]]  # a category and some of its items
    separator: str  # between indices
    pieces: Windows | None = None  # of whole sequences
    summaries: Mapping[int, str] = dataclasses.field(default_factory=dict)  # by window
    intents: Mapping[int, str] = dataclasses.field(default_factory=dict)  # by item

    def numbers(self, task: str) -> np.ndarray:
        """What the task can have examples of."""
        if task == "sequence":
            return np.arange(len(self.pieces))
        if task in SEQUENTIAL:
            return np.arange(len(self.windows))
        if task in PREFERENCE:
            return self.summarised
        return np.arange(len(self.groups if task == "items_of_category" else self.facts.ids))

    def texts(self, task: str, number: int) -> tuple[str, str, str, str, list[int]]:
        """What asks, what answers, the user, the item, the items of the history. An empty text is an unknown one."""
        facts, windows = self.facts, self.windows
        if task == "items_of_category":
            category, items = self.groups[number]
            return category, self._indices(items), "", "", []
        if task == "sequence":
            pieces = self.pieces
            first, *rest = [*pieces.history(number), pieces.events[pieces.target[number]]]
            user = pieces.users[pieces.user[number]]
            return self._indices([first]), self._indices(rest), user, facts.ids[rest[-1]], [first, *rest[:-1]]
        if task not in SEQUENTIAL and task not in PREFERENCE:
            asking, answering = FIELDS[task]
            of_item = {"item": facts.index, "intent": self.intents} | {
                name: getattr(facts, name) for name in ("text", "title", "description", "attributes")
            }
            return of_item[asking][number], of_item[answering][number], "", facts.ids[number], []
        user, history = windows.users[windows.user[number]], windows.history(number)
        target = windows.events[windows.target[number]]
        if task == "preference_summary":  # says nothing of the target
            return self._indices(history), self.summaries[number], user, "", history
        if task == "item_from_preference":
            asks = self.summaries[number]
        elif task == "next_item_from_titles":
            history = [row for row in history if facts.title[row]]
            asks = "; ".join(facts.title[row] for row in history)
        else:
            asks = self._indices(history)
        answers = facts.title[target] if task == "next_title" else facts.index[target]
        return asks, answers, user, facts.ids[target], history

    def _indices(self, items: Sequence[int]) -> str:
        return self.separator.join([self.facts.index[row] for row in items])


def task_random(seed: int, task: str) -> np.random.Generator:
    """One for each task: the examples of a task do not change with which others are made."""
    return np.random.default_rng([seed, zlib.crc32(task.encode())])


def category_groups(facts: ItemFacts, size: int, random: np.random.Generator) -> list[tuple[str, list[int]]]:
    """The members of each category in random order, `size` at a time, at most PER_CATEGORY times."""
    members: dict[str, list[int]] = {}
    for row, kinds in enumerate(facts.categories):
        for kind in dict.fromkeys(kinds):
            members.setdefault(kind, []).append(row)
    groups = []
    for kind in sorted(members):
        rows = random.permutation(members[kind])[: size * PER_CATEGORY].tolist()
        groups += [(kind, rows[start : start + size]) for start in range(0, len(rows), size)]
    return groups


@dataclasses.dataclass(eq=False)
class Counts:
    """What was written and what was not, and why."""

    examples: Counter = dataclasses.field(default_factory=Counter)  # by task
    prompt_words: Counter = dataclasses.field(default_factory=Counter)
    completion_words: Counter = dataclasses.field(default_factory=Counter)
    dropped: dict[str, Counter] = dataclasses.field(default_factory=dict)  # task → reason → examples


def write_examples(
    path: Path,
    material: Material,
    choices: Mapping[str, Choice],
    templates: Mapping[str, Sequence[Template]],
    advance: Callable[[int], None],
) -> Counts:
    """An Arrow stream of FEATURES, task by task; an example one of whose texts is empty is dropped and counted."""
    counts = Counts()
    schema = FEATURES.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for task, choice in choices.items():
            for start in range(0, len(choice), BATCH):
                part = slice(start, start + BATCH)
                numbers, drawn = choice.number[part].tolist(), choice.template[part].tolist()
                rows = list(_rows(task, material, numbers, [templates[task][place] for place in drawn], counts))
                columns = [pa.array(values, field.type) for values, field in zip(zip(*rows), schema)]
                if columns:
                    stream.write_batch(pa.record_batch(columns, schema=schema))
                advance(len(numbers))
    return counts


def _rows(task: str, material: Material, numbers: Sequence[int], templates: Sequence[Template], counts: Counts):
    asking, answering = FIELDS[task]
    for number, template in zip(numbers, templates):
        asks, answers, user, item, history = material.texts(task, number)
        if not (asks and answers):
            reason = f"no_{answering if asks else asking}"
            counts.dropped.setdefault(task, Counter())[reason] += 1
            continue
        prompt, completion = template.fill(asks, answers)
        counts.examples[task] += 1
        counts.prompt_words[task] += len(prompt.split())
        counts.completion_words[task] += len(completion.split())
        yield task, prompt, completion, user, item, [material.facts.ids[row] for row in history]
