"""What every reader shares: the columns of an event, the fields of an item, the checks, and what becomes of a bad line.

A reader turns one line into rows, or raises `BadLine` with the reason. `event_batches` and `item_records` do the rest:
they number the lines, hand a bad one to `BadLines`, and hold one batch in memory, whatever the file's size.
A line is taken whole or not at all. Blank lines are passed over.
"""

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import polars as pl

from recllm.errors import UserError
from recllm.files import read_lines
from recllm.formats.values import BadLine, Row, show

EVENT_COLUMNS = {
    "line": pl.UInt64,  # where in its file, from 1
    "user": pl.String,
    "item": pl.String,
    "behaviour": pl.String,  # never null
    "timestamp": pl.Float64,  # seconds
    "split": pl.String,  # train, valid or test where the data come divided
    "review": pl.String,
    "helpful": pl.Float64,  # how many found the review helpful
    "rating": pl.Float64,
}
BATCH = 100_000  # rows


@dataclasses.dataclass
class BadLines:
    """What to do with lines that cannot be read: stop at the first, or skip, count and list the first `keep`."""

    policy: Literal["stop", "skip"] = "stop"
    keep: int = 1000
    count: int = 0
    listed: list[dict] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.policy not in ("stop", "skip"):
            raise UserError(f"on_bad_line: {self.policy!r} is neither stop nor skip", fix="--on_bad_line stop")

    def add(self, file: str | Path, line: int, reason: str) -> None:
        if self.policy == "stop":
            fix = "correct the line, or leave out and count all such lines with --on_bad_line skip"
            raise UserError(reason, file=file, line=line, fix=fix)
        self.count += 1
        if len(self.listed) < self.keep:
            self.listed.append({"file": Path(file).name, "line": line, "reason": reason})


class Reader:
    """One format. `events` and `items` are streams: what is wrong with a file is raised when it is reached."""

    name: str  # the value of --format
    describe: str

    def files(self, path: str | Path) -> list[Path]:
        """The files that are read for `path`: itself, unless the format has several that belong together."""
        return [Path(path)]

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        raise NotImplementedError

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        raise NotImplementedError


# -- streams ----------------------------------------------------------------------------------------------------------


def text_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a plain or gzip file, without blank lines and byte-order mark."""
    for number, line in read_lines(path):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line and not line.isspace():
            yield number, line


def event_batches(
    path: str | Path, lines: Iterable[tuple[int, Any]], parse: Callable[[Any], Sequence[Row]], bad: BadLines
) -> Iterator[pl.DataFrame]:
    """Data frames of at most BATCH rows, columns as EVENT_COLUMNS. `lines` is `text_lines(path)`, or numbered entries.

    A file that gives no event at all is refused, also under "skip".
    """
    columns: list[list] = [[] for _ in EVENT_COLUMNS]
    before, empty = bad.count, True
    for numbers, rows in _parsed(path, lines, parse, bad):
        empty = False
        for column, values in zip(columns, (numbers, *zip(*rows))):
            column.extend(values)
        while len(columns[0]) >= BATCH:
            yield _frame([column[:BATCH] for column in columns])
            for column in columns:
                del column[:BATCH]
    if empty:
        raise nothing_in(path, "interactions", bad, before)
    if columns[0]:
        yield _frame(columns)


def _parsed(
    path: str | Path, lines: Iterable[tuple[int, Any]], parse: Callable[[Any], Sequence[Row]], bad: BadLines
) -> Iterator[tuple[list[int], list[Row]]]:
    """(line of each row, rows), a few hundred at a time: turned into columns while the processor still holds them."""
    numbers, rows = [], []
    for number, line in lines:
        try:
            new = parse(line)
        except BadLine as reason:
            bad.add(path, number, str(reason))
            continue
        rows.extend(new)
        numbers.extend([number] * len(new))
        if len(rows) >= 500:
            yield numbers, rows
            numbers, rows = [], []
    if rows:
        yield numbers, rows


def item_records(
    path: str | Path, lines: Iterable[tuple[int, Any]], parse: Callable[[Any], dict], bad: BadLines
) -> Iterator[dict]:
    """The items of a file; an id that was there before is a bad line that names both lines."""
    seen, before, empty = SeenIds(), bad.count, True
    for number, line in lines:
        try:
            record = parse(line)
            if first := seen.add(record["item"], number):
                raise BadLine(f"item {show(record['item'])} was already on line {first}")
        except BadLine as reason:
            bad.add(path, number, str(reason))
            continue
        yield record
        empty = False
    if empty:
        raise nothing_in(path, "items", bad, before)


def nothing_in(path: str | Path, what: str, bad: BadLines, before: int) -> UserError:
    """The error for a file of which nothing could be used; `before` is bad.count when the file was opened."""
    if bad.count == before:
        return UserError(f"the file holds no {what}", file=path, fix="check the path and --format")
    reason = f"; the first: {bad.listed[before]['reason']}" if before < len(bad.listed) else ""
    return UserError(
        f"none of its {bad.count - before} lines could be read{reason}", file=path, fix="check the path and --format"
    )


def _frame(columns: list[list]) -> pl.DataFrame:
    return pl.DataFrame(
        [pl.Series(name, values, dtype) for (name, dtype), values in zip(EVENT_COLUMNS.items(), columns)]
    )


class SeenIds:
    """id → the line it was first on, in about 30 bytes an id whatever its length.

    An open-addressing table of 64-bit hashes in two flat arrays. Two different ids of a million share a hash with
    probability 3e-8.
    """

    def __init__(self):
        self._hashes, self._lines, self._count = array("Q", bytes(8 * 1024)), array("Q", bytes(8 * 1024)), 0

    def add(self, name: str, line: int) -> int:
        """The line of `name` if it was there already, otherwise 0, and `line` is remembered."""
        key = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") or 1  # 0 marks a free slot
        slot = self._slot(key)
        if self._hashes[slot]:
            return self._lines[slot]
        self._hashes[slot], self._lines[slot] = key, line
        self._count += 1
        if 3 * self._count > 2 * len(self._hashes):
            self._grow()
        return 0

    def _slot(self, key: int) -> int:
        mask = len(self._hashes) - 1  # the size is a power of two
        slot = key & mask
        while self._hashes[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        hashes, lines = self._hashes, self._lines
        self._hashes, self._lines = array("Q", bytes(16 * len(hashes))), array("Q", bytes(16 * len(hashes)))
        for key, line in zip(hashes, lines):
            if key:
                slot = self._slot(key)
                self._hashes[slot], self._lines[slot] = key, line
