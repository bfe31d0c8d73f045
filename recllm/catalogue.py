"""The prepared data set: which items there are, who did what in which order, and which events may be learnt from.

Four files, written by `recllm.preparation`, read by every later stage:

    items.parquet         item, title, description, brand, categories, reviews, and the data's own columns
    interactions.parquet  user, item, behaviour, timestamp, position   (position: 0, 1, … in the user's own order)
    splits.parquet        user, position, split                        (one row an event: train, valid, test or none)
    catalogue.json        counts, settings, sources with SHA-256, what was dropped and why, fingerprints

An event's history is every earlier event of its user, whatever their split: at test time the past is known.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa

from recllm.errors import UserError
from recllm.files import digest_all, read_object, require, sha256_file

Split = Literal["train", "valid", "test"]  # an event may also have `none`: no history, so neither learnt nor a target

ITEM_COLUMNS = {  # in this order; further columns are the data's own, text or lists of text
    "item": pl.String,
    "title": pl.String,
    "description": pl.String,
    "brand": pl.String,
    "categories": pl.List(pl.String),
    "reviews": pl.List(pl.String),
}
INTERACTION_COLUMNS = {
    "user": pl.String,
    "item": pl.String,
    "behaviour": pl.String,
    "timestamp": pl.Float64,
    "position": pl.UInt32,
}
SPLIT_COLUMNS = {"user": pl.String, "position": pl.UInt32, "split": pl.String}
PREPARE = "run data_prep/prepare.py"
AGAIN = "run data_prep/prepare.py again, with --overwrite"


def fingerprint_items(items: list[str]) -> str:
    """Which items, in which order: what embeddings, semantic IDs and models must agree on."""
    return digest_all(items)


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """A prepared folder. `load` refuses one that is incomplete or whose files do not belong together."""

    folder: Path
    items: pl.DataFrame
    report: dict

    @classmethod
    def load(cls, folder: str | Path) -> "Catalogue":
        folder = require(folder, "the prepared data set", PREPARE)
        for name in ("catalogue.json", "items.parquet", "interactions.parquet", "splits.parquet"):
            require(folder / name, "a part of the prepared data set", PREPARE)
        report = read_object(folder / "catalogue.json")
        if not isinstance(report.get("files", {}), dict):
            raise UserError("is damaged", file=folder / "catalogue.json", fix=AGAIN)
        for name, sha256 in report.get("files", {}).items():
            if sha256_file(folder / name) != sha256:
                raise UserError("the file is not of the same run as catalogue.json", file=folder / name, fix=AGAIN)
        items = read_table(folder / "items.parquet", ITEM_COLUMNS)
        if fingerprint_items(items["item"].to_list()) != report.get("items_fingerprint"):
            raise UserError("items.parquet and catalogue.json are not of one run", file=folder, fix=AGAIN)
        return cls(folder, items, report)

    @property
    def name(self) -> str:
        return self.report["name"]

    @property
    def fingerprint(self) -> str:
        """Of everything: items, their text, the events and the split."""
        return self.report["fingerprint"]

    @property
    def items_fingerprint(self) -> str:
        return self.report["items_fingerprint"]

    @functools.cached_property
    def item_ids(self) -> list[str]:
        return self.items["item"].to_list()

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        """item → its row in items.parquet, in embeddings and in every (N, …) tensor."""
        return {item: row for row, item in enumerate(self.item_ids)}

    @property
    def behaviours(self) -> list[str]:
        """Every behaviour, the most frequent first."""
        return list(self.report["behaviours"])

    @functools.cached_property
    def interactions(self) -> pl.DataFrame:
        """Events in order (user, then position), with their `split`."""
        events = read_table(self.folder / "interactions.parquet", INTERACTION_COLUMNS)
        split = read_table(self.folder / "splits.parquet", SPLIT_COLUMNS)
        if len(events) != len(split):
            raise UserError("interactions and splits differ in length", file=self.folder, fix=AGAIN)
        return events.with_columns(split["split"])  # the two files are written row by row together

    def training_sequences(self) -> pl.DataFrame:
        """user, items, behaviours: what a model may learn from. No event of valid or test is among them."""
        return (
            self.interactions.filter(pl.col("split") == "train")
            .group_by("user", maintain_order=True)
            .agg(items="item", behaviours="behaviour")
        )

    def targets(self, split: Split, max_history: int | None = None) -> pl.DataFrame:
        """user, position, item, behaviour, history, history_behaviours: one row for each target of `split`.

        The history is what came before the target, oldest first, cut to the last `max_history`; without it, to what
        was set when the data was prepared (--max_history), so that every model sees as much of the past.
        """
        longest = max_history or self.report.get("max_history") or 2**31
        events = self.interactions.with_columns(row=pl.int_range(pl.len()))
        wanted = events.filter(pl.col("split") == split)
        length = pl.min_horizontal("position", pl.lit(longest, pl.UInt32)).cast(pl.Int64)
        # The events of a user are consecutive rows: a history is the `length` rows before the target's.
        spans = wanted.with_columns(past=pl.int_ranges(pl.col("row") - length, pl.col("row")))
        return spans.select(
            "user",
            "position",
            "item",
            "behaviour",
            history=_gather(spans["past"], events["item"]),
            history_behaviours=_gather(spans["past"], events["behaviour"]),
        )


def _gather(rows: pl.Series, values: pl.Series) -> pl.Series:
    """Lists of row numbers → lists of the values there."""
    offsets = np.concatenate([[0], rows.list.len().to_numpy().cumsum()])
    flat = values.gather(rows.explode(empty_as_null=False).cast(pl.UInt32))
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat.to_arrow())))


def read_table(path: Path, columns: dict[str, pl.DataType]) -> pl.DataFrame:
    """A parquet file of ours; a missing column or a damaged file is one sentence."""
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError):
        raise UserError("not a readable parquet file", file=path, fix="make it again") from None
    if missing := [name for name in columns if name not in table.columns]:
        raise UserError(f"column {missing[0]!r} is missing", file=path, fix="make it again")
    return table
