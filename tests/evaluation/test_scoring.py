"""Scores of five items and four users by hand, against loops over random data, and what is refused."""

import json
import math
import random

import pytest
import torch
from helpers import write_catalogue
from hypothesis import given
from hypothesis import strategies as st

from recllm import metrics
from recllm.errors import UserError
from recllm.evaluation.predictions import Prediction
from recllm.evaluation.scoring import per_user, score, score_tables
from recllm.evaluation.slices import labels_of

ITEMS = ["i1", "i2", "i3", "i4", "i5"]
SEQUENCES = {  # the last is the test target, the one before it is of valid, the others are trained on
    "u1": ["i1", "i2", "i3", "i4"],
    "u2": ["i1", "i1", "i2", "i1"],
    "u3": ["i2", "i1", "i5"],
    "u4": ["i1", "i2", "i1", "i2", "i3", "i1", "i2"],
}  # training events: i1 5, i2 4, i3 1, i4 0, i5 0
LISTS = {"u1": ["i1", "i4", "i2"], "u2": ["i1", "i2"], "u3": ["i2", "i1", "i5"], "u4": ["i1", "i3"]}


@pytest.fixture
def shop(tmp_path):
    return write_catalogue(tmp_path / "shop", ITEMS, SEQUENCES)


def predict(catalogue, lists, split="test") -> list[Prediction]:
    cases = catalogue.targets(split).select("user", "position", "item").iter_rows()
    return [Prediction(user, position, item, lists[user], [0.0] * len(lists[user])) for user, position, item in cases]


def test_by_hand(shop):
    scores = score(predict(shop, LISTS), shop, "test", ks=(1, 2))
    second = 1 / math.log2(3)  # ndcg of the second place; the targets stand at 2, 1, 3 and nowhere
    assert scores["users"] == scores["targets"] == 4
    assert scores["metrics"] == pytest.approx(
        {
            "recall@1": 1 / 4,
            "recall@2": 2 / 4,
            "ndcg@1": 1 / 4,
            "ndcg@2": (second + 1) / 4,
            "mrr@1": 1 / 4,
            "mrr@2": (1 / 2 + 1) / 4,
            "recall@3": 3 / 4,
        }
    )
    # Shown: i1 four times, i2 twice, i3 and i4 once. Gini: (−4·0 − 2·1 + 0·1 + 2·2 + 4·4) / (5·8).
    # Popularity percentiles of i1 … i5: 1, .75, .5, 0, .25; shown 6/8, taken (0 + 1 + .25 + .75)/4.
    assert scores["lists"] == pytest.approx(
        {
            "coverage@2": 4 / 5,
            "gini@2": 18 / 40,
            "popularity_bias@2": 6 / 8 - 2 / 4,
            "distinct_share@2": 1,
            "validity": 10 / 12,
        }
    )
    expected = {
        "history length": {"1-4": (3, 2 / 3, (second + 1) / 3), "5-9": (1, 0, 0)},
        "item popularity": {"0": (2, 1 / 2, second / 2), "1-4": (1, 0, 0), "5-19": (1, 1, 1)},
        "new items": {"seen in training": (2, 1 / 2, 1 / 2), "new": (2, 1 / 2, second / 2)},
        "repeat": {"target not in the history": (2, 1 / 2, second / 2), "target in the history": (2, 1 / 2, 1 / 2)},
    }
    assert {name: list(parts) for name, parts in scores["slices"].items()} == {
        name: list(parts) for name, parts in expected.items()
    }
    for name, parts in expected.items():
        for label, (users, recall, ndcg) in parts.items():
            assert scores["slices"][name][label] == pytest.approx(
                {"users": users, "targets": users, "recall@2": recall, "ndcg@2": ndcg}
            )


def test_intervals_are_those_of_the_users_values(shop):
    scores = score(predict(shop, LISTS), shop, "test", ks=(1, 2), seed=3)
    hits = torch.tensor([1.0, 1, 0, 0])  # u1 … u4
    assert scores["intervals"]["recall@2"] == pytest.approx(metrics.bootstrap_interval(hits, seed=3))
    assert set(scores["intervals"]) == set(scores["metrics"])


