"""The checks that all formats share, defined once: ids, numbers, text, and the dialects of one record.

Each function takes what a file holds and gives what the library works with, or raises `BadLine` with the reason.
"""

import ast
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from recllm.errors import UserError
from recllm.files import read_lines

Row = tuple  # an event without its line: user, item, behaviour, timestamp, split, review, helpful, rating
BEHAVIOUR = "interaction"  # of data that name none
SPLITS = ("train", "valid", "test")


class BadLine(Exception):
    """One line cannot be taken; the message is the reason."""


def show(value: Any) -> str:
    """A value as it appears in a reason, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes; nesting without end
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"


def listed(names: Iterable[str]) -> str:
    """The fields or columns that were found, for a reason."""
    text = ", ".join(map(str, names)) or "none"
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text if len(text) <= 200 else text[:197] + "…"


def checked_text(value: str) -> str:
    """`value`, unless it cannot be written as UTF-8 (half a surrogate pair, from a JSON escape)."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadLine(f"{show(value)} is not valid Unicode text") from None
    return value


def identity(value: Any, what: str) -> str:
    """A user's or item's id as text: text that is not blank, or a whole number in decimal."""
    if type(value) is str:
        if not value or value.isspace():
            raise BadLine(f"{what} is empty")
        return checked_text(value)
    if value is None:
        raise BadLine(f"{what} is missing")
    if type(value) is int:
        try:
            return str(value)
        except ValueError:  # more than 4,300 digits
            pass
    raise BadLine(f"{what} is neither text nor a whole number: {show(value)}")


def identities(values: list, what: str) -> list[str]:
    """`identity` of each, quickly where all are plain text."""
    try:
        if "".join(values).isascii() and "" not in map(str.strip, values):
            return values
    except TypeError:  # not all are text
        pass
    return [identity(value, what) for value in values]


def number(value: Any, what: str) -> float | None:
    """A finite number, also when written as text; None stays None."""
    kind = type(value)
    if value is None or (kind is float and math.isfinite(value)):
        return value
    if kind not in (int, float, str) or (kind is str and "_" in value):
        raise BadLine(f"{what} is not a number: {show(value)}")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise BadLine(f"{what} is not a number: {show(value)}") from None
    if not math.isfinite(result):
        raise BadLine(f"{what} is not a finite number: {show(value)}")
    return result


def numbers(values: list, what: str) -> list[float | None]:
    """`number` of each, quickly where all are finite numbers."""
    if {*map(type, values)} <= {int, float}:
        try:
            if all(map(math.isfinite, result := [*map(float, values)])):
                return result
        except OverflowError:
            pass
    return [number(value, what) for value in values]


def behaviour_name(value: Any) -> str:
    return BEHAVIOUR if value is None else identity(value, "behaviour")


def split_name(value: Any) -> str | None:
    if value is not None and value not in SPLITS:
        raise BadLine(f"split is none of train, valid, test: {show(value)}")
    return value


def sequence_rows(
    user: Any,
    items: Any,
    behaviours: Any = None,
    timestamps: Any = None,
    splits: Any = None,
) -> list[Row]:
    """The rows of one user's events, oldest first. Lists beside `items` are as long as it, or absent."""
    user = identity(user, "user")
    if not isinstance(items, list | tuple):
        raise BadLine(f"items is not a list: {show(items)}")
    if not items:
        raise BadLine("user has no items")
    beside = {"behaviours": behaviours, "timestamps": timestamps, "splits": splits}
    for name, values in beside.items():
        if values is not None and not isinstance(values, list | tuple):
            raise BadLine(f"{name} is not a list: {show(values)}")
        if values is not None and len(values) != len(items):
            raise BadLine(f"items has {len(items)} entries and {name} has {len(values)}")
    nothing = [None] * len(items)
    if behaviours is None:
        behaviours = [BEHAVIOUR] * len(items)
    elif None in behaviours:
        behaviours = [behaviour_name(value) for value in behaviours]
    columns = (
        [user] * len(items),
        identities(items, "item"),
        identities(behaviours, "behaviour"),
        nothing if timestamps is None else numbers(timestamps, "timestamp"),
        nothing if splits is None else [split_name(value) for value in splits],
        nothing,
        nothing,
        nothing,
    )
    return list(zip(*columns))


