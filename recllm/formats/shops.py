"""Logs of shops in which users click, save, put into the cart and pay: CSV without quotes, an event a line.

Four public logs, each with names of its own for what users do; here they are click, favourite, cart and pay, and what
only one log has keeps a plain name. Ids of categories, brands and sellers are numbers of their own: c12, b12 and s12.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from recllm.errors import UserError
from recllm.formats.records import BadLines, Reader, SeenIds, event_batches, item_records, nothing_in, text_lines
from recllm.formats.values import BadLine, Row, decode_text, identity, item_record, listed, number, show

TMALL_YEAR = 2014  # the log gives month and day: 11 May to 12 November


# -- times ------------------------------------------------------------------------------------------------------------


def seconds(cell: str) -> float:
    if not cell:
        raise BadLine("timestamp is missing")
    return number(cell, "timestamp")


def milliseconds(cell: str) -> float:
    return seconds(cell) / 1000


@functools.lru_cache(maxsize=1024)
def month_and_day(cell: str) -> float:
    """1111 → the beginning of 11 November."""
    try:
        return datetime(TMALL_YEAR, int(cell[:-2]), int(cell[-2:]), tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        raise BadLine(f"timestamp is no day as month and day (1111): {show(cell)}") from None


def date_and_time(cell: str) -> float:
    """2018-03-01 09:30:00, taken as UTC: the logs name no zone."""
    try:
        return datetime.fromisoformat(cell).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise BadLine(f"timestamp is no date and time (2018-03-01 09:30:00): {show(cell)}") from None


# -- layouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which columns hold an event, and what the log calls click, favourite, cart, pay."""

    user: str
    item: str
    behaviour: str
    time: str
    words: Mapping[str, str]  # the log's → ours
    instant: Callable[[str], float]

    def parser(self, table: "Csv") -> Callable[[bytes], list[Row]]:
        user, item, behaviour, time = table.places(self.user, self.item, self.behaviour, self.time)
        known = listed(self.words)

        def parse(line: bytes) -> list[Row]:
            cells = table.cells(line)
            word = self.words.get(cells[behaviour])
            if word is None:
                raise BadLine(f"{self.behaviour} is none of {known}: {show(cells[behaviour])}")
            who, what = identity(whole(cells[user]), "user"), identity(whole(cells[item]), "item")
            return [(who, what, word, self.instant(cells[time]), None, None, None, None)]

        return parse


def whole(cell: str) -> str:
    """JData 2016 writes its users as 266079.0."""
    return cell.removesuffix(".0")


class Csv:
    """A file's columns, from its first line unless they are known, and the `lines` that hold data."""

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None):
        self.path, lines = path, text_lines(path)
        if columns is not None:
            self.columns, self.lines = list(columns), lines
            return
        _, header = next(lines, (0, b""))
        try:
            self.columns = [cell.strip().strip('"') for cell in decode_text(header).split(",")]
        except BadLine as reason:
            raise UserError(str(reason), file=path, line=1, fix="save the file as UTF-8") from None
        # Two parts of a file laid one after the other: the second header is no event.
        self.lines = ((place, line) for place, line in lines if line != header)

    def cells(self, line: bytes) -> list[str]:
        cells = decode_text(line).split(",")
        if len(cells) != len(self.columns):
            raise BadLine(f"has {len(cells)} fields, and there are {len(self.columns)} columns")
        return [cell.strip() for cell in cells]

    def places(self, *names: str) -> list[int]:
        if missing := [name for name in names if name not in self.columns]:
            raise UserError(
                f"no {missing[0]} column; the header has {listed(self.columns)}",
                file=self.path,
                line=1,
                fix="check the path and --format",
            )
        return [self.columns.index(name) for name in names]

    def fields(self, names: Mapping[str, str]) -> dict[str, int]:
        """Our names → the places of those of the columns that there are."""
        return {ours: self.columns.index(name) for ours, name in names.items() if name in self.columns}


# -- items ------------------------------------------------------------------------------------------------------------

LETTER = {"categories": "c", "brand": "b", "seller": "s"}


def item_parser(table: Csv, item: str, names: Mapping[str, str]) -> Callable[[bytes], dict]:
    """An item of one line. `names`: categories, brand, seller → the column that holds the id."""
    [place], fields = table.places(item), table.fields(names)

    def parse(line: bytes) -> dict:
        cells = table.cells(line)
        ids = {name: whole(cells[column]) for name, column in fields.items()}
        known = {name: LETTER[name] + value for name, value in ids.items() if value not in ("", "-1")}
        return item_record(whole(cells[place]), **known)

    return parse


