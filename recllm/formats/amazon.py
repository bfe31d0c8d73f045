"""Amazon's review and metadata dumps of 2014, 2018 and 2023, and the files that hold ratings only.

One record a line, JSON or, in 2014's metadata, Python's way to write a dict (read with `ast.literal_eval`: nothing is
run). Every review is an event with the behaviour "review". A line is first decoded into the few typed fields that are
needed, which skips the rest unread; only a line that does not fit is looked at again, to say what is wrong with it.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from recllm.formats.records import BadLines, Reader, event_batches, item_records, text_lines
from recllm.formats.values import (
    BadLine,
    Row,
    decode_text,
    identity,
    item_record,
    json_object,
    number,
    python_literal,
    show,
    text,
)
from recllm.text import clean

BEHAVIOUR = "review"
_BY = re.compile(r"^by\s*\n\s*")
_ASIN = re.compile(rb"(?:B[0-9A-Z]{9}|[0-9]{9}[0-9X])$")


class Review2014(msgspec.Struct, gc=False):
    reviewerID: str
    asin: str
    unixReviewTime: int
    overall: float | None = None
    helpful: list[float] | None = None  # found it helpful, voted
    reviewText: str | None = None
    summary: str | None = None


class Review2018(msgspec.Struct, gc=False):
    reviewerID: str
    asin: str
    unixReviewTime: int
    overall: float | None = None
    vote: str | None = None  # "1,234"
    reviewText: str | None = None
    summary: str | None = None


class Review2023(msgspec.Struct, gc=False):
    user_id: str
    timestamp: int  # milliseconds
    parent_asin: str | None = None
    asin: str | None = None
    rating: float | None = None
    helpful_vote: float | None = None
    text: str | None = None
    title: str | None = None


def row_2014(review: Any) -> list[Row]:
    helpful = review.helpful[0] if isinstance(review.helpful, list) and review.helpful else None
    words = plain(review.reviewText) or plain(review.summary)
    return [_row(review.reviewerID, review.asin, review.unixReviewTime, words, helpful, review.overall)]


def row_2018(review: Any) -> list[Row]:
    votes = review.vote.replace(",", "") if isinstance(review.vote, str) else review.vote
    words = plain(review.reviewText) or plain(review.summary)
    return [_row(review.reviewerID, review.asin, review.unixReviewTime, words, votes, review.overall)]


def row_2023(review: Any) -> list[Row]:
    """parent_asin is the product, asin one of its variants; the metadata are by product."""
    item = review.asin if review.parent_asin is None else review.parent_asin
    milliseconds = number(review.timestamp, "timestamp")
    seconds = None if milliseconds is None else milliseconds / 1000
    words = plain(review.text) or plain(review.title)
    return [_row(review.user_id, item, seconds, words, review.helpful_vote, review.rating)]


def _row(user: Any, item: Any, seconds: Any, review: str | None, helpful: Any, rating: Any) -> Row:
    if seconds is None:
        raise BadLine("timestamp is missing")
    return (
        identity(user, "user"),
        identity(item, "item"),
        BEHAVIOUR,
        number(seconds, "timestamp"),
        None,
        review,
        number(helpful, "helpful"),
        number(rating, "rating"),
    )


def item_2014(meta: dict) -> dict:
    return item_record(
        meta.get("asin"),
        title=plain(meta.get("title")),
        description=plain(meta.get("description")),
        brand=brand_name(meta.get("brand")),
        categories=plain_list(meta.get("categories")),
        price=text(meta.get("price")),
    )


def item_2018(meta: dict) -> dict:
    """A title with "getTime" is a page's script, not a title (the data's own notes say so): it is left empty."""
    title = plain(meta.get("title"))
    return item_record(
        meta.get("asin"),
        title=None if title and "getTime" in title else title,
        description=plain(meta.get("description")),
        brand=brand_name(meta.get("brand")),
        categories=plain_list(meta.get("category")),
        main_category=plain(meta.get("main_cat")),
        features=plain_list(meta.get("feature")),
    )


def item_2023(meta: dict) -> dict:
    return item_record(
        meta.get("parent_asin"),
        title=plain(meta.get("title")),
        description=plain(meta.get("description")),
        brand=brand_name(meta.get("store")),
        categories=plain_list(meta.get("categories")),
        main_category=plain(meta.get("main_category")),
        features=plain_list(meta.get("features")),
        price=text(meta.get("price")),
    )


def item_of_any_year(meta: dict) -> dict:
    if "parent_asin" in meta:
        return item_2023(meta)
    return item_2018(meta) if "category" in meta or "main_cat" in meta else item_2014(meta)


def plain(value: Any) -> str | None:
    """A field's text, cleaned as all text is (recllm.text.clean); a list is joined; nothing → None."""
    return clean(text(value)) or None


