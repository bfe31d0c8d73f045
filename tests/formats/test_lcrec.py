"""The one-object JSON files of LC-Rec, LETTER and S3-Rec, and indices in both directions."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.formats import BadLines
from recllm.formats.lcrec import read_index, write_index

INTER = '{"0": [0, 1, 2], "7": [2]}'
BROKEN = [
    ("[1]", "not one JSON object", None),
    ('{"0": [1],\n"1": ', "not valid JSON", 2),
    ("[" * 100_000, "brackets too deep", None),
    (b'{"0": "\xff"}', "not UTF-8 text", None),
    ("", "not valid JSON", 1),
    ("{}", "holds no", None),
]


def test_events(write, events):
    for name in ("x.inter.json", "x.inter.json.gz"):
        got = events("lcrec", write(name, INTER))
        rows = [(1, "0", "0"), (1, "0", "1"), (1, "0", "2"), (2, "7", "2")]
        assert got.select("line", "user", "item").rows() == rows
        assert got["timestamp"].null_count() == 4


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ('"1": []', "user has no items"),
        ('"1": 5', "items is not a list: 5"),
        ('"1": [1, null]', "item is missing"),
        ('"": [1]', "user is empty"),
        ('"a": [1]', "user 'a' was already on line 1"),
    ],
)
def test_bad_users(entry, reason, write, events):
    path, bad = write("x.inter.json", f'{{"a": [1], "b": [2], {entry}, "d": [4], "e": [5]}}'), BadLines("skip")
    with pytest.raises(UserError) as error:
        events("lcrec", path)
    assert (error.value.problem, error.value.line) == (reason, 3)
    assert events("lcrec", path, bad)["user"].to_list() == ["a", "b", "d", "e"]
    assert bad.listed == [{"file": "x.inter.json", "line": 3, "reason": reason}]


@pytest.mark.parametrize(("content", "reason", "line"), BROKEN)
def test_broken_files(content, reason, line, write, events, items):
    path = write("x.json", content)
    for read in (lambda: events("lcrec", path), lambda: items("lcrec", path), lambda: items("s3rec", path)):
        with pytest.raises(UserError) as error:
            read()
        assert reason in error.value.problem
        assert error.value.line == line


def test_items(write, items):
    content = {
        "0": {"title": "A", "description": ["x", "y"], "brand": "B", "categories": "Toys, Dolls", "nested": {"a": 1}},
        "1": {"title": "", "description": "", "brand": None, "categories": [["Toys"], ["Cars"]], "rank": 4},
    }
    assert items("lcrec", write("x.item.json", json.dumps(content))) == [
        {"item": "0", "title": "A", "description": "x y", "brand": "B", "categories": ["Toys", "Dolls"]},
        {
            "item": "1",
            "title": None,
            "description": None,
            "brand": None,
            "categories": ["Toys", "Cars"],
            "rank": "4",
        },
    ]


def test_bad_items(write, items):
    path, bad = write("x.item.json", '{"0": {}, "0": {"title": "again"}, "1": [], "": {}, "2": {}}'), BadLines("skip")
    assert [record["item"] for record in items("lcrec", path, bad)] == ["0", "2"]
    assert [(entry["line"], entry["reason"]) for entry in bad.listed] == [
        (2, "item '0' was already on line 1"),
        (3, "the fields of item '1' are not an object"),
        (4, "item is empty"),
    ]


def test_s3rec(write, events, items):
    got = events("s3rec", write("Beauty.txt", "1 1 2 3\n\n2\t4  5 \n"))
    assert got.select("line", "user", "item").rows() == [
        (1, "1", "1"),
        (1, "1", "2"),
        (1, "1", "3"),
        (3, "2", "4"),
        (3, "2", "5"),
    ]
    records = items("s3rec", write("Beauty_item2attributes.json", '{"1": [173, 1], "2": []}'))
    assert [(record["item"], record.get("attributes")) for record in records] == [("1", ["173", "1"]), ("2", None)]
    with pytest.raises(UserError, match="attributes of item '1' are not a list"):
        items("s3rec", write("Beauty_item2attributes.json", '{"1": 3}'))


TOKENS = st.text(min_size=1, max_size=5).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.dictionaries(TOKENS, st.lists(TOKENS, min_size=1, max_size=4).map(tuple), min_size=1, max_size=5))
def test_an_index_comes_back(index, tmp_path):
    write_index(tmp_path / "x.index.json", index)
    got = read_index(tmp_path / "x.index.json")
    assert got == index
    assert list(got) == list(index)


def test_a_published_index(write):
    assert read_index(write("x.index.json", '{"0": ["<a_12>", "<b_7>"], "1": ["<a_12>", "<b_7>"]}')) == {
        "0": ("<a_12>", "<b_7>"),
        "1": ("<a_12>", "<b_7>"),
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"0": ["<a_1>"], "1": []}', "item '1' has no list of tokens but []"),
        ('{"0": ["<a_1>"], "1": "<a_1>"}', "item '1' has no list of tokens but '<a_1>'"),
        ('{"0": ["<a_1>"], "1": ["<a_1>", 7]}', "item '1' has a token that is not text: 7"),
        ('{"0": ["<a_1>"], "1": ["<a_1>", " "]}', "item '1' has a token that is not text: ' '"),
        ('{"0": ["<a_1>"], "0": ["<a_2>"]}', "item '0' is there twice"),
        ('{"0": ["<a_1>"], "": ["<a_2>"]}', "item is empty"),
    ],
)
def test_a_bad_index(content, reason, write):
    with pytest.raises(UserError) as error:
        read_index(write("x.index.json", content))
    assert (error.value.problem, error.value.line) == (reason, 2)


@pytest.mark.parametrize(("content", "reason", "line"), BROKEN)
def test_a_broken_index(content, reason, line, write):
    with pytest.raises(UserError) as error:
        read_index(write("x.index.json", content))
    assert reason in error.value.problem


@pytest.mark.parametrize("index", [{}, {"0": []}, {"0": ["a", ""]}, {"": ["a"]}, {"0": ["\ud800"]}])
def test_a_bad_index_is_not_written(index, tmp_path):
    with pytest.raises(UserError):
        write_index(tmp_path / "x.index.json", index)
    assert not list(tmp_path.iterdir())
