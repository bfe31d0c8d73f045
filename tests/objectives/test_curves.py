"""Weight curves against the thing itself: the gradients of all possible groups of a small policy, and their chances."""

import itertools

import pytest
import torch
from groups_for_tests import in_float64
from torch import Tensor

from recllm.objectives import curves
from recllm.objectives.group import group_normalised
from recllm.objectives.recast import boundary_signal, repair_groups
from recllm.objectives.srpo import bonus_advantage

POLICIES = [[0.05, 0.5, 0.15, 0.3], [0.4, 0.1, 0.3, 0.2], [0.9, 0.05, 0.03, 0.02]]  # of four items, item 0 the target
GRID = in_float64([1e-30, 1e-6, 1e-2, 0.3, 0.5, 0.9, 0.999])


def expected_gradient(policy: Tensor, group: int, signal) -> Tensor:
    """Σ over all groups of chance × mean over the active answers of A_i ∇log π(a_i), by the logits.   (4,) -> (4,)

    `signal` makes of hits (1, G) the advantages (1, G), the place where the target stands in (or -1), and over how
    many answers is averaged.
    """
    total = torch.zeros_like(policy)
    for answers in itertools.product(range(len(policy)), repeat=group):
        chance = policy[list(answers)].prod()
        advantages, replaced, count = signal(in_float64([[answer == 0 for answer in answers]]))
        for place, advantage in enumerate(advantages[0].tolist()):
            answer = 0 if place == replaced else answers[place]
            score = torch.eye(len(policy), dtype=torch.double)[answer] - policy  # ∇ of log softmax
            total += chance * advantage * score / count
    return total


def grpo(hits: Tensor):
    return group_normalised(hits), -1, hits.size(1)


def bonus(hits: Tensor):
    return bonus_advantage(hits, 2), -1, hits.size(1)


def repair_only(hits: Tensor):
    repaired = repair_groups(hits, torch.zeros_like(hits))
    return group_normalised(repaired.rewards), repaired.replaced.item(), hits.size(1)


def full(hits: Tensor):
    found = boundary_signal(hits, hits, 0.7)
    return found.advantages, found.replaced.item(), 2


def boundary_only(hits: Tensor):
    return boundary_signal(hits, hits, 0.7, repair=False).advantages, -1, 2


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"P={policy[0]}")
@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize(
    ("signal", "curve"),
    [
        (grpo, lambda p, group: curves.grpo_weight(p, group)),
        (bonus, lambda p, group: curves.srpo_bonus_weight(p, group, 2)),
        (repair_only, lambda p, group: curves.repair_only_weight(p, group)),
        (full, lambda p, group: curves.recast_weight(p, group, 0.7)),
        (boundary_only, lambda p, group: curves.boundary_only_weight(p, group, 0.7)),
    ],
    ids=["GRPO", "SRPO's bonus", "repair only", "ReCast", "boundary only"],
)
def test_a_curve_is_the_expected_gradient(policy, group, signal, curve):
    policy = in_float64(policy)
    direction = torch.eye(len(policy), dtype=torch.double)[0] - policy  # ∇log P
    expected = curve(policy[:1], group) * direction
    assert torch.allclose(expected_gradient(policy, group, signal), expected, atol=1e-12)


def test_closed_forms_are_gradients_of_what_they_name():
    logp = GRID.log().requires_grad_()
    p = logp.exp()
    for value, curve in (
        (logp, curves.sft_weight(GRID)),
        (p, curves.reinforce_weight(GRID)),
        (1 - (1 - p) ** 4, curves.success_weight(GRID, 4)),
        (p / (GRID * (1 - GRID)).sqrt(), curves.grpo_limit_weight(GRID)),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), logp, retain_graph=True)
        assert torch.allclose(gradient, curve, rtol=1e-6, atol=0)


def test_grpo_comes_to_its_limit_as_the_group_grows():
    p = in_float64([0.1, 0.5, 0.8])
    errors = [(curves.grpo_weight(p, group) - curves.grpo_limit_weight(p)).abs().max() for group in (16, 128, 1024)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 5e-3


def test_a_draw_is_worth_the_more_the_rarer_only_under_repair():
    p = in_float64([1e-30])
    assert curves.recast_weight(p, 16).item() == pytest.approx(1 / 2)
    assert curves.repair_only_weight(p, 16).item() == pytest.approx(15 / 16**1.5)
    one_hit = 16e-30 * 15 / 16**1.5  # c = 1 with chance G P
    assert curves.grpo_weight(p, 16).item() == pytest.approx(one_hit, rel=1e-9, abs=0)
    assert curves.boundary_only_weight(p, 16).item() == pytest.approx(16e-30 / 2, rel=1e-9, abs=0)


@pytest.mark.parametrize("group", [1, 2, 256])
def test_all_curves_are_finite_and_none_pushes_the_target_down(group):
    for name, curve in curves.weight_curves(GRID, group, k=1).items():
        assert curve.shape == GRID.shape
        assert curve.isfinite().all(), name
        assert (curve >= 0).all(), name
        assert group > 1 or not name.startswith(("GRPO, G = ", "ReCast")) or (curve == 0).all(), name
