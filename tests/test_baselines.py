"""Popularity, repeat-last and item-kNN: arithmetic to redo by hand, slow references, and what may not matter."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from events_for_tests import write_events
from helpers import write_catalogue
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm import baselines
from recllm.baselines import ItemKNN, Popularity, RepeatLast, best_items, cosine, keep_best
from recllm.errors import UserError

ITEMS = ["a", "b", "c", "d", "e"]


def cases_of(*histories):
    return pl.DataFrame({"history": histories}, schema={"history": pl.List(pl.String)})


def random_sequences(users=40, items=30, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 9, users)
    return {f"u{user}": [f"i{row}" for row in generator.integers(0, items, n)] for user, n in enumerate(lengths)}


@pytest.fixture
def random_catalogue(tmp_path):
    return write_catalogue(tmp_path / "random", [f"i{row}" for row in range(30)], random_sequences())


values = st.sampled_from([-math.inf, -2.5, -1.0, -0.0, 0.0, 1e-30, 0.5, 0.5000001, 3.0])


@given(st.lists(st.lists(values, min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_best_items_is_a_sort_by_score_then_row(scores, k):
    found = best_items(torch.tensor(scores), k)
    for case, row_scores in enumerate(scores):
        ordered = sorted(range(6), key=lambda row: (-row_scores[row], row))[:k]
        expected = [row for row in ordered if row_scores[row] > -math.inf]
        assert found.rows[case].tolist() == expected + [-1] * (k - len(expected))
        shown = [row_scores[row] for row in expected] + [-math.inf] * (k - len(expected))
        assert torch.equal(found.scores[case], torch.tensor(shown))


def test_excluded_rows_are_in_no_list():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    found = best_items(scores, 3, (torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])))
    assert found.rows.tolist() == [[1, 2, -1], [2, -1, -1]]
    assert scores[0, 0] == 3.0  # the caller's scores are left as they were


def test_popularity_counts_training_events_and_orders_equals_by_row(tmp_path):
    # The last two events of u and v are validation and test: b, c, c, b and e remain. All of w's are training.
    sequences = {"u": ["b", "c", "c", "b", "a", "a"], "v": ["e", "a", "a"], "w": ["d", "d"]}
    catalogue = write_catalogue(tmp_path, ITEMS, sequences)
    ranking = Popularity.of(catalogue).rank(catalogue.targets("test"), 5)
    assert ranking.rows.tolist() == [[1, 2, 3, 4, 0]] * 2
    assert ranking.scores.tolist() == [[2, 2, 2, 1, 0]] * 2


def test_popularity_of_conversions_counts_those_that_train(tmp_path):
    # u's last two payments (b, c) are held out; of what trains, a is paid twice and b once, and c is only clicked.
    events = {
        "u": [("a", "pay"), ("c", "click"), ("c", "click"), ("b", "pay"), ("c", "pay")],
        "v": [("a", "click"), ("a", "pay"), ("b", "pay"), ("c", "click"), ("b", "pay"), ("d", "pay")],
    }
    catalogue = write_events(tmp_path, events, target_behaviour="pay")
    counts = dict(zip(catalogue.item_ids, Popularity.of(catalogue, behaviour="pay").counts.tolist()))
    assert counts == {"a": 2, "b": 1, "c": 0, "d": 0}
    assert Popularity.of(catalogue, behaviour="pay").describe()["behaviour"] == "pay"
    every = dict(zip(catalogue.item_ids, Popularity.of(catalogue).counts.tolist()))
    assert every == {"a": 3, "b": 1, "c": 3, "d": 0}


def test_repeat_last_is_the_history_from_its_end_each_item_once(tmp_path):
    catalogue = write_catalogue(tmp_path, ITEMS, {"u": ["a", "b", "c"]})
    ranking = RepeatLast.of(catalogue).rank(cases_of(["a", "b", "a", "d"], ["c"], [], ["e", "d", "c", "b"]), 3)
    assert ranking.rows.tolist() == [[3, 0, 1], [2, -1, -1], [-1, -1, -1], [1, 2, 3]]
    assert ranking.scores.tolist()[0] == [0, -1, -2]
    assert ranking.scores.tolist()[1] == [0, -math.inf, -math.inf]


def test_cosine_by_hand():
    # Three users: (a, b), (a, b, c), (a, a).   ‖a‖² = 1 + 1 + 4 = 6, ‖b‖² = 2, ‖c‖² = 1.
    items, users = np.array([0, 1, 0, 1, 2, 0, 0]), np.array([0, 0, 1, 1, 1, 2, 2])
    expected = [
        [2 / 6, 2 / math.sqrt(12), 1 / math.sqrt(6), 0],  # a comes back once: 2 · (2 − 1) ordered pairs
        [2 / math.sqrt(12), 0, 1 / math.sqrt(2), 0],
        [1 / math.sqrt(6), 1 / math.sqrt(2), 0, 0],
        [0, 0, 0, 0],  # never seen
    ]
    assert np.allclose(cosine(items, users, 4).toarray(), expected)


def test_item_knn_by_hand(tmp_path):
    # Training: u (a, b), v (a, b), w (c, b). similarity a-b = 2/√(2·3), b-c = 1/√(3·1); a and c have no user in common.
    sequences = {"u": ["a", "b", "e", "e"], "v": ["a", "b", "e", "e"], "w": ["c", "b", "e", "e"]}
    knn = ItemKNN.of(write_catalogue(tmp_path, ITEMS, sequences), neighbours=2, fading=0.5)
    ranking = knn.rank(cases_of(["a"], ["c", "a"], ["a", "b"], ["d"], []), 3)
    ab, bc = 2 / math.sqrt(6), 1 / math.sqrt(3)
    assert ranking.rows.tolist() == [[1, -1, -1], [1, -1, -1], [0, 2, 1], [-1, -1, -1], [-1, -1, -1]]
    assert torch.allclose(ranking.scores[0, :1], torch.tensor([ab]))
    assert torch.allclose(ranking.scores[1, :1], torch.tensor([ab + 0.5 * bc]))
    assert torch.allclose(ranking.scores[2], torch.tensor([ab, bc, 0.5 * ab]))


def test_item_knn_against_a_loop_over_users_and_items(random_catalogue):
    knn = ItemKNN.of(random_catalogue, neighbours=4, fading=0.7)
    cases = random_catalogue.targets("test")
    counts = np.zeros((40, 30))
    for user, sequence in enumerate(random_catalogue.training_sequences()["items"]):
        for item in sequence:
            counts[user, random_catalogue.row_of[item]] += 1
    similarity = np.zeros((30, 30))
    for i in range(30):
        norm = np.linalg.norm(counts[:, i])
        for j in range(30):
            pairs = counts[:, i] @ counts[:, j] - (counts[:, i].sum() if i == j else 0)
            similarity[i, j] = pairs / (norm * np.linalg.norm(counts[:, j])) if pairs else 0
        kept = sorted(range(30), key=lambda j: (-similarity[i, j].round(12), j))[:4]
        similarity[i, [j for j in range(30) if j not in kept]] = 0
    ranking = knn.rank(cases, 30)
    for case, history in enumerate(cases["history"]):
        expected = np.zeros(30)
        for ago, item in enumerate(reversed(history.to_list())):
            expected += 0.7**ago * similarity[random_catalogue.row_of[item]]
        found = np.zeros(30)
        listed = ranking.rows[case] >= 0
        found[ranking.rows[case][listed]] = ranking.scores[case][listed]
        assert np.allclose(found, expected, atol=1e-6)


def test_only_the_best_neighbours_are_kept_and_equals_by_column():
    similarity = cosine(np.array([0, 1, 2, 3]), np.array([0, 0, 0, 0]), 4)  # one user with four items: all 1
    assert keep_best(similarity, 2).toarray().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_a_case_alone_is_answered_as_among_others(random_catalogue, monkeypatch):
    cases = random_catalogue.targets("test")
    for ranker in (Popularity.of(random_catalogue), RepeatLast.of(random_catalogue), ItemKNN.of(random_catalogue)):
        together = ranker.rank(cases, 10)
        monkeypatch.setattr(baselines, "CELLS", 90)  # three cases at a time
        assert torch.equal(ranker.rank(cases, 10).rows, together.rows)
        for case in range(len(cases)):
            alone = ranker.rank(cases[case : case + 1], 10)
            assert torch.equal(alone.rows[0], together.rows[case])
            assert torch.equal(alone.scores[0], together.scores[case])
        assert ranker.rank(cases[:0], 10).rows.shape == (0, 10)


def test_events_of_validation_and_test_change_nothing(tmp_path, random_catalogue):
    changed = {
        user: [*sequence[:-2], "i0", "i0"] if len(sequence) >= 3 else sequence
        for user, sequence in random_sequences().items()
    }
    other = write_catalogue(tmp_path / "other", [f"i{row}" for row in range(30)], changed)
    cases = random_catalogue.targets("test")
    for kind in (Popularity, ItemKNN):
        assert torch.equal(kind.of(other).rank(cases, 10).scores, kind.of(random_catalogue).rank(cases, 10).scores)


def test_items_of_the_history_are_left_out_when_asked(random_catalogue):
    cases = random_catalogue.targets("test")
    with_history = ItemKNN.of(random_catalogue).rank(cases, 10).rows
    without = ItemKNN.of(random_catalogue, exclude_history=True).rank(cases, 10).rows
    own = [{random_catalogue.row_of[item] for item in history} for history in cases["history"]]
    assert any(own[case] & set(with_history[case].tolist()) for case in range(len(cases)))
    for case, rows in enumerate(without.tolist()):
        assert not own[case] & set(rows)


def test_an_item_that_is_not_in_the_catalogue_is_named(random_catalogue):
    for ranker in (RepeatLast.of(random_catalogue), ItemKNN.of(random_catalogue)):
        with pytest.raises(UserError, match="'i99' of a history is not in the catalogue"):
            ranker.rank(cases_of(["i1", "i99"]), 3)


@pytest.mark.parametrize("bad", [{"neighbours": 0}, {"fading": 0.0}, {"fading": 1.5}])
def test_settings_that_mean_nothing_are_refused(random_catalogue, bad):
    with pytest.raises(UserError, match="neighbours is"):
        ItemKNN.of(random_catalogue, **bad)
