"""The closed forms: worked examples, a sum over where an answer leaves the path, gradients, tiny probabilities."""

import math

import pytest
import torch
from groups_for_tests import in_float64, worked_examples
from hypothesis import given
from hypothesis import strategies as st

from recllm.objectives.exact import (
    expected_prefix_reward,
    expected_success,
    prefix_reward_std,
    prefix_token_weights,
)

paths = st.lists(st.floats(1e-4, 1 - 1e-4), min_size=1, max_size=5)


@pytest.mark.parametrize("case", worked_examples("exact"), ids=lambda case: f"{case['path_probs'][0]}-{case['k']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_examples(case, dtype):
    logps, beta = in_float64([case["path_probs"]]).log().to(dtype), case["beta"]
    found = expected_prefix_reward(logps, beta), prefix_reward_std(logps, beta), expected_success(logps, case["k"])
    assert {one.dtype for one in found} == {dtype}
    expected = [case[name] for name in ("mean", "std", "success_at_k")]
    assert [one.item() for one in found] == pytest.approx(expected, abs=1e-6)


def outcomes(probs: list[float], beta: float) -> list[tuple[float, float]]:
    """(probability, reward) of leaving the path after 0, 1, … codes, and of the whole path."""
    levels, reached, found = len(probs), 1.0, []
    for h, p in enumerate(probs):
        found.append((reached * (1 - p), (h / levels) ** beta))
        reached *= p
    return [*found, (reached, 1.0)]


@given(paths, st.sampled_from([0.25, 0.5, 1.0, 2.0]), st.integers(1, 8))
def test_the_sum_over_all_outcomes(probs, beta, k):
    logps, cases = in_float64([probs]).log(), outcomes(probs, beta)
    mean = sum(p * r for p, r in cases)
    std = math.sqrt(sum(p * (r - mean) ** 2 for p, r in cases))
    assert expected_prefix_reward(logps, beta).item() == pytest.approx(mean, rel=1e-9)
    assert prefix_reward_std(logps, beta).item() == pytest.approx(std, rel=1e-6)
    assert expected_success(logps, k).item() == pytest.approx(1 - (1 - cases[-1][0]) ** k, rel=1e-9, abs=1e-15)


@given(paths, st.sampled_from([0.5, 1.0]))
def test_the_token_weights_are_the_gradient(probs, beta):
    logps = in_float64([probs]).log().requires_grad_()
    expected_prefix_reward(logps, beta).sum().backward()
    weights = prefix_token_weights(logps.detach(), beta)
    assert torch.allclose(weights, logps.grad, rtol=1e-9)
    assert (weights.diff(dim=1) <= 0).all(), "an earlier level is on the way to all that a later one is"
    assert weights[0, 0].item() == pytest.approx(expected_prefix_reward(logps.detach(), beta).item())


@pytest.mark.parametrize("function", [expected_prefix_reward, prefix_reward_std, lambda x: expected_success(x, 4)])
def test_gradients_are_those_of_differences(function):
    logps = in_float64([[0.3, 0.6, 0.2], [0.9, 0.01, 0.5]]).log().requires_grad_()
    assert torch.autograd.gradcheck(function, logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_probabilities_lose_no_digits(dtype):
    logps = torch.tensor([[-30 * math.log(10) / 3] * 3], dtype=dtype, requires_grad=True)  # P_3 = 1e-30
    success = expected_success(logps, 64)
    assert success.item() == pytest.approx(64e-30, rel=1e-4, abs=0)
    (gradient,) = torch.autograd.grad(success.sum(), logps)
    assert gradient[0].tolist() == pytest.approx([64e-30] * 3, rel=1e-4, abs=0)
    first = torch.full((1, 1), -30 * math.log(10), dtype=dtype, requires_grad=True)  # Bernoulli of 1e-30
    std = prefix_reward_std(first)
    assert std.item() == pytest.approx(1e-15, rel=1e-4, abs=0)
    (gradient,) = torch.autograd.grad(std.sum(), first)
    assert gradient.item() == pytest.approx(0.5e-15, rel=1e-4, abs=0)


def test_near_certainty_loses_no_digits_either():
    logps = torch.tensor([[-1e-7]], requires_grad=True)  # float32, 1 − P = 1e-7
    std = prefix_reward_std(logps)
    assert std.item() == pytest.approx(math.sqrt(1e-7), rel=1e-5)
    (gradient,) = torch.autograd.grad(std.sum(), logps)  # d sqrt(P(1−P)) / d log P = P (1 − 2P) / (2 std)
    assert gradient.item() == pytest.approx(-1 / (2 * math.sqrt(1e-7)), rel=1e-5)


@pytest.mark.parametrize("logp", [0.0, 1e-7, -math.inf, -200.0])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_certain_impossible_and_rounded_paths_give_finite_values_and_gradients(logp, k):
    logps = torch.tensor([[logp, logp, -0.5], [-0.5, logp, logp], [logp] * 3], requires_grad=True)
    for function in (expected_prefix_reward, prefix_reward_std, lambda x: expected_success(x, k)):
        value = function(logps)
        (gradient,) = torch.autograd.grad(value.sum(), logps)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert ((value >= 0) & (value <= 1)).all()


def test_a_short_target_is_as_if_its_levels_were_all():
    logps = in_float64([[-0.5, -1.0, math.nan], [-0.5, -1.0, -2.0]]).requires_grad_()
    lengths = torch.tensor([2, 3])
    alone = logps[:1, :2], logps[1:]
    for function in (
        lambda x, **kw: expected_prefix_reward(x, 0.5, **kw),
        lambda x, **kw: prefix_reward_std(x, 0.5, **kw),
        lambda x, **kw: expected_success(x, 4, **kw),
    ):
        found = function(logps, lengths=lengths)
        assert torch.allclose(found, torch.cat([function(one) for one in alone]))
        (gradient,) = torch.autograd.grad(found.sum(), logps)
        assert gradient[0, 2] == 0
        assert gradient.isfinite().all()
    weights = prefix_token_weights(logps.detach(), 0.5, lengths=lengths)
    assert weights[0, 2] == 0
    assert torch.allclose(weights[0, :2], prefix_token_weights(alone[0].detach(), 0.5)[0])


def test_bad_settings():
    with pytest.raises(ValueError, match="beta is 0"):
        expected_prefix_reward(torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="k is 0"):
        expected_success(torch.zeros(1, 2), 0)
