"""Our own format, as JSON lines or as parquet. An event a row, or a user a row with lists.

    {"user": "u1", "item": "i7", "behaviour": "click", "timestamp": 1700000000, "split": "train",
     "review": "…", "helpful": 3, "rating": 5}
    {"user": "u1", "items": ["i7", "i2"], "behaviours": ["click", "pay"], "timestamps": [1, 2], "splits": [...]}

Only user and item(s) are required. The first line decides which of the two a file is.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recllm.errors import UserError
from recllm.formats.records import BATCH, BadLines, Reader, event_batches, item_records, text_lines
from recllm.formats.values import (
    BadLine,
    Row,
    behaviour_name,
    identity,
    item_record,
    json_object,
    listed,
    number,
    sequence_rows,
    split_name,
    text,
)


def event_row(record: dict) -> list[Row]:
    """One event a line."""
    return [
        (
            identity(record.get("user"), "user"),
            identity(record.get("item"), "item"),
            behaviour_name(record.get("behaviour")),
            number(record.get("timestamp"), "timestamp"),
            split_name(record.get("split")),
            text(record.get("review")),
            number(record.get("helpful"), "helpful"),
            number(record.get("rating"), "rating"),
        )
    ]


def user_rows(record: dict) -> list[Row]:
    """One user a line. Both spellings of behaviours are read."""
    behaviours = record.get("behaviours", record.get("behaviors"))
    return sequence_rows(
        record.get("user"), record.get("items"), behaviours, record.get("timestamps"), record.get("splits")
    )


def shape_of(fields: list[str]) -> Callable[[dict], list[Row]]:
    """Which of the two a file is, by the fields of its first row."""
    if "user" in fields and "items" in fields:
        return user_rows
    if "user" in fields and "item" in fields:
        return event_row
    needed = '"user" and "item" (an event a row), or "user" and "items" (a user a row)'
    raise BadLine(f"needs {needed}; it has {listed(fields)}")


def item_fields(record: dict) -> dict:
    if "item" not in record:
        raise BadLine(f'needs "item"; it has {listed(record)}')
    return item_record(**record)


class Jsonl(Reader):
    name = "jsonl"
    describe = "our own: events.jsonl(.gz), an event or a user a line; items.jsonl(.gz), an item a line"

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        shape: Callable | None = None

        def parse(line: bytes) -> list[Row]:
            nonlocal shape
            record = json_object(line)
            shape = shape or shape_of(list(record))
            return shape(record)

        return event_batches(path, text_lines(path), parse, bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        return item_records(path, text_lines(path), lambda line: item_fields(json_object(line)), bad)


class Parquet(Reader):
    name = "parquet"
    describe = "our own columns in a parquet file; the line is the row, from 1"

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        def stream():
            columns = parquet_columns(path)
            try:
                shape = shape_of(columns)
            except BadLine as reason:
                raise UserError(str(reason), file=path, fix="rename the columns") from None
            wanted = ["user", "item", "items", "behaviour", "behaviours", "behaviors", "timestamp", "timestamps"]
            wanted += ["split", "splits", "review", "helpful", "rating"]
            rows = parquet_rows(path, [name for name in wanted if name in columns])
            yield from event_batches(path, rows, shape, bad)

        return stream()

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        def stream():
            columns = parquet_columns(path)
            if "item" not in columns:
                raise UserError(f'needs "item"; it has {listed(columns)}', file=path, fix="rename the columns")
            yield from item_records(path, parquet_rows(path, columns), item_fields, bad)

        return stream()


def parquet_columns(path: str | Path) -> list[str]:
    with _readable(path):
        return pq.read_schema(path).names


def parquet_rows(path: str | Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, the row) with one batch in memory; instants become seconds since 1970."""
    first = 1
    with _readable(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH // 10, columns=columns):
            values = [_plain(batch.column(name)) for name in columns]
            for offset, row in enumerate(zip(*values)):
                yield first + offset, dict(zip(columns, row))
            first += len(batch)


def _plain(column: pa.Array) -> list:
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return (pl.from_arrow(column).cast(pl.Datetime("us")).dt.epoch("us") / 1e6).to_list()
    return column.to_pylist()


class _readable:
    """pyarrow's ways to say that a file is missing or damaged → one sentence."""

    def __init__(self, path: str | Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, FileNotFoundError):
            raise UserError("the file does not exist", file=self.path, fix="check the path") from None
        if isinstance(error, pa.ArrowException | OSError | UnicodeDecodeError):
            raise UserError("not a readable parquet file", file=self.path, fix="check the path and --format") from None
