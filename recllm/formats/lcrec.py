"""LC-Rec's and LETTER's JSON files, one object each, and their indices in both directions.

    *.inter.json   {user: [item, …]}                oldest first
    *.item.json    {item: {"title", "description", "brand"?, "categories"?, …}}
    *.index.json   {item: ["<a_12>", "<b_7>", …]}   the tokens of its semantic ID

These files are read whole. The "line" of a user or an item is its place in the object, from 1.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl

from recllm.errors import UserError
from recllm.files import write_whole
from recllm.formats.records import BadLines, Reader, SeenIds, event_batches, item_records
from recllm.formats.values import (
    BadLine,
    Row,
    checked_text,
    entries,
    identity,
    item_record,
    sequence_rows,
    show,
)


def metadata(entry: tuple) -> dict:
    item, fields = entry
    if not isinstance(fields, dict):
        raise BadLine(f"the fields of item {show(item)} are not an object")
    if isinstance(fields.get("categories"), str):
        fields = fields | {"categories": fields["categories"].split(",")}
    return item_record(**fields | {"item": item})


class LCRec(Reader):
    name = "lcrec"
    describe = "LC-Rec and LETTER: *.inter.json {user: [items]}, *.item.json {item: {title, …}}"

    def events(self, path: str | Path, bad: BadLines) -> Iterator[pl.DataFrame]:
        seen = SeenIds()

        def parse(entry: tuple) -> list[Row]:
            place, (user, items) = entry
            rows = sequence_rows(user, items)
            if first := seen.add(user, place):
                raise BadLine(f"user {show(user)} was already on line {first}")
            return rows

        return event_batches(path, ((place, (place, entry)) for place, entry in entries(path)), parse, bad)

    def items(self, path: str | Path, bad: BadLines) -> Iterator[dict]:
        return item_records(path, entries(path), metadata, bad)


def read_index(path: str | Path) -> dict[str, tuple[str, ...]]:
    """item → the tokens of its semantic ID. Two items may share one: published indices do (LETTER's Instruments)."""
    index: dict[str, tuple[str, ...]] = {}
    for place, (item, tokens) in entries(path):
        try:
            identity(item, "item")
            if item in index:
                raise BadLine(f"item {show(item)} is there twice")
            index[item] = checked_tokens(item, tokens)
        except BadLine as reason:
            fix = 'an index is {"item": ["<a_12>", "<b_7>", …], …}'
            raise UserError(str(reason), file=path, line=place, fix=fix) from None
    if not index:
        raise UserError("the index holds no items", file=path, fix="check the path")
    return index


def write_index(path: str | Path, index: Mapping[str, Sequence[str]]) -> None:
    """item → tokens, as LC-Rec, LETTER and MiniOneRec read it; the items keep the order of the mapping."""
    checked = {}
    for item, tokens in index.items():
        try:
            checked[identity(item, "item")] = checked_tokens(item, list(tokens))
        except BadLine as reason:
            raise UserError(str(reason), file=path, fix="give every item a list of tokens") from None
    if not checked:
        raise UserError("there are no items to write", file=path, fix="build the semantic IDs first")
    with write_whole(path) as partial:
        partial.write_text(json.dumps(checked, ensure_ascii=False), encoding="utf-8")


def checked_tokens(item: str, tokens: object) -> tuple[str, ...]:
    if not isinstance(tokens, list) or not tokens:
        raise BadLine(f"item {show(item)} has no list of tokens but {show(tokens)}")
    for token in tokens:
        if not isinstance(token, str) or not token or token.isspace():
            raise BadLine(f"item {show(item)} has a token that is not text: {show(token)}")
        checked_text(token)
    return tuple(tokens)