def plain_list(value: Any) -> list[str]:
    """Every text in lists however nested (2014: [[a, b], [a, c]] → a, b, c), each once, cleaned as by `plain`."""
    flat, pending = {}, [value]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending.extend(reversed(part))
        elif words := plain(part):
            flat[words] = None
    return list(flat)


def brand_name(value: Any) -> str | None:
    return plain(_BY.sub("", value)) if isinstance(value, str) else plain(value)  # 2018: "by\n    \n    OPI"


def record_of(line: bytes) -> dict:
    """A line in either of the two dialects."""
    if not line.startswith((b"{'", b"{u'")):
        return json_object(line)
    if not isinstance(record := python_literal(decode_text(line)), dict):
        raise BadLine(f"not a record: {show(record)}")
    return {key: value for key, value in record.items() if isinstance(key, str)}


class Amazon(Reader):
    """One of the three releases: the typed fields of a review, and what becomes of a review and of an item."""

    def __init__(self, year: int, fields: type, row: Callable[[Any], list[Row]], item: Callable[[dict], dict]):
        self.name = f"amazon{year}"
        self.describe = f"Amazon {year}: reviews and metadata, a record a line (.json.gz, .jsonl.gz)"
        self._fields, self._row, self._item = fields, row, item

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        decode = msgspec.json.Decoder(self._fields).decode
        names = self._fields.__struct_fields__

        def parse(line: bytes) -> list[Row]:
            try:
                review = decode(line)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                review = Loose(record_of(line), names)
            return self._row(review)

        return event_batches(path, text_lines(path), parse, bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        return item_records(path, text_lines(path), lambda line: self._item(record_of(line)), bad)


AMAZON = (
    Amazon(2014, Review2014, row_2014, item_2014),
    Amazon(2018, Review2018, row_2018, item_2018),
    Amazon(2023, Review2023, row_2023, item_2023),
)


class Loose:
    """A record with every field of the typed one, whatever its type; absent fields are None."""

    def __init__(self, record: dict, names: tuple[str, ...]):
        for name in names:
            setattr(self, name, record.get(name))


class AmazonRatings(Reader):
    """CSV without quotes. 2014 has user,item,rating,timestamp; 2018 item,user,…; 2023 a header and milliseconds.

    The header, or else which of the first line's two ids is an ASIN, tells them apart.
    """

    name = "amazon_ratings"
    describe = "Amazon's ratings-only CSV of any year, with the metadata of any year"

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        order: tuple[int, int] | None = None
        unit = 1.0

        def parse(line: bytes) -> list[Row]:
            nonlocal order, unit
            cells = decode_text(line).split(",")
            if order is None and line.startswith(b"user_id,"):
                order, unit = (0, 1), 1000.0
                return []
            if len(cells) < 4:
                raise BadLine(f"has {len(cells)} of the 4 fields (user, item, rating, timestamp)")
            order = order or ratings_order(*(cell.encode() for cell in cells[:2]))
            user, item = (cells[position] for position in order)
            seconds = number(cells[3], "timestamp") / unit
            return [_row(user, item, seconds, None, None, cells[2] or None)]

        return event_batches(path, text_lines(path), parse, bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        return item_records(path, text_lines(path), lambda line: item_of_any_year(record_of(line)), bad)


def ratings_order(first: bytes, second: bytes) -> tuple[int, int]:
    """The positions of user and item."""
    if bool(_ASIN.match(first)) == bool(_ASIN.match(second)):
        raise BadLine(f"cannot tell user from item: {show(first.decode())}, {show(second.decode())}")
    return (1, 0) if _ASIN.match(first) else (0, 1)
