"""GRC: the worked examples, the reward by hand and by a slow reference, and what holds for any group."""

import math

import pytest
import torch
from groups_for_tests import in_float64, shuffled, worked_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.objectives.grc import calibrated_scores, first_divergence, grc_reward, label_entropy, same_attributes

WEIGHTS = {"beta_cor": 2.2, "beta_last": 2.0, "beta_loc": 1.0, "beta_sem": 0.8, "beta_delta": 1.0, "task_weight": 1.0}


def ids(values: list) -> list[int]:
    return [-1 if value is None else "xyz".index(value) for value in values]


@pytest.mark.parametrize("case", worked_examples("grc"), ids=lambda case: f"{case['draft']}-{case['loc_pred']}")
def test_worked_examples(case):
    draft, corrected = torch.tensor([[case["draft"]]]), torch.tensor([[case["corrected"]]])
    target, said = (
        torch.tensor([case["target"]]),
        (torch.tensor([[case["loc_pred"]]]), torch.tensor([[case["sem_pred"]]])),
    )
    before, after = (torch.tensor([[ids(case["attributes"][name])]]) for name in ("draft", "corrected"))
    wanted = torch.tensor([ids(case["attributes"]["target"])])
    found = grc_reward(draft, corrected, target, *said, before, after, wanted)
    assert first_divergence(draft, target).tolist() == [[case["loc_gt"]]]
    assert same_attributes(before, wanted).long().tolist() == [[case["sem_gt"]]]
    for name in ("task", "loc", "sem", "delta", "total"):
        assert getattr(found, name).shape == (1, 1)
        assert getattr(found, name).item() == pytest.approx(case[name], abs=1e-6), name


@pytest.mark.parametrize("case", worked_examples("egrs"), ids=lambda case: str(case["order"]))
def test_worked_examples_of_the_schedule(case):
    found = calibrated_scores(in_float64([case["scores"]]), in_float64([case["entropies"]]), case["alpha"])
    assert found[0].tolist() == pytest.approx(case["calibrated"], abs=1e-6)
    assert found[0].argsort(descending=True, stable=True).tolist() == case["order"]


def test_the_reward_by_hand():
    # L = 3. The draft is right at levels 1 and 3, the correction puts level 2 right and breaks level 3.
    found = grc_reward(
        torch.tensor([[[4, 9, 6]]]), torch.tensor([[[4, 5, 9]]]), torch.tensor([[4, 5, 6]]),
        torch.tensor([[2]]), torch.tensor([[[0, 0]]]),
        torch.tensor([[[1, 3]]]), torch.tensor([[[1, 2]]]), torch.tensor([[1, 2]]),
    )  # fmt: skip
    assert found.task.item() == 2 + 2 * 2
    assert found.delta.item() == 0
    # Said to go wrong at 2, and does: 1. Of levels 2 and 3 one was put right: 1/2.
    assert found.loc.item() == pytest.approx(1.5, abs=1e-6)
    # The first attribute was the target's (said other: wrong), the second was not (right), and became it.
    assert found.sem.item() == pytest.approx(1 / 2 + 1 / 2)
    assert found.total.item() == pytest.approx(6 + 2.2 * (1.5 + 0.8 * 1 + 0), abs=1e-5)


def test_hits_are_counted_level_by_level_and_not_as_a_prefix():
    codes, target = torch.tensor([[[9, 5, 6], [4, 9, 9]]]), torch.tensor([[4, 5, 6]])
    said = torch.ones(1, 2).long(), torch.zeros(1, 2, 0)
    nothing = torch.zeros(1, 2, 0), torch.zeros(1, 2, 0), torch.zeros(1, 0)
    assert grc_reward(codes, codes, target, *said, *nothing).task.tolist() == [[2 + 2 * 2, 1 + 2 * 1]]
    assert grc_reward(codes, codes, target, *said, *nothing).sem.tolist() == [[0, 0]]  # K = 0
    assert first_divergence(codes, target).tolist() == [[1, 2]]


