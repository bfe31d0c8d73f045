"""Coded events → the three parquet files, in one pass over the buckets; the fingerprint is made of the same pass."""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recllm.catalogue import INTERACTION_COLUMNS, SPLIT_COLUMNS
from recllm.files import digest
from recllm.preparation.splitting import TRAIN, positions
from recllm.preparation.staging import SPLITS, Staged, read_bucket

HASHED_AT_ONCE = 100_000  # rows: strings become Python objects for a moment
ARROW = {pl.String: pa.string(), pl.Float64: pa.float64(), pl.UInt32: pa.uint32()}


@dataclass
class Written:
    """What the pass over the events counted."""

    users: int = 0
    events: int = 0
    behaviours: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    shortest: int = 2**31
    fingerprint: str = ""
    trains: np.ndarray | None = None  # order in the file → may the event be learnt from?


def write_events(
    folder: Path, staged: Staged, buckets: list[Path], label: Callable[[np.ndarray], np.ndarray]
) -> Written:
    """interactions.parquet and splits.parquet, row by row together; `label` gives each event's split."""
    written = Written(trains=np.zeros(staged.events, bool))
    hashes = {name: hashlib.sha256() for name in ("user", "item", "behaviour", "timestamp", "split")}
    with ExitStack() as stack:
        interactions = _writer(stack, folder / "interactions.parquet", INTERACTION_COLUMNS)
        splits = _writer(stack, folder / "splits.parquet", SPLIT_COLUMNS)
        for path in buckets:
            events = read_bucket(path)
            if not len(events):
                continue
            split = label(events)
            place = positions(events)
            frame = pl.DataFrame(
                {
                    "user": staged.users.gather(events["user"]),
                    "item": staged.items.gather(events["item"]),
                    "behaviour": pl.Series(staged.behaviours).gather(events["behaviour"]),
                    "timestamp": pl.Series(events["time"]) if staged.timed else pl.Series([None] * len(events)),
                    "position": pl.Series(place),
                },
                schema=INTERACTION_COLUMNS,
            ).with_columns(split=pl.Series(np.array(SPLITS)[split]))
            interactions.write_table(frame.select(INTERACTION_COLUMNS.keys()).to_arrow().cast(interactions.schema))
            splits.write_table(frame.select(SPLIT_COLUMNS.keys()).to_arrow().cast(splits.schema))
            _count(written, events, split, place, staged)
            written.trains[events["order"][split == TRAIN]] = True
            for name, state in hashes.items():
                _hash_column(state, frame[name])
    written.fingerprint = digest(*(hashes[name].digest() for name in sorted(hashes)))
    return written


def _writer(stack: ExitStack, path: Path, columns: dict[str, pl.DataType]) -> pq.ParquetWriter:
    schema = pa.schema([(name, ARROW[kind]) for name, kind in columns.items()])
    return stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=True))


def _count(written: Written, events: np.ndarray, split: np.ndarray, place: np.ndarray, staged: Staged) -> None:
    written.events += len(events)
    lengths = place[np.r_[place[1:] == 0, True]] + 1  # a user's last position + 1
    written.users += len(lengths)
    written.longest = max(written.longest, int(lengths.max()))
    written.shortest = min(written.shortest, int(lengths.min()))
    for name, count in zip(SPLITS, np.bincount(split, minlength=len(SPLITS))):
        written.splits[name] = written.splits.get(name, 0) + int(count)
    for code in np.unique(events["behaviour"]):
        name = staged.behaviours[code]
        written.behaviours[name] = written.behaviours.get(name, 0) + int((events["behaviour"] == code).sum())


def _hash_column(state, column: pl.Series) -> None:
    """The values and nothing of how they were chunked, so that bucket sizes do not matter."""
    if column.dtype == pl.String:
        for part in column.to_frame().iter_slices(HASHED_AT_ONCE):
            state.update("\n".join(part.to_series().to_list()).encode() + b"\n")
    else:
        state.update(column.fill_null(float("nan")).to_numpy().astype("<f8").tobytes())
