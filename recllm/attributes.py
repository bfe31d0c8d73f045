"""Attributes of items that reflection asks about: is the draft's category the target's, its brand, its price class?

A spec is a column of items.parquet, or `price:5`: five classes of a numeric column, with about as many items each. Of a
list, such as `categories`, the last value counts: the leaf. An attribute keeps the classes' edges, so that an item gets
the same class wherever it is asked.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recllm.errors import UserError

NOT_SHARED = ("item", "title", "description", "reviews")  # names and long texts: of hardly two items the same
MISSING = -1


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Stored in the checkpoint (recllm.json)."""

    name: str  # part of a slot's token: letters, digits, _ and -
    column: str
    edges: tuple[float, ...] | None = None  # the least value of every class but the first, ascending; None: values

    def as_json(self) -> dict:
        return {"name": self.name, "column": self.column, "edges": None if self.edges is None else list(self.edges)}

    @classmethod
    def read(cls, value: Mapping) -> "Attribute":
        try:
            edges = value["edges"]
            return cls(str(value["name"]), str(value["column"]), None if edges is None else tuple(map(float, edges)))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"the checkpoint's attribute is unknown here: {value}", fix="update recllm") from None

    def values(self, items: pl.DataFrame) -> list[str | int | None]:
        """Of each item its value, or its class counted from 0; None where nothing is known."""
        column = _column(items, self.column)
        if self.edges is None:
            return [_text(value) for value in column.to_list()]
        numbers = _numbers(column)
        classes = np.searchsorted(np.array(self.edges), numbers, side="right").tolist()
        return [None if math.isnan(number) else which for number, which in zip(numbers, classes)]


def attributes_of(specs: Sequence[str], items: pl.DataFrame) -> tuple[Attribute, ...]:
    """What `["categories", "price:5"]` means for these items. Refuses an attribute that tells no two items apart."""
    if not specs:
        raise UserError("no attribute to reflect on: K = 0", fix=f"attributes: {_choice(items)}")
    found = tuple(_attribute(spec, items) for spec in specs)
    names = [attribute.name for attribute in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"attributes: {twice[0]!r} is named twice", fix="each column once")
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class ItemAttributes:
    """Which items share what. Row i of `ids` is row i of the items it was made of."""

    attributes: tuple[Attribute, ...]  # K
    ids: Tensor  # (N, K) int64: the same number, the same value; -1 where nothing is known

    @classmethod
    def of(cls, attributes: Sequence[Attribute], items: pl.DataFrame) -> "ItemAttributes":
        columns = []
        for attribute in attributes:
            values = attribute.values(items)
            number = {value: place for place, value in enumerate(sorted({v for v in values if v is not None}))}
            columns.append([MISSING if value is None else number[value] for value in values])
        ids = torch.tensor(columns, dtype=torch.int64).reshape(len(columns), len(items))
        return cls(tuple(attributes), ids.T.contiguous())

    @property
    def names(self) -> tuple[str, ...]:
        """K"""
        return tuple(attribute.name for attribute in self.attributes)

    def ids_of(self, rows: Tensor) -> Tensor:
        """Of items by row; -1 throughout for row -1, no item.   (…,) -> (…, K)"""
        ids = self.ids.to(rows.device)[rows.clamp(min=0)]
        return ids.masked_fill((rows < 0).unsqueeze(-1), MISSING)

    def same(self, rows: Tensor, target_rows: Tensor) -> Tensor:
        """Which attributes are known of both and the same.   (…,), (…,) -> (…, K) bool; the shapes may broadcast"""
        ids = self.ids_of(rows)
        return (ids == self.ids_of(target_rows)) & (ids >= 0)


def _attribute(spec: str, items: pl.DataFrame) -> Attribute:
    name, colon, classes = spec.rpartition(":")
    if spec in items.columns or not colon:  # a column may have a colon in its name
        attribute = Attribute(_name(spec), spec)
        if _column(items, spec).dtype.is_float():
            fix = f"attributes: ['{spec}:5'], five classes of it"
            raise UserError(f"the attribute {spec!r} holds numbers, of which hardly two are the same", fix=fix)
    else:
        if not classes.isdecimal() or int(classes) < 2:
            raise UserError(f"attributes: {spec!r} is no number of classes", fix=f"2 or more, such as {name}:5")
        attribute = Attribute(_name(name), name, _edges(_numbers(_column(items, name)), int(classes)))
    values = [value for value in attribute.values(items) if value is not None]
    if (differ := len(set(values))) in (0, 1, len(values)):
        word = "value" if attribute.edges is None else "number"
        problem = f"no item has a {word}", f"its {word} is the same for every item", f"no two items share a {word}"
        problem = problem[min(differ, 2)]
        raise UserError(f"the attribute {attribute.column!r}: {problem}", fix=f"name some of {_choice(items)}")
    return attribute


def _column(items: pl.DataFrame, name: str) -> pl.Series:
    if name not in items.columns:
        raise UserError(f"the items have no column {name!r}", fix=f"name some of {_choice(items)}")
    return items[name]


def _choice(items: pl.DataFrame) -> str:
    return ", ".join(name for name in items.columns if name not in NOT_SHARED) or "none: the items have titles alone"


def _name(column: str) -> str:
    return re.sub(r"[^\w-]+", "_", column)


def _text(value: object) -> str | None:
    """Without white space around it; of a list the last."""
    if isinstance(value, list):
        value = value[-1] if value else None
    return None if value is None else str(value).strip() or None


def _numbers(column: pl.Series) -> np.ndarray:
    """Of text the first number in it ("$1,299.00"); NaN where there is none. (N,) float64"""
    if isinstance(column.dtype, pl.List):
        column = column.list.last()
    if not column.dtype.is_numeric():
        text = column.cast(pl.String).str.replace_all(",", "")
        column = text.str.extract(r"(-?\d+(?:\.\d+)?)")
    numbers = column.cast(pl.Float64).to_numpy().astype(np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _edges(numbers: np.ndarray, classes: int) -> tuple[float, ...]:
    """Between classes of about as many items each: of the gaps between values those nearest to 1/n, 2/n, … of all.

    Where many items share a value there are fewer classes, and never an empty one.
    """
    values, counts = np.unique(numbers[~np.isnan(numbers)], return_counts=True)
    if len(values) < 2:
        return ()
    below, wanted = counts.cumsum()[:-1] * classes, np.arange(1, classes) * counts.sum()  # shares, times n times items
    gaps = np.unique(np.abs(below - wanted[:, None]).argmin(axis=1))  # whole numbers: of two as near the first
    return tuple(values[gaps + 1].tolist())
