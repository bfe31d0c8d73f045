"""Amazon's three releases, as their own pages show them, and their dialects."""

import json

import pytest

from recllm.errors import UserError
from recllm.formats import BadLines
from recllm.formats.amazon import plain


def test_2014_reviews_in_both_dialects(write, events):
    review = {
        "reviewerID": "A2SUAM1J3GNN3B",
        "asin": "0000013714",
        "reviewerName": 'J. "Mac" O\'Neil',
        "helpful": [2, 3],
        "reviewText": "He's having   a <b>wonderful</b> time &amp; so am I.",
        "overall": 5.0,
        "summary": "Heavenly!",
        "unixReviewTime": 1252800000,
        "reviewTime": "09 13, 2009",
    }
    short = review | {"reviewText": "", "helpful": [0, 0]}
    lines = [json.dumps(review), repr(review), json.dumps(short)]
    got = events("amazon2014", write("reviews.json.gz", lines)).drop("line")
    row = ("A2SUAM1J3GNN3B", "0000013714", "review", 1252800000.0, None)
    words = "He's having a wonderful time & so am I."
    assert got.rows() == [(*row, words, 2.0, 5.0), (*row, words, 2.0, 5.0), (*row, "Heavenly!", 0.0, 5.0)]


def test_2014_metadata(write, items):
    meta = {
        "asin": "0000031852",
        "title": "Girls Ballet Tutu Zebra Hot Pink",
        "price": 3.17,
        "imUrl": "http://example.invalid/a.jpg",
        "related": {"also_bought": ["B00JHONN1S"]},
        "salesRank": {"Toys & Games": 211836},
        "brand": "Coxlures",
        "categories": [["Sports & Outdoors", "Other Sports"], ["Sports & Outdoors", "Dance"]],
    }
    [record] = items("amazon2014", write("meta.json", [repr(meta)]))
    assert record == {
        "item": "0000031852",
        "title": "Girls Ballet Tutu Zebra Hot Pink",
        "description": None,
        "brand": "Coxlures",
        "categories": ["Sports & Outdoors", "Other Sports", "Dance"],
        "price": "3.17",
    }


def test_2018_reviews_and_metadata(write, events, items):
    review = {
        "overall": 5.0,
        "vote": "1,234",
        "verified": True,
        "reviewerID": "AUI6WTTT0QZYS",
        "asin": "5120053084",
        "style": {"Size:": "Large"},
        "reviewText": "I now have 4",
        "unixReviewTime": 1514764800,
    }
    got = events("amazon2018", write("reviews.json", [json.dumps(review)])).drop("line")
    assert got.rows() == [("AUI6WTTT0QZYS", "5120053084", "review", 1514764800.0, None, "I now have 4", 1234.0, 5.0)]
    meta = {
        "asin": "5120053084",
        "title": "Toy &amp;amp; Case",
        "description": ["Botiquecutie &reg; only.", "", "<p>Hot<br/>Pink</p>"],
        "brand": "by\n    \n    OPI",
        "category": ["Clothing", "Girls", "Clothing"],
        "main_cat": '<img src="x" alt="Toys"/>',
        "feature": ["Soft", "<i>Washable</i>"],
        "also_buy": ["B1"],
        "similar_item": "<table></table>",
        "rank": "19,963,069 in Clothing",
    }
    script = {"asin": "X", "title": "var aPageStart = (new Date()).getTime();", "category": []}
    first, second = items("amazon2018", write("meta.json.gz", [json.dumps(meta), json.dumps(script)]))
    assert first == {
        "item": "5120053084",
        "title": "Toy & Case",
        "description": "Botiquecutie ® only. Hot Pink",
        "brand": "OPI",
        "categories": ["Clothing", "Girls"],
        "features": ["Soft", "Washable"],
    }
    assert second["title"] is None


