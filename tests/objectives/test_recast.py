"""ReCast: the worked examples, the rules at the edges, and what holds for any group."""

import pytest
import torch
from groups_for_tests import answered_groups, fill, in_float64, worked_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.objectives.group import group_normalised, is_hit
from recllm.objectives.recast import (
    adaptive_repair_probability,
    boundary_signal,
    repair_groups,
    structural_score,
)


def parsed(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes (1, G, M, L), target (1, L) and task rewards (1, G) of a worked example."""
    levels, most = len(case["target"]), max(map(len, case["group"]))
    none = [-1] * levels
    codes = torch.tensor([[[*answer, *[none] * (most - len(answer))] for answer in case["group"]]])
    rewards = in_float64([[case["target"] in answer for answer in case["group"]]])
    return codes.view(1, len(case["group"]), most, levels), torch.tensor([case["target"]]), rewards


@pytest.mark.parametrize("case", worked_examples("recast"), ids=lambda case: f"G{len(case['group'])}-{case['target']}")
def test_worked_examples(case):
    codes, target, rewards = parsed(case)
    found = boundary_signal(rewards, structural_score(codes, target), case["weight"])
    assert found.advantages[0].tolist() == pytest.approx(case["advantages"], abs=1e-6)
    assert found.active[0].tolist() == [advantage != 0 for advantage in case["advantages"]]
    places = (found.replaced, found.positive, found.negative)
    assert [place.item() for place in places] == [
        -1 if case[name] is None else case[name] for name in ("replaced", "positive", "negative")
    ]


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        ([[1, 2, -1]], 1.0),
        ([[1, 2, 0]], 2 / 3),  # two of the longer one's three
        ([[1, -1, -1]], 1 / 2),
        ([[0, 2, -1]], 0.0),
        ([[0, 2, -1], [1, 0, 0]], 1 / 3),  # the best of several
        ([[-1, -1, -1]], 0.0),
        ([], 0.0),
    ],
)
def test_the_score_of_a_target_with_fewer_codes_than_levels(answers, score):
    codes = torch.tensor(answers, dtype=torch.int64).view(1, 1, len(answers), 3)
    assert structural_score(codes, torch.tensor([[1, 2, -1]])).item() == pytest.approx(score)


def test_without_a_target_nothing_scores():
    codes = torch.tensor([[[[1, 2, 0]], [[-1, -1, -1]]]])
    assert structural_score(codes, torch.full((1, 3), -1)).tolist() == [[0, 0]]


def test_repair_by_hand():
    rewards, scores = in_float64([[0, 0, 0], [0, 1, 0]]), in_float64([[0.5, 0.25, 0.25], [0, 1, 0.5]])
    found = repair_groups(rewards, scores)
    assert found.replaced.tolist() == [1, -1], "the first of the worst; a group with a hit is left alone"
    assert found.rewards.tolist() == [[0, 1, 0], [0, 1, 0]]
    assert found.scores.tolist() == [[0.5, 1, 0.25], [0, 1, 0.5]]
    assert rewards[0].tolist() == [0, 0, 0], "what was given stays"
    assert group_normalised(found.rewards)[0].tolist() == pytest.approx([-(3**-0.5), 2 * 3**-0.5, -(3**-0.5)])


def test_without_repair_a_group_of_zeros_has_no_positive_and_no_signal():
    found = boundary_signal(in_float64([[0, 0], [0, 0]]), in_float64([[0, 0.5], [0, 0.5]]), repair=False)
    assert not found.active.any()
    assert (found.advantages == 0).all()
    assert (found.replaced.tolist(), found.positive.tolist(), found.negative.tolist()) == ([-1, -1], [-1, -1], [1, 1])


def test_repair_may_be_said_of_each_group():
    zeros = in_float64([[0, 0], [0, 0], [0, 1]])
    found = boundary_signal(zeros, zeros, repair=torch.tensor([True, False, True]))
    assert found.replaced.tolist() == [0, -1, -1]
    assert found.active.tolist() == [[True, True], [False, False], [True, True]]


def test_an_anchor_alone_has_nothing_to_be_held_against():
    found = boundary_signal(in_float64([[0]]), in_float64([[0]]))
    assert (found.replaced.item(), found.positive.item(), found.negative.item()) == (0, 0, -1)
    assert not found.active.any()


def test_a_larger_reward_goes_before_a_larger_score():
    rewards, scores = in_float64([[0.5, 1, 1, 0], [0, 0.5, 0, 0]]), in_float64([[1, 0.25, 0.5, 0], [0, 0, 1, 0]])
    found = boundary_signal(rewards, scores, weight=0.3)
    assert found.advantages.tolist() == [[0, 0, 1, -0.3], [0, 1, -0.3, 0]]


@given(answered_groups(), st.sampled_from([0.5, 1.0, 2.0]), st.booleans())
@settings(max_examples=50)
def test_any_group(answered, weight, repair):
    codes, target = answered
    hits, scores = is_hit(codes, target), structural_score(codes.unsqueeze(2), target)
    assert torch.equal(scores == 1, hits), "only the whole item scores 1"
    found = boundary_signal(hits.double(), scores.double(), weight, repair)
    assert found.advantages.isfinite().all()
    assert torch.equal(found.active, found.advantages != 0)
    for group in range(len(codes)):
        reward, advantages = hits[group].double().tolist(), found.advantages[group]
        worst = min(range(len(reward)), key=lambda i: (scores[group, i].item(), i))
        replaced = worst if repair and not any(reward) else -1
        assert found.replaced[group].item() == replaced
        after = [1.0 if i == replaced else r for i, r in enumerate(reward)]
        if any(after) and not all(after):
            assert sorted(advantages[found.active[group]].tolist()) == [-weight, 1]
            assert after[int(advantages.argmax())] == 1
            miss = int(advantages.argmin())
            others = [scores[group, i].item() for i, r in enumerate(after) if r == 0]
            assert after[miss] == 0
            assert scores[group, miss] == max(others)
        else:
            assert not found.active[group].any()


def test_the_type_is_kept():
    for dtype in (torch.float32, torch.float64):
        rewards = torch.tensor([[0, 1]], dtype=dtype)
        assert boundary_signal(rewards, rewards).advantages.dtype == dtype
    hits = torch.tensor([[False, True]])
    assert boundary_signal(hits, hits.float()).advantages.tolist() == [[-1, 1]]


def test_adaptive_repair_falls_as_groups_become_trainable():
    assert [adaptive_repair_probability(share) for share in (0, 0.25, 1)] == [1, 0.75, 0]
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="a share is from 0 to 1"):
            adaptive_repair_probability(share)


def test_the_weight_is_not_negative():
    with pytest.raises(ValueError, match="contrastive weight is -1"):
        boundary_signal(torch.zeros(1, 2), torch.zeros(1, 2), weight=-1)


def test_items_may_be_several_and_of_differing_number():
    codes = torch.tensor([[[fill([0, 0], 3), fill([1, 2], 3)], [fill([], 3), fill([], 3)]]])
    assert structural_score(codes, torch.tensor([[1, 2, -1]])).tolist() == [[1, 0]]
