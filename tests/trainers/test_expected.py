"""Expectations in place of drawn items: against sums over what could have been drawn, and what the tokens weigh."""

import dataclasses
import itertools

import pytest
import torch
from helpers import write_small_model
from taught import write_reasoning_model

from recllm.actor import AnswerRows, AnswerScorer
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.mixtures.targets import rl_prompts
from recllm.objectives.group import group_normalised, has_signal
from recllm.objectives.srpo import bonus_advantage, prefix_reward
from recllm.trainers.batches import padded
from recllm.trainers.expected import (
    bonus_gain,
    boundary_of_expectations,
    expectation_of,
    expected_groups,
    path_logps,
    target_ids,
    taught,
)
from recllm.trainers.groups import RolloutGroups, Rollouts, Signal
from recllm.trainers.rollouts import RolloutSettings, RolloutSource
from recllm.trie import SemanticIdTrie

LEVELS = [torch.arange(100, 104), torch.arange(200, 204)]  # token ids of two levels of four codes
# Two prompts of three answers: chains of one to three tokens, then an item; the last chain of the first never opened.
ANSWERS = [[1, 101, 201], [1, 2, 102, 202], [1, 2, 3], [4, 100], [4, 5, 100], [6, 103, 203]]
STARTS = [1, 2, 3, 1, 2, 1]
CODES = [[1, 1], [2, 2], [-1, -1], [0, -1], [0, -1], [3, 3]]
TARGETS = [[1, 2], [0, -1]]  # the second is an item of one code
PROBS = [[0.5, 0.2], [0.1, 0.4], [0, 0], [0.3, 0], [0.6, 0], [0.05, 0]]  # of the targets' codes


def groups_of(rewards=None) -> RolloutGroups:
    logps = [[-1.0] * len(ids) for ids in ANSWERS]
    rollouts = Rollouts([[7, 8], [9]], ANSWERS, STARTS, torch.tensor(CODES), logps)
    rows = tuple({"mode": "reason", "target": target} for target in TARGETS)
    rewards = torch.zeros(2, 3) if rewards is None else rewards
    return RolloutGroups(rollouts, torch.tensor(TARGETS), rewards, rows, ("0", "1"))


def logps_of(probs=PROBS) -> torch.Tensor:
    return torch.tensor(probs).clamp(min=1e-30).log().view(2, 3, 2)


OPENED = torch.tensor([[True, True, False], [True, True, True]])


def expected(weights=None, measured=None, counts=OPENED, beta=0.5):
    measured = torch.zeros(2, 3) if measured is None else measured
    return expected_groups(groups_of(), logps_of(), counts, measured, weights or {"hit": 1.0}, beta)


# ---- expectations


