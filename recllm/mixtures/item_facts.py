"""What may be said of an item without naming it: values that it shares with some items and not with nearly all.

A category that one item alone has would give the item away; one that all have ("Beauty", in a shop of cosmetics) says
nothing. Both are left out here, so whatever is composed of these facts is true, and of use.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import polars as pl
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from recllm.catalogue import ITEM_COLUMNS, Catalogue
from recllm.text import label, plain

NEARLY_ALL = 0.8  # of the items: what more of them have says nothing
FEWEST = 2
LONGEST = 6  # words of a value; a longer one is no fact but a text
ITEMS_A_VALUE = 10  # of a column that is chosen by itself: a price of a catalogue is nearly a name
FOLLOWS = 1.2  # a column counts if neighbours in a history agree in it so many times as often as strangers
NO_VALUES = frozenset(("unknown", "generic", "unbranded", "none", "null", "nan", "n/a", "na", "other", "-"))
TITLE_SHARE, TITLE_WORDS = 0.5, 2


@dataclasses.dataclass(frozen=True)
class Facts:
    """kinds: categories, the general first; values: (column, value) of the other columns, in order."""

    kinds: tuple[str, ...] = ()
    values: tuple[tuple[str, str], ...] = ()
    guessed: bool = False  # there are no categories, and the kinds are words of the title

    def __bool__(self) -> bool:
        return bool(self.kinds or self.values)

    @property
    def kind(self) -> str:
        """The most specific category, or "" ."""
        return self.kinds[-1] if self.kinds else ""

    @property
    def all(self) -> frozenset[tuple[str, str]]:
        return frozenset({("categories", kind) for kind in self.kinds} | set(self.values))

    def said(self) -> str:
        """Running Shoes by Vesper, tier 400."""
        first = [phrase(column, value) for column, value in self.values if column == "brand"]
        others = [phrase(column, value) for column, value in self.values if column != "brand"]
        return ", ".join([" ".join([self.kind or "an item", *first]), *others])


def phrase(column: str, value: str) -> str:
    return f"by {value}" if column == "brand" else f"{label(column).lower()} {value}"


def item_facts(catalogue: Catalogue, columns: Sequence[str], rl_share: float = 0.0) -> dict[str, Facts]:
    """item → what is known of it from these columns. Without any category, words of the titles stand for them.

    rl_share: of `Catalogue.training_sequences`, from which those words are chosen.
    """
    rows = list(catalogue.items.iter_rows(named=True))
    kinds = {row["item"]: _kinds(row) if "categories" in columns else [] for row in rows}
    guessed = False
    if "title" in columns and not any(kinds.values()):
        guessed, kinds = True, _title_words(catalogue, rl_share)
    values = [column for column in columns if column not in ("title", "categories", "reviews")]
    values = {row["item"]: [(name, _value(row[name])) for name in values] for row in rows}
    counts = Counter(("categories", kind) for said in kinds.values() for kind in said)
    counts += Counter(pair for pairs in values.values() for pair in pairs)

    def says(column: str, value: str) -> bool:
        return bool(value) and FEWEST <= counts[column, value] <= NEARLY_ALL * len(rows)

    return {
        item: Facts(
            tuple(kind for kind in kinds[item] if says("categories", kind)),
            tuple((column, value) for column, value in values[item] if says(column, value)),
            guessed,
        )
        for item in kinds
    }


def speaking_columns(catalogue: Catalogue, rl_share: float = 0.0) -> list[str]:
    """title, categories, brand, and the data's own columns that tell something about what follows what.

    Such a column holds few short values, and neighbours in a training history agree in it clearly more often than two
    events at random do: a tier does, a colour that nobody cares about does not.
    """
    own = [name for name in catalogue.items.columns if name not in ITEM_COLUMNS]
    return ["title", "categories", "brand", *(name for name in own if _tells(catalogue, name, rl_share))]


def _tells(catalogue: Catalogue, column: str, rl_share: float) -> bool:
    """Σ 1[x_t = x_{t+1}] / pairs  ≥  FOLLOWS · Σ_v p(v)²"""
    if catalogue.items[column].dtype != pl.String:
        return False
    value = {item: _value(said) for item, said in catalogue.items.select("item", column).iter_rows()}
    counts, pairs, agree = Counter(), 0, 0
    for items in catalogue.training_sequences(rl_share)["items"].to_list():
        said = [value[item] for item in items if value[item]]
        counts.update(said)
        pairs += max(0, len(said) - 1)
        agree += sum(one == other for one, other in itertools.pairwise(said))
    if not pairs or not 2 <= len(counts) <= max(4, len(value) / ITEMS_A_VALUE):
        return False
    chance = sum((count / counts.total()) ** 2 for count in counts.values())
    return agree / pairs >= FOLLOWS * chance


def _kinds(row: Mapping) -> list[str]:
    return list(dict.fromkeys(text for category in row["categories"] or [] if (text := _value(category))))


def _value(value) -> str:
    text = plain(value)
    return text if len(text.split()) <= LONGEST and text.lower() not in NO_VALUES else ""


def _title_words(catalogue: Catalogue, rl_share: float) -> dict[str, list[str]]:
    """Of each title the two words that tell most of what follows; of those the more common first.

    score(w) = P(w in the next title | w in this one) − P(w), over neighbours in the training histories: "strings" comes
    again, "inches" does not.
    """
    titles = {item: plain(title).lower() for item, title in catalogue.items.select("item", "title").iter_rows()}
    words = {item: set(re.findall(r"[^\W\d_]{4,}", title)) - ENGLISH_STOP_WORDS for item, title in titles.items()}
    titles_with = Counter(word for said in words.values() for word in said)
    most = max(FEWEST, TITLE_SHARE * len(titles))
    shared = {word for word, count in titles_with.items() if FEWEST <= count <= most}
    pairs, here, both = 0, Counter(), Counter()
    for items in catalogue.training_sequences(rl_share)["items"].to_list():
        for one, other in itertools.pairwise(items):
            pairs += 1
            here.update(words[one] & shared)
            both.update(words[one] & words[other] & shared)
    score = {word: both[word] / here[word] - here[word] / pairs if here[word] else 0.0 for word in shared}
    found = {}
    for item, said in words.items():
        best = sorted(said & shared, key=lambda word: (-score[word], word))[:TITLE_WORDS]
        found[item] = sorted(best, key=lambda word: (-titles_with[word], word))
    return found
