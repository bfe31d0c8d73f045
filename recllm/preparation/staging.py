"""Raw files → parquet parts in file order → integer codes in buckets of whole users.

Strings live on disk; memory holds one batch, the tables of distinct ids, and later one bucket. Codes follow the order
of ids (shorter first, then alphabetical, so "9" < "10"), which makes every later result independent of chunking.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recllm.errors import UserError
from recllm.formats.records import EVENT_COLUMNS
from recllm.preparation.config import PrepareConfig

PART_EVENTS = 500_000
EVENT = np.dtype(
    [("user", "u4"), ("item", "u4"), ("behaviour", "u1"), ("split", "u1"), ("time", "f8"), ("order", "u8")]
)
SPLITS = ("train", "valid", "test", "none")  # the code of a split is its place here; none: neither learnt nor a target
CODED = ["order", "user", "item", "behaviour", "timestamp", "split"]
NO_SPLIT = 255  # the files do not say


@dataclass(frozen=True)
class Staged:
    """Events in file order, on disk, with the tables that turn their codes back into ids."""

    parts: list[Path]
    events: int
    users: pl.Series  # code → id
    items: pl.Series
    behaviours: list[str]
    timed: bool  # every event has a timestamp, or none has


def stage_events(batches: Iterable[pl.DataFrame], folder: Path, config: PrepareConfig) -> Staged:
    """Write the batches as parquet parts of one size, with behaviours renamed and filtered; find the distinct ids."""
    parts, seen, timed, behaviours = [], 0, 0, {}
    for batch in _regrouped(_selected(batches, config, behaviours), PART_EVENTS):
        parts.append(folder / f"part-{len(parts):05d}.parquet")
        batch = batch.with_row_index("order", offset=seen)
        batch.write_parquet(parts[-1], compression="lz4", statistics=False)
        seen += len(batch)
        timed += len(batch) - batch["timestamp"].null_count()
    _check_behaviours(config, behaviours)
    if not seen:
        raise UserError("no event was read", file=config.interactions[0], fix="check --format")
    if timed not in (0, seen):
        raise UserError(
            f"{seen - timed:,} of {seen:,} events have no timestamp, the others have one",
            file=config.interactions[0],
            fix="give every event a timestamp, or none and keep the file in order of time",
        )
    kept = sorted(name for name, count in behaviours.items() if count > 0)
    if len(kept) > 255:
        raise UserError(f"{len(kept)} different behaviours, e.g. {kept[:3]}", fix="check the behaviour column")
    return Staged(parts, seen, _distinct(parts, "user"), _distinct(parts, "item"), kept, timed > 0)


def _selected(batches: Iterable[pl.DataFrame], config: PrepareConfig, counts: dict[str, int]) -> Iterator[pl.DataFrame]:
    """Rename and filter behaviours; `counts` receives events by behaviour, negative for those left out."""
    for batch in batches:
        for name in config.renamed.keys() & set(batch["behaviour"].unique()):
            counts.setdefault(name, 0)  # it was there, under its old name
        batch = batch.select("file", *EVENT_COLUMNS).with_columns(pl.col("behaviour").replace(config.renamed))
        for name, count in batch["behaviour"].value_counts().iter_rows():
            sign = -1 if config.behaviours and name not in config.behaviours else 1
            counts[name] = counts.get(name, 0) + sign * count
        yield batch.filter(pl.col("behaviour").is_in(config.behaviours)) if config.behaviours else batch


def _check_behaviours(config: PrepareConfig, counts: dict[str, int]) -> None:
    """A name in the settings that the data does not have is a slip of the pen, and would lose events unseen."""
    for name in (*config.renamed, *config.behaviours):
        if counts and name not in counts:
            raise UserError(
                f"no event has the behaviour {name!r}; the data has {', '.join(sorted(counts))}",
                file=config.interactions[0],
                fix="correct --behaviours and --rename",
            )


def _regrouped(batches: Iterable[pl.DataFrame], rows: int) -> Iterator[pl.DataFrame]:
    """The same rows in frames of `rows`, the last one smaller."""
    held, count = [], 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        if count >= rows:
            whole = pl.concat(held)
            for start in range(0, count - rows + 1, rows):
                yield whole.slice(start, rows)
            held = [whole.slice(count - count % rows)]
            count %= rows
    if count:
        yield pl.concat(held)


def _distinct(parts: list[Path], column: str) -> pl.Series:
    ids = pl.scan_parquet(parts).select(pl.col(column).unique()).collect(engine="streaming")[column]
    return sorted_ids(ids)


def sorted_ids(ids: pl.Series) -> pl.Series:
    """Shorter ids first, then by code point: numbers in order of size, and one order everywhere."""
    frame = ids.to_frame("id")
    return frame.sort(pl.col("id").str.len_bytes(), "id")["id"]


def bucket_users(staged: Staged, folder: Path, bucket_events: int) -> list[Path]:
    """Codes into files of about `bucket_events` events, each holding whole users, in the order of user codes.

    A user with more events than that still goes into one bucket. Within a bucket events keep the order of the file.
    """
    coded, per_user = folder / "coded.bin", np.zeros(len(staged.users), np.int64)
    with open(coded, "wb") as stream:
        for events in _coded(staged):
            per_user += np.bincount(events["user"], minlength=len(per_user))
            events.tofile(stream)
    bucket_of = (np.cumsum(per_user) - per_user) // bucket_events  # user code → bucket, never decreasing
    used, bucket_of = np.unique(bucket_of, return_inverse=True)
    paths = [folder / f"bucket-{number:05d}.bin" for number in range(len(used))]
    with open(coded, "rb") as stream:
        while len(events := np.fromfile(stream, EVENT, count=PART_EVENTS)):
            owner = bucket_of[events["user"]]
            for number in np.unique(owner):
                with open(paths[number], "ab") as bucket:
                    events[owner == number].tofile(bucket)
    coded.unlink()
    return paths


def _coded(staged: Staged) -> Iterator[np.ndarray]:
    """Events in file order with codes for ids. Looking ids up costs a pass over the tables of ids, so parts are taken
    together until they have about as many events as there are ids: memory and time stay in proportion."""
    users = staged.users.to_frame("user").with_row_index("user_code")
    items = staged.items.to_frame("item").with_row_index("item_code")
    behaviours = {name: code for code, name in enumerate(staged.behaviours)}
    together = 1 + len(staged.users) // PART_EVENTS
    for start in range(0, len(staged.parts), together):
        part = pl.read_parquet(staged.parts[start : start + together], columns=CODED)
        part = part.join(users, on="user", how="left", maintain_order="left")
        part = part.join(items, on="item", how="left", maintain_order="left")
        events = np.empty(len(part), EVENT)
        events["user"], events["item"] = part["user_code"].to_numpy(), part["item_code"].to_numpy()
        events["behaviour"] = part["behaviour"].replace_strict(behaviours, return_dtype=pl.UInt8).to_numpy()
        events["split"] = (
            part["split"].replace_strict(SPLITS[:3], range(3), default=NO_SPLIT, return_dtype=pl.UInt8).to_numpy()
        )
        events["time"] = part["timestamp"].fill_null(0.0).to_numpy()
        events["order"] = part["order"].to_numpy()
        yield events


def read_bucket(path: Path) -> np.ndarray:
    return np.fromfile(path, EVENT)
