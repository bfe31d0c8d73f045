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
from recllm.files import digest, digest_all, read_object, require, sha256_file

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
RL_SHORTEST = 3  # training events: without the last, one is left to learn from and one before it
PREPARE = "run data_prep/prepare.py"
AGAIN = "run data_prep/prepare.py again, with --overwrite"


def fingerprint_items(items: list[str]) -> str:
    """Which items, in which order: what embeddings, semantic IDs and models must agree on."""
    return digest_all(items)


def rl_draw(user: str) -> float:
    """A number in [0, 1) of the user's id and nothing else; below a share, the user is of that share."""
    return int(digest("recllm rl_share", user)[:13], 16) / 16**13


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

    def training_sequences(self, rl_share: float = 0.0) -> pl.DataFrame:
        """user, items, behaviours: what a model may learn from. No event of valid or test is among them, and none of
        `rl_targets(rl_share)`."""
        events = self.interactions.filter(pl.col("split") == "train")
        events = events.filter(~kept_for_rl(events, rl_share)) if rl_share else events
        return events.group_by("user", maintain_order=True).agg(items="item", behaviours="behaviour")

    def rl_targets(self, rl_share: float | None, max_history: int | None = None) -> pl.DataFrame:
        """What `training_sequences(rl_share)` leaves to reinforcement learning, in the columns of `targets`: the last
        training event of a share of the users. None: every training event that has another before it.

        Users are chosen by their ids alone (`rl_draw`): whatever the seed and the mixture the same ones, and those of
        a share among those of a larger one. A user with fewer than RL_SHORTEST training events keeps theirs.
        """
        events = self.interactions.filter(pl.col("split") == "train")
        past = events.select(pl.int_range(pl.len()).over("user")).to_series()  # training events of the user before it
        wanted = past > 0 if rl_share is None else kept_for_rl(events, rl_share)
        return self.with_histories(events, wanted, past, max_history)

    def targets(self, split: Split, max_history: int | None = None) -> pl.DataFrame:
        """user, position, item, behaviour, history, history_behaviours: one row for each target of `split`.

        The history is what came before the target, oldest first, cut to the last `max_history`; without it, to what
        was set when the data was prepared (--max_history), so that every model sees as much of the past.
        """
        events = self.interactions
        return self.with_histories(events, events["split"] == split, events["position"], max_history)

    def with_histories(
        self, events: pl.DataFrame, wanted: pl.Series, past: pl.Series, max_history: int | None
    ) -> pl.DataFrame:
        """The wanted of these events, each with what came before it. `past`: how many events of its user that are."""
        longest = max_history or self.report.get("max_history") or 2**31
        length = past.cast(pl.Int64).clip(upper_bound=longest)
        # The events of a user are consecutive rows: a history is the `length` rows before the target's.
        spans = events.with_columns(row=pl.int_range(pl.len()), length=length).filter(wanted)
        spans = spans.with_columns(past=pl.int_ranges(pl.col("row") - pl.col("length"), pl.col("row")))
        return spans.select(
            "user",
            "position",
            "item",
            "behaviour",
            history=_gather(spans["past"], events["item"]),
            history_behaviours=_gather(spans["past"], events["behaviour"]),
        )


def kept_for_rl(events: pl.DataFrame, rl_share: float) -> pl.Series:
    """Of each training event, in order: is it a target of reinforcement learning, that nothing else may show?"""
    ends = events.select("user").with_row_index("row").group_by("user").agg(last=pl.max("row"), count=pl.len())
    ends = ends.filter(pl.col("count") >= RL_SHORTEST)
    chosen = ends["user"].map_elements(rl_draw, return_dtype=pl.Float64) < rl_share
    kept = np.zeros(len(events), bool)
    kept[ends["last"].filter(chosen).to_numpy()] = True
    return pl.Series(kept)


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
