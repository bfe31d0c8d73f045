"""Bad lines, ids that were seen before, and the checks that all formats share."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.formats.records import BadLines, SeenIds, item_records
from recllm.formats.values import BadLine, identity, item_record, number, python_literal, texts


def test_stop_raises_with_file_line_and_fix():
    with pytest.raises(UserError, match=r"f\.txt, line 3: no\. Fix: .*--on_bad_line skip"):
        BadLines().add("f.txt", 3, "no")


def test_skip_counts_all_and_lists_the_first():
    bad = BadLines("skip", keep=2)
    for line in (1, 2, 3):
        bad.add("folder/f.txt", line, "no")
    assert bad.count == 3
    assert bad.listed == [{"file": "f.txt", "line": 1, "reason": "no"}, {"file": "f.txt", "line": 2, "reason": "no"}]


def test_a_policy_that_is_neither_is_refused():
    with pytest.raises(UserError, match="neither stop nor skip"):
        BadLines("ignore")


def test_seen_ids_equal_a_dict():
    seen, reference = SeenIds(), {}
    for line in range(1, 6001):
        name = f"item {line * 7919 % 4000}"  # 4,000 different ones: the table grows twice
        assert seen.add(name, line) == reference.get(name, 0)
        reference.setdefault(name, line)


def test_a_duplicate_item_names_both_lines():
    lines, bad = [(1, "a"), (4, "b"), (9, "a")], BadLines("skip")
    assert [record["item"] for record in item_records("f", lines, item_record, bad)] == ["a", "b"]
    assert bad.listed == [{"file": "f", "line": 9, "reason": "item 'a' was already on line 1"}]


@given(st.one_of(st.integers(), st.text(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_an_id_is_text_that_is_not_blank_and_can_be_written(value):
    try:
        name = identity(value, "item")
    except BadLine:
        assert not isinstance(value, int) or isinstance(value, bool)
        return
    assert name == str(value)
    assert name.strip()
    name.encode()


@given(st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.binary()))
def test_a_number_is_finite(value):
    try:
        result = number(value, "timestamp")
    except BadLine:
        return
    assert math.isfinite(result)
    assert result == float(value)


def test_numbers_beyond_what_can_be_held():
    for value in (10**400, 10**5000):
        with pytest.raises(BadLine, match="not a number"):
            number(value, "timestamp")
    with pytest.raises(BadLine, match="neither text nor a whole number"):
        identity(10**5000, "item")


def test_own_columns_are_text_or_lists_of_text():
    record = item_record(
        7,
        title="  A title ",
        categories=[["a", None, "b"], ["a", "c"], ""],
        asin="B1",
        price=4.5,
        flag=True,
        codes=[42, 7, None, 42],
        nested={"a": 1},
        deep=[{"a": 1}],
        nothing=None,
    )
    assert record == {
        "item": "7",
        "title": "A title",
        "description": None,
        "brand": None,
        "categories": ["a", "b", "c"],
        "asin": "B1",
        "price": "4.5",
        "flag": "true",
        "codes": ["42", "7", "42"],
    }


def test_a_column_name_that_cannot_be_written():
    with pytest.raises(BadLine, match="not valid Unicode"):
        item_record("1", **{"\ud800": "x"})


def test_texts_flattens_without_recursion():
    nested = "x"
    for _ in range(50_000):
        nested = [nested]
    assert texts(nested) == ["x"]


@pytest.mark.parametrize(
    "source",
    ["open('x')", "1 + 'a'", "{[]: 1}", "(" * 5000, "-" * 50_000 + "1", "1+" * 20_000 + "1", "'\x00", "9" * 5000],
)
def test_a_literal_that_is_none_is_a_bad_line(source):
    with pytest.raises(BadLine, match="not a Python literal"):
        python_literal(source)
