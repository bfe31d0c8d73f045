"""MiniOneRec's CSV files (and ReRe's and D3's): each row is a target item with the window of items before it.

    user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid
    A22,"['Gorilla Glue']",Grizzly G9849,[117],118,['<a_165><b_107><c_44>'],<a_104><b_118><c_176>

Three files, train, valid and test, hold every (window, target) pair of a user once, so that the user's sequence can be
put together again by laying the windows over one another:
  1. A user's rows are taken in the order train, valid, test, and in each file from top to bottom.
     Those with shorter windows come first: windows grow with the sequence until they have their full length.
  2. The next row is the first whose window is the whole sequence so far, or has full length and is its end; its target
     is appended. (Rows of one timestamp may stand in the files in another order than in the user's sequence.)
  3. Where there is none (the user's first row; or rows are missing), the first row left over is laid on with the
     longest overlap; the events of its window that are new are appended before its target.
  4. A target's split is its file's; an event that is no row's target (the first of a user) counts as "train".
  5. A row that does not follow, and whose window and target stand in the sequence already, is a bad line: it is there
     twice.
Timestamps and ratings are used where both the window's (history_timestamp, history_rating) and the target's are there.
Rows are held in memory, about a kilobyte each.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars as pl

from recllm.errors import UserError
from recllm.formats.lcrec import metadata
from recllm.formats.records import BadLines, Reader, event_batches, item_records, text_lines
from recllm.formats.values import (
    BEHAVIOUR,
    SPLITS,
    BadLine,
    entries,
    identity,
    listed,
    number,
    python_literal,
    show,
)

SPELLINGS = {"train": ("train",), "valid": ("valid", "val", "validation", "eval", "dev"), "test": ("test",)}


class Event(NamedTuple):
    item: str
    timestamp: float | None
    rating: float | None


@dataclass(frozen=True)
class Window:
    """One row: the events before the target, and the target."""

    file: Path
    line: int
    split: str
    history: list[Event]
    target: Event


class MiniOneRec(Reader):
    name = "minionerec"
    describe = "MiniOneRec, ReRe, D3: train, valid and test CSV of (window, target) rows; items from *.item.json"

    def files(self, path: str | Path) -> list[Path]:
        if Path(path).name.endswith(".json"):
            return [Path(path)]
        return list(split_files(path).values())

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        users: dict[str, list[Window]] = {}
        for split, file in split_files(path).items():
            for user, window in windows(file, split, bad):
                users.setdefault(user, []).append(window)

        longest = max((len(row.history) for own in users.values() for row in own), default=0)

        def rows():
            for user, own in users.items():
                for line, split, event in put_together(own, longest, bad):
                    yield line, [(user, event.item, BEHAVIOUR, event.timestamp, split, None, None, event.rating)]

        yield from event_batches(path, rows(), lambda row: row, bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        yield from item_records(path := item_file(path), entries(path), metadata, bad)


# -- files ------------------------------------------------------------------------------------------------------------


def split_files(path: str | Path) -> dict[str, Path]:
    """split → file, of a folder that holds the three, or of one of them. At least one is there."""
    path = Path(path)
    if path.is_dir():
        found = [file for split in SPLITS for file in _csv_files(path) if _split_of(file) == split]
        by_split = {split: [file for file in found if _split_of(file) == split] for split in SPLITS}
        if several := next((files for files in by_split.values() if len(files) > 1), None):
            names = listed(str(file.relative_to(path)) for file in several)
            raise UserError(f"more than one data set: {names}", file=path, fix="give the path of one of the files")
        files = {split: files[0] for split, files in by_split.items() if files}
        if not files:
            raise UserError("no train, valid or test CSV is in the folder", file=path, fix="check the path")
        return files
    if not path.exists():
        raise UserError("the file does not exist", file=path, fix="check the path")
    if (own := _split_of(path)) is None:
        raise UserError(
            "neither the name nor the folder says train, valid or test", file=path, fix="rename it, e.g. to train.csv"
        )
    return {split: file for split in SPLITS if (file := path if split == own else _sibling(path, own, split))}


def item_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted([*path.glob("*.item.json"), *path.glob("*/*.item.json")])
    if len(found) != 1:
        raise UserError(f"{len(found)} files *.item.json are in the folder", file=path, fix="give the path of one")
    return found[0]


def _csv_files(folder: Path) -> list[Path]:
    return sorted(file for pattern in ("*.csv", "*/*.csv", "*.csv.gz", "*/*.csv.gz") for file in folder.glob(pattern))


def _split_of(file: Path) -> str | None:
    """From the name's parts (Office.train.csv, valid_x.csv), or else the folder's name."""
    for words in (re.split(r"[._-]", file.name.lower()), [file.parent.name.lower()]):
        for split, spellings in SPELLINGS.items():
            if set(words) & set(spellings):
                return split
    return None


def _sibling(file: Path, own: str, other: str) -> Path | None:
    """The same data set's file of another split: one word of the name, or of the folder's name, exchanged."""
    for spelling in SPELLINGS[own]:
        word = re.compile(rf"(?<![a-z]){spelling}(?![a-z])", re.IGNORECASE)
        for new in SPELLINGS[other]:
            for candidate in (file.with_name(word.sub(new, file.name)), file.parent.parent / new / file.name):
                if candidate != file and candidate.is_file():
                    return candidate
    return None


# -- rows -------------------------------------------------------------------------------------------------------------


def windows(file: Path, split: str, bad: BadLines) -> Iterator[tuple[str, Window]]:
    """(user, window) of each row that can be read."""
    table = _csv_rows(file)
    _, header = next(table, (0, []))
    header = [] if isinstance(header, csv.Error) else header
    for name in ("user_id", "history_item_id", "item_id"):
        if name not in header:
            raise UserError(
                f"no {name} column; the header has {listed(header)}",
                file=file,
                line=1,
                fix="check the path and --format",
            )
    for line, cells in table:
        try:
            if isinstance(cells, csv.Error):
                raise BadLine(f"not a CSV row: {cells}")
            yield _row_window(file, line, split, header, cells)
        except BadLine as reason:
            bad.add(file, line, str(reason))


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(line on which the row begins, its cells). A quoted cell may hold line ends."""
    # Bytes that are not UTF-8 pass as lone surrogates, so that the row they stand in can be named; see `_row_window`.
    lines = (line.decode("utf-8", "surrogateescape") + "\n" for _, line in text_lines(file))
    reader = csv.reader(lines, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, error
            continue
        if cells:
            yield first, cells


def _row_window(file: Path, line: int, split: str, header: list[str], cells: list[str]) -> tuple[str, Window]:
    if len(cells) != len(header):
        raise BadLine(f"has {len(cells)} fields, the header {len(header)}")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise BadLine("not UTF-8 text") from None
    row = dict(zip(header, cells))
    items = _list(row, "history_item_id")
    events = [items, *(_list(row, f"history_{name}", len(items), name) for name in ("timestamp", "rating"))]
    target = [row[name] if f"history_{name}" in row and name in row else None for name in ("timestamp", "rating")]
    history = [_event(*event) for event in zip(*events)]
    return identity(row["user_id"], "user"), Window(file, line, split, history, _event(row["item_id"], *target))


def _list(row: dict[str, str], column: str, length: int | None = None, beside: str | None = None) -> list:
    """A list written by Python. A column that is absent, or whose `beside` is, gives `length` times None."""
    if length is not None and not (column in row and beside in row):
        return [None] * length
    try:
        values = msgspec.json.decode(row[column])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        values = python_literal(row[column])
    if not isinstance(values, list):
        raise BadLine(f"{column} is not a list: {show(row[column])}")
    if length is not None and len(values) != length:
        raise BadLine(f"history_item_id has {length} entries and {column} has {len(values)}")
    return values


def _event(item: Any, timestamp: Any, rating: Any) -> Event:
    return Event(identity(item, "item"), number(timestamp, "timestamp"), number(rating, "rating"))


# -- sequences --------------------------------------------------------------------------------------------------------


def put_together(rows: list[Window], longest: int, bad: BadLines) -> list[tuple[int, str, Event]]:
    """(line, split, event) of one user, oldest first. `longest`: of all users' windows, in events."""
    rows = sorted(rows, key=lambda row: len(row.history))  # stable: of equal length they stay in the files' order
    sequence: list[Event] = []
    labels: list[tuple[int, str]] = []
    while rows:
        place = next((place for place, row in enumerate(rows) if _follows(row.history, sequence, longest)), 0)
        row = rows.pop(place)
        if not _follows(row.history, sequence, longest):
            if _contains(sequence, [*row.history, row.target]):
                bad.add(row.file, row.line, "the row's items and its target are there twice")
                continue
            new = row.history[_overlap(sequence, row.history) :]
            sequence += new
            labels += [(row.line, "train")] * len(new)
        sequence.append(row.target)
        labels.append((row.line, row.split))
    return [(*label, event) for label, event in zip(labels, sequence)]


def _follows(history: list[Event], sequence: list[Event], longest: int) -> bool:
    """Whether the window reaches to the end of the sequence, and back to its start or as far as windows reach."""
    return history == sequence or (0 < len(history) == longest and history == sequence[-longest:])


def _overlap(sequence: list[Event], history: list[Event]) -> int:
    """How many of the window's first events are the sequence's last."""
    lengths = range(min(len(sequence), len(history)), 0, -1)
    return next((length for length in lengths if sequence[-length:] == history[:length]), 0)


def _contains(sequence: list[Event], part: list[Event]) -> bool:
    return any(sequence[start : start + len(part)] == part for start in range(len(sequence) - len(part) + 1))