@pytest.mark.parametrize("weights", [{"hit": 1.0}, {"prefix": 1.0}, {"hit": 2.0, "prefix": 0.5}])
def test_mean_variance_and_gradient_are_sums_over_where_an_item_leaves_the_path(weights):
    found = expected(weights, measured=torch.full((2, 3), 0.25))
    for row, probs in enumerate(PROBS):
        place, lengths = divmod(row, 3)[0], 2 if row < 3 else 1
        if row == 2:  # never opened
            assert found.rewards[0, 2] == 0.25
            assert found.variances[0, 2] == 0
            assert not found.weights[0, 2].any()
            continue
        logps = torch.tensor(probs[:lengths]).double().log().requires_grad_()
        p = logps.exp()
        chances = [1 - p[0], *([p[0] * (1 - p[1]), p[0] * p[1]] if lengths == 2 else [p[0]])]
        values = [weights.get("prefix", 0) * (h / lengths) ** 0.5 + weights.get("hit", 0) * (h == lengths)
                  for h in range(lengths + 1)]  # fmt: skip
        mean = sum(chance * value for chance, value in zip(chances, values))
        variance = sum(chance * value**2 for chance, value in zip(chances, values)) - mean**2
        assert found.rewards[place, row % 3].item() == pytest.approx(mean.item() + 0.25, rel=1e-5)
        assert found.variances[place, row % 3].item() == pytest.approx(variance.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(mean, logps)
        assert found.weights[place, row % 3, :lengths].tolist() == pytest.approx(gradient.tolist(), rel=1e-5)
        assert not found.weights[place, row % 3, lengths:].any()


def test_the_spread_is_what_drawn_items_would_have_shown():
    """Mean over all outcomes of three Bernoulli items of the variance that GRPO measures in their group."""
    found = expected()
    chances = found.rewards[1].double().tolist()
    variance = 0.0
    for hits in itertools.product([0.0, 1.0], repeat=3):
        chance = torch.tensor([p if hit else 1 - p for p, hit in zip(chances, hits)]).double().prod().item()
        variance += chance * torch.tensor(hits).double().var().item()
    assert found.spread[1].item() ** 2 == pytest.approx(variance, rel=1e-6)
    assert found.relative[1].sum().item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(found.of_target, (found.weights / found.spread.unsqueeze(2)).float())


def test_chains_that_matter_little_are_not_blown_up():
    logps = torch.tensor([[0.5, 0.2], [0.5001, 0.2], [0.5, 0.2]] * 2).log().view(2, 3, 2)
    found = expected_groups(groups_of(), logps, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3), {"hit": 1}, 0.5)
    assert has_signal(found.rewards).all()
    assert group_normalised(found.rewards)[0].abs().max() > 1
    assert found.relative[0].abs().max() < 1e-3
    assert 0.2 < found.of_target[0].max() < 0.5  # P / sqrt(P (1 − P)) at P = .1 is a third


def test_groups_whose_drawn_items_all_missed_are_trainable_and_one_that_never_opened_is_not():
    found = expected()
    assert not groups_of().hits[0].any()
    assert found.trainable.tolist() == [True, True]
    nothing = expected(counts=torch.tensor([[False] * 3, [True] * 3]))
    assert nothing.trainable.tolist() == [False, True]
    assert not nothing.relative[0].any()
    assert nothing.relative.isfinite().all()
    assert not nothing.of_target[0].any()


def test_groups_are_taken_and_exchanged_with_their_expectations():
    found, others = expected(), expected({"prefix": 3.0})
    mixed = found.exchanged([0], others, [1])
    assert torch.equal(mixed.rewards, torch.stack([others.rewards[1], found.rewards[1]]))
    assert torch.equal(mixed.weights, torch.stack([others.weights[1], found.weights[1]]))
    assert torch.equal(mixed.spread, torch.cat([others.spread[1:], found.spread[1:]]))
    assert mixed.keys == ("1", "1")
    assert torch.equal(found.take([1]).relative, found.relative[1:])


def test_other_rewards_stay_as_measured_and_a_gate_holds():
    each = torch.tensor([[1.0, 0.0]] * 6)
    each[:, 1] = torch.arange(6.0)
    groups, formed = groups_of(), torch.tensor([[False, True, True], [True, True, True]])
    names, weights = ["hit", "format"], [2.0, 0.5]
    plain = expectation_of(groups, each, names, weights, None, logps_of(), 0.5)
    gated = expectation_of(groups, each, names, weights, formed, logps_of(), 0.5)
    assert plain.rewards[0].tolist() == pytest.approx([2 * 0.1 + 0.0, 2 * 0.04 + 0.5, 1.0])
    assert gated.rewards[0].tolist() == pytest.approx([0.0, 2 * 0.04 + 0.5, 1.0])
    assert not gated.weights[0, 0].any()


# ---- signals


