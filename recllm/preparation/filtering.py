"""Order, repeats and the iterated k-core, on arrays of events of whole users."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from recllm.preparation.staging import read_bucket


def in_order(events: np.ndarray) -> np.ndarray:
    """By user, then time; events of one timestamp keep the order they have in the file."""
    return events[np.lexsort((events["order"], events["time"], events["user"]))]


def count_ties(ordered: np.ndarray) -> int:
    """Events that share user and timestamp with the one before: the order of these is the file's, not time's."""
    same_user = ordered["user"][1:] == ordered["user"][:-1]
    return int(np.sum(same_user & (ordered["time"][1:] == ordered["time"][:-1])))


def without_repeats(ordered: np.ndarray, policy: str) -> np.ndarray:
    """See PrepareConfig.repeats. The order of what stays is unchanged."""
    if policy == "keep" or not len(ordered):
        return ordered
    if policy == "consecutive":
        again = np.ones(len(ordered), bool)
        again[0] = False
        for column in ("user", "item", "behaviour"):
            again[1:] &= ordered[column][1:] == ordered[column][:-1]
        return ordered[~again]
    pair = ordered["user"].astype(np.uint64) << np.uint64(32) | ordered["item"].astype(np.uint64)
    if policy == "first":
        _, keep = np.unique(pair, return_index=True)
    else:
        _, keep = np.unique(pair[::-1], return_index=True)
        keep = len(pair) - 1 - keep
    return ordered[np.sort(keep)]


def rewrite(buckets: list[Path], change: Callable[[np.ndarray], np.ndarray]) -> int:
    """Apply `change` to every bucket in place; the number of events left."""
    left = 0
    for path in buckets:
        events = change(read_bucket(path))
        events.tofile(path)
        left += len(events)
    return left


def k_core(buckets: list[Path], users: int, items: int, user_core: int, item_core: int) -> list[dict]:
    """Drop users with fewer than `user_core` and items with fewer than `item_core` events until none is left to drop.

    The largest subset in which both hold is unique, so the order of dropping does not matter. Returns what each round
    dropped: {"users", "items", "events"}.
    """
    rounds = []
    while True:
        of_user, of_item = counts(buckets, users, items)
        weak_user = (of_user > 0) & (of_user < user_core)
        weak_item = (of_item > 0) & (of_item < item_core)
        if not weak_user.any() and not weak_item.any():
            return rounds
        before = int(of_user.sum())
        after = rewrite(buckets, lambda events: events[~(weak_user[events["user"]] | weak_item[events["item"]])])  # noqa: B023 - called at once
        rounds.append({"users": int(weak_user.sum()), "items": int(weak_item.sum()), "events": before - after})


def counts(buckets: list[Path], users: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Events of each user and of each item. A bucket's users are a range of codes of their own."""
    of_user, of_item = np.zeros(users, np.int64), np.zeros(items, np.int64)
    for path in buckets:
        events = read_bucket(path)
        if not len(events):
            continue
        first = int(events["user"].min())
        here = np.bincount(events["user"] - first)
        of_user[first : first + len(here)] += here
        of_item += np.bincount(events["item"], minlength=items)
    return of_user, of_item