def test_the_order_of_predictions_is_no_matter_and_all_values_are_json(shop):
    predictions = predict(shop, LISTS)
    once = score(predictions, shop, "test", ks=(1, 2))
    assert score(predictions[::-1], shop, "test", ks=(1, 2)) == once
    assert json.loads(json.dumps(once, allow_nan=False)) == once


def test_unfilled_places_count_against_the_length_that_was_asked_for(shop):
    predictions = predict(shop, LISTS)
    assert score(predictions, shop, "test", ks=(1,))["lists"]["validity"] == pytest.approx(10 / 12)
    longer = score(predictions, shop, "test", ks=(1,), length=5)
    assert longer["lists"]["validity"] == 10 / 20
    assert list(longer["metrics"])[-1] == "recall@5"
    assert score(predictions, shop, "test", ks=(5,))["lists"]["validity"] == 10 / 20


def test_who_recommends_nothing_scores_zero_and_has_no_popularity(shop):
    scores = score(predict(shop, {user: [] for user in SEQUENCES}), shop, "test", ks=(2,))
    assert set(scores["metrics"].values()) == {0}
    assert scores["lists"]["popularity_bias@2"] is None
    assert scores["lists"]["validity"] == 0
    json.dumps(scores, allow_nan=False)
    assert score_tables(scores)[1].row_count == 5


def test_users_with_several_targets(tmp_path):
    """Every event a target: u1 has three, u2 one. The mean is over targets; a user's targets are drawn together."""
    catalogue = write_catalogue(tmp_path, ["a", "b"], {"u1": ["a", "a", "b"], "u2": ["b"]}, split="train")
    scores = score(predict(catalogue, {"u1": ["a"], "u2": ["b"]}, "train"), catalogue, "train", ks=(1,))
    assert (scores["users"], scores["targets"]) == (2, 4)
    assert scores["metrics"]["recall@1"] == 3 / 4
    assert scores["slices"]["history length"]["0"] == {"users": 2, "targets": 2, "recall@1": 1, "ndcg@1": 1}
    assert scores["slices"]["history length"]["1-4"]["users"] == 1
    # n̄ = 2, m = 3/4: u1 (2 − 1·m)/2 = 5/8, u2 (1 + 1·m)/2 = 7/8
    assert scores["intervals"]["recall@1"] == [5 / 8, 7 / 8]


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=1))
def test_the_mean_over_users_is_the_mean_over_cases(cases):
    values = torch.tensor([value for _, value in cases], dtype=torch.double)
    user = torch.tensor([user for user, _ in cases]).unique(return_inverse=True)[1]
    assert float(per_user(values, user).mean()) == pytest.approx(float(values.mean()), abs=1e-12)
    alone = torch.arange(len(values))
    assert per_user(values, alone).tolist() == pytest.approx(values.tolist(), abs=1e-12)


def test_against_loops_over_random_users(tmp_path):
    dice = random.Random(0)
    items = [f"i{n}" for n in range(40)]
    sequences = {
        f"u{n:02}": [items[int(40 * dice.random() ** 2)] for _ in range(dice.choice([3, 5, 8, 14, 30, 60]))]
        for n in range(60)
    }
    catalogue = write_catalogue(tmp_path, items, sequences)
    lists = {user: dice.sample(items, dice.randint(0, 12)) for user in sequences}
    scores = score(predict(catalogue, lists), catalogue, "test", ks=(4, 9))
    trained = [item for sequence in sequences.values() for item in sequence[:-2]]
    hit = {user: float(sequence[-1] in lists[user][:9]) for user, sequence in sequences.items()}

    def expect(name, label, chosen):
        part = scores["slices"][name].get(label, {"users": 0})
        assert part["users"] == len(chosen), (name, label)
        if chosen:
            assert part["recall@9"] == pytest.approx(sum(hit[user] for user in chosen) / len(chosen))

    length = {user: len(sequence) - 1 for user, sequence in sequences.items()}
    count = {user: trained.count(sequence[-1]) for user, sequence in sequences.items()}
    lengths = (("1-4", 1, 4), ("5-9", 5, 9), ("10-19", 10, 19), ("20-49", 20, 49), ("50+", 50, 999))
    counts = (("0", 0, 0), ("1-4", 1, 4), ("5-19", 5, 19), ("20-99", 20, 99), ("100+", 100, 9999))
    for name, size, buckets in (("history length", length, lengths), ("item popularity", count, counts)):
        for label, low, high in buckets:
            expect(name, label, [user for user in sequences if low <= size[user] <= high])
    repeats = [user for user, sequence in sequences.items() if sequence[-1] in sequence[:-1]]
    expect("repeat", "target in the history", repeats)
    expect("repeat", "target not in the history", [user for user in sequences if user not in repeats])
    for name in scores["slices"]:
        assert sum(part["users"] for part in scores["slices"][name].values()) == 60