def text(value: Any) -> str | None:
    """One text of what a field holds: text trimmed, numbers in decimal, a list joined by spaces; nothing → None."""
    if type(value) is str:
        return checked_text(value.strip()) or None
    if isinstance(value, list | tuple):
        return " ".join(texts(value)) or None
    if value is None or isinstance(value, dict) or (type(value) is float and math.isnan(value)):
        return None
    return show(value) if type(value) is not bool else str(value).lower()


def texts(value: Any) -> list[str]:
    """A field's texts in order, each once: lists in lists are flattened; nulls, blanks and objects are dropped."""
    flat, pending = {}, [value]
    while pending:
        part = pending.pop()
        if isinstance(part, list | tuple):
            pending.extend(reversed(part))
        elif name := text(part):
            flat[name] = None
    return list(flat)


def item_record(
    item: Any, title: Any = None, description: Any = None, brand: Any = None, categories: Any = None, **own: Any
) -> dict:
    """An item as every reader gives it. `own`: the data's further columns, text or a list of text; others are dropped.

    In `own` lists keep their order and repetitions: [42, 7, 42] is a code, not a set.
    """
    record = {
        "item": identity(item, "item"),
        "title": text(title),
        "description": text(description),
        "brand": text(brand),
        "categories": texts(categories),
    }
    for name, value in own.items():
        checked_text(name)
        if isinstance(value, list):
            parts = [text(part) for part in value if not isinstance(part, list | dict)]
            if kept := [part for part in parts if part is not None]:
                record[name] = kept
        elif (value := text(value)) is not None:
            record[name] = value
    return record


# -- JSON -------------------------------------------------------------------------------------------------------------


def decode_text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 text (byte {line[error.start]:#04x} at column {error.start + 1})") from None


def json_value(line: bytes) -> Any:
    """JSON, with NaN and Infinity let through, so that the check of their field can name it."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass
    try:
        return json.loads(decode_text(line))
    except json.JSONDecodeError as error:
        raise BadLine(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError):
        raise BadLine("not valid JSON: a number too long or brackets too deep") from None


def json_object(line: bytes) -> dict:
    if not isinstance(value := json_value(line), dict):
        raise BadLine(f"not a JSON object: {show(value)}")
    return value


def python_literal(source: str) -> Any:
    """What Python's repr() wrote: text, numbers, lists and dicts. Nothing is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes that escape nothing
            return ast.literal_eval(source)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "not plain text, numbers, lists and dicts"
        raise BadLine(f"not a Python literal: {reason}") from None


class _Object(dict):
    """A JSON object that remembers the keys that stand there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.pairs = pairs if len(pairs) > len(self) else None


def entries(path: str | Path) -> Iterator[tuple[int, tuple[str, Any]]]:
    """(place from 1, (key, value)) of a file that is one JSON object. The file is held in memory."""
    content = b"\n".join(line for _, line in read_lines(path)).removeprefix(b"\xef\xbb\xbf")
    try:
        whole = json.loads(decode_text(content), object_pairs_hook=_Object)
    except BadLine as reason:
        raise UserError(str(reason), file=path, fix="save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", file=path, line=error.lineno, fix="check the file") from None
    except (ValueError, RecursionError):
        problem = "not valid JSON: a number too long or brackets too deep"
        raise UserError(problem, file=path, fix="check the file") from None
    if not isinstance(whole, _Object):
        raise UserError("not one JSON object", file=path, fix="check the path and --format")
    yield from enumerate(whole.pairs or whole.items(), start=1)