def test_2023_reviews_and_metadata(write, events, items):
    review = {
        "rating": 4,
        "title": "Nice",
        "text": "Such a lovely scent.<br />Yes.",
        "asin": "B00YQ6X8EO",
        "parent_asin": "B00PARENT0",
        "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
        "timestamp": 1588687728923,
        "helpful_vote": 7,
        "verified_purchase": True,
    }
    variant = {name: value for name, value in review.items() if name != "parent_asin"}
    got = events("amazon2023", write("r.jsonl", [json.dumps(review), json.dumps(variant)])).drop("line")
    row = ("review", 1588687728.923, None, "Such a lovely scent. Yes.", 7.0, 4.0)
    user = "AGKHLEW2SOWHNMFQIJGBECAF7INQ"
    assert got.rows() == [(user, "B00PARENT0", *row), (user, "B00YQ6X8EO", *row)]
    meta = {
        "main_category": "All Beauty",
        "title": "Howard LC0008",
        "average_rating": 4.8,
        "features": [],
        "description": ["One.", "Two."],
        "price": None,
        "store": "Howard Products",
        "categories": ["Beauty", "Hair"],
        "details": {"UPC": "1"},
        "parent_asin": "B00PARENT0",
        "images": [{"thumb": "x"}],
    }
    [record] = items("amazon2023", write("meta.jsonl", [json.dumps(meta)]))
    assert record == {
        "item": "B00PARENT0",
        "title": "Howard LC0008",
        "description": "One. Two.",
        "brand": "Howard Products",
        "categories": ["Beauty", "Hair"],
        "main_category": "All Beauty",
    }


@pytest.mark.parametrize("dialect", [json.dumps, repr])
@pytest.mark.parametrize("name", ["amazon2014", "amazon2018"])
def test_duplicate_metadata(name, dialect, write, items):
    lines = [dialect({"asin": asin, "title": "it's"}) for asin in ("B1", "B2", "B1")]
    with pytest.raises(UserError, match="line 3: item 'B1' was already on line 1"):
        items(name, write("meta.json.gz", lines))
    bad = BadLines("skip")
    assert [record["item"] for record in items(name, write("meta.json", lines), bad)] == ["B1", "B2"]
    assert bad.count == 1


def test_a_line_is_never_run(write, items, tmp_path):
    """`eval` would make the file."""
    trace = tmp_path / "trace"
    line = f"{{'asin': open({str(trace)!r}, 'w').name}}"
    with pytest.raises(UserError, match="not a Python literal"):
        items("amazon2014", write("meta.json", [line]))
    assert not trace.exists()


def test_a_typed_field_of_another_type_is_looked_at_again(write, events):
    """Strict types are only the quick way: a whole number as an id and a vote as a number are good."""
    review = {"reviewerID": 12, "asin": 34, "unixReviewTime": "56", "vote": 3, "overall": "4"}
    got = events("amazon2018", write("r.json", [json.dumps(review)])).drop("line")
    assert got.rows() == [("12", "34", "review", 56.0, None, None, 3.0, 4.0)]


RATED = ("A1KLRMWW2FWPL4", "0000031887", 5.0, 1297468800.0)


@pytest.mark.parametrize(
    "lines",
    [
        ["A1KLRMWW2FWPL4,0000031887,5.0,1297468800"],
        ["0000031887,A1KLRMWW2FWPL4,5.0,1297468800"],
        ["user_id,parent_asin,rating,timestamp", "A1KLRMWW2FWPL4,0000031887,5.0,1297468800000"],
    ],
    ids=["2014", "2018", "2023"],
)
def test_ratings_of_each_year(lines, write, events, items):
    got = events("amazon_ratings", write("ratings.csv", lines))
    assert got.select("user", "item", "rating", "timestamp").rows() == [RATED]
    meta = ['{"asin": "1", "category": ["a"]}', "{'asin': '2', 'categories': [['b']]}", '{"parent_asin": "3"}']
    assert [record["item"] for record in items("amazon_ratings", write("meta.json", meta))] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a &lt; b and c &gt; d", "a < b and c > d"),
        ("<script>var a = '<b>';</script>Soap", "Soap"),
        ("<STYLE type='x'>p {}\n</STYLE > Soap <!-- no -->", "Soap"),
        ("5 < 6 > 4", "5 < 6 > 4"),
        ("caf&eacute;\t&#34;x&#34;", 'café "x"'),
        ("<br>", None),
        ("one\x00two\u200b three", "one two three"),
        ("Cafe\u0301", "Café"),
        ("a <!-- b <i> --> c", "a c"),
        (None, None),
        ("<a" * 20_000, "<a" * 20_000),
    ],
)
def test_plain_text(dirty, clean):
    assert plain(dirty) == clean