def first_of_items(
    path: str | Path, lines: Iterable[tuple[int, Any]], parse: Callable[[Any], dict], bad: BadLines
) -> Iterator[dict]:
    """The items of a log, where each stands on many lines: as the first of them says."""
    seen, before, empty = SeenIds(), bad.count, True
    for place, line in lines:
        try:
            record = parse(line)
        except BadLine as reason:
            bad.add(path, place, str(reason))
            continue
        empty = False
        if not seen.add(record["item"], place):
            yield record
    if empty:
        raise nothing_in(path, "items", bad, before)


# -- the four ---------------------------------------------------------------------------------------------------------


class RetailRocket(Reader):
    """events.csv; as items item_properties.csv, of which the category an item had first is kept."""

    name = "retailrocket"
    describe = "RetailRocket: events.csv; items from item_properties*.csv (their categories)"
    layout = Layout(
        "visitorid", "itemid", "event", "timestamp",
        {"view": "click", "addtocart": "cart", "transaction": "pay"}, milliseconds,
    )  # fmt: skip

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        table = Csv(path)
        yield from event_batches(path, table.lines, self.layout.parser(table), bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        table, before = Csv(path), bad.count
        time, item, field, value = table.places("timestamp", "itemid", "property", "value")
        category: dict[str, tuple[float, str | None]] = {}
        for place, line in table.lines:  # a week's snapshots stand together, so the whole file is read first
            try:
                cells = table.cells(line)
                name, when = identity(cells[item], "item"), milliseconds(cells[time])
            except BadLine as reason:
                bad.add(path, place, str(reason))
                continue
            known = category.setdefault(name, (float("inf"), None))
            if cells[field] == "categoryid" and when < known[0]:
                category[name] = when, cells[value]
        if not category:
            raise nothing_in(path, "items", bad, before)
        for name, (_, number_of) in category.items():
            yield item_record(name, categories=number_of and LETTER["categories"] + number_of)


class Tmall(Reader):
    """user_log_format1.csv of IJCAI-15, also as items. Days without hours: within a day the file's order counts."""

    name = "tmall"
    describe = "Tmall, IJCAI-15: user_log_format1.csv, also as the item file (category, brand, seller)"
    words: Mapping[str, str] = {"0": "click", "1": "cart", "2": "pay", "3": "favourite"}
    layout = Layout("user_id", "item_id", "action_type", "time_stamp", words, month_and_day)

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        table = Csv(path)
        yield from event_batches(path, table.lines, self.layout.parser(table), bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        table = Csv(path)
        names = {"categories": "cat_id", "brand": "brand_id", "seller": "seller_id"}
        yield from first_of_items(path, table.lines, item_parser(table, "item_id", names), bad)


class Taobao(Reader):
    """UserBehavior.csv, which has no header; also as items."""

    name = "taobao"
    describe = "Taobao UserBehavior: UserBehavior.csv, also as the item file (category)"
    columns = ("user", "item", "category", "behaviour", "timestamp")
    words: Mapping[str, str] = {"pv": "click", "fav": "favourite", "cart": "cart", "buy": "pay"}
    layout = Layout("user", "item", "behaviour", "timestamp", words, seconds)

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        table = Csv(path, self.columns)
        return event_batches(path, table.lines, self.layout.parser(table), bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        table = Csv(path, self.columns)
        return first_of_items(path, table.lines, item_parser(table, "item", {"categories": "category"}), bad)


class JData(Reader):
    """The action logs of JD's two competitions, whose types mean different things; their headers tell them apart."""

    name = "jdata"
    describe = "JData: jdata_action.csv (2019) or JData_Action_*.csv (2016); items from the product file"
    of_2019: Mapping[str, str] = {"1": "click", "2": "pay", "3": "favourite", "4": "comment", "5": "cart"}
    of_2016: Mapping[str, str] = {
        "1": "click", "2": "cart", "3": "cart removal", "4": "pay", "5": "favourite", "6": "click",
    }  # fmt: skip

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        table = Csv(path)
        earlier = "time" in table.columns and "action_time" not in table.columns
        time, words = ("time", self.of_2016) if earlier else ("action_time", self.of_2019)
        layout = Layout("user_id", "sku_id", "type", time, words, date_and_time)
        yield from event_batches(path, table.lines, layout.parser(table), bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        table = Csv(path)
        names = {"categories": "cate", "brand": "brand", "seller": "shop_id"}
        yield from item_records(path, table.lines, item_parser(table, "sku_id", names), bad)
