"""The items' side: staged while the files stream by, gathered for the items that survive, with their best reviews."""

import json
from itertools import chain, islice
from pathlib import Path

import numpy as np
import polars as pl

from recllm import formats
from recllm.catalogue import ITEM_COLUMNS
from recllm.errors import UserError
from recllm.formats.records import BadLines
from recllm.preparation.config import PrepareConfig
from recllm.preparation.staging import Staged
from recllm.text import best_reviews

PART_ITEMS = 50_000
CANDIDATES = 4  # reviews held for each one kept: text.best_reviews chooses among them
STAGED_COLUMNS = ITEM_COLUMNS | {"own": pl.String}


def stage_items(config: PrepareConfig, bad: BadLines, folder: Path) -> list[Path]:
    """Records as parquet parts; what is the data's own travels as JSON until it is known which columns there are."""
    reader = formats.by_name(config.format)
    records = chain.from_iterable(reader.items(Path(path), bad) for path in config.items)
    parts = []
    while batch := list(islice(records, PART_ITEMS)):
        rows = []
        for record in batch:
            own = {name: value for name, value in record.items() if name not in ITEM_COLUMNS}
            row = {name: record.get(name) for name in STAGED_COLUMNS if name != "own"}
            if isinstance(row["reviews"], str):
                row["reviews"] = [row["reviews"]]
            rows.append(row | {"own": json.dumps(own, ensure_ascii=False) if own else None})
        parts.append(folder / f"items-{len(parts):05d}.parquet")
        pl.DataFrame(rows, schema=STAGED_COLUMNS).write_parquet(parts[-1], compression="lz4")
    if len(config.items) > 1:  # within a file the reader has looked
        _refuse_twice(parts, config)
    return parts


def _refuse_twice(parts: list[Path], config: PrepareConfig) -> None:
    """An item of two item files: which text would be its own?"""
    count = pl.scan_parquet(parts).group_by("item").len().filter(pl.col("len") > 1)
    if len(twice := count.sort("item").collect(engine="streaming")):
        raise UserError(
            f"{len(twice):,} items stand in more than one of the item files, {twice['item'][0]!r} for one",
            file=config.items[0],
            fix="give each item in one file",
        )


def unknown_items(parts: list[Path], events_of: pl.DataFrame) -> pl.DataFrame:
    """The items (with their `events`) that the item files lack."""
    if not parts:
        return events_of.clear()
    known = pl.scan_parquet(parts).select("item")
    return events_of.lazy().join(known, on="item", how="anti", maintain_order="left").collect(engine="streaming")


def refuse_unknown(unknown: pl.DataFrame, staged: Staged, files: list[str]) -> None:
    """Name the first event of an item that the item files lack."""
    wanted = unknown["item"].implode()
    for part in staged.parts:
        rows = pl.read_parquet(part, columns=["item", "file", "line"]).filter(pl.col("item").is_in(wanted))
        if len(rows):
            item, file, line = rows.row(0)
            raise UserError(
                f"item {item!r} is not in the item files; {len(unknown):,} items with {unknown['events'].sum():,} "
                "events are not",
                file=files[file],
                line=line,
                fix="complete the item files, or --unknown_items drop, or --unknown_items keep",
            )


def gather_items(parts: list[Path], wanted: pl.Series, cold: bool) -> pl.DataFrame:
    """One row for each wanted item in the wanted order, without text where the files have none; then the cold ones."""
    table = wanted.to_frame("item")
    if not parts:
        empty = {name: kind for name, kind in STAGED_COLUMNS.items() if name != "item"}
        return table.with_columns(pl.lit(None, kind).alias(name) for name, kind in empty.items())
    staged = pl.scan_parquet(parts)
    found = staged.join(table.lazy(), on="item", how="semi").collect(engine="streaming")
    table = table.join(found, on="item", how="left", maintain_order="left")
    if cold:
        rest = staged.join(table.select("item").lazy(), on="item", how="anti").collect(engine="streaming")
        rest = rest.sort(pl.col("item").str.len_bytes(), "item")
        table = pl.concat([table, rest.select(table.columns)])
    return table


def with_own_columns(table: pl.DataFrame) -> pl.DataFrame:
    """`own` JSON → columns: text, or lists of text where any item has a list."""
    own = [json.loads(text) if text else {} for text in table["own"]]
    columns = []
    for name in sorted({name for record in own for name in record}):
        values = [record.get(name) for record in own]
        if any(isinstance(value, list) for value in values):
            values = [value if value is None or isinstance(value, list) else [value] for value in values]
            columns.append(pl.Series(name, values, dtype=pl.List(pl.String)))
        else:
            columns.append(pl.Series(name, values, dtype=pl.String))
    table = table.drop("own").with_columns(pl.col("categories").fill_null([]), *columns)
    return table.select(*ITEM_COLUMNS, pl.exclude(list(ITEM_COLUMNS)))


def with_reviews(table: pl.DataFrame, of_events: pl.Series) -> pl.DataFrame:
    """The reviews of the events; those of the item files where no event has one."""
    own = table["reviews"].fill_null([])
    return table.with_columns(pl.when(of_events.list.len() > 0).then(of_events).otherwise(own).alias("reviews"))


def gather_reviews(staged: Staged, trains: np.ndarray, wanted: pl.Series, keep: int) -> pl.Series:
    """item → its best reviews, best first, out of the events that `trains` (order → bool) marks.

    A review is written by the user whose next item is to be predicted: those of valid and test events are left out.
    """
    held = pl.DataFrame(schema={"item": pl.String, "review": pl.String, "helpful": pl.Float64, "order": pl.UInt32})
    enough = 0
    for part in staged.parts if keep else []:
        rows = pl.read_parquet(part, columns=held.columns).filter(pl.col("review").is_not_null())
        rows = rows.filter(pl.Series(trains[rows["order"].to_numpy()], dtype=pl.Boolean))
        held = pl.concat([held, rows.cast(held.schema)])
        if len(held) > 2 * enough:  # sorted again only when it has doubled
            held = _most_helpful(held, keep * CANDIDATES)
            enough = max(len(held), PART_ITEMS)
    held = _most_helpful(held, keep * CANDIDATES)
    per_item = held.group_by("item", maintain_order=True).agg("review", "helpful")
    chosen = pl.Series("reviews", dtype=pl.List(pl.String), values=[])
    for some in per_item.iter_slices(PART_ITEMS):  # texts are Python objects for a moment
        best = [best_reviews(texts, keep, helpful=votes) for _, texts, votes in some.iter_rows()]
        chosen.append(pl.Series("reviews", best, dtype=chosen.dtype))
    reviewed = per_item.select("item", chosen)
    joined = wanted.to_frame("item").join(reviewed, on="item", how="left", maintain_order="left")
    return joined["reviews"].fill_null([])


def _most_helpful(reviews: pl.DataFrame, keep: int) -> pl.DataFrame:
    """At most `keep` of each item, the most helpful first, the earlier of equals."""
    best_first = reviews.sort("item", pl.col("helpful").fill_null(0), "order", descending=[False, True, False])
    return best_first.group_by("item", maintain_order=True).head(keep)
