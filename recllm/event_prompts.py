"""How a history of events is written for a model, where users do more than one thing with an item.

    A user's events, oldest first: <|click|><|a_3|><|b_7|><|cart|><|a_3|><|b_7|>   →   <|pay|><|a_9|><|b_0|>

An event is (item, behaviour). Its behaviour's token stands before the item's codes, in the history and in the answer.
The template is a `PromptStyle`'s, stored in the checkpoint like any other; this is how its {history} is filled.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.prompting import HISTORY, PromptStyle
from recllm.semantic_ids import SemanticIdTable
from recllm.tokenization import behaviour_token

Event = tuple[str, str]  # item, behaviour
# Nothing after the history: an answer continues it, so that a row of events can teach all of them at once.
TEMPLATE = f"A user's events, oldest first: {HISTORY}"


def is_event(value: object) -> bool:
    """A pair of two texts?"""
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, str) for part in value)


class EventTexts:
    """Events as text, each written once. A `PromptStyle` asks it as it asks a table."""

    def __init__(self, table: SemanticIdTable):
        self.table, self._written = table, {}

    def text_of(self, event: Event) -> str:
        item, behaviour = event
        if (text := self._written.get((item, behaviour))) is None:
            text = self._written[item, behaviour] = behaviour_token(behaviour) + self.table.text_of(item)
        return text


@dataclass(frozen=True, eq=False)
class EventWriter:
    """Histories of events → token ids, and where in them each item ends. An empty one is a prompt without events."""

    style: PromptStyle
    table: SemanticIdTable
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self):
        if not self.style.events:
            raise UserError(
                "the model was not trained on behaviours: it reads histories of items alone",
                fix="train it on data of data_prep/build_conversions.py",
            )
        if self.style.separator:
            problem = f"the prompt's separator is {self.style.separator!r}, and between events nothing may stand"
            raise UserError(problem, fix="train on data of data_prep/build_conversions.py")

    @functools.cached_property
    def texts(self) -> EventTexts:
        return EventTexts(self.table)

    def ids(self, histories: Sequence[Sequence[Event]]) -> list[list[int]]:
        """The prompts, of the last `style.max_history` events each. Refuses what the model has no token for."""
        for history in histories:
            self.check(history)
        if not histories:
            return []
        texts = [self.style.text(history, self.texts, self.tokenizer) for history in histories]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def ends(self, histories: Sequence[Sequence[Event]]) -> list[list[int]]:
        """The place in the prompt of the last code of each event that it shows, oldest first."""
        first = len(self.prefix)
        return [[first + end for end in ends_of(self._depths(history))] for history in histories]

    def opening(self, behaviour: str) -> int:
        """The token that opens an answer of this behaviour."""
        token = behaviour_token(behaviour)
        if token not in self._vocabulary:
            fix = "leave its events out, or build the model from data that have it (data_prep/build_model.py)"
            raise UserError(f"the model has no token for the behaviour {behaviour!r}", fix=fix)
        return self._vocabulary[token]

    def check(self, history: Sequence[Event]) -> None:
        for event in history:
            if not is_event(event):
                raise UserError(f"a history of events holds pairs, got {event!r}", fix="(item, behaviour)")
        unknown = [item for item, _ in history if item not in self.table]
        if unknown:
            raise UserError(
                f"the model knows no item {unknown[0]!r}" + (f" (and {len(unknown) - 1} more)" if unknown[1:] else ""),
                fix="leave it out of the history, or give it a semantic ID (recllm.semantic_ids.encode_new)",
            )
        for behaviour in {behaviour for _, behaviour in history}:
            self.opening(behaviour)

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """The tokens before the first event, the same in every prompt."""
        item = self.table.items[0]
        text = self.style.text([(item, "-")], self.texts, self.tokenizer)
        before = text[: text.index(self.texts.text_of((item, "-")))]  # an event begins with an added token: it cuts
        return tuple(self.tokenizer(before, add_special_tokens=False)["input_ids"])

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def _depths(self, history: Sequence[Event]) -> list[int]:
        return [self.table.depth_of(item) for item, _ in history[-self.style.max_history :]]


def ends_of(depths: Sequence[int]) -> list[int]:
    """Where each event's last code stands, from the first event's token on: an event is a behaviour and its codes.

    [2, 3] -> [2, 6]: places 0 behaviour, 1 2 codes, 3 behaviour, 4 5 6 codes.
    """
    return [end - 1 for end in accumulate(1 + depth for depth in depths)]