def test_a_draft_that_is_called_right_has_nothing_to_put_right():
    target = torch.tensor([[4, 5, 6]])
    said, nothing = (torch.tensor([[4]]), torch.zeros(1, 1, 0)), (torch.zeros(1, 1, 0),) * 2
    right = grc_reward(target[None], target[None], target, *said, *nothing, torch.zeros(1, 0))
    assert (right.loc.item(), right.delta.item()) == (1, 0)
    wrong = grc_reward(torch.tensor([[[4, 5, 9]]]), target[None], target, *said, *nothing, torch.zeros(1, 0))
    assert (wrong.loc.item(), wrong.delta.item()) == (0, 1)  # E is empty, whatever was put right


@pytest.mark.parametrize(
    ("draft", "corrected", "wanted", "said", "sem"),
    [
        (-1, 2, 2, 0, 2),  # an item of unknown value differs, and may be put right
        (-1, -1, 2, 0, 1),
        (-1, -1, -1, 0, 1),  # two unknown values are not the same
        (-1, -1, -1, 1, 0),
        (2, 2, 2, 1, 1),
        (2, 2, 2, 0, 0),
        (2, -1, 3, 0, 1),
        (2, 3, 3, 1, 0),  # put right, but not because it was said
    ],
)
def test_one_attribute(draft, corrected, wanted, said, sem):
    codes, loc = torch.zeros(1, 1, 2).long(), torch.ones(1, 1).long()
    attributes = torch.tensor([[[draft]]]), torch.tensor([[[corrected]]]), torch.tensor([[wanted]])
    assert grc_reward(codes, codes, codes[0], loc, torch.tensor([[[said]]]), *attributes).sem.item() == sem


def test_an_answer_that_names_no_item():
    absent, target = torch.full((1, 1, 3), -1), torch.tensor([[4, 5, 6]])
    assert first_divergence(absent, target).item() == 1
    reward = grc_reward(
        absent, absent, target, torch.tensor([[1]]), torch.zeros(1, 1, 1),
        torch.full((1, 1, 1), -1), torch.full((1, 1, 1), -1), torch.tensor([[0]]),
    )  # fmt: skip
    assert (reward.task.item(), reward.delta.item()) == (0, 0)
    assert (reward.loc.item(), reward.sem.item()) == (1, 1)


def test_first_divergence_of_any_shape():
    drafts, target = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 9, 3], [9, 2, 3]]), torch.tensor([1, 2, 3])
    assert first_divergence(drafts, target).tolist() == [4, 3, 2, 1]
    assert first_divergence(drafts, target.expand(4, 3)).tolist() == [4, 3, 2, 1]
    assert first_divergence(drafts[None, None], target[None, None]).tolist() == [[[4, 3, 2, 1]]]
    assert first_divergence(drafts[0], target).item() == 4


# ---- any group

LEVELS, ATTRIBUTES = 3, 2


@st.composite
def groups(draw):
    prompts, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))

    def integers(low, high, *shape):
        flat = draw(st.lists(st.integers(low, high), min_size=math.prod(shape), max_size=math.prod(shape)))
        return torch.tensor(flat).reshape(shape)

    answers = [integers(0, 1, prompts, group, LEVELS) for _ in range(2)]
    said = integers(1, LEVELS + 1, prompts, group), integers(0, 1, prompts, group, ATTRIBUTES)
    attributes = [integers(-1, 1, prompts, group, ATTRIBUTES) for _ in range(2)]
    return *answers, integers(0, 1, prompts, LEVELS), *said, *attributes, integers(-1, 1, prompts, ATTRIBUTES)


def slow_reward(draft, corrected, target, loc, sem, before, after, wanted, weights) -> dict[str, float]:
    """Of one trajectory, written as the paper has it."""
    levels = range(1, len(target) + 1)
    first = next((t for t in levels if draft[t - 1] != target[t - 1]), len(target) + 1)
    l0, l1 = (sum(codes[t - 1] == target[t - 1] for t in levels) for codes in (draft, corrected))
    edited = {t for t in levels if t >= loc}
    fixed = {t for t in levels if draft[t - 1] != target[t - 1] and corrected[t - 1] == target[t - 1]}
    slots = range(len(wanted))
    was = [before[k] == wanted[k] != -1 for k in slots]
    became = [after[k] == wanted[k] != -1 for k in slots]
    parts = {
        "task": l0 + weights["beta_last"] * l1,
        "loc": (loc == first) + len(edited & fixed) / (len(edited) + 1e-6),
        "sem": sum(sem[k] == was[k] for k in slots) / len(slots)
        + sum(sem[k] == 0 and not was[k] and became[k] for k in slots) / len(slots),
        "delta": max(0, l1 - l0),
    }
    correction = sum(weights[f"beta_{name}"] * parts[name] for name in ("loc", "sem", "delta"))
    return parts | {"total": weights["task_weight"] * parts["task"] + weights["beta_cor"] * correction}


