"""RecBole's atomic files: headers by many names, quotes that mean nothing, sequences of tokens."""

import pytest

from recllm.errors import UserError
from recllm.formats import BadLines


def test_events_with_every_column(write, events):
    path = write(
        "x.inter",
        [
            "rating:float\tbehavior_type:token\tuid:token\tItem_ID:token\ttime:float\treview:token_seq\tvote:float",
            '4.5\tcart\t7\t"i, 1"\t12.5\tso "good"\t3',
            "\t\t8\ti2\t13\t\t",
        ],
    )
    assert events("recbole", path).drop("line").rows() == [
        ("7", '"i, 1"', "cart", 12.5, None, 'so "good"', 3.0, 4.5),
        ("8", "i2", "interaction", 13.0, None, None, None, None),
    ]


def test_items(write, items):
    path = write(
        "x.item.gz",
        [
            "item_id:token\tmovie_title:token_seq\tclass:token_seq\trelease_year:token\tprice:float\ttags:token_seq\tvec:float_seq",
            '1\tToy Story "1"\tAnimation Children\t1995\t3.5\ta b a\t0.1 0.2',
            "2\tHeat\t\t\t\t\t",
        ],
    )
    nothing = {"description": None, "brand": None}
    assert items("recbole", path) == [
        nothing
        | {
            "item": "1",
            "title": 'Toy Story "1"',
            "categories": ["Animation", "Children"],
            "release_year": "1995",
            "price": "3.5",
            "tags": ["a", "b", "a"],
        },
        nothing | {"item": "2", "title": "Heat", "categories": []},
    ]


def test_a_second_column_of_one_meaning_does_not_take_the_firsts_place(write, items):
    header = "item_id:token\titem:token\ttitle:token\tbrand:token\tstore:token\titem_name:token"
    [record] = items("recbole", write("x.item", [header, "1\tother\tHeat\tAcme\tShop\tA name"]))
    assert (record["item"], record["title"], record["brand"]) == ("1", "Heat", "Acme")
    assert (record["store"], record["item_name"]) == ("Shop", "A name")
    header = "item_id:token\tasin:token\titem_name:token\tname:token"
    [record] = items("recbole", write("y.item", [header, "1\tB2\tLong\tShort"]))
    assert (record["item"], record["asin"], record["title"], record["name"]) == ("1", "B2", "Long", "Short")


def test_a_category_that_is_one_token_is_not_taken_apart(write, items):
    [record] = items("recbole", write("x.item", ["item_id:token\tcategory:token", "1\tHealth & Care"]))
    assert record["categories"] == ["Health & Care"]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("uid:token\tthing:token", "no item column; the header has uid, thing"),
        ("who:token\titem_id:token", "no user column; the header has who, item_id"),
        ("user_id,item_id,timestamp", "no user column; the header has user_id,item_id,timestamp"),
        ("user_id:token\titem_id_list:token_seq\titem_id:token", "a history with its target"),
    ],
)
def test_a_wrong_header_is_refused_also_when_lines_are_skipped(header, reason, write, events):
    with pytest.raises(UserError) as error:
        events("recbole", write("x.inter", [header, "1\t2\t3"]), BadLines("skip"))
    assert reason in error.value.problem
    assert error.value.line == 1


def test_items_need_an_item_and_no_duplicates(write, items):
    with pytest.raises(UserError, match="no item column; the header has title"):
        items("recbole", write("x.item", ["title:token", "a"]))
    with pytest.raises(UserError, match="line 4: item '1' was already on line 2"):
        items("recbole", write("x.item", ["item_id:token", "1", "2", "1"]))


def test_a_header_that_is_not_text(write, events):
    with pytest.raises(UserError, match="line 1: not UTF-8 text"):
        events("recbole", write("x.inter", b"\xff\xfeu\x00s\x00"))
