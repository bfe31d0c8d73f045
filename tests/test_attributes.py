"""Attributes: what a spec means for a catalogue, classes of numbers, missing values, which items share what."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recllm.attributes import Attribute, ItemAttributes, attributes_of
from recllm.errors import UserError

ITEMS = pl.DataFrame(
    {
        "item": ["a", "b", "c", "d", "e"],
        "title": ["A", "B", "C", "D", "E"],
        "brand": ["Acme", " Acme ", "Bolt", "", None],
        "categories": [["Shop", "Cups"], ["Cups"], ["Shop", "Pots"], [], None],
        "price": ["$9.99", "$1,299.00", "12", "n/a", None],
        "weight": [1.5, 2.5, 2.5, float("nan"), None],
        "tier": [1, 2, 2, 1, None],
        "empty": ["", " ", None, None, ""],
        "same": ["x", "x", "x", "x", None],
        "code": ["p1", "p2", "p3", "p4", "p5"],
        "size of it: small": ["s", "s", "l", "l", None],
    }
)


def known(*specs: str, items: pl.DataFrame = ITEMS) -> ItemAttributes:
    return ItemAttributes.of(attributes_of(specs, items), items)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("brand", ["Acme", "Acme", "Bolt", None, None]),
        ("categories", ["Cups", "Cups", "Pots", None, None]),  # the leaf, wherever it stands
        ("tier", ["1", "2", "2", "1", None]),
        ("price:2", [0, 1, 1, None, None]),
        ("weight:2", [0, 1, 1, None, None]),
        ("weight:9", [0, 1, 1, None, None]),  # two different numbers make two classes at most
    ],
)
def test_values(spec, values):
    (attribute,) = attributes_of([spec], ITEMS)
    assert attribute.values(ITEMS) == values
    assert attribute.name == attribute.column == spec.split(":")[0]


def test_which_items_share_what():
    found = known("brand", "categories", "price:2")
    assert found.names == ("brand", "categories", "price")
    assert found.ids.dtype == torch.int64
    assert found.ids.tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 1], [-1] * 3, [-1] * 3]
    rows, target = torch.tensor([[0, 1, 2, 3, 4, -1]]), torch.tensor([[1]])
    same = found.same(rows, target)
    assert same.shape == (1, 6, 3)
    assert same[0].tolist() == [
        [True, True, False], [True, True, True], [False, False, True], *[[False] * 3] * 3
    ]  # fmt: skip
    nothing = torch.tensor([3, 4, -1])
    assert not found.same(nothing, nothing).any(), "a missing value equals nothing, not even itself"
    assert found.ids_of(rows[0, :3]).tolist() == found.ids[:3].tolist()
    assert found.ids_of(torch.tensor(-1)).tolist() == [-1] * 3


def test_a_column_with_signs_in_its_name_gets_a_name_for_a_token():
    (attribute,) = attributes_of(["size of it: small"], ITEMS)
    assert (attribute.name, attribute.column) == ("size_of_it_small", "size of it: small")


@given(st.lists(st.integers(0, 12), min_size=2, max_size=20), st.integers(2, 6))
@settings(max_examples=60)
def test_classes_of_any_numbers(numbers, classes):
    assume((different := len(set(numbers))) > 1)
    numbers = numbers * 2  # so that some items share a class
    items = pl.DataFrame({"item": list(map(str, range(len(numbers)))), "n": list(map(float, numbers))})
    (attribute,) = attributes_of([f"n:{classes}"], items)
    found = attribute.values(items)
    count = len(attribute.edges) + 1
    assert set(found) == set(range(count)), "no class is empty"
    assert 2 <= count <= min(classes, different)
    by_number = dict(zip(numbers, found))
    assert all(by_number[number] == which for number, which in zip(numbers, found)), "equal numbers, one class"
    ordered = [by_number[number] for number in sorted(by_number)]
    assert ordered == sorted(ordered)


def test_classes_hold_about_as_many_items_each():
    prices = np.random.default_rng(0).lognormal(size=1000)
    items = pl.DataFrame({"item": list(map(str, range(1000))), "price": prices})
    (attribute,) = attributes_of(["price:5"], items)
    assert np.bincount(attribute.values(items)).tolist() == [200] * 5
    assert attribute.edges == tuple(np.sort(prices)[[200, 400, 600, 800]])


def test_an_item_gets_the_class_of_the_edges_wherever_it_is_asked():
    (attribute,) = attributes_of(["weight:2"], ITEMS)
    assert attribute.edges == (2.5,)
    others = pl.DataFrame({"weight": [0.0, 2.4, 2.5, 99.0, None, float("inf")]})
    assert attribute.values(others) == [0, 0, 1, 1, None, None]
    stored = json.loads(json.dumps(attribute.as_json()))
    assert Attribute.read(stored) == attribute
    assert Attribute.read(json.loads(json.dumps(Attribute("brand", "brand").as_json()))) == Attribute("brand", "brand")


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([], "K = 0"),
        (["colour"], r"no column 'colour'.*brand, categories, price"),
        (["colour:5"], r"no column 'colour'"),
        (["empty"], r"'empty': no item has a value.*brand, categories"),
        (["same"], r"'same': its value is the same for every item"),
        (["code"], r"'code': no two items share a value"),
        (["title"], r"'title': no two items share a value"),
        (["brand:3"], r"'brand': no item has a number"),
        (["price:1"], r"'price:1' is no number of classes.*price:5"),
        (["price:x"], r"'price:x' is no number of classes"),
        (["weight"], r"'weight' holds numbers.*weight:5"),
        (["brand", "brand"], r"'brand' is named twice"),
        (["tier:2", "tier:3"], r"'tier' is named twice"),
    ],
)
def test_bad_specs_are_refused(specs, said):
    with pytest.raises(UserError, match=said):
        attributes_of(specs, ITEMS)


def test_items_without_the_column_are_refused():
    attributes = attributes_of(["tier"], ITEMS)
    with pytest.raises(UserError, match="no column 'tier'"):
        ItemAttributes.of(attributes, ITEMS.drop("tier"))


@pytest.mark.parametrize("value", [{}, {"name": "a", "column": "a", "edges": "x"}, {"name": "a", "column": "a"}])
def test_an_attribute_of_another_version_is_refused(value):
    with pytest.raises(UserError, match="update recllm"):
        Attribute.read(value)
