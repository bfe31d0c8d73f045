"""What alignment examples are written from: the items' texts, and the windows of the training sequences."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import polars as pl

from recllm.catalogue import Catalogue
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids.tokens import token_regex
from recllm.text import fuse, limit_words, plain, rewritten_texts

ATTRIBUTE_WORDS = 12  # of one attribute: a column of longer texts is cut, not left out
LEVELS = ("low-priced", "mid-priced", "high-priced")
_TEXT = {"item", "title", "description", "reviews"}  # the other columns hold attributes


@dataclasses.dataclass(frozen=True, eq=False)
class ItemFacts:
    """Lists in the catalogue's order; "" where nothing is known. No text holds an item's token."""

    ids: list[str]
    index: list[str]  # the item's tokens
    title: list[str]
    text: list[str]  # title, attributes and description
    description: list[str]
    attributes: list[str]  # "Brand: …", a line each
    brand: list[str]
    categories: list[list[str]]
    price: list[str]  # one of LEVELS

    @classmethod
    def of(
        cls,
        catalogue: Catalogue,
        table: SemanticIdTable,
        title: str,
        attributes: Sequence[str],
        max_words: int,
        rewritten: bool,
    ) -> "ItemFacts":
        """`title`: the column that names an item; `rewritten`: texts.parquet describes it, not its own description."""
        rows = catalogue.items.to_dicts()
        if rewritten:
            rows = [row | {"description": text} for row, text in zip(rows, rewritten_texts(catalogue))]
        token = token_regex(table.pattern)

        def column(text_of) -> list[str]:
            return [token.sub("", text_of(row)) for row in rows]

        return cls(
            ids=catalogue.item_ids,
            index=[table.text_of(item) for item in catalogue.item_ids],
            title=column(lambda row: plain(row[title])),
            text=column(lambda row: fuse(row, (title, *attributes, "description"), max_words)),
            description=column(lambda row: limit_words(plain(row["description"]), max_words)),
            attributes=column(lambda row: fuse({name: _short(row[name]) for name in attributes}, attributes)),
            brand=column(lambda row: plain(row["brand"])),
            categories=[[token.sub("", name) for part in row["categories"] if (name := plain(part))] for row in rows],
            price=price_levels(catalogue.items),
        )


def attribute_columns(items: pl.DataFrame, title: str = "title") -> list[str]:
    """Brand and categories, then the data's own columns of text; but for what names an item, in words or by a code."""
    own = [name for name, kind in items.schema.items() if kind == pl.String and name not in {*_TEXT, title, "brand"}]
    return ["brand", "categories", *(name for name in own if not _is_code(items[name]))]


def _is_code(column: pl.Series) -> bool:
    """Single words of which nearly each is another one: numbers of articles, links to pictures."""
    said = column.filter(column.str.strip_chars() != "").drop_nulls()
    return len(said) > 10 and said.n_unique() > 0.9 * len(said) and not said.str.contains(r"\S\s+\S").any()


def price_levels(items: pl.DataFrame) -> list[str]:
    """The third of the catalogue's prices that an item's is in; "" without one, or where all prices are the same."""
    if "price" not in items.columns:
        return [""] * len(items)
    texts = [plain(value).replace(",", "") for value in items["price"].to_list()]
    number = pl.Series(texts, dtype=pl.String).str.extract(r"(\d+(?:\.\d+)?)").cast(pl.Float64).to_numpy()
    known = number[~np.isnan(number)]
    if not len(known) or known.min() == known.max():
        return [""] * len(items)
    third = np.searchsorted(np.quantile(known, [1 / 3, 2 / 3]), number)
    return ["" if np.isnan(price) else LEVELS[level] for price, level in zip(number, third)]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Training events that are targets, each with the events of its user before it: W windows over E events."""

    users: list[str]
    events: list[int]  # (E,) rows of items.parquet, user by user
    user: np.ndarray  # (W,) of which user, a place in `users`
    first: np.ndarray  # (W,) where in `events` the history begins
    target: np.ndarray  # (W,) where in `events` the target is: the history ends before it

    @classmethod
    def of(
        cls, catalogue: Catalogue, every: bool, max_history: int, max_targets: int | None = None, rl_share: float = 0.0
    ) -> "Windows":
        """Of each user every training event from the second on, or the last alone; the latest `max_targets` of them."""
        sequences = catalogue.training_sequences(rl_share)
        rows = pl.DataFrame({"item": catalogue.item_ids, "row": np.arange(len(catalogue.item_ids))})
        events = sequences.select(item="items").explode("item").join(rows, on="item", how="left", maintain_order="left")
        lengths = sequences["items"].list.len().to_numpy().astype(np.int64)  # (users,)
        starts = np.concatenate([[0], lengths.cumsum()])[:-1]
        user = np.repeat(np.arange(len(lengths)), lengths)  # (E,)
        position = np.arange(len(user)) - starts[user]
        latest = lengths[user] - position  # 1 for a user's last event
        wanted = (position > 0) & (latest <= (min(max_targets or len(user), len(user)) if every else 1))
        target = np.flatnonzero(wanted)
        first = np.maximum(starts[user[target]], target - max_history)
        return cls(sequences["user"].to_list(), events["row"].to_list(), user[target], first, target)

    @classmethod
    def pieces(cls, catalogue: Catalogue, size: int, rl_share: float = 0.0) -> "Windows":
        """Whole sequences, in pieces of up to `size` events: of each the last event is the target.

        A piece begins with the last event of the one before, so that every event from the second on answers once.
        """
        every = cls.of(catalogue, True, size, rl_share=rl_share)
        position, step = every.position(), size - 1
        last = np.append(every.user[1:] != every.user[:-1], True)[: len(every)]  # is it the user's last event?
        chosen = np.flatnonzero(last | (position % step == 0))
        first = every.target[chosen] - position[chosen] + (position[chosen] - 1) // step * step
        return cls(every.users, every.events, every.user[chosen], first, every.target[chosen])

    def position(self) -> np.ndarray:
        """Of each target in its user's sequence, where every event from the second on is a target. (W,)"""
        new = np.append(True, self.user[1:] != self.user[:-1])[: len(self)]
        began = np.maximum.accumulate(np.where(new, np.arange(len(self)), 0)) if len(self) else np.arange(0)
        return np.arange(len(self)) - began + 1

    def __len__(self) -> int:
        return len(self.target)

    def history(self, window: int) -> list[int]:
        return self.events[self.first[window] : self.target[window]]

    def last_of_users(self) -> np.ndarray:
        """The last window of each user who has one."""
        return np.flatnonzero(np.append(self.user[1:] != self.user[:-1], True)[: len(self)])


def _short(value) -> str:
    return limit_words(plain(value), ATTRIBUTE_WORDS)
