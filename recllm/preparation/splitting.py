"""Which events may be learnt from, which are validation and which are test targets."""

from pathlib import Path

import numpy as np

from recllm.errors import UserError
from recllm.preparation.config import PrepareConfig
from recllm.preparation.staging import NO_SPLIT, SPLITS, read_bucket

TRAIN, VALID, TEST, NONE = range(4)
SHORTEST = 3  # leave-one-out: one event to learn from, one to validate, one to test


def positions(ordered: np.ndarray) -> np.ndarray:
    """0, 1, 2, … within each user."""
    starts = np.flatnonzero(np.r_[True, ordered["user"][1:] != ordered["user"][:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    return np.arange(len(ordered)) - np.repeat(starts, lengths)


def leave_one_out(ordered: np.ndarray) -> np.ndarray:
    """Last event: test; the one before: valid; a user with fewer than three events only trains."""
    place = positions(ordered)
    ends = np.flatnonzero(np.r_[ordered["user"][1:] != ordered["user"][:-1], True])
    ends = ends[place[ends] >= SHORTEST - 1]
    split = np.full(len(ordered), TRAIN, np.uint8)
    split[ends], split[ends - 1] = TEST, VALID
    return split


def by_time(ordered: np.ndarray, valid_from: float, test_from: float) -> np.ndarray:
    """An event at a boundary belongs to the later side, so equal timestamps are never on both."""
    late = (ordered["time"] >= valid_from).astype(np.uint8) + (ordered["time"] >= test_from)
    return _with_a_history(ordered, late.astype(np.uint8))


def time_boundaries(buckets: list[Path], config: PrepareConfig) -> tuple[float, float]:
    """valid_from and test_from: given, or the timestamps that leave the wanted shares of all targets after them.

    Targets are events with a history, as in MiniOneRec's 8:1:1. Holds the time of every event, twice for a moment.
    """
    if config.valid_from is not None:
        return config.valid_from, config.test_from
    times = []
    for path in buckets:
        events = read_bucket(path)
        times.append(events["time"][positions(events) > 0])
    times = np.concatenate(times)
    times.sort()
    if not len(times):
        raise UserError("no user has two events, so there is no target to split", fix="lower --user_core")
    first_valid = times[min(round(len(times) * (1 - config.valid_share - config.test_share)), len(times) - 1)]
    first_test = times[min(round(len(times) * (1 - config.test_share)), len(times) - 1)]
    if first_valid >= first_test:
        raise UserError(
            "the timestamps are too coarse to split by shares: validation and test begin at the same one",
            fix="give --valid_from and --test_from, or --split leave-one-out",
        )
    return float(first_valid), float(first_test)


def official(ordered: np.ndarray) -> np.ndarray:
    """As the files say; but what comes after a user's first validation or test event is nothing to learn from."""
    held_out = ordered["split"] != TRAIN
    before = np.cumsum(held_out) - held_out  # of all users
    first = np.flatnonzero(positions(ordered) == 0)
    starts = np.repeat(before[first], np.diff(np.r_[first, len(ordered)]))
    split = ordered["split"].copy()
    split[(split == TRAIN) & (before > starts)] = NONE
    return _with_a_history(ordered, split)


def _with_a_history(ordered: np.ndarray, split: np.ndarray) -> np.ndarray:
    """A user's first event cannot be recommended from a history: it is no target, and in test time nothing to learn."""
    split[(split != TRAIN) & (positions(ordered) == 0)] = NONE
    return split


def refuse_empty(config: PrepareConfig, counts: dict[str, int]) -> None:
    """A time or official split with an empty part is a mistake of units or dates, not a wish."""
    if config.split != "leave-one-out" and (empty := [name for name in SPLITS[:3] if not counts.get(name)]):
        raise UserError(
            f"the {config.split} split leaves no event for {' and '.join(empty)}",
            file=config.interactions[0],
            fix="check --valid_from and --test_from (they are in the unit of the timestamps), or --split leave-one-out",
        )


def check(config: PrepareConfig, timed: bool, buckets: list[Path]) -> None:
    """The split can be made from these events, or one sentence says why not."""
    if config.split == "time" and not timed:
        raise UserError("a time split needs timestamps, and these events have none", fix="--split leave-one-out")
    if config.split == "official":
        missing = sum(int((read_bucket(path)["split"] == NO_SPLIT).sum()) for path in buckets)
        if missing:
            raise UserError(
                f"{missing:,} events do not say which of {'/'.join(SPLITS[:3])} they belong to",
                fix="--split leave-one-out or --split time",
            )
