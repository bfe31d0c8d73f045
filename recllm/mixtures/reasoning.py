"""Reasoning data: history → a chain in five stages that ends in the next item.   GREAM, section 4.2.

A teacher that sees history and next item writes the reasoning (recllm.mixtures.teacher_answers); the chain around it
is composed, checked and read back here. Only training events are used, without those kept for reinforcement learning.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset

from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.files import digest
from recllm.launch import console
from recllm.mixtures.item_facts import Facts, item_facts, speaking_columns
from recllm.mixtures.offline_chains import compose
from recllm.mixtures.store import FEATURES, RL_SHARE, Mixture, already_made, check_rl_share, save_mixture
from recllm.mixtures.teacher_answers import DROPS, Composer, Dropped, parse_answer, question, readable
from recllm.prompting import PromptStyle
from recllm.reasoning import SHORT_TEMPLATE, STEPS, TEMPLATE, Chain
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids.of_data import index_of
from recllm.teacher import Request, TeacherConfig, cached_write, estimate
from recllm.text import check_columns, fuse, plain

TASK = "reasoning"
COMMAND = "data_prep/build_reasoning.py"
CACHE_FILE = "reasoning.cache.jsonl"
TEMPLATES = {"long": TEMPLATE, "short": SHORT_TEMPLATE}
NOTE_WORDS = 60  # of an item, as the teacher sees it


@dataclass
class ReasoningConfig:
    """Settings of `data_prep/build_reasoning.py`."""

    data: str = field(metadata={"help": "The prepared folder, with semantic_ids.json inside."})
    output: str | None = field(default=None, metadata={"help": "Folder to write. Default: reasoning in the data's."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Default: semantic_ids.json of the data folder."})
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Of items.parquet: what a teacher sees and templates speak of. Default: title, categories, brand, "
            "and own columns of short values in which neighbours of a history agree more often than others."
        },
    )
    template: str = field(
        default="long", metadata={"help": "The prompt: long, short (for tiny models), or a text with {history} once."}
    )
    chat: bool = field(default=False, metadata={"help": "Prompts become a user's message in the chat template."})
    separator: str = field(default="", metadata={"help": "Between items: blanks, commas, full stops, or nothing."})
    max_history: int = field(default=20, metadata={"help": "Most recent items that a prompt shows."})
    min_history: int = field(default=2, metadata={"help": "Fewest items before a target."})
    targets: Literal["last", "all"] = field(
        default="last", metadata={"help": "Each user's last training event, or every one, with enough history."}
    )
    users: int | None = field(default=None, metadata={"help": "So many, drawn by seed. Default: all."})
    denoise: Literal["teacher", "copy"] = field(
        default="teacher", metadata={"help": "The rewritten history: without what the teacher drops, or a plain copy."}
    )
    justification: bool = field(default=True, metadata={"help": "One line before the recommendation says why."})
    rl_share: float = field(default=0.0, metadata={"help": RL_SHARE})
    seed: int = field(default=0, metadata={"help": "Of the draw of users."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a mixture of other data or settings."})

    def __post_init__(self):
        if self.min_history < 1 or self.max_history < self.min_history:
            raise UserError(
                f"min_history is {self.min_history}, max_history {self.max_history}",
                fix="min_history at least 1, max_history at least as much",
            )
        if self.users is not None and self.users < 1:
            raise UserError(f"users is {self.users}", fix="1 or more, or leave it out for all")
        check_rl_share(self.rl_share)
        if self.separator.strip(" ,."):
            raise UserError(
                f"the separator {self.separator!r} would not read back", fix="blanks, commas, full stops or nothing"
            )
        _ = self.style  # refuses a template without {history}

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output else Path(self.data) / "reasoning"

    @property
    def style(self) -> PromptStyle:
        template = TEMPLATES.get(self.template, self.template)
        return PromptStyle(template, self.separator, self.chat, self.max_history)


@dataclasses.dataclass(frozen=True)
class Case:
    """A training event to explain, and what the prompt shows of what came before."""

    user: str
    position: int
    history: tuple[str, ...]
    target: str


def build_reasoning(config: ReasoningConfig, teacher: TeacherConfig) -> Mixture | None:
    """Write the mixture, or leave it when it is there and complete; None if only the estimate was wanted."""
    catalogue = Catalogue.load(config.data)
    table = index_of(catalogue, config.semantic_ids)
    columns = config.columns or speaking_columns(catalogue, config.rl_share)
    check_columns(catalogue, columns)
    cases = find_cases(config, catalogue)
    facts = item_facts(catalogue, columns, config.rl_share)
    requests = ask(cases, catalogue, columns, facts, offline=teacher.teacher == "offline")
    asked = [request for request in requests if request]
    if not asked:
        raise UserError(
            f"nothing is known of any next item ({', '.join(columns)}), so nothing can be said of why it follows",
            file=catalogue.folder / "items.parquet",
            fix="prepare the data with item files, or name columns that say something with --columns",
        )
    writer, cache = teacher.make(), catalogue.folder / CACHE_FILE
    keys = [writer.cache_key(request) for request in asked]
    made_of = digest(catalogue.fingerprint, table.fingerprint, repr(_settings(config, columns)), *keys)
    if not teacher.estimate_only and (made := _there(config, table, made_of)) is not None:
        return made
    prices = teacher.input_price, teacher.output_price
    expected = estimate(writer, asked, cache, *prices, teacher.concurrency, readable)
    how = "from templates" if teacher.teacher == "offline" else f"by {teacher.teacher_model}: {expected}"
    console.print(f"writing {len(asked):,} chains {how}", highlight=False, soft_wrap=True)
    if teacher.estimate_only:
        return None
    written = iter(cached_write(writer, asked, cache, "reasoning", readable))
    answers = [next(written) if request else None for request in requests]
    chains, dropped = compose_all(_composer(config, catalogue, table, facts), cases, answers)
    _check_any(chains, dropped, teacher)
    report = {
        "kind": TASK,
        "catalogue": catalogue.fingerprint,
        "semantic_ids": table.fingerprint,
        "made_of": made_of,
        "teacher": teacher.teacher if teacher.teacher == "offline" else teacher.teacher_model,
        "settings": _settings(config, columns),
        "prompt": dataclasses.asdict(config.style),
        "tasks": {TASK: len(chains)},
        "dropped": dropped,
        **_figures(chains),
    }
    return save_mixture(_examples(config.style, chains, table), report, config.folder)


def find_cases(config: ReasoningConfig, catalogue: Catalogue) -> list[Case]:
    """What is explained, in the order of users and time: training events after at least min_history others."""
    sequences = catalogue.training_sequences(config.rl_share).select("user", "items").rows()
    sequences = [(user, items) for user, items in sequences if len(items) > config.min_history]
    if not sequences:
        raise UserError(
            f"no user has a training event after {config.min_history} others",
            file=catalogue.folder,
            fix="a smaller --min_history, or prepare the data with a smaller --user_core",
        )
    if config.users is not None and config.users < len(sequences):
        drawn = np.random.default_rng(config.seed).choice(len(sequences), config.users, replace=False)
        sequences = [sequences[number] for number in sorted(drawn)]
    return [
        Case(user, position, tuple(items[max(0, position - config.max_history) : position]), items[position])
        for user, items in sequences
        for position in range(config.min_history if config.targets == "all" else len(items) - 1, len(items))
    ]


def ask(
    cases: Sequence[Case], catalogue: Catalogue, columns: Sequence[str], facts: Mapping[str, Facts], offline: bool
) -> list[Request | None]:
    """One request a case; None where nothing is known of the target."""
    rows = catalogue.items.iter_rows(named=True)
    notes = {row["item"]: fuse(row, columns, NOTE_WORDS).replace("\n", " | ") for row in rows}

    def request(case: Case) -> Request | None:
        if not (facts[case.target] if offline else notes[case.target]):
            return None
        messages = question([notes[item] for item in case.history], notes[case.target])
        composed = compose([facts[item] for item in case.history], facts[case.target])
        return Request(f"{case.user}, event {case.position}", messages, composed.text())

    return list(map(request, cases))


def _composer(
    config: ReasoningConfig, catalogue: Catalogue, table: SemanticIdTable, facts: Mapping[str, Facts]
) -> Composer:
    titles = {item: plain(title) for item, title in catalogue.items.select("item", "title").iter_rows()}
    shared = {item: sorted(value for _, value in known.all) for item, known in facts.items()}
    denoise = config.denoise == "teacher"
    return Composer(table, titles, shared, config.separator, denoise, config.justification)


def compose_all(
    composer: Composer, cases: Sequence[Case], answers: Sequence[str | None]
) -> tuple[list[tuple[Case, Chain]], dict[str, int]]:
    """The chains that hold, and how many do not, by reason."""
    chains, dropped = [], Counter()
    for case, answer in zip(cases, answers, strict=True):
        said = parse_answer(answer) if answer else None
        if said is None:
            dropped["nothing_known" if answer is None else "no_answer"] += 1
            continue
        try:
            chains.append((case, composer.chain(said, case.history, case.target)))
        except Dropped as error:
            dropped[error.reason] += 1
    return chains, {reason: dropped[reason] for reason in DROPS if dropped[reason]}


def _check_any(chains: Sequence, dropped: dict[str, int], teacher: TeacherConfig) -> None:
    if chains:
        return
    why = "; ".join(f"{count:,} × {reason} ({DROPS[reason]})" for reason, count in dropped.items())
    fix = "look at items.parquet" if teacher.teacher == "offline" else "another --teacher_model, a larger --max_tokens"
    raise UserError(f"no chain is left, all were dropped: {why}", fix=fix)


def _examples(style: PromptStyle, chains: Sequence[tuple[Case, Chain]], table: SemanticIdTable) -> Dataset:
    """Plain content; what a chat template adds comes when it is tokenised."""
    plain_style = dataclasses.replace(style, chat=False)
    columns = {
        "task": [TASK] * len(chains),
        "prompt": [plain_style.text(case.history, table, None) for case, _ in chains],
        "completion": [chain.text(table, style.separator) for _, chain in chains],
        "user": [case.user for case, _ in chains],
        "item": [case.target for case, _ in chains],
        "history": [list(case.history) for case, _ in chains],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def _figures(chains: Sequence[tuple[Case, Chain]]) -> dict:
    """users; denoised: share of the shown items that the rewritten histories lack; words of the three steps."""
    shown = sum(len(case.history) for case, _ in chains)
    lost = [len(case.history) - len(chain.history) for case, chain in chains]
    steps = [sum(len(getattr(chain, stage).split()) for stage in STEPS) for _, chain in chains]
    return {
        "users": len(list(itertools.groupby(case.user for case, _ in chains))),
        "denoised": sum(lost) / shown,
        "denoised_chains": sum(map(bool, lost)) / len(chains),
        "mean_words": sum(steps) / len(steps),
    }


def _settings(config: ReasoningConfig, columns: Sequence[str]) -> dict:
    places = ("data", "output", "semantic_ids", "overwrite")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in places}
    if not config.rl_share:
        del settings["rl_share"]  # a mixture made before there was the setting is the same
    return settings | {"columns": list(columns)}


def _there(config: ReasoningConfig, table: SemanticIdTable, made_of: str) -> Mixture | None:
    """The mixture, if it is made and no answer is missing."""
    if not already_made(config.folder, made_of, config.overwrite):
        return None
    made = Mixture.load(config.folder, table, COMMAND)
    missing = made.report["dropped"].get("no_answer", 0)
    if missing:
        console.print(f"{missing:,} answers are missing from it: they are asked for again", highlight=False)
    return None if missing else made
