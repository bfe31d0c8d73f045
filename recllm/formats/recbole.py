"""RecBole's atomic files: tab-separated `.inter` and `.item` whose header names each column and its type.

    user_id:token	item_id:token	timestamp:float	rating:float

Data sets name their columns differently: the usual names are known, and a header without a user and an item column is
refused. A quotation mark is a character like any other. An empty cell is a missing value.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from recllm.errors import UserError
from recllm.formats.records import BadLines, Reader, event_batches, item_records, text_lines
from recllm.formats.values import (
    BadLine,
    Row,
    behaviour_name,
    decode_text,
    identity,
    item_record,
    listed,
    number,
    split_name,
    text,
)

NAMES = {  # ours → what it is called elsewhere, the likeliest first
    "user": ("user_id", "user", "uid", "userid", "session_id", "reviewerid"),
    "item": ("item_id", "item", "iid", "itemid", "parent_asin", "asin", "business_id", "movie_id", "product_id"),
    "timestamp": ("timestamp", "time", "unixreviewtime", "unix_time", "ts"),
    "rating": ("rating", "stars", "overall", "score"),
    "behaviour": ("behaviour", "behavior", "behavior_type", "event", "event_type", "action", "action_type"),
    "review": ("review", "review_text", "reviewtext", "text"),
    "helpful": ("helpful", "helpful_vote", "vote", "votes"),
    "split": ("split",),
    "title": ("title", "item_name", "movie_title", "product_title", "name"),
    "description": ("description", "desc"),
    "brand": ("brand", "store", "manufacturer", "artist"),
    "categories": ("categories", "category", "class", "genres", "genre"),
}
EVENT = ("user", "item", "behaviour", "timestamp", "split", "review", "helpful", "rating")
ITEM = ("item", "title", "description", "brand", "categories")


class Table:
    """A file's header, and the `lines` after it, which `cells` takes apart."""

    def __init__(self, path: str | Path):
        self.path = path
        self.lines = text_lines(path)
        try:
            _, header = next(self.lines, (0, b""))
            cells = [cell.strip() for cell in decode_text(header).split("\t")]
        except BadLine as reason:
            raise UserError(str(reason), file=path, line=1, fix="save the file as UTF-8") from None
        self.columns = [cell.split(":")[0] for cell in cells]
        self.types = [cell.partition(":")[2] for cell in cells]

    def cells(self, line: bytes) -> list[str | None]:
        cells = decode_text(line).split("\t")
        if len(cells) != len(self.columns):
            raise BadLine(f"has {len(cells)} fields, the header {len(self.columns)}")
        return [cell.strip() or None for cell in cells]

    def places(self, wanted: tuple[str, ...], required: tuple[str, ...]) -> dict[str, int]:
        """Our names → the positions of their columns."""
        lower = [name.lower() for name in self.columns]
        found = {}
        for name in wanted:
            for alias in NAMES[name]:
                if alias in lower:
                    found[name] = lower.index(alias)
                    break
        if missing := [name for name in required if name not in found]:
            raise UserError(
                f"no {missing[0]} column; the header has {listed(self.columns)}",
                file=self.path,
                line=1,
                fix=f"name it {NAMES[missing[0]][0]}:token; columns are separated by tabs",
            )
        return found


def event_parser(table: Table) -> Callable[[bytes], list[Row]]:
    if "item_id_list" in table.columns:
        raise UserError(
            "each row is a history with its target, not an event (item_id_list)",
            file=table.path,
            line=1,
            fix="give the .inter file from before the split",
        )
    found = table.places(EVENT, required=("user", "item"))
    position = [found.get(name) for name in EVENT]

    def parse(line: bytes) -> list[Row]:
        cells = table.cells(line)
        user, item, behaviour, seconds, split, review, helpful, rating = (
            None if place is None else cells[place] for place in position
        )
        if seconds is None and "timestamp" in found:
            raise BadLine("timestamp is missing")
        return [
            (
                identity(user, "user"),
                identity(item, "item"),
                behaviour_name(behaviour),
                number(seconds, "timestamp"),
                split_name(split),
                text(review),
                number(helpful, "helpful"),
                number(rating, "rating"),
            )
        ]

    return parse


def item_parser(table: Table) -> Callable[[bytes], dict]:
    found = table.places(ITEM, required=("item",))
    used = set(found.values())
    own = [  # a second column of one meaning (`item` beside `item_id`) does not take the first one's place
        place
        for place, name in enumerate(table.columns)
        if place not in used and name not in ITEM and table.types[place] != "float_seq"
    ]

    def parse(line: bytes) -> dict:
        cells = table.cells(line)
        fields = {name: cells[place] for name, place in found.items()}
        if fields.get("categories"):
            fields["categories"] = _parts(fields["categories"], table.types[found["categories"]])
        fields |= {table.columns[place]: _parts(cells[place], table.types[place]) for place in own}
        return item_record(**fields)

    return parse


def _parts(cell: str | None, kind: str) -> str | list[str] | None:
    return cell.split() if cell and kind == "token_seq" else cell


class RecBole(Reader):
    name = "recbole"
    describe = "RecBole's atomic files: .inter and .item, tab-separated with a typed header"

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        table = Table(path)
        yield from event_batches(path, table.lines, event_parser(table), bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        table = Table(path)
        yield from item_records(path, table.lines, item_parser(table), bad)
