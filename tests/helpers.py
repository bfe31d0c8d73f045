"""A prepared folder made by hand, so that a test of a later stage needs no preparation stage and reads what it sees."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import polars as pl

from recllm.catalogue import INTERACTION_COLUMNS, ITEM_COLUMNS, SPLIT_COLUMNS, Catalogue, fingerprint_items
from recllm.files import digest, write_json


def write_catalogue(
    folder: str | Path,
    items: Iterable[str | Mapping],
    sequences: Mapping[str, Sequence[str | tuple[str, str]]],
    split: str = "leave-one-out",
    name: str = "tiny",
) -> Catalogue:
    """Write the four files and load them.

    items      "i1" or {"item": "i1", "title": "…", "reviews": ["…"], "own_column": …}; what is absent is null
    sequences  {user: [item, …]} or {user: [(item, behaviour), …]}, oldest first; the timestamp is the position
    split      "leave-one-out": last → test, last but one → valid, for users with 3 events or more; "train": all
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"item": item} if isinstance(item, str) else dict(item) for item in items]
    own = sorted({key for row in rows for key in row} - set(ITEM_COLUMNS))
    columns = [pl.Series(key, [row.get(key) for row in rows], dtype) for key, dtype in ITEM_COLUMNS.items()]
    columns += [pl.Series(key, [row.get(key) for row in rows]) for key in own]
    table = pl.DataFrame(columns).with_columns(
        pl.col("title", "description", "brand").fill_null(""), pl.col("categories", "reviews").fill_null([])
    )
    events, splits = [], []
    for user, sequence in sequences.items():
        for position, event in enumerate(sequence):
            item, behaviour = (event, "buy") if isinstance(event, str) else event
            events.append((user, item, behaviour, float(position), position))
            left = len(sequence) - position if split == "leave-one-out" and len(sequence) >= 3 else 3
            splits.append((user, position, {1: "test", 2: "valid"}.get(left, "train")))
    interactions = pl.DataFrame(events, schema=INTERACTION_COLUMNS, orient="row")
    table.write_parquet(folder / "items.parquet")
    interactions.write_parquet(folder / "interactions.parquet")
    pl.DataFrame(splits, schema=SPLIT_COLUMNS, orient="row").write_parquet(folder / "splits.parquet")
    behaviours = interactions.group_by("behaviour").len().sort("len", "behaviour", descending=[True, False])
    write_json(
        folder / "catalogue.json",
        {
            "name": name,
            "behaviours": dict(behaviours.iter_rows()),
            "items_fingerprint": fingerprint_items(table["item"].to_list()),
            "fingerprint": digest(repr(rows), repr(events), repr(splits)),
        },
    )
    return Catalogue.load(folder)
