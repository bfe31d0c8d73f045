"""The curriculum: GREAM's formula, every batch once, ever denser, and a function of the seed alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from recllm.errors import UserError
from recllm.mixtures.curriculum import (
    ALIGN,
    REASON,
    Schedule,
    ScheduledSampler,
    curriculum_order,
    insert_probability,
    sequential_order,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "curriculum.json").read_text())


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['i']}of{case['n_align']}")
def test_the_probability_is_that_of_the_worked_examples(case):
    found = insert_probability(case["i"], case["n_align"], case["n_reason"], case["gamma"])
    assert found == pytest.approx(case["p"], abs=1e-6)


def test_the_probability_by_hand():
    assert insert_probability(0, 10, 10) == 0  # nothing before the first steps of alignment
    assert insert_probability(5, 10, 10) == pytest.approx(1.5 * 0.5 * 1)
    assert insert_probability(9, 10, 10) == 1  # 1.35, and no probability is above one
    assert insert_probability(4, 10, 5, gamma=1) == pytest.approx(1 * 0.4 * 0.5)


@pytest.mark.parametrize(("align", "reason"), [(40, 25), (7, 30), (30, 7), (1, 1), (12, 0), (0, 5)])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_every_batch_of_every_epoch_comes_once_and_each_kind_in_its_order(align, reason, epochs):
    order = curriculum_order(align, reason, epochs, 1.5, seed=3)
    assert len(order) == epochs
    for batches in order:
        assert [number for kind, number in batches if kind == ALIGN] == list(range(align))
        assert [number for kind, number in batches if kind == REASON] == list(range(reason))


def test_reasoning_grows_denser_and_the_last_epoch_is_even():
    align, reason = 300, 150
    halves = np.zeros((2, 2))  # epoch, half of the alignment batches
    for seed in range(20):
        order = curriculum_order(align, reason, 2, 1.5, seed)
        for epoch, batches in enumerate(order):
            seen = 0
            for kind, _ in batches:
                seen += kind == ALIGN
                if kind == REASON and seen < align:
                    halves[epoch, int(seen > align / 2)] += 1
    # p rises from 0 to .75, so 1/4 of the inserted ones fall in the first half: 1.5 · .5 · (1/8) / (1/2)
    assert halves[0, 0] / halves[0].sum() == pytest.approx(0.25, abs=0.04)
    assert halves[1, 0] / halves[1].sum() == pytest.approx(0.5, abs=0.04)


def test_the_order_is_a_function_of_the_seed():
    assert curriculum_order(50, 40, 3, 1.5, 7) == curriculum_order(50, 40, 3, 1.5, 7)
    assert curriculum_order(50, 40, 3, 1.5, 7) != curriculum_order(50, 40, 3, 1.5, 8)
    epochs = curriculum_order(50, 40, 3, 1.5, 7)
    assert epochs[0] != epochs[1]


def test_direct_then_reasoning_goes_through_one_kind_before_the_other():
    order = sequential_order(3, 2, 2)
    assert order == [
        [("align", 0, 0), ("align", 1, 0), ("align", 2, 0), ("align", 0, 1), ("align", 1, 1)],
        [("align", 2, 1), ("reason", 0, 0), ("reason", 1, 0), ("reason", 0, 1), ("reason", 1, 1)],
    ]


@pytest.mark.parametrize("kind", ["curriculum", "uniform", "direct_then_reasoning"])
@pytest.mark.parametrize("lengths", [None, "varied"])
def test_a_sampler_gives_every_row_in_batches_of_one_kind(kind, lengths):
    align, total, batch, epochs = 22, 36, 4, 3
    lengths = None if lengths is None else np.arange(total) % 11
    sampler = ScheduledSampler(align, total, batch, epochs, Schedule(kind, seed=1), lengths)
    counts = np.zeros(total, int)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == (6 + 4) * batch
        for start in range(0, len(rows), batch):
            kinds = {row < align for row in rows[start : start + batch]}
            assert len(kinds) == 1, "a batch of two kinds"
        counts += np.bincount(rows, minlength=total)
    # 22 rows in 6 batches of 4 fill two places again, in each of three passes; 14 rows in 4 batches likewise.
    assert counts.min() == epochs
    assert counts.sum() == epochs * 40


def test_a_sampler_that_is_asked_later_gives_the_same():
    """A resumed run builds it anew and goes on in the middle: nothing may depend on the epochs before."""
    first = ScheduledSampler(20, 33, 4, 3, Schedule(seed=5))
    epochs = []
    for epoch in range(3):
        first.set_epoch(epoch)
        epochs.append(list(first))
    again = ScheduledSampler(20, 33, 4, 3, Schedule(seed=5))
    again.set_epoch(2)
    assert list(again) == epochs[2]
    assert epochs[0] != epochs[1]


def test_rows_of_like_length_come_together():
    lengths = np.random.default_rng(0).integers(1, 200, size=400)

    def spread(sampler):
        rows = np.array(list(sampler)).reshape(-1, 8)
        return np.ptp(lengths[rows], axis=1).mean()

    grouped = ScheduledSampler(400, 400, 8, 1, Schedule(seed=0), lengths)
    plain = ScheduledSampler(400, 400, 8, 1, Schedule(seed=0))
    assert spread(grouped) < 0.2 * spread(plain)


def test_a_strange_schedule_is_refused():
    with pytest.raises(UserError, match="schedule 'random' is not one of"):
        Schedule("random")
    with pytest.raises(UserError, match="gamma must be above 0"):
        Schedule(gamma=0)
