"""Conversion data: histories of (behaviour, item) events, and what came next.   RCLRec, section 1.

Stage `all` teaches the next event of any behaviour, stage `target` conversions alone. A prepared folder with behaviours
and its semantic IDs → a folder of prompts and completions, which `recipes/sft.py` trains on as it stands. No conversion
of validation or test, and nothing that came after one, is in a history or a target (`mixtures.conversion_cases`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from datasets.table import MemoryMappedTable

from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.event_prompts import TEMPLATE, EventTexts, ends_of
from recllm.files import digest, make_folder, write_whole
from recllm.mixtures import store
from recllm.mixtures.conversion_cases import ConversionEvents, repeat_counts
from recllm.mixtures.store import Mixture, already_made, save_mixture
from recllm.progress import progress
from recllm.prompting import HISTORY, PromptStyle
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids.of_data import index_of

VERSION = 1  # of what is written; a change of it makes every mixture anew
COMMAND = "data_prep/build_conversions.py"
BATCH = 10_000  # examples held in memory at a time
TASKS = {"all": "next_event", "target": "conversion", "sequence": "event_sequence"}
FEATURES = Features(
    {
        **store.FEATURES,  # task, prompt, completion, user, item (the target), history (items that the prompt shows)
        "position": Value("int64"),  # of the target among the user's events: with the user, what names it
        "behaviour": Value("string"),  # of the target
        "history_behaviours": ListOf(Value("int32")),  # places in the report's `behaviours`
        "history_rows": ListOf(Value("int32")),  # rows of the semantic-ID table
        "ends": ListOf(Value("int32")),  # of each item its last code's place, counted from the first event's token
        "target_row": Value("int32"),  # of the semantic-ID table
        "target": ListOf(Value("int32")),  # L codes, -1 at the end where the item has fewer
        "repeat": ListOf(Value("string")),  # behaviours by which the user had met the target's item; []: it is new
        "shown": Value("bool"),  # does the target's item stand in the history shown?
    }
)


@dataclass
class ConversionsConfig:
    """Settings of `data_prep/build_conversions.py`."""

    data: str = field(metadata={"help": "Prepared folder (--split conversion), with semantic_ids.json inside."})
    stage: Literal["all", "target"] = field(
        default="all", metadata={"help": "The next event of any behaviour, or conversions alone."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder to write. Default: conversions_STAGE, in data."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Default: semantic_ids.json of the data folder."})
    windows: Literal["all", "last", "sequence"] = field(
        default="all",
        metadata={"help": "Targets: every one, a user's last, or (stage all) whole sequences, a row for many events."},
    )
    max_history: int = field(default=50, metadata={"help": "Most recent events of a history that a prompt shows."})
    max_targets: int | None = field(default=None, metadata={"help": "windows all: a user's latest. Default: all."})
    template: str = field(default=TEMPLATE, metadata={"help": "Of a prompt, with {history} in it."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a mixture of other data or settings."})

    def __post_init__(self):
        if self.max_history < 1:
            raise UserError(f"max_history is {self.max_history}", fix="1 or more events")
        if self.max_targets is not None and self.max_targets < 1:
            raise UserError(f"max_targets is {self.max_targets}", fix="1 or more, or leave it out for all")
        if self.max_targets is not None and self.windows != "all":
            raise UserError(
                f"max_targets has no meaning with windows {self.windows}", fix="windows all, or leave it out"
            )
        if self.windows == "sequence" and self.stage == "target":
            raise UserError("a sequence answers with events of every behaviour", fix="windows all for stage target")
        if self.windows == "sequence" and not self.template.endswith(HISTORY):
            raise UserError(
                "in a sequence each event answers to those before it", fix=f"a template that ends in {HISTORY}"
            )
        _ = self.style

    @property
    def style(self) -> PromptStyle:
        """How the trained model is asked; `EventWriter(style, table, tokenizer)` fills it."""
        return PromptStyle(self.template, max_history=self.max_history, events=True)

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output else Path(self.data) / f"conversions_{self.stage}"


class Conversions(Mixture):
    """`Conversions.load(folder, table, COMMAND)`. Its `style` is filled by an `EventWriter`."""

    @property
    def behaviours(self) -> list[str]:
        """What the numbers of `history_behaviours` stand for."""
        return self.report["behaviours"]

    @property
    def target_behaviour(self) -> str:
        return self.report["target_behaviour"]


def build_conversions(config: ConversionsConfig) -> Conversions:
    """Make `config.folder`, or leave it when it is made already."""
    catalogue = Catalogue.load(config.data)
    events = ConversionEvents(catalogue)
    table = index_of(catalogue, config.semantic_ids)
    made_of = digest(str(VERSION), catalogue.fingerprint, table.fingerprint, json.dumps(_settings(config)))
    if already_made(config.folder, made_of, config.overwrite):
        return Conversions.load(config.folder, table, COMMAND)
    targets = targets_of(config, events)
    if targets.is_empty():
        raise _nothing(config, events)
    conversions = {split: events.cases(split, config.max_history) for split in ("train", "valid", "test")}
    make_folder(config.folder.parent)
    with write_whole(rows := config.folder.with_name(f".{config.folder.name}.arrow")) as path:
        with progress("conversion examples", len(targets)) as advance:
            _write(path, targets, config, catalogue.behaviours, table, advance)
        examples = Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=made_of[:16])
        report = {"kind": "conversions", "version": VERSION, "made_of": made_of, "catalogue": catalogue.fingerprint}
        report |= {"semantic_ids": table.fingerprint, "settings": _settings(config), "prompt": asdict(config.style)}
        report |= {"stage": config.stage, "target_behaviour": events.target_behaviour}
        report |= {"behaviours": catalogue.behaviours, "tasks": {task_of(config): len(targets)}}
        report |= {"targets": _by_behaviour(config, events, targets), "users": _users(events)}
        report |= {"dropped": _dropped(config, events, targets)}
        report |= {"conversions": {split: repeat_counts(cases) for split, cases in conversions.items()}}
        save_mixture(examples, report, config.folder)
    rows.unlink()
    return Conversions.load(config.folder, table, COMMAND)


def targets_of(config: ConversionsConfig, events: ConversionEvents) -> pl.DataFrame:
    """A row for each example, in the catalogue's order."""
    if config.windows == "sequence":
        return events.training_pieces(config.max_history)
    latest = 1 if config.windows == "last" else config.max_targets
    return events.training_targets(config.stage, config.max_history, latest)


