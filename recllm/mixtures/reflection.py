"""Reflection data: what a pre-trained recommender would draft, and what is wrong with it.   GRC, section 4.1

For every target B drafts by beam search, each with its labels: the first level at which it is not the target, and of
each attribute whether it is the target's. A target is a training event and never one of validation or test.

Which drafts train is a policy. The paper takes all, of which nearly all go wrong at the first level. `balanced` keeps
up to M of a target's, going round the labels from the deepest, the rarest, to the first, with a draft of each drawn by
seed. Drawn, since the best-scored of each label would look alike: a draft's score, which says most about its label,
would say nothing any more. Drafts of a search are distinct items, so none is there twice.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from datasets.table import InMemoryTable
from torch import Tensor

from recllm.attributes import Attribute, ItemAttributes, attributes_of
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Answers, Decoder
from recllm.decoding.decoder import generator_of
from recllm.errors import UserError
from recllm.files import digest
from recllm.mixtures.store import Mixture, already_made, save_mixture
from recllm.mixtures.targets import Which, rl_prompts
from recllm.objectives.grc import first_divergence
from recllm.progress import progress
from recllm.reflection import Template
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids.of_data import index_of

KIND = "reflection"
COMMAND = "data_prep/build_reflection.py"
VERSION = 2  # of what is written; a change of it makes the data anew
BLOCK = 512  # prompts between two steps of the progress bar
UNKNOWN = -1  # label of an attribute of which the target's value is not known: not trained on
FEATURES = Features(
    {
        "user": Value("string"),
        "position": Value("int64"),  # of the target among the user's events
        "prompt_ids": ListOf(Value("int32")),
        "target": ListOf(Value("int32")),  # L codes
        "drafts": ListOf(ListOf(Value("int32"))),  # best first, L codes each
        "loc": ListOf(Value("int8")),  # of each draft 1 … L + 1
        "same": ListOf(ListOf(Value("int8"))),  # of each draft K labels: 1 same, 0 other, UNKNOWN
        "score": ListOf(Value("float32")),  # of each draft its log-probability
    }
)


@dataclass
class ReflectionConfig:
    """Settings of `data_prep/build_reflection.py`."""

    data: str = field(metadata={"help": "Prepared folder, with semantic_ids.json inside."})
    model: str = field(metadata={"help": "The pre-trained recommender: checkpoint folder or Hub repository."})
    output: str | None = field(default=None, metadata={"help": "Folder to write. Default: reflection, in the data."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Default: semantic_ids.json of the data folder."})
    attributes: list[str] = field(
        default_factory=lambda: ["categories"],
        metadata={"help": "Columns of items.parquet; of a list the last value; price:5 for five classes of numbers."},
    )
    drafts: int = field(default=20, metadata={"help": "B, drafts a target, by beam search."})
    keep: int = field(default=4, metadata={"help": "M, drafts of a target that train, at most. Not of policy all."})
    policy: Literal["balanced", "all"] = field(
        default="balanced", metadata={"help": "Which drafts train: so many a target, label by label; or every one."}
    )
    rl_targets: Which = field(
        default="held_out",
        metadata={
            "help": "Targets that the model's training kept out (--rl_share), those that it saw, or all of them."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "So many targets, drawn by seed. Default: all."})
    seed: int = field(default=0, metadata={"help": "Of the draws of targets and of the drafts that train."})
    batch_size: int | None = field(default=None, metadata={"help": "Prompts at once. Default: what memory allows."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1 … Default: a GPU if there is one."})
    overwrite: bool = field(default=False, metadata={"help": "Replace reflection data of other settings."})

    def __post_init__(self):
        if not self.attributes:
            raise UserError("attributes is empty, and reflection asks about one at least", fix="attributes: categories")
        for name in ("drafts", "keep", "limit", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}", fix="1 or more")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}", fix="0 or more")

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output else Path(self.data) / KIND


@dataclass(frozen=True, eq=False)
class ReflectionData(Mixture):
    """A row a target (FEATURES). `report`: start, attributes, counts (`reflection_counts`), settings, …"""

    @classmethod
    def load(cls, folder: str | Path, table: SemanticIdTable, command: str = COMMAND) -> "ReflectionData":
        mixture = Mixture.load(folder, table, command)
        if mixture.report.get("kind") != KIND:
            raise UserError("is no reflection data", file=folder, fix=f"run {command}")
        return cls(mixture.examples, mixture.report)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """K, what its labels are about."""
        return tuple(map(Attribute.read, self.report["attributes"]))


@dataclass(frozen=True, eq=False)
class Labelled:
    """Of P targets with B drafts each, the labels."""

    loc: Tensor  # (P, B) int8, 1 … L + 1; 0 where there is no draft
    same: Tensor  # (P, B, K) int8, 1, 0, or UNKNOWN
    kept: Tensor  # (P, B) bool: does it train?


def build_reflection(config: ReflectionConfig) -> ReflectionData:
    """Make `config.folder`, or leave it when it is made already."""
    catalogue = Catalogue.load(config.data)
    table = index_of(catalogue, config.semantic_ids)
    attributes = attributes_of(config.attributes, catalogue.items)
    template = Template(table.levels, tuple(attribute.name for attribute in attributes))
    check_index(table)
    if config.drafts > len(catalogue.items):
        few = len(catalogue.items)
        raise UserError(f"{config.drafts} drafts of {few:,} items", fix=f"--drafts {few} or fewer")
    checkpoint = Checkpoint.load(config.model, config.device)
    if checkpoint.table.fingerprint != table.fingerprint:
        raise UserError(
            "the checkpoint was made with other semantic IDs than the data's",
            file=config.model,
            fix="a checkpoint of this data, or its index with --semantic_ids",
        )
    parts = catalogue.fingerprint, table.fingerprint, checkpoint.weights, repr(attributes), repr(_settings(config))
    made_of = digest(str(VERSION), *parts)
    if already_made(config.folder, made_of, config.overwrite):
        return ReflectionData.load(config.folder, table)

    known = item_attributes(attributes, checkpoint)
    prompts = rl_prompts(
        catalogue, checkpoint, which=config.rl_targets, mode="direct", limit=config.limit, seed=config.seed,
        new_tokens=template.form.places,
    )  # fmt: skip
    allowed = torch.tensor([item in catalogue.row_of for item in table.items])  # an index may know new items too
    rows, labelled = find_drafts(prompts, checkpoint, known, allowed, config)
    report = {
        "kind": KIND,
        "version": VERSION,
        "made_of": made_of,
        "catalogue": catalogue.fingerprint,
        "semantic_ids": table.fingerprint,
        "start": {"name": checkpoint.name, "weights": checkpoint.weights},
        "settings": _settings(config),
        "prompt": dataclasses.asdict(checkpoint.style),
        "tokens": written_with(checkpoint),
        "attributes": [attribute.as_json() for attribute in attributes],
        "missing": dict(zip(known.names, (known.ids < 0).sum(0).tolist())),  # items of which it is not known
        **reflection_counts(labelled, table.levels, known.names),
    }
    save_mixture(Dataset(InMemoryTable(rows), fingerprint=made_of[:16]), report, config.folder)
    return ReflectionData.load(config.folder, table)


def item_attributes(attributes: Sequence[Attribute], checkpoint: Checkpoint) -> ItemAttributes:
    """In the order of the index; from what the checkpoint carries, since later nothing else is there to tell from."""
    missing = [attribute.column for attribute in attributes if attribute.column not in checkpoint.items.columns]
    if missing:
        raise UserError(
            f"the data have a column {missing[0]!r}, and the checkpoint's items.parquet does not",
            file=checkpoint.name,
            fix="build the model again from the data as they are now (data_prep/build_model.py), or another attribute",
        )
    return ItemAttributes.of(attributes, checkpoint.items)


def written_with(checkpoint: Checkpoint) -> str:
    """Which tokens prompts are made of: another tokenizer would read their ids as other words."""
    ids = [checkpoint.writer.prefix, *(level.tolist() for level in checkpoint.tokens.levels)]
    return digest(*map(repr, map(list, ids)))


def check_index(table: SemanticIdTable) -> None:
    """All items have L codes."""
    short = np.flatnonzero(table.depths < table.levels)
    if len(short):
        raise UserError(
            f"{len(short):,} items have fewer than {table.levels} codes, {table.items[short[0]]!r} first, and a draft "
            "is compared level by level",
            fix="build_semantic_ids.py --collisions extra-level-all, which makes all equally deep",
        )


def find_drafts(
    prompts: Dataset, checkpoint: Checkpoint, known: ItemAttributes, allowed: Tensor, config: ReflectionConfig
) -> tuple[pa.Table, list[Labelled]]:
    """Rows of FEATURES in the order of the prompts, and the labels they were chosen by, block by block."""
    keep = config.keep if config.policy == "balanced" else None
    only = None if bool(allowed.all()) else allowed
    decoder = Decoder(
        checkpoint.model, checkpoint.tokens, prefix=checkpoint.writer.prefix, batch_size=config.batch_size
    )
    batches, blocks = [], []
    with progress("drafts", len(prompts)) as advance:
        for start in range(0, len(prompts), BLOCK):
            asked = prompts[start : start + BLOCK]
            rows = torch.tensor([checkpoint.table.row_of[item] for item in asked["item"]])
            found = decoder.beams(asked["prompt_ids"], config.drafts, only)
            whose = zip(asked["user"], asked["position"])
            draws = [torch.rand(config.drafts, generator=generator_of(config.seed, *target)) for target in whose]
            blocks.append(label(found, torch.tensor(asked["target"]), rows, known, keep, torch.stack(draws)))
            batches.append(_rows(asked, found, blocks[-1]))
            advance(len(rows))
    return pa.Table.from_batches(batches), blocks


def label(
    found: Answers, target: Tensor, target_rows: Tensor, known: ItemAttributes, keep: int | None, draws: Tensor
) -> Labelled:
    """Drafts and draws (P, B), targets as codes (P, L) and as rows (P,); keep None: every draft trains."""
    there = found.rows >= 0  # (P, B)
    loc = first_divergence(found.codes, target).masked_fill(~there, 0)
    target_rows = target_rows.unsqueeze(1)  # (P, 1)
    same = known.same(found.rows, target_rows).long().masked_fill(known.ids_of(target_rows) < 0, UNKNOWN)
    kept = there if keep is None else there & (balanced_ranks(loc, target.size(1), draws) < keep)
    return Labelled(loc.to(torch.int8), same.to(torch.int8), kept)


def balanced_ranks(loc: Tensor, levels: int, draws: Tensor) -> Tensor:
    """Each draft's place when one goes round the labels, L + 1 first, and takes one of each.   (P, B) × 2 -> (P, B)

    Of a label the draft with the smallest draw comes first. [1, 1, 3, 1, 2, 3] of L = 2 with ascending draws: the first
    of labels 3, 2, 1, then the second of 3 and of 1, then the third of 1: [2, 4, 0, 5, 1, 3]. Drafts of label 0 are
    none, and come after all others.
    """
    alike = loc.unsqueeze(2) == loc.unsqueeze(1)  # (P, B, B)
    round_ = (alike & (draws.unsqueeze(1) < draws.unsqueeze(2))).sum(dim=2)  # how many of the same label are before it
    turn = torch.where(loc > 0, round_ * (levels + 1) + levels + 1 - loc, round_.size(1) * (levels + 1))
    return turn.argsort(dim=1, stable=True).argsort(dim=1)


def reflection_counts(blocks: Sequence[Labelled], levels: int, names: Sequence[str]) -> dict:
    """drafts, labels and attributes: numbers [found, kept]; with_target: targets that are among their own drafts."""
    loc, kept = torch.cat([block.loc for block in blocks]), torch.cat([block.kept for block in blocks])
    same = torch.cat([block.same for block in blocks])  # (P, B, K)
    there = loc > 0

    def counted(which: Tensor) -> list[int]:
        return [int((which & there).sum()), int((which & kept).sum())]

    values = {"same": 1, "other": 0, "unknown": UNKNOWN}
    return {
        "targets": len(loc),
        "with_target": int((loc == levels + 1).any(dim=1).sum()),
        "drafts": counted(there),
        "labels": {str(value): counted(loc == value) for value in range(1, levels + 2)},
        "attribute_labels": {
            name: {value: counted(same[..., slot] == number) for value, number in values.items()}
            for slot, name in enumerate(names)
        },
    }


def _rows(asked: dict, found: Answers, labelled: Labelled) -> pa.RecordBatch:
    columns = {name: asked[name] for name in ("user", "position", "prompt_ids", "target")}
    values = {"drafts": found.codes, "loc": labelled.loc, "same": labelled.same, "score": found.scores}
    for name, value in values.items():
        columns[name] = [each[kept].tolist() for each, kept in zip(value, labelled.kept)]
    schema = FEATURES.arrow_schema
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _settings(config: ReflectionConfig) -> dict:
    """What the data are a function of, beside data, index, model and attributes."""
    names = ["drafts", "policy", "rl_targets", "limit", *(["keep"] if config.policy == "balanced" else [])]
    return {
        name: getattr(config, name)
        for name in [*names, *(["seed"] if config.limit or config.policy == "balanced" else [])]
    }
