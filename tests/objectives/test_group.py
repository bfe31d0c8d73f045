"""What all methods share: hits and prefixes of items of any depth, rewards relative to their group."""

import pytest
import torch
from groups_for_tests import in_float64, rewards, shuffled, worked_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.objectives.group import (
    code_count,
    common_prefix,
    group_normalised,
    has_signal,
    is_hit,
    rank_normalised,
)

TARGET = torch.tensor([[4, 2, -1]])  # an item of two codes


@pytest.mark.parametrize(
    ("answer", "shared", "hit"),
    [
        ([4, 2, -1], 2, True),
        ([4, 2, 0], 2, False),  # goes on: another item
        ([4, -1, -1], 1, False),
        ([4, 3, -1], 1, False),
        ([3, 2, -1], 0, False),  # what comes after a wrong code does not count
        ([-1, -1, -1], 0, False),
    ],
)
def test_an_answer_beside_a_short_item(answer, shared, hit):
    codes = torch.tensor([[answer]])
    assert common_prefix(codes, TARGET.unsqueeze(1)).item() == shared
    assert is_hit(codes, TARGET).item() is hit
    assert code_count(codes).item() == sum(code >= 0 for code in answer)


def test_nothing_is_not_the_answer_to_nothing():
    absent = torch.full((1, 1, 3), -1)
    assert not is_hit(absent, absent[0]).any()


def test_by_hand():
    found = group_normalised(in_float64([[1, 0, 0, 0], [2, 1, 0, 1]]))
    # mean 1/4, squares 9/16 + 3/16 = 3/4, over 3 is 1/4, std 1/2; mean 1, squares 2, over 3, std .8165
    assert found[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert found[1].tolist() == pytest.approx([1.5**0.5, 0, -(1.5**0.5), 0])


@pytest.mark.parametrize("case", worked_examples("rank_advantage"), ids=lambda case: str(case["returns"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_examples_of_the_rank_advantage(case, dtype):
    found = rank_normalised(torch.tensor([case["returns"]], dtype=dtype))
    assert found.dtype == dtype
    assert found[0].tolist() == pytest.approx(case["advantages"], abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 1e-3, 0.1, 1.0, 70.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_signal(constant, dtype):
    noise = torch.tensor([[0.0, 1, -1, 2, 0, 1]], dtype=dtype) * torch.finfo(torch.float32).eps * max(constant, 0.1)
    group = torch.full((1, 6), constant, dtype=dtype) + noise
    assert group.unique().numel() > 1, "the test has noise to look at"
    assert has_signal(group).tolist() == [False]
    assert group_normalised(group).tolist() == [[0.0] * 6]
    assert rank_normalised(group).tolist() == [[0.0] * 6]


def test_small_expected_rewards_are_signal():
    group = in_float64([[1e-6, 3e-6, 2e-6]])
    assert has_signal(group).tolist() == [True]
    assert group_normalised(group)[0].tolist() == pytest.approx([-1, 1, 0])


@pytest.mark.parametrize("given_type", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_the_type_is_kept_and_whole_numbers_become_the_default(given_type):
    group = torch.tensor([[1, 0, 0, 1]]).to(given_type)
    expected = given_type if given_type.is_floating_point else torch.float32
    assert group_normalised(group).dtype == rank_normalised(group).dtype == expected


@given(rewards, st.integers(0, 99))
@settings(max_examples=50)
def test_normalised_rewards_of_any_group(group, seed):
    advantages = group_normalised(group)
    assert advantages.isfinite().all()
    assert advantages.sum(dim=1).abs().max() < 1e-9
    signal = torch.tensor([len(set(row)) > 1 for row in group.tolist()])
    assert torch.equal(has_signal(group), signal)
    assert (advantages[~signal] == 0).all()
    if signal.any():
        assert torch.allclose(advantages[signal].std(dim=1), torch.ones(1).double())
    assert torch.allclose(group_normalised(group + 5), advantages), "a shift changes nothing"
    assert torch.allclose(group_normalised(group * 7), advantages), "nor does a scale"
    moved, order = shuffled(group, seed)
    assert torch.allclose(group_normalised(moved), advantages[:, order])


@given(rewards, st.integers(0, 99))
@settings(max_examples=50)
def test_ranks_of_any_group(group, seed):
    advantages = rank_normalised(group)
    assert advantages.isfinite().all()
    assert torch.allclose(rank_normalised(group.square() + 2), advantages), "only the order counts"
    moved, order = shuffled(group, seed)
    assert torch.allclose(rank_normalised(moved), advantages[:, order])
    for row, found in zip(group.tolist(), advantages.tolist()):
        pairs = [(a, b) for a in zip(row, found) for b in zip(row, found)]
        assert all((a[0] < b[0]) == (a[1] < b[1] - 1e-9) for a, b in pairs)