@given(groups(), st.fixed_dictionaries({name: st.sampled_from([0.0, value, 0.3]) for name, value in WEIGHTS.items()}))
@settings(max_examples=60)
def test_the_reward_equals_a_slow_reference(group, weights):
    found = grc_reward(*group, **weights)
    draft, corrected, target, loc, sem, before, after, wanted = (part.tolist() for part in group)
    for p in range(len(target)):
        for g in range(len(draft[p])):
            expected = slow_reward(
                draft[p][g], corrected[p][g], target[p], loc[p][g], sem[p][g], before[p][g], after[p][g], wanted[p],
                weights,
            )  # fmt: skip
            for name, value in expected.items():
                assert getattr(found, name)[p, g].item() == pytest.approx(value, abs=1e-5), name


@given(groups(), st.integers(0, 99))
@settings(max_examples=30)
def test_shuffling_a_group_permutes_its_rewards(group, seed):
    rewards = grc_reward(*group).total
    moved = [shuffled(part, seed)[0] if place not in (2, 7) else part for place, part in enumerate(group)]
    _, order = shuffled(group[0], seed)
    assert torch.equal(grc_reward(*moved).total, rewards[:, order])


@pytest.mark.parametrize(
    ("weight", "term"), [("task_weight", "task"), ("beta_loc", "loc"), ("beta_sem", "sem"), ("beta_delta", "delta")]
)
def test_a_weight_of_0_leaves_its_term_out(weight, term):
    given_ = (
        torch.tensor([[[4, 9, 9]]]), torch.tensor([[[4, 5, 9]]]), torch.tensor([[4, 5, 6]]), torch.tensor([[2]]),
        torch.tensor([[[0]]]), torch.tensor([[[1]]]), torch.tensor([[[2]]]), torch.tensor([[2]]),
    )  # fmt: skip
    whole, without = grc_reward(*given_), grc_reward(*given_, **{weight: 0.0})
    share = WEIGHTS[weight] * (1 if term == "task" else WEIGHTS["beta_cor"])
    assert getattr(whole, term).item() > 0
    assert (whole.total - without.total).item() == pytest.approx(share * getattr(whole, term).item(), rel=1e-5)
    assert [getattr(without, name) for name in whole._fields[:-1]] == [
        getattr(whole, name) for name in whole._fields[:-1]
    ]


def test_eps_is_above_zero():
    codes = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="eps is 0"):
        grc_reward(codes, codes, codes[0], torch.ones(1, 1), codes, codes, codes, codes[0], eps=0)


# ---- doubt


def test_entropy_by_hand():
    logps = torch.tensor([[0.25, 0.25, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]).log()
    assert label_entropy(logps).tolist() == pytest.approx([1.5 * math.log(2), 0])
    assert label_entropy(torch.zeros(2, 3, 5)).shape == (2, 3)
    assert label_entropy(torch.zeros(7)).item() == pytest.approx(math.log(7))  # of logits too
    assert label_entropy(logps + 3).tolist() == pytest.approx(label_entropy(logps).tolist())


def test_doubt_lifts_a_draft_and_a_weight_of_0_lifts_none():
    scores, doubt = in_float64([[-1.0, -1.1, float("-inf")]]), in_float64([[0.0, 1.0, 0.0]])
    assert calibrated_scores(scores, doubt).argmax().item() == 1
    assert torch.equal(calibrated_scores(scores, doubt, 0.0), scores)
    assert calibrated_scores(scores, doubt)[0, 2] == float("-inf")  # no draft stays none
