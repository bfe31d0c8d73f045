"""Predictions matched with a split's targets and a catalogue's items, or one sentence that says what is wrong."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recllm.catalogue import Catalogue, Split
from recllm.errors import UserError
from recllm.evaluation.predictions import AGAIN, Prediction

KEY = ["user", "position"]


def in_order(
    predictions: Sequence[Prediction], catalogue: Catalogue, split: Split, file: str | Path | None, measured: pl.Series
) -> pl.DataFrame:
    """user, position, target, line: one row a measured target, in the order of `Catalogue.targets`."""
    wanted = catalogue.targets(split).filter(measured)
    wanted = wanted.select("user", pl.col("position").cast(pl.Int64), target="item")
    given = pl.DataFrame(
        {
            "user": [prediction.user for prediction in predictions],
            "position": [prediction.position for prediction in predictions],
            "given": [prediction.target for prediction in predictions],
        },
        schema={"user": pl.String, "position": pl.Int64, "given": pl.String},
    ).with_row_index("line", offset=1)
    doubled = given.filter(~pl.struct(KEY).is_first_distinct())
    _refuse(doubled, "is predicted a second time", file, "keep one line for each target")
    foreign = given.join(wanted, on=KEY, how="anti", maintain_order="left")
    of_another = f"is not a target of the {split} split of {catalogue.name}"
    _refuse(foreign, of_another, file, "give the split and the prepared data that were predicted")
    missing = wanted.join(given, on=KEY, how="anti", maintain_order="left")
    if len(missing):
        raise UserError(
            f"{len(missing):,} of the {len(wanted):,} targets of the {split} split have no prediction, "
            f"the first is {_case(missing)}",
            file=file,
            fix=AGAIN,
        )
    cases = wanted.join(given, on=KEY, how="left", maintain_order="left")
    other = cases.filter(pl.col("target") != pl.col("given"))
    if len(other):
        target, wrong = other["target"][0], other["given"][0]
        _refuse(other, f"took {target!r} by the catalogue, and the prediction says {wrong!r}", file, AGAIN)
    return cases.drop("given")


def item_lists(
    predictions: Sequence[Prediction], catalogue: Catalogue, length: int, file: str | Path | None = None
) -> Tensor:
    """The lists as rows of the catalogue, filled up with -1.   -> (P, K)"""
    row_of = catalogue.row_of
    flat = np.fromiter((row_of.get(item, -1) for item in chain.from_iterable(p.items for p in predictions)), np.int64)
    sizes = torch.tensor([len(prediction.items) for prediction in predictions])
    if (flat < 0).any():
        at = int(np.flatnonzero(flat < 0)[0])
        line = int(torch.searchsorted(sizes.cumsum(0), at, right=True))
        item = list(chain.from_iterable(p.items for p in predictions[: line + 1]))[at]
        problem = f"user {predictions[line].user!r} is recommended {item!r}, which {catalogue.name} does not have"
        raise UserError(problem, file=file, line=line + 1, fix="give the prepared data that were predicted")
    items = torch.full((len(predictions), length), -1)
    items[torch.arange(length) < sizes.unsqueeze(1)] = torch.from_numpy(flat)
    return items


def list_length(
    predictions: Sequence[Prediction], ks: Sequence[int], length: int | None, file: str | Path | None
) -> int:
    sizes = [len(prediction.items) for prediction in predictions]
    longest, k = max(sizes), max(ks)
    if length is None:
        return max(longest, k)
    if length < k:
        raise UserError(f"recall@{k} needs lists of {k} items, and they were to have {length}", fix="ask for more")
    if longest > length:
        line = sizes.index(longest) + 1
        raise UserError(f"{longest} items in a list that was to have {length}", file=file, line=line, fix=AGAIN)
    return length


def _refuse(cases: pl.DataFrame, what: str, file: str | Path | None, fix: str) -> None:
    if len(cases):
        more = f" (and {len(cases) - 1:,} more like it)" if len(cases) > 1 else ""
        line = None if file is None else cases["line"][0]
        raise UserError(f"{_case(cases)} {what}{more}", file=file, line=line, fix=fix)


def _case(cases: pl.DataFrame) -> str:
    return f"user {cases['user'][0]!r} at position {cases['position'][0]}"
