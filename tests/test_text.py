import polars as pl
import pytest
from helpers import write_catalogue
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.text import best_reviews, clean, fuse, item_texts, limit_words, review_score

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

    pl.DataFrame({"item": ["a", "b", "c"], "text": ["A cup.", "", ""]}).write_parquet(tmp_path / "texts.parquet")
    assert item_texts(catalogue, "rewritten") == ["Red cup\nA cup.", "Acme", ""]
    pl.DataFrame({"item": ["b", "a", "c"], "text": ["", "", ""]}).write_parquet(tmp_path / "texts.parquet")
    with pytest.raises(UserError, match="written for other items"):
        item_texts(catalogue, "rewritten")