def task_of(config: ConversionsConfig) -> str:
    return TASKS["sequence" if config.windows == "sequence" else config.stage]


def _write(
    path: Path, targets: pl.DataFrame, config: ConversionsConfig, behaviours: list[str], table: SemanticIdTable,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """An Arrow stream of FEATURES."""
    schema, texts = FEATURES.arrow_schema, EventTexts(table)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for some in targets.iter_slices(BATCH):
            columns = list(zip(*_rows(some, config, behaviours, texts)))
            arrays = [pa.array(values, column.type) for values, column in zip(columns, schema)]
            stream.write_batch(pa.record_batch(arrays, schema=schema))
            advance(len(some))


def _rows(targets: pl.DataFrame, config: ConversionsConfig, behaviours: list[str], texts: EventTexts) -> Iterator:
    """Tuples in the order of FEATURES."""
    table, task, style = texts.table, task_of(config), config.style
    number = {behaviour: place for place, behaviour in enumerate(behaviours)}
    names = "user", "position", "item", "behaviour", "history", "history_behaviours", "repeat", "shown"
    for user, position, item, behaviour, history, kinds, repeat, shown in targets.select(names).iter_rows():
        events = [*zip(history, kinds), (item, behaviour)]
        asked = 1 if config.windows == "sequence" else len(history)  # events in the prompt; the others answer
        rows = [table.row_of[one] for one in history]
        yield (
            task,
            style.text(events[:asked], texts, None),
            "".join(map(texts.text_of, events[asked:])),
            user,
            item,
            history,
            position,
            behaviour,
            [number[kind] for kind in kinds],
            rows,
            ends_of(table.depths[rows].tolist()),
            table.row_of[item],
            table.codes[table.row_of[item]].tolist(),
            repeat,
            shown,
        )


def _settings(config: ConversionsConfig) -> dict:
    places = ("data", "output", "semantic_ids", "overwrite")
    return {name: value for name, value in sorted(vars(config).items()) if name not in places}


def _by_behaviour(config: ConversionsConfig, events: ConversionEvents, targets: pl.DataFrame) -> dict[str, int]:
    """How many events are answers; of a sequence they are more than its examples."""
    if config.windows == "sequence":
        targets = events.training_targets("all", max_history=1)
    return dict(sorted(targets["behaviour"].value_counts().iter_rows(), key=lambda pair: (-pair[1], pair[0])))


def _users(events: ConversionEvents) -> dict[str, int]:
    """All; those with a conversion; those with a test target."""
    conversions = events.events.filter(pl.col("behaviour") == events.target_behaviour)
    held_out = conversions.filter(pl.col("split") == "test")
    users = events.events["user"].n_unique(), conversions["user"].n_unique(), held_out["user"].n_unique()
    return dict(zip(("all", "with_conversions", "held_out"), users))


def _dropped(config: ConversionsConfig, events: ConversionEvents, targets: pl.DataFrame) -> dict[str, int]:
    """The events that are neither answers nor held out, by reason."""
    conversion = pl.col("behaviour") == events.target_behaviour
    neither = events.events.filter(pl.col("split") == "none")
    train = events.events.filter(pl.col("split") == "train")
    wanted = train if config.stage == "all" else train.filter(conversion)
    first = len(neither.filter(conversion & (pl.col("position") == 0)))  # held out, and nothing to ask with
    with_history = int((wanted["position"] > 0).sum())
    reasons = {
        "after_a_held_out_conversion": len(neither) - first,
        "held_out_without_a_history": first,
        "other_behaviour": len(train) - len(wanted),
        "no_history": len(wanted) - with_history,
        "not_among_the_latest": 0 if config.windows == "sequence" else with_history - len(targets),
    }
    return {reason: count for reason, count in reasons.items() if count}


def _nothing(config: ConversionsConfig, events: ConversionEvents) -> UserError:
    held_out = int(events.events["split"].is_in(["valid", "test"]).sum())
    what = "event" if config.stage == "all" else "conversion"
    return UserError(
        f"no {what} with a history is left to train on: {held_out:,} conversions are held out",
        file=events.catalogue.folder,
        fix="prepare the data with a smaller --held_out_share, such as 0.3",
    )
