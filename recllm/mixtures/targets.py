"""What reinforcement learning trains on: prompts, and the items that followed.

By default the targets are those that supervised training never saw (`Catalogue.rl_targets`; docs/rl_targets.md).
Prompts are written as evaluation writes them, token for token.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets import List as ListOf
from datasets.table import InMemoryTable

from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.files import digest
from recllm.progress import progress
from recllm.prompting import PromptStyle
from recllm.semantic_ids import SemanticIdTable

Which = Literal["held_out", "trained", "all"]
Mode = Literal["direct", "reason", "joint"]
BATCH = 5_000  # prompts tokenised at a time
FEATURES = Features(
    {
        "user": Value("string"),
        "position": Value("int64"),  # of the target among the user's events: with the user, what names the target
        "mode": Value("string"),  # direct or reason
        "prompt": Value("string"),  # as the model reads it
        "prompt_ids": ListOf(Value("int32")),
        "target": ListOf(Value("int32")),  # L codes, -1 at the end where the item has fewer
        "item": Value("string"),
        "history": ListOf(Value("string")),  # items, as the prompt shows them
    }
)
AGAIN = "build the mixtures again with --rl_share 0.2 and train, or rl_targets: all"


@dataclass(kw_only=True)
class TargetsConfig:
    """Settings of what is trained on."""

    rl_targets: Which = field(
        default="held_out",
        metadata={"help": "Targets that supervised training kept out (--rl_share), those that it saw, or all of them."},
    )
    mode: Mode = field(
        default="direct", metadata={"help": "Answer at once, after reasoning, or joint: every target in both ways."}
    )
    limit: int | None = field(default=None, metadata={"help": "So many targets, drawn by seed. Default: all."})

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}", fix="1 or more, or leave it out for all")


def rl_prompts(
    catalogue: Catalogue, checkpoint: Checkpoint, *, which: Which, mode: Mode, limit: int | None, seed: int,
    new_tokens: int,
) -> Dataset:  # fmt: skip
    """Rows of FEATURES in the catalogue's order; of `joint` first every target asked directly, then every one again.

    limit       so many targets, a sample by `seed`
    new_tokens  what an answer may add to a prompt: a prompt that leaves no room for them is refused here
    """
    share = None if which == "all" else share_of(catalogue, checkpoint)
    styles = {"direct": lambda: checkpoint.style, "reason": lambda: checkpoint.reasoning}
    styles = {name: style() for name, style in styles.items() if mode in (name, "joint")}
    longest = max(style.max_history for style in styles.values())
    cases = catalogue.rl_targets(share, longest)
    if which == "trained":
        kept_out = cases.select("user", "position")
        cases = catalogue.rl_targets(None, longest).join(
            kept_out, on=["user", "position"], how="anti", maintain_order="left"
        )
    if cases.is_empty():
        raise no_targets(catalogue, share)
    if limit is not None and limit < len(cases):
        cases = cases[np.sort(np.random.default_rng(seed).choice(len(cases), limit, replace=False))]
    texts = ItemTexts.of(cases, checkpoint.table)
    batches = []
    with progress("tokenising prompts", len(cases) * len(styles)) as advance:
        for name, style in styles.items():
            for some in cases.iter_slices(BATCH):
                batches.append(_rows(name, style, some, texts, checkpoint))
                advance(len(some))
    rows = pa.Table.from_batches(batches)
    check_lengths(rows, checkpoint, new_tokens)
    parts = catalogue.fingerprint, checkpoint.weights, repr((which, share, styles, limit, seed))
    return Dataset(InMemoryTable(rows), fingerprint=digest("rl_prompts", *parts)[:16])


def share_of(catalogue: Catalogue, checkpoint: Checkpoint) -> float:
    """Of how many users the checkpoint never saw the last training event."""
    sft = checkpoint.report.get("sft", {})
    share = sft.get("rl_share", 0.0)
    if not share:
        problem = "its supervised training kept no target out, and on what is memorised there is little to learn"
        raise UserError(problem, file=checkpoint.name, fix=AGAIN)
    if sft.get("catalogue", catalogue.fingerprint) != catalogue.fingerprint:
        problem = "its supervised training kept targets of other data out than these"
        raise UserError(problem, file=catalogue.folder, fix="the data it was trained on, or rl_targets: all")
    return share


def no_targets(catalogue: Catalogue, share: float | None) -> UserError:
    if share is None:
        return UserError("no user has two training events, so there is no target", file=catalogue.folder)
    problem = f"none of the users whose targets were kept out (rl_share {share:g}) has three training events or more"
    return UserError(problem, file=catalogue.folder, fix="a larger --rl_share of the mixtures, or rl_targets: all")


def check_lengths(rows: pa.Table, checkpoint: Checkpoint, new_tokens: int) -> None:
    """Prompt and answer fit the model's context."""
    context = getattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", None)
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in rows["prompt_ids"].chunks])
    too_long = int((lengths + new_tokens > context).sum()) if context else 0
    if too_long:
        raise UserError(
            f"{too_long:,} of {len(lengths):,} prompts, the longest of {lengths.max():,} tokens, leave no room for "
            f"{new_tokens:,} more in the model's context of {context:,}",
            fix="a smaller max_completion_length, or mixtures of a smaller --max_history to train from",
        )


@dataclass(frozen=True, eq=False)
class ItemTexts:
    """The items of targets and histories as a table writes them, each written once: prompts name the same few often."""

    texts: dict[str, str]

    @classmethod
    def of(cls, cases: pl.DataFrame, table: SemanticIdTable) -> "ItemTexts":
        """Refuses an item without a semantic ID."""
        used = pl.concat([cases["item"], cases["history"].explode(empty_as_null=False)]).unique(maintain_order=True)
        unknown = [item for item in used.to_list() if item not in table]
        if unknown:
            raise UserError(
                f"{len(unknown):,} items have no semantic ID in the model, {unknown[0]!r} first",
                fix="train on the data that the model was made from, or give new items an ID (encode_new)",
            )
        return cls({item: table.text_of(item) for item in used.to_list()})

    def text_of(self, item: str) -> str:
        return self.texts[item]


def _rows(
    mode: str, style: PromptStyle, cases: pl.DataFrame, texts: ItemTexts, checkpoint: Checkpoint
) -> pa.RecordBatch:
    table, tokenizer = checkpoint.table, checkpoint.tokenizer
    items, histories = cases["item"].to_list(), cases["history"].list.tail(style.max_history).to_list()
    prompts = [style.text(history, texts, tokenizer) for history in histories]
    columns = {
        "user": cases["user"].to_list(),
        "position": cases["position"].to_list(),
        "mode": [mode] * len(cases),
        "prompt": prompts,
        "prompt_ids": tokenizer(prompts, add_special_tokens=False)["input_ids"],  # as PromptWriter.ids
        "target": list(table.codes[[table.row_of[item] for item in items]]),
        "item": items,
        "history": histories,
    }
    schema = FEATURES.arrow_schema
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