@pytest.mark.parametrize("hits", [[0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0]])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_bonus_gain_is_the_gradient_of_the_bonus_over_an_answers_item(hits, k):
    hits = torch.tensor([hits]).double()
    gain = bonus_gain(hits, k)
    for answer in range(4):
        logp = torch.tensor(-1.2, dtype=torch.double, requires_grad=True)
        bonus = []
        for value in (1, 0):
            changed = hits.clone()
            changed[0, answer] = value
            bonus.append(bonus_advantage(changed, k)[0, answer])
        # Σ over {the target, anything else} of π(item) · bonus(item), the bonus held fixed
        (gradient,) = torch.autograd.grad(logp.exp() * bonus[0] + (1 - logp.exp()) * bonus[1], logp)
        assert gain[0, answer].item() * logp.exp().item() == pytest.approx(gradient.item(), abs=1e-9)


def test_recast_contrasts_the_largest_expectation_with_the_smallest_that_opened():
    found = expected()  # .1, .04, never opened | .3, .6, .05
    advantages, active = boundary_of_expectations(found, 0.5)
    assert advantages.tolist() == [[1, -0.5, 0], [0, 1, -0.5]]
    assert active.tolist() == [[True, True, False], [False, True, True]]
    lonely = expected(counts=torch.tensor([[True, False, False], [True] * 3]))
    assert boundary_of_expectations(lonely, 1.0)[0][0].tolist() == [1, -1, 0]
    same = dataclasses.replace(found, rewards=torch.full((2, 3), 0.3))
    advantages, active = boundary_of_expectations(same, 1.0)
    assert not advantages.any(), "no chain is better than another"
    assert active.sum(dim=1).tolist() == [2, 2], "but the target can be taught after them"


def test_the_target_stands_in_and_every_token_has_its_advantage():
    found = expected()
    signal = Signal(torch.tensor([[1.0, -1.0, 0.5], [2.0, 3.0, 4.0]]), torch.ones(2, 3, dtype=torch.bool))
    signal.active[1, 2] = False
    groups, changed = taught(found, signal, found.of_target, LEVELS)
    assert groups.rollouts.answers == [[1, 101, 202], [1, 2, 101, 202], [1, 2, 3], [4, 100], [4, 5, 100], [6, 103, 203]]
    assert groups.rollouts.starts == STARTS
    assert groups.hits.tolist() == [[True, True, False], [True, True, False]]
    a = found.of_target
    assert changed.advantages[0, 0].tolist() == pytest.approx([1, *a[0, 0].tolist(), 0])
    assert changed.advantages[0, 1].tolist() == pytest.approx([-1, -1, *a[0, 1].tolist()])
    assert changed.advantages[0, 2].tolist() == [0.5, 0.5, 0.5, 0]
    assert changed.advantages[1, 1].tolist() == pytest.approx([3, 3, a[1, 1, 0].item(), 0])
    assert groups.rollouts.logps[1] == [-1, -1, 0, 0]
    assert found.rollouts.answers == ANSWERS, "what was drawn is left as it is"


# ---- with a model


@pytest.fixture(scope="module")
def reasons(tmp_path_factory):
    return write_reasoning_model(tmp_path_factory.mktemp("expected"), steps=60)