def test_bucket_names():
    assert labels_of((0, 1, 5, 20)) == ("0", "1-4", "5-19", "20+")


def test_tables_hold_the_figures(shop):
    main, lists, slices = score_tables(score(predict(shop, LISTS), shop, "test", ks=(1, 2)))
    assert list(main.columns[1].cells)[1] == "0.5000"
    assert "popularity bias@2" in list(lists.columns[0].cells)
    assert list(slices.columns[1].cells)[:2] == ["1-4", "5-9"]


# ---- refused


def changed(predictions, index, **values):
    old = predictions[index]
    fields = {name: values.get(name, getattr(old, name)) for name in old.__struct_fields__}
    return [*predictions[:index], Prediction(**fields), *predictions[index + 1 :]]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda p: p[1:], r"^p\.jsonl: 1 of the 4 targets of the test split have no prediction, .* 'u1' at position 3"),
        (lambda p: [], "4 of the 4 targets"),
        (lambda p: [*p, p[1]], r"^p\.jsonl, line 5: user 'u2' at position 3 is predicted a second time"),
        (
            lambda p: changed(p, 0, user="u9"),
            "line 1: user 'u9' at position 3 is not a target of the test split of t",
        ),
        (lambda p: changed(p, 2, position=1), "line 3: user 'u3' at position 1 is not a target"),
        (lambda p: changed(p, 3, target="i1"), "line 4: user 'u4' at position 6 took 'i2' .* prediction says 'i1'"),
        (lambda p: changed(p, 2, items=["i2", "x"]), "line 3: user 'u3' is recommended 'x', which tiny does not have"),
        (lambda p: changed(p, 2, items=["x"])[::-1], "line 2: user 'u3' is recommended 'x'"),
        (lambda p: changed(p, 1, items=ITEMS), "line 2: 5 items in a list that was to have 3"),
    ],
)
def test_predictions_that_are_not_the_splits_are_refused(shop, spoil, sentence):
    predictions = spoil(predict(shop, LISTS))
    with pytest.raises(UserError, match=sentence) as caught:
        score(predictions, shop, "test", ks=(1, 2), length=3, file="p.jsonl")
    assert "Fix: " in str(caught.value)


def test_other_lengths_and_splits_are_refused(shop, tmp_path):
    with pytest.raises(UserError, match="recall@10 needs lists of 10 items, and they were to have 3"):
        score(predict(shop, LISTS), shop, "test", ks=(5, 10), length=3)
    catalogue = write_catalogue(tmp_path / "short", ["a"], {"u": ["a", "a"]})
    with pytest.raises(UserError, match="the test split has no targets"):
        score([], catalogue, "test")


def test_an_event_of_an_item_that_is_not_in_the_catalogue_is_refused(tmp_path):
    catalogue = write_catalogue(tmp_path, ["a"], {"u": ["a", "a", "ghost"]})
    with pytest.raises(UserError, match=r"item 'ghost' has events, and items\.parquet does not have it"):
        score([Prediction("u", 2, "ghost", ["a"], [0.0])], catalogue, "test")
