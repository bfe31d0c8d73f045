import html
import math
import re
import unicodedata

import polars as pl
import pytest
from helpers import write_catalogue
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.text import best_reviews, clean, fuse, item_texts, limit_words, review_score, write_texts

PLAIN = "The hose is light, it never kinks and the brass ends have held for two years in my garden."


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("<b>Soft</b>&nbsp;hat<br/>wool", "Soft hat wool"),
        ("a &amp;quot;best&amp;quot; buy", 'a "best" buy'),
        ("<style>p {x}</style><p class='a'>Text</p><!-- hidden -->", "Text"),
        ("5 < 6 and I <3 it", "5 < 6 and I <3 it"),
        ("one\n\ttwo\x00three\u200b", "one two three"),
        ("Cafe\u0301", "Café"),
        (None, ""),
    ],
)
def test_clean(dirty, expected):
    assert clean(dirty) == expected


@given(st.text())
def test_clean_text_is_one_trimmed_line(text):
    assert clean(text) == " ".join(clean(text).split())
    assert clean(text).isprintable()


def slowly_cleaned(text: str) -> str:
    """The steps of `clean` without its short cuts."""
    text = re.sub(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", " ", html.unescape(text), flags=re.DOTALL | re.IGNORECASE)
    text = unicodedata.normalize("NFC", html.unescape(re.sub(r"<[a-zA-Z/!][^<>]*>", " ", text)))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def slowly_scored(text: str, helpful: int) -> float:
    """The formula of `review_score`, letter by letter."""
    text = slowly_cleaned(text)
    if not (letters := sum(c.isalpha() for c in text)):
        return 0.0
    words = text.lower().split()
    language = min(1.0, letters / sum(len(word) for word in text.split()) / 0.8)
    language *= 1.0 if len(words) < 8 else min(1.0, len(set(words)) / len(words) / 0.5)
    language *= 0.5 if re.search(r"https?://\S|www\.\S", text) else 1.0
    language *= 0.5 if len(words) > 3 and sum(c.isupper() for c in text) > 0.6 * letters else 1.0
    return language * (1 - math.exp(-len(text) / 6 / 30) + math.log2(1 + helpful))


PIECES = [
    "<b>",
    "</b>",
    "<!-- x -->",
    "<script>",
    "</script>",
    "&amp;lt;",
    "&nbsp;",
    "www.a",
    "http://b",
    "ÄÖ",
    "²",
    "\x85",
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join), st.integers(0, 50))
def test_the_short_cuts_change_nothing(text, helpful):
    assert clean(text) == slowly_cleaned(text)
    assert review_score(text, helpful) == pytest.approx(slowly_scored(text, helpful))


def test_limit_words():
    assert limit_words("a b  c", 2) == "a b"
    assert limit_words("a b  c", 3) == "a b  c"


def test_review_score_prefers_votes_then_length_and_dislikes_what_is_no_language():
    assert review_score(PLAIN, 10) > review_score(PLAIN, 1) > review_score(PLAIN)
    assert review_score(PLAIN) > review_score("The hose is light.")
    assert review_score(PLAIN) > review_score(PLAIN.upper())
    assert review_score(PLAIN) > review_score(PLAIN + " http://spam.example/x")
    assert review_score(PLAIN) > review_score("good " * 18)
    assert review_score("!!! 10/10 !!!") == 0
    assert review_score("质量很好，用了两年也没有坏，颜色和图片一样，非常满意，推荐购买") > review_score("很好")


def test_best_reviews_is_a_function_of_the_set():
    reviews = [PLAIN, "Broke after a week and the seller did not answer.", "ok", PLAIN, "<b>ok</b>"]
    votes = [0, 3, 0, 1, None]
    expected = ["Broke after a week and the seller did not answer.", PLAIN, "ok"]
    assert best_reviews(reviews, 5, helpful=votes) == expected
    assert best_reviews(reviews[::-1], 5, helpful=votes[::-1]) == expected
    assert best_reviews(reviews, 1, helpful=votes) == expected[:1]
    assert best_reviews(["", "???"], 3) == []


def test_fuse_says_what_the_row_has_and_skips_what_it_lacks():
    row = {"item": "i", "title": "Hose", "brand": None, "categories": ["Garden", "Water"], "reviews": ["<i>Fine</i>"]}
    assert fuse(row) == "Hose\nCategories: Garden, Water\nReviews: Fine"
    assert fuse(row | {"tags": ["a", "b"]}, ["tags", "title"]) == "Tags: a, b\nHose"
    assert fuse(row, max_words=3) == "Hose Categories: Garden,"
    assert fuse({"item": "i"}) == ""
    nine = {"item": "i", "reviews": [f"Review {number}" for number in range(9)]}  # all that preparation kept
    assert fuse(nine) == "Reviews: " + " / ".join(nine["reviews"])


def test_texts_of_a_catalogue(tmp_path):
    items = [{"item": "a", "title": "Red cup", "shade": "dark"}, {"item": "b", "brand": "Acme"}, "c"]
    catalogue = write_catalogue(tmp_path, items, {"u": ["a", "b"]})
    assert item_texts(catalogue, "title") == ["Red cup", "Acme", ""]
    assert item_texts(catalogue, "fused") == ["Red cup", "Brand: Acme", ""]
    assert item_texts(catalogue, "fused", ["title", "shade"]) == ["Red cup\nShade: dark", "", ""]
    assert item_texts(catalogue, "shade") == ["dark", "", ""]
    with pytest.raises(UserError, match=r"rewritten text does not exist.*rewrite_text"):
        item_texts(catalogue, "rewritten")
    with pytest.raises(UserError, match="column 'colour' is missing"):
        item_texts(catalogue, "colour")
    with pytest.raises(UserError, match=r"no item has any text \(description\).*collaborative needs no text"):
        item_texts(catalogue, "description")

    write_texts(catalogue, ["A cup.", "", ""])
    assert item_texts(catalogue, "rewritten") == ["Red cup\nA cup.", "Acme", ""]


@pytest.mark.parametrize("change", ["items", "text", "split"])
def test_rewritten_texts_of_other_data_are_refused(tmp_path, change):
    """A text of another split may hold the review of what is now a test event."""
    items, sequences = ["a", "b", "c"], {"u": ["a", "b", "c"]}
    write_texts(write_catalogue(tmp_path, items, sequences), ["A cup.", "", ""])
    if change == "items":
        items = items[::-1]
    if change == "text":
        items[0] = {"item": "a", "title": "Red cup"}
    catalogue = write_catalogue(tmp_path, items, sequences, split="train" if change == "split" else "leave-one-out")
    with pytest.raises(UserError, match=r"texts\.parquet: written from other data.*rewrite_text\.py with --overwrite"):
        item_texts(catalogue, "rewritten")


def test_texts_that_do_not_say_of_which_data_they_are_are_refused(tmp_path):
    catalogue = write_catalogue(tmp_path, "ab", {"u": "ab"})
    pl.DataFrame({"item": ["a", "b"], "text": ["", "x"]}).write_parquet(tmp_path / "texts.parquet")
    with pytest.raises(UserError, match="written from other data"):
        item_texts(catalogue, "rewritten")
