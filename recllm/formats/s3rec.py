"""S3-Rec's text files: a user a line, `user item item …`, oldest first.

Items, where there are any, come from `*_item2attributes.json`: {item: [attribute number, …]}, read whole.
"""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from recllm.formats.records import BadLines, Reader, event_batches, item_records, text_lines
from recllm.formats.values import (
    BadLine,
    Row,
    decode_text,
    entries,
    item_record,
    sequence_rows,
    show,
)


def user_rows(line: bytes) -> list[Row]:
    user, *items = decode_text(line).split()
    return sequence_rows(user, items)


def attributes(entry: tuple) -> dict:
    item, numbers = entry
    if not isinstance(numbers, list):
        raise BadLine(f"the attributes of item {show(item)} are not a list")
    return item_record(item, attributes=numbers)


class S3Rec(Reader):
    name = "s3rec"
    describe = "S3-Rec: `user item item …` a line; items from *_item2attributes.json"

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        return event_batches(path, text_lines(path), user_rows, bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        return item_records(path, entries(path), attributes, bad)