def test_paths_are_scored_after_their_own_chains(reasons):
    data, path = reasons
    checkpoint = Checkpoint.load(path, "cpu", "float32")
    rows = rl_prompts(
        Catalogue.load(data), checkpoint, which="all", mode="joint", limit=3, seed=0, new_tokens=60
    )  # fmt: skip
    rows = [rows[place] for place in (0, 3, 5)]  # one asked directly
    assert [row["mode"] for row in rows] == ["direct", "reason", "reason"]
    rollouts = RolloutSource.of(checkpoint, RolloutSettings(max_new_tokens=60))(rows, 3, 0, ["a", "b", "c"])
    targets = torch.tensor([row["target"] for row in rows])
    groups = RolloutGroups(rollouts, targets, torch.zeros(3, 3), tuple(rows), ("a", "b", "c"))
    trie = SemanticIdTrie.from_codes(checkpoint.table.codes, checkpoint.table.sizes)
    scorer = AnswerScorer(checkpoint.model, checkpoint.tokens, trie, layout="padded")
    scorer.install(checkpoint.model)
    with torch.no_grad():
        found = path_logps(
            groups, checkpoint.tokens.levels, lambda rows: checkpoint.model(answer_rows=rows)[0], 0, 2,
            torch.device("cpu"),
        )  # fmt: skip
        for row, (ids, start) in enumerate(zip(rollouts.answers, rollouts.starts)):
            if start == len(ids):
                assert not found.view(9, -1)[row].any()
                continue
            codes = target_ids(targets[row // 3], checkpoint.tokens.levels)
            prompt, answer = [rollouts.prompts[row // 3]], [[*ids[:start], *codes]]
            whole = AnswerRows(
                torch.tensor(prompt), torch.ones(1, len(prompt[0])).long(), torch.tensor(answer),
                torch.ones(1, len(answer[0])).long(), torch.tensor([start]),
            )  # fmt: skip
            wanted = checkpoint.model(answer_rows=whole)[0][0, start:]
            assert found.view(9, -1)[row, : len(codes)].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    assert any(start < len(ids) for ids, start in zip(rollouts.answers[3:], rollouts.starts[3:])), "no chain opened"


def test_the_gradient_is_the_one_of_drawn_items_summed_over_all_of_them(tmp_path):
    """Σ_item π(item | chain) (r − b) ∇[log π(chain) + log π(item | chain)], the chain given, for a baseline b."""
    _, folder = write_small_model(tmp_path, items=13)
    checkpoint = Checkpoint.load(folder, "cpu", "float32")
    trie = SemanticIdTrie.from_codes(checkpoint.table.codes, checkpoint.table.sizes)
    scorer, model = AnswerScorer(checkpoint.model, checkpoint.tokens, trie), checkpoint.model
    levels = checkpoint.tokens.levels
    prompt, chain, baseline = [5, 6, 7], [8, 9, 10, 11], 0.05
    items = torch.tensor(checkpoint.table.codes.tolist())  # (N, L)
    target, weights = items[5:6], {"hit": 1.0, "prefix": 0.5}

    def logps(answers: list[list[int]]) -> torch.Tensor:
        rows = AnswerRows(
            torch.tensor([prompt] * len(answers)), torch.ones(len(answers), 3).long(), padded(answers, 0),
            padded([[1] * len(ids) for ids in answers], 0), torch.full((len(answers),), len(chain)),
        )  # fmt: skip
        return scorer.score(model, rows)[0]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([each.grad.flatten() for each in model.parameters()])

    everything = logps([[*chain, *target_ids(item, levels)] for item in items])
    near = prefix_reward(items.unsqueeze(0), target)[0]
    rewards = 0.5 * near + (near == 1).float() - baseline
    chances = everything[:, len(chain) :].sum(dim=1).exp().detach()
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    wanted = gradient((chances * rewards * everything.sum(dim=1)).sum())

    rollouts = Rollouts([prompt], [[*chain, 0]] * 2, [len(chain)] * 2, torch.zeros(2, 2).long(), None)
    drawn = RolloutGroups(rollouts, target, torch.zeros(1, 2), ({"mode": "reason"},), ("0",))
    with torch.no_grad():
        path = path_logps(drawn, levels, lambda rows: scorer.score(model, rows)[0], 0, 2, torch.device("cpu"))
    found = expected_groups(drawn, path, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2), weights, 0.5)
    signal = Signal((found.rewards - baseline), torch.ones(1, 2, dtype=torch.bool))
    groups, signal = taught(found, signal, found.weights.float(), levels)
    ours = gradient((signal.advantages[0, :1] * logps(groups.rollouts.answers[:1])).sum())
    assert wanted.norm() > 1e-3
    assert (ours - wanted).norm() < 1e-4 * wanted.norm()
