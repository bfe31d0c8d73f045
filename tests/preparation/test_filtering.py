"""Ordering, repeats and the k-core against slow references that a reader can check by eye."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.preparation.filtering import count_ties, in_order, k_core, without_repeats
from recllm.preparation.splitting import NONE, TEST, TRAIN, VALID, by_time, leave_one_out, positions
from recllm.preparation.staging import EVENT, read_bucket


def events(*rows: tuple[int, int], behaviours=None, times=None) -> np.ndarray:
    """(user, item) in file order."""
    made = np.zeros(len(rows), EVENT)
    made["user"] = [user for user, _ in rows]
    made["item"] = [item for _, item in rows]
    made["order"] = range(len(rows))
    if behaviours is not None:
        made["behaviour"] = behaviours
    if times is not None:
        made["time"] = times
    return made


def pairs(made: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(made["user"].tolist(), made["item"].tolist()))


def test_ties_keep_the_order_of_the_file_and_are_counted():
    ordered = in_order(events((1, 7), (0, 5), (1, 8), (1, 9), times=[3, 1, 2, 3]))
    assert pairs(ordered) == [(0, 5), (1, 8), (1, 7), (1, 9)]
    assert count_ties(ordered) == 1


def test_repeat_policies():
    rows = events((0, 1), (0, 2), (0, 1), (0, 1), (1, 1), behaviours=[0, 0, 0, 1, 1])
    assert pairs(without_repeats(rows, "keep")) == pairs(rows)
    assert pairs(without_repeats(rows, "first")) == [(0, 1), (0, 2), (1, 1)]
    assert without_repeats(rows, "last")["order"].tolist() == [1, 3, 4]
    # The fourth event repeats the item with another behaviour (cart after click), so it is no repetition of the third.
    assert without_repeats(rows, "consecutive")["order"].tolist() == [0, 1, 2, 3, 4]
    rows["behaviour"] = 0
    assert without_repeats(rows, "consecutive")["order"].tolist() == [0, 1, 2, 4]


def slow_k_core(rows: list[tuple[int, int]], user_core: int, item_core: int) -> list[tuple[int, int]]:
    while True:
        users, items = [u for u, _ in rows], [i for _, i in rows]
        kept = [(u, i) for u, i in rows if users.count(u) >= user_core and items.count(i) >= item_core]
        if kept == rows:
            return rows
        rows = kept


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40),
    user_core=st.integers(1, 4),
    item_core=st.integers(1, 4),
    buckets=st.integers(1, 3),
)
def test_k_core_equals_the_slow_one_however_the_users_are_bucketed(
    tmp_path_factory, rows, user_core, item_core, buckets
):
    folder = tmp_path_factory.mktemp("buckets")
    ordered = in_order(events(*rows)) if rows else events()
    paths = [folder / str(number) for number in range(buckets)]
    for number, path in enumerate(paths):
        ordered[ordered["user"] % buckets == number].tofile(path)
    rounds = k_core(paths, users=7, items=7, user_core=user_core, item_core=item_core)
    kept = [pair for path in paths for pair in pairs(read_bucket(path))]
    assert sorted(kept) == sorted(slow_k_core(rows, user_core, item_core))
    assert sum(round["events"] for round in rounds) == len(rows) - len(kept)


def test_positions_and_leave_one_out():
    ordered = events((3, 0), (3, 1), (3, 2), (3, 3), (5, 0), (5, 1), (8, 0), (8, 1), (8, 2))
    assert positions(ordered).tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert leave_one_out(ordered).tolist() == [TRAIN, TRAIN, VALID, TEST, TRAIN, TRAIN, TRAIN, VALID, TEST]


def test_equal_timestamps_are_never_on_both_sides_of_a_boundary():
    ordered = events((0, 0), (0, 1), (1, 2), (1, 3), (1, 4), times=[1, 5, 5, 7, 9])
    assert by_time(ordered, valid_from=5, test_from=9).tolist() == [TRAIN, VALID, NONE, VALID, TEST]


@pytest.mark.parametrize("policy", ["keep", "first", "last", "consecutive"])
def test_no_events_stay_no_events(policy):
    assert len(without_repeats(events(), policy)) == 0
