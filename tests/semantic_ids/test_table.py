"""The table: valid by construction, found again from codes, tokens and files."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.catalogue import fingerprint_items
from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids.prefixes import find_prefixes, number_prefixes, tuple_keys

CODES = [[0, 1, -1], [0, 2, 0], [0, 2, 1], [1, 0, -1]]


@pytest.fixture
def table() -> SemanticIdTable:
    return SemanticIdTable(("w", "x", "y", "z"), np.array(CODES), (2, 3, 2))


def test_items_codes_and_tokens(table):
    assert table.codes_of("y") == (0, 2, 1)
    assert table.codes_of("w") == (0, 1)
    assert table.depth_of("w") == 2
    assert table.depth_of("y") == 3
    assert table.tokens_of("y") == ["<|a_0|>", "<|b_2|>", "<|c_1|>"]
    assert table.text_of("w") == "<|a_0|><|b_1|>"
    assert table.all_tokens() == ["<|a_0|>", "<|a_1|>", "<|b_0|>", "<|b_1|>", "<|b_2|>", "<|c_0|>", "<|c_1|>"]
    assert len(table) == 4
    assert "w" in table
    assert "v" not in table


def test_item_of_wants_the_whole_tuple(table):
    assert table.item_of((0, 1)) == "w"
    assert table.item_of((0, 1, -1)) == "w"
    assert [table.item_of(codes) for codes in [(), (0,), (0, 2), (0, 1, 0), (1, 1), (5, 5, 5), (0, 2, 1, 0)]] == [
        None
    ] * 7


def test_rows_of_many_at_once(table):
    assert table.rows_of(table.codes).tolist() == [0, 1, 2, 3]
    assert table.rows_of([(1, 0), (0, 2, 1), (0,), (-1, 0, 0), (99, 0)]).tolist() == [3, 2, -1, -1, -1]
    assert table.rows_of([]).tolist() == []


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("buy <|a_0|><|b_1|>, then <|a_0|> <|b_2|><|c_1|>!", [(0, 1), (0, 2, 1)]),
        ("<|a_0|><|a_1|><|b_2|>", [(1, 2)]),  # a run begins again at level a
        ("<|a_0|><|b_9|><|c_1|>", []),  # no such token
        ("<|a_0|>, <|b_1|>", []),  # more than white space in between
        ("<|b_1|><|c_0|>", []),
        ("<|a_00|><|b_1|>", []),
        ("<|a_1|><|b_1|><|c_0|><|c_1|>", [(1, 1, 0)]),  # no item, yet item-like
        ("", []),
    ],
)
def test_parse(table, text, codes):
    assert table.parse(text) == codes


def test_parse_finds_what_text_of_wrote(table):
    assert table.parse(" and ".join(map(table.text_of, table.items))) == [table.codes_of(item) for item in table.items]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"codes": [[0, 1, -1], [0, 2, 0], [0, 2, 0], [1, 0, -1]]}, "have the same codes"),
        ({"codes": [[0, 2, -1], [0, 2, 0], [0, 2, 1], [1, 0, -1]]}, "are the beginning of those of"),
        ({"codes": [[0, 1, -1], [0, 2, 0], [0, 2, 2], [1, 0, -1]]}, "do not fit the levels' sizes"),
        ({"codes": [[0, -1, 1], [0, 2, 0], [0, 2, 1], [1, 0, -1]]}, "do not fit the levels' sizes"),
        ({"codes": [[-1, -1, -1], [0, 2, 0], [0, 2, 1], [1, 0, -1]]}, "do not fit the levels' sizes"),
        ({"codes": [[0, 1], [0, 2], [1, 1], [1, 0]]}, "do not fit 4 items and 3 levels"),
        ({"codes": np.array(CODES, float)}, "do not fit 4 items and 3 levels"),
        ({"codes": [[0], [0, 1], [1], [1, 1]]}, "differ in length"),
        ({"items": ("w", "x", "x", "z")}, "item 'x' is there twice"),
        ({"items": ("w", "x", 3, "z")}, "must be text"),
        ({"items": (), "codes": np.zeros((0, 3), int)}, "at least one item"),
        ({"sizes": (2, 3, 0)}, "at least one code"),
        ({"pattern": "<{level}>"}, "must hold {level} and {code}"),
        ({"pattern": "<{level}_{code}_{code}>"}, "once each"),
        ({"pattern": "<{level}_{code:03d}>"}, "once each"),
        ({"pattern": "<{level"}, "once each"),
    ],
)
def test_invalid_tables_cannot_be_made(change, sentence):
    fields = {"items": ("w", "x", "y", "z"), "codes": np.array(CODES), "sizes": (2, 3, 2)} | change
    with pytest.raises(UserError) as error:
        SemanticIdTable(**fields)
    assert sentence in str(error.value)


def test_a_table_is_frozen(table):
    with pytest.raises(ValueError, match="read-only"):
        table.codes[0, 0] = 1
    source = np.array(CODES, np.int32)
    mine = SemanticIdTable(("w", "x", "y", "z"), source, (2, 3, 2))
    source[0, 1] = 0
    assert mine.codes_of("w") == (0, 1)


def test_unknown_item_and_token_are_sentences(table):
    with pytest.raises(UserError, match="'v' has no semantic ID"):
        table.codes_of("v")
    with pytest.raises(UserError, match="no code 2 at level 0"):
        table.token(0, 2)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3).map(tuple), min_size=1, max_size=40, unique=True),
    st.sampled_from(
        ["<|{level}_{code}|>", "<{level}_{code}>", "[{code}:{level}]", "{level}{code}", "{{{level}}}{code}."]
    ),
)
def test_every_item_is_found_again(rows, pattern):
    items = tuple(f"item {number}" for number in range(len(rows)))
    table = SemanticIdTable(items, np.array(rows), (4, 4, 4), pattern)
    for item, codes in zip(items, rows):
        assert table.item_of(codes) == item
        assert table.parse(table.text_of(item)) == [codes]
    missing = {(a, b, c) for a in range(4) for b in range(4) for c in range(4)} - set(rows)
    assert all(table.item_of(codes) is None for codes in missing)
    assert SemanticIdTable.from_index(table.to_index(), pattern, (4, 4, 4)).fingerprint == table.fingerprint


@given(
    st.lists(st.lists(st.integers(-1, 4), min_size=4, max_size=4), min_size=1, max_size=30),
    st.sampled_from([(5, 5, 5, 5), (2**20, 2**20, 2**20, 2**20)]),
)
def test_prefix_numbers_agree_with_comparing_tuples(rows, sizes):
    codes = np.array(rows)
    keys, numbers = number_prefixes(codes, sizes)
    key = tuple_keys(codes, sizes)
    for i, first in enumerate(rows):
        for j, second in enumerate(rows):
            assert (key[i] < key[j]) == (first < second)
            for level in range(4):
                assert (numbers[level][i] < numbers[level][j]) == (first[: level + 1] < second[: level + 1])
    assert find_prefixes(codes, sizes, keys).tolist() == numbers[-1].tolist()


def test_save_and_load(table, tmp_path):
    path = tmp_path / "semantic_ids.json"
    table = SemanticIdTable(table.items, table.codes, table.sizes, report={"figure": 1.5})
    table.save(path)
    first = path.read_bytes()
    loaded = SemanticIdTable.load(path, expect_items_fingerprint=fingerprint_items(["w", "x", "y", "z"]))
    assert loaded == table
    assert loaded.codes.tolist() == CODES
    assert loaded.report == {"figure": 1.5}
    loaded.save(path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["semantic_ids.json"]
    assert json.loads(first)["items"]["w"] == [0, 1]  # plain JSON, for people and other programs


def test_the_fingerprint_is_of_items_codes_sizes_and_pattern(table):
    fields = {"items": table.items, "codes": table.codes, "sizes": table.sizes}
    swapped = table.codes[[1, 0, 2, 3]]
    changes = [
        {"items": ("v", "x", "y", "z")},
        {"codes": swapped},
        {"sizes": (2, 3, 3)},
        {"pattern": "<{level}_{code}>"},
    ]
    others = {SemanticIdTable(**fields | change).fingerprint for change in changes}
    assert len(others | {table.fingerprint}) == 5
    assert SemanticIdTable(**fields, items_fingerprint="other", report={"a": 1}).fingerprint == table.fingerprint


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"w":[0,1]', '"w":[0,0]', "was edited"),
        ('"w":[0,1]', '"v":[0,1]', "was edited"),
        ('"w":[0,1]', '"w":[0,2,0]', "have the same codes"),
        ('"w":[0,1]', '"w":[0,1.5]', "of another type"),
        ('"w":[0,1]', '"w":3', "of another type"),
        ('"sizes":[2,3,2]', '"sizes":[2,3]', "do not fit"),
        ('"sizes":[2,3,2],', "", "a part is missing"),
        ("recllm semantic IDs 1", "other", "not a file of semantic IDs"),
        ('"w":[0,1]', '"w":[0,1', "not valid JSON"),
    ],
)
def test_an_edited_file_is_refused_in_a_sentence(table, tmp_path, old, new, sentence):
    path = tmp_path / "semantic_ids.json"
    table.save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=sentence) as error:
        SemanticIdTable.load(path)
    assert str(path) in str(error.value)


def test_missing_file_and_other_catalogue(table, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        SemanticIdTable.load(tmp_path / "none.json")
    table.save(tmp_path / "s.json")
    with pytest.raises(UserError, match="another catalogue"):
        SemanticIdTable.load(tmp_path / "s.json", expect_items_fingerprint="other")


def test_published_indices_with_collisions():
    index = {"1": ["<a_5>", "<b_0>"], "2": ["<a_5>", "<b_0>"], "3": ["<a_5>", "<b_1>"]}
    with pytest.raises(UserError, match=r"items '[12]' and '[12]' have the same codes"):
        SemanticIdTable.from_index(index)
    table = SemanticIdTable.from_index(index, on_collision="extra-level")
    assert table.to_index() == {
        "1": ["<a_5>", "<b_0>", "<c_0>"],
        "2": ["<a_5>", "<b_0>", "<c_1>"],
        "3": ["<a_5>", "<b_1>"],
    }
    assert SemanticIdTable.from_index(index, on_collision="extra-level-all").codes[:, 2].tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="needs embeddings"):
        SemanticIdTable.from_index(index, on_collision="reassign")


@pytest.mark.parametrize(
    "index",
    [{}, {"1": []}, {"1": ["<b_0>", "<a_0>"]}, {"1": ["<a_0>", "<a_1>"]}, {"1": ["word"]}, {"1": ["<a_0>", "b 1"]}],
)
def test_an_index_that_is_none(index):
    with pytest.raises(UserError):
        SemanticIdTable.from_index(index)
