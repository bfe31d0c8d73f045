"""Item text: cleaned, the best reviews chosen, all that is known of an item fused into one text to embed or rewrite."""

import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

import polars as pl

from recllm.catalogue import Catalogue, read_table
from recllm.errors import UserError
from recllm.files import require

TEXT_SOURCES = ("title", "fused", "rewritten")  # what may be embedded; any other name is a column of items.parquet
TEXT_COLUMNS = ("title", "brand", "categories", "description", "reviews")  # short facts first: a limit cuts the end
UNLABELLED = ("title", "description")  # they say themselves what they are
TEXTS_FILE = "texts.parquet"  # item, text: what data_prep/rewrite_text.py writes
MAX_REVIEWS = 5

_UNSEEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")  # "a < b" and "<3" are text
_LINK = re.compile(r"https?://\S+|www\.\S+")


def clean(text: str | None) -> str:
    """Without HTML, control characters and repeated white space, on one line."""
    text = _TAG.sub(" ", _UNSEEN.sub(" ", html.unescape(text or "")))
    text = unicodedata.normalize("NFC", html.unescape(text))  # the dumps hold &amp;quot; as well
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def limit_words(text: str, words: int) -> str:
    parts = text.split(maxsplit=words)
    return text if len(parts) <= words else " ".join(parts[:words])


def review_score(text: str, helpful: int = 0) -> float:
    """How much a review is worth reading: looks like language × (length + votes).

    length    nearly 1 from 100 words on; a word is counted as six characters, so that Chinese is not short
    votes     log2(1 + helpful): the tenth vote adds less than the first
    language  0 … 1: letters rather than signs, words not repeated, no links, no shouting
    """
    text = clean(text)
    if not (letters := sum(c.isalpha() for c in text)):
        return 0.0
    words = text.lower().split()
    language = min(1.0, letters / len(text.replace(" ", "")) / 0.8)
    language *= 1.0 if len(words) < 8 else min(1.0, len(set(words)) / len(words) / 0.5)
    language *= 0.5 if _LINK.search(text) else 1.0
    language *= 0.5 if len(words) > 3 and sum(c.isupper() for c in text) > 0.6 * letters else 1.0
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
    scored = sorted((-review_score(text, count), text) for text, count in votes.items())
    return [text for score, text in scored[:keep] if score < 0]


def fuse(row: Mapping, columns: Sequence[str] = TEXT_COLUMNS, max_words: int | None = 400) -> str:
    """One text of an item's row: a line for each column that says something.

    Of `reviews`, which preparation stores best first, the first five.
    """
    lines = []
    for column in columns:
        value = row.get(column)
        if column == "reviews":
            text = " / ".join(said for review in (value or [])[:MAX_REVIEWS] if (said := clean(review)))
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


def rewritten_texts(catalogue: Catalogue) -> list[str]:
    """texts.parquet in the catalogue's order; refused if it was written for other items."""
    path = require(catalogue.folder / TEXTS_FILE, "the rewritten text", "run data_prep/rewrite_text.py")
    table = read_table(path, {"item": pl.String, "text": pl.String})
    if table["item"].to_list() != catalogue.item_ids:
        raise UserError("written for other items", file=path, fix="run data_prep/rewrite_text.py again")
    return [clean(text) for text in table["text"]]


def plain(value) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(text for part in value if (text := plain(part)))
    return clean(value if isinstance(value, str) else "" if value is None else str(value))
