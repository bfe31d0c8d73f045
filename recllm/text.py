"""Item text: cleaned, the best reviews chosen, all that is known of an item fused into one text to embed or rewrite."""

import html
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recllm.catalogue import Catalogue, read_table
from recllm.errors import UserError
from recllm.files import require, write_whole

TEXT_SOURCES = ("title", "fused", "rewritten")  # what may be embedded; any other name is a column of items.parquet
TEXT_COLUMNS = ("title", "brand", "categories", "description", "reviews")  # short facts first: a limit cuts the end
UNLABELLED = ("title", "description")  # they say themselves what they are
TEXTS_FILE = "texts.parquet"  # item, text: what data_prep/rewrite_text.py writes
MAX_REVIEWS = 5

_UNSEEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[a-zA-Z/!][^<>]*>")  # "a < b" and "<3" are text
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalpha())
_NO_CAPITALS = bytes(byte for byte in range(128) if not chr(byte).isupper())
_LINK = re.compile(r"https?://\S+|www\.\S+")


def clean(text: str | None) -> str:
    """Without HTML, control characters and repeated white space, on one line."""
    text = text or ""  # most texts need little of what follows: each step looks first whether there is work
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", _UNSEEN.sub(" ", text))
    if "&" in text:
        text = html.unescape(text)  # the dumps hold &amp;quot; as well
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = " ".join(text.split())
    if not text.isprintable():
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text


def limit_words(text: str, words: int) -> str:
    parts = text.split(maxsplit=words)
    return text if len(parts) <= words else " ".join(parts[:words])


def review_score(text: str, helpful: int = 0) -> float:
    """How much a review is worth reading: looks like language × (length + votes).

    length    nearly 1 from 100 words on; a word is counted as six characters, so that Chinese is not short
    votes     log2(1 + helpful): the tenth vote adds less than the first
    language  0 … 1: letters rather than signs, words not repeated, no links, no shouting
    """
    return _score(clean(text), helpful)


def _score(text: str, helpful: int) -> float:
    """Of a text that is clean. Letters are counted as bytes where they are ASCII, which is ten times as fast."""
    plain_bytes = text.encode("ascii", "ignore")
    others = "" if text.isascii() else "".join(_NOT_ASCII.findall(text))
    letters = len(plain_bytes.translate(None, _NO_LETTERS)) + sum(c.isalpha() for c in others)
    if not letters:
        return 0.0
    capitals = len(plain_bytes.translate(None, _NO_CAPITALS)) + sum(c.isupper() for c in others)
    words = text.lower().split()
    language = min(1.0, letters / (len(text) - text.count(" ")) / 0.8)
    language *= 1.0 if len(words) < 8 else min(1.0, len(set(words)) / len(words) / 0.5)
    language *= 0.5 if ("://" in text or "www." in text) and _LINK.search(text) else 1.0
    language *= 0.5 if len(words) > 3 and capitals > 0.6 * letters else 1.0
    length = 1 - math.exp(-len(text) / 6 / 30)
    return language * (length + math.log2(1 + max(0, helpful)))


def best_reviews(
    reviews: Sequence[str], keep: int = MAX_REVIEWS, *, helpful: Sequence[int | None] | None = None
) -> list[str]:
    """The `keep` best, cleaned, the best first; equal ones in alphabetical order. `helpful`: votes, review by review.

    A text is kept once, with the most votes it has. Neither order nor repetition of the input matters.
    """
    votes: dict[str, int] = {}
    for review, count in zip(reviews, helpful or [0] * len(reviews), strict=True):
        text = clean(review)
        votes[text] = max(votes.get(text, 0), count or 0)
    scored = sorted((-_score(text, count), text) for text, count in votes.items())
    return [text for score, text in scored[:keep] if score < 0]


