"""Which kind of case each target is: how long its user's past, how popular its item, new or known, had before or not.

Nothing here depends on a ranker or on its protocol: the past is the whole of it, however much of it a ranker reads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from recllm.catalogue import Catalogue, Split
from recllm.errors import UserError

HISTORY_FROM = (0, 1, 5, 10, 20, 50)  # events of the user before the target
POPULARITY_FROM = (0, 1, 5, 20, 100)  # training events of the target's item


class Slices(NamedTuple):
    """One way to divide the cases: case p belongs to labels[member[p]]."""

    name: str
    labels: tuple[str, ...]
    member: Tensor  # (P,) int64


def slices_of(catalogue: Catalogue, split: Split, popularity: Tensor) -> list[Slices]:
    """Every division of the split's targets, cases in the order of `Catalogue.targets`.   popularity: (N,)"""
    # Events stand in the user's order: one that is not the first of its user and item is a repeat.
    repeated = ~pl.struct("user", "item").is_first_distinct()
    events = catalogue.interactions.with_columns(repeated=repeated).filter(pl.col("split") == split)
    counts = popularity[item_rows(catalogue, events["item"])]  # (P,)
    return [
        Slices("history length", labels_of(HISTORY_FROM), _bucket(to_tensor(events["position"]), HISTORY_FROM)),
        Slices("item popularity", labels_of(POPULARITY_FROM), _bucket(counts, POPULARITY_FROM)),
        Slices("new items", ("seen in training", "new"), (counts == 0).long()),
        Slices("repeat", ("target not in the history", "target in the history"), to_tensor(events["repeated"])),
    ]


def training_counts(catalogue: Catalogue) -> Tensor:
    """How many training events each item has.   -> (N,) int64"""
    trained = catalogue.interactions.filter(pl.col("split") == "train")["item"]
    return torch.bincount(item_rows(catalogue, trained), minlength=len(catalogue.item_ids))


def item_rows(catalogue: Catalogue, items: pl.Series) -> Tensor:
    """Item ids → their rows in the catalogue."""
    every = catalogue.items["item"]
    numbers = pl.int_range(len(every), eager=True)
    rows = items.replace_strict(every, numbers, default=None, return_dtype=pl.Int64)
    if rows.null_count():
        raise UserError(
            f"item {items.filter(rows.is_null()).min()!r} has events, and items.parquet does not have it",
            file=catalogue.folder,
            fix="run data_prep/prepare.py again, with --overwrite",
        )
    return to_tensor(rows)


def labels_of(starts: Sequence[int]) -> tuple[str, ...]:
    """(0, 1, 5) -> "0", "1-4", "5+" """
    ends = [start - 1 for start in starts[1:]]
    closed = [str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends)]
    return (*closed, f"{starts[-1]}+")


def _bucket(values: Tensor, starts: Sequence[int]) -> Tensor:
    """The last start that is not above the value.   (P,) -> (P,)"""
    return torch.bucketize(values, torch.tensor(starts), right=True) - 1


def to_tensor(column: pl.Series) -> Tensor:
    """Whole numbers or truth values.   -> (P,) int64"""
    return torch.from_numpy(column.cast(pl.Int64).to_numpy(writable=True))
