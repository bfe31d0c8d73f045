"""SRPO: the worked examples, the bonus by enumeration of every draw, and what holds for any group."""

import itertools

import pytest
import torch
from groups_for_tests import answered_groups, in_float64, shuffled, worked_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.metrics import pass_at_k
from recllm.objectives.group import is_hit
from recllm.objectives.srpo import bonus_advantage, group_success, prefix_reward, srpo_advantage


@pytest.mark.parametrize("case", worked_examples("srpo"), ids=lambda case: f"G{len(case['hits'])}-k{case['k']}")
def test_worked_examples(case):
    codes, target, k, beta = torch.tensor([case["generated"]]), torch.tensor([case["target"]]), case["k"], case["beta"]
    hits = is_hit(codes, target)
    assert hits[0].long().tolist() == case["hits"]
    assert prefix_reward(codes, target, beta)[0].tolist() == pytest.approx(case["rewards"], abs=1e-6)
    assert group_success(hits, k).item() == pytest.approx(case["rho"], abs=1e-6)
    assert bonus_advantage(hits, k)[0].tolist() == pytest.approx(case["bonus"], abs=1e-6)
    assert srpo_advantage(codes, target, k, beta)[0].tolist() == pytest.approx(case["advantages"], abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ([4, 2, 7, -1], 1.0),
        ([4, 2, 8, -1], (2 / 3) ** 0.5),
        ([4, 2, -1, -1], (2 / 3) ** 0.5),
        ([4, 9, 7, -1], (1 / 3) ** 0.5),
        ([4, 2, 7, 0], (2 / 3) ** 0.5),  # all codes and one more: another item
        ([-1, -1, -1, -1], 0.0),
    ],
)
def test_the_reward_of_a_target_with_fewer_codes_than_levels(answer, reward):
    found = prefix_reward(torch.tensor([[answer]]), torch.tensor([[4, 2, 7, -1]]))
    assert found.item() == pytest.approx(reward)


def test_the_bonus_by_hand():
    # One hit of four, k = 2: half of the six pairs hold it, ρ = σ = 1/2. A miss's companion misses in 2 of 3 cases.
    found = bonus_advantage(in_float64([[1, 0, 0, 0]]), 2)
    assert found[0].tolist() == pytest.approx([(1 - 1 / 2) / (1 / 2), *[(1 / 2 - 2 / 3) / (1 / 2)] * 3])


@pytest.mark.parametrize("hits", [[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 0, 1]])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_answers_worth_is_the_success_of_the_draws_that_hold_it(hits, k):
    draws = [(draw, any(hits[i] for i in draw)) for draw in itertools.combinations(range(5), k)]
    success = [sum(won for draw, won in draws if i in draw) / sum(i in draw for draw, _ in draws) for i in range(5)]
    rho = sum(won for _, won in draws) / len(draws)
    sigma = (rho * (1 - rho)) ** 0.5
    expected = [(worth - rho) / sigma if sigma else 0 for worth in success]
    assert bonus_advantage(torch.tensor([hits]), k)[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("group", [1, 2, 16, 256])
def test_every_count_of_hits_in_small_and_large_groups(group):
    hits = in_float64([[i < c for i in range(group)] for c in range(group + 1)])
    for k in {1, min(4, group), group // 2 or 1, group}:
        bonus = bonus_advantage(hits, k)
        assert bonus.isfinite().all()
        assert bonus.sum(dim=1).abs().max() < 1e-8
        assert (bonus[0] == 0).all(), "no hit"
        assert (bonus[-1] == 0).all(), "no miss"
        counts = torch.arange(group + 1)
        assert torch.allclose(group_success(hits, k), pass_at_k(group, counts, k)), "the metric's own definition"


@given(answered_groups(), st.integers(1, 8), st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 99))
@settings(max_examples=50)
def test_any_group(answered, k, beta, seed):
    codes, target = answered
    k = min(k, codes.size(1))
    hits = is_hit(codes, target)
    bonus, advantages = bonus_advantage(hits.double(), k), srpo_advantage(codes, target, k, beta)
    assert advantages.isfinite().all()
    assert bonus.sum(dim=1).abs().max() < 1e-9
    assert ((bonus >= 0) | ~hits).all(), "a hit is never pushed down"
    rewards = prefix_reward(codes, target, beta)
    assert torch.equal(rewards == 1, hits), "only the whole item is worth 1"
    assert (rewards[codes[..., 0] < 0] == 0).all()
    moved, order = shuffled(codes, seed)
    assert torch.allclose(srpo_advantage(moved, target, k, beta), advantages[:, order], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_is_kept(dtype):
    hits = torch.tensor([[1, 0, 0, 1]], dtype=dtype)
    assert bonus_advantage(hits, 2).dtype == group_success(hits, 2).dtype == dtype
    assert bonus_advantage(hits.bool(), 2).dtype == torch.float32
    codes = torch.tensor([[[0, 1], [0, 0]]])
    assert srpo_advantage(codes, torch.tensor([[0, 1]]), 1).dtype == torch.float32


def test_without_a_target_nothing_is_worth_anything():
    codes, absent = torch.tensor([[[1, 2], [-1, -1]]]), torch.full((1, 2), -1)
    assert prefix_reward(codes, absent).tolist() == [[0, 0]]
    assert srpo_advantage(codes, absent, 1).tolist() == [[0, 0]]


@pytest.mark.parametrize("k", [0, 5])
def test_k_fits_the_group(k):
    with pytest.raises(ValueError, match=f"k is {k} in groups of 4"):
        bonus_advantage(torch.zeros(1, 4), k)
    with pytest.raises(ValueError, match=f"k is {k} in groups of 4"):
        group_success(torch.zeros(1, 4), k)


def test_beta_is_above_zero():
    with pytest.raises(ValueError, match="beta is 0"):
        prefix_reward(torch.zeros(1, 1, 2), torch.zeros(1, 2), 0)