def fuse(row: Mapping, columns: Sequence[str] = TEXT_COLUMNS, max_words: int | None = 400) -> str:
    """One text of an item's row: a line for each column that says something.

    Of `reviews`, all that preparation chose and put in order, the best first.
    """
    lines = []
    for column in columns:
        value = row.get(column)
        if column == "reviews":
            text = " / ".join(said for review in value or [] if (said := clean(review)))
        else:
            text = plain(value)
        if text:
            lines.append(text if column in UNLABELLED else f"{label(column)}: {text}")
    text = "\n".join(lines)
    return text if max_words is None or len(text.split()) <= max_words else limit_words(text, max_words)


def label(column: str) -> str:
    return column.replace("_", " ").capitalize()


def title(row: Mapping, columns: Sequence[str] = TEXT_COLUMNS) -> str:
    """The title, or the first column that says something (Amazon's 2014 Beauty has brands and categories only)."""
    return next((text for column in ("title", *columns) if (text := plain(row.get(column)))), "")


def item_texts(
    catalogue: Catalogue, source: str, columns: Sequence[str] = TEXT_COLUMNS, max_words: int = 400
) -> list[str]:
    """The text of every item, in the catalogue's order; refuses a catalogue whose items have none.

    source: one of TEXT_SOURCES, or a column of items.parquet.
    """
    check_columns(catalogue, columns if source in TEXT_SOURCES else [source])
    rows = catalogue.items.iter_rows(named=True)
    if source == "title":
        texts = [limit_words(title(row, columns), max_words) for row in rows]
    elif source == "fused":
        texts = [fuse(row, columns, max_words) for row in rows]
    elif source == "rewritten":
        texts = [
            limit_words(f"{title(row, columns)}\n{text}".strip(), max_words)
            for row, text in zip(rows, rewritten_texts(catalogue), strict=True)
        ]
    else:
        texts = [limit_words(plain(row[source]), max_words) for row in rows]
    if not any(texts):
        looked = source if source not in ("fused", "title") else ", ".join(columns)
        raise UserError(
            f"no item has any text ({looked})", file=catalogue.folder, fix="--encoder collaborative needs no text"
        )
    return texts


def check_columns(catalogue: Catalogue, columns: Sequence[str]) -> None:
    known = catalogue.items.columns
    if unknown := [column for column in columns if column not in known]:
        path = catalogue.folder / "items.parquet"
        raise UserError(f"column {unknown[0]!r} is missing", file=path, fix=f"name one of {', '.join(known)}")


def write_texts(catalogue: Catalogue, texts: Sequence[str], **about: str) -> pl.DataFrame:
    """texts.parquet: item, text; in its metadata of which data, and what else is to be known `about` them."""
    table = pl.DataFrame({"item": catalogue.item_ids, "text": texts}, schema={"item": pl.String, "text": pl.String})
    about = {"catalogue_fingerprint": catalogue.fingerprint} | about
    with write_whole(catalogue.folder / TEXTS_FILE) as partial:
        table.write_parquet(partial, metadata={"recllm": json.dumps(about, sort_keys=True)})
    return table


def read_texts(path: Path) -> tuple[pl.DataFrame, dict[str, str]]:
    """What `write_texts` wrote: the table, and what is known about it (nothing of a file that is not ours)."""
    table = read_table(path, {"item": pl.String, "text": pl.String})
    return table, json.loads(pl.read_parquet_metadata(path).get("recllm", "{}"))


def rewritten_texts(catalogue: Catalogue) -> list[str]:
    """texts.parquet in the catalogue's order; refused if it was written from other data.

    A text of another split may quote the review of what is now a test event.
    """
    path = require(catalogue.folder / TEXTS_FILE, "the rewritten text", "run data_prep/rewrite_text.py")
    table, about = read_texts(path)
    if about.get("catalogue_fingerprint") != catalogue.fingerprint or table["item"].to_list() != catalogue.item_ids:
        raise UserError(
            "written from other data: the catalogue's items, text, events or split have changed",
            file=path,
            fix="run data_prep/rewrite_text.py with --overwrite",
        )
    return [clean(text) for text in table["text"]]


def plain(value) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(text for part in value if (text := plain(part)))
    return clean(value if isinstance(value, str) else "" if value is None else str(value))
