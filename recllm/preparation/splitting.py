"""Which events may be learnt from, which are validation and which are test targets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from recllm.errors import UserError
from recllm.files import digest
from recllm.preparation.config import PrepareConfig
from recllm.preparation.staging import NO_SPLIT, SPLITS, Staged, read_bucket

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


def by_conversion(ordered: np.ndarray, conversion: np.ndarray) -> np.ndarray:
    """A user's last conversion: test; the one before it: valid; what came before both trains.

    What came after the validation target is nothing to learn from: its history would show the target. Users without a
    conversion only train.   `conversion` (E,) bool: is the event one that may be held out?
    """
    starts = np.flatnonzero(np.r_[True, ordered["user"][1:] != ordered["user"][:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    before = np.r_[0, np.cumsum(conversion)]  # (E + 1,) of all users
    total = np.repeat(before[starts + lengths] - before[starts], lengths)
    left = np.repeat(before[starts + lengths], lengths) - before[:-1]  # conversions of the user from this event on
    split = np.where(left >= np.minimum(total, 2), TRAIN, NONE).astype(np.uint8)
    split[conversion & (left == 1)] = TEST
    split[conversion & (left == 2)] = VALID
    return _with_a_history(ordered, split)


def held_out_draw(user: str) -> float:
    """A number in [0, 1) of the user's id and nothing else; below the share, conversions of the user are held out."""
    return int(digest("recllm held_out_share", user)[:13], 16) / 16**13


def conversions(config: PrepareConfig, staged: Staged) -> Callable[[np.ndarray], np.ndarray]:
    """events (E,) -> (E,) bool: of the target behaviour, by a user of the share?"""
    check_target(config.target_behaviour, staged.behaviours, config.interactions[0])
    target = staged.behaviours.index(config.target_behaviour)
    if config.held_out_share == 1:
        return lambda events: events["behaviour"] == target
    chosen = np.array([held_out_draw(user) < config.held_out_share for user in staged.users])
    return lambda events: (events["behaviour"] == target) & chosen[events["user"]]


def check_target(target: str, behaviours: list[str], file: str) -> None:
    """There are conversions, or one sentence says what there is instead."""
    if target in behaviours:
        return
    if len(behaviours) == 1:
        raise UserError(
            f"the data have no behaviours to tell conversions by: every event is one of {behaviours[0]!r}",
            file=file,
            fix="a log that says what users did, or --split leave-one-out",
        )
    raise UserError(
        f"no event is a conversion: none has the behaviour {target!r}; the data have {', '.join(behaviours)}",
        file=file,
        fix="--target_behaviour, or --rename purchase=pay",
    )


def _with_a_history(ordered: np.ndarray, split: np.ndarray) -> np.ndarray:
    """A user's first event cannot be recommended from a history: it is no target, and in test time nothing to learn."""
    split[(split != TRAIN) & (positions(ordered) == 0)] = NONE
    return split


def refuse_empty(config: PrepareConfig, counts: dict[str, int]) -> None:
    """A time or official split with an empty part is a mistake of units or dates, not a wish."""
    if config.split == "conversion":
        if empty := [name for name in ("train", "test") if not counts.get(name)]:
            raise UserError(
                f"the conversion split leaves no event for {' and '.join(empty)}",
                file=config.interactions[0],
                fix="another --held_out_share, or data with more conversions",
            )
    elif config.split != "leave-one-out" and (empty := [name for name in SPLITS[:3] if not counts.get(name)]):
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
