"""GRC by reinforcement: the spec's loss, rewards and signal written out, on trajectories that were really drawn."""

import dataclasses

import pytest
import torch
from grc_for_tests import G, Weights, facts_of, grc_trainer, returns_of, slow_logps, slow_ranks, slow_reward
from peft import LoraConfig
from reflecting_for_tests import write_reflecting_model
from rl_for_tests import assert_same_gradients, losses_of

from recllm.checkpoint import Checkpoint
from recllm.trainers.batches import chosen
from recllm.trainers.grc import PARTS, GRCSettings
from recllm.trainers.trajectories import TrajectoryReward, TrajectorySource

LAYOUTS = ("parallel", "causal")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(data, model) of each layout: 12 items of two levels, two attributes."""
    return {
        layout: write_reflecting_model(tmp_path_factory.mktemp(layout), layout=layout, users=12) for layout in LAYOUTS
    }


@pytest.fixture(scope="module")
def made(models):
    return models["parallel"]


def watched(trainer):
    """(weights, batch) of every call of the loss; (groups, signal) of every generation."""
    seen, groups, compute, signal = [], [], trainer._compute_loss, trainer.build_signal

    def loss(model, inputs):
        weights = {name: each.detach().clone() for name, each in trainer.start.model.state_dict().items()}
        seen.append((weights, {name: each for name, each in inputs.items() if isinstance(each, torch.Tensor)}))
        return compute(model, inputs)

    def build(found):
        groups.append((found, signal(found)))
        return groups[-1][1]

    trainer._compute_loss, trainer.build_signal = loss, build
    return seen, groups


def prompt_of(batch, row) -> list[int]:
    return batch["prompt_ids"][row][batch["prompt_mask"][row] > 0].tolist()


def all_slow_logps(checkpoint, batch, temperature=1.0):
    """(R, F), with gradient."""
    answers = batch["completion_ids"].tolist()
    return torch.stack([
        slow_logps(checkpoint, prompt_of(batch, row), answer, None, "children", temperature)
        for row, answer in enumerate(answers)
    ])  # fmt: skip


# ---- rollouts and log-probabilities


@pytest.mark.parametrize(("layout", "temperature"), [("parallel", 1.0), ("parallel", 0.7), ("causal", 1.0)])
def test_what_was_drawn_has_the_probability_that_the_loss_gives_it(models, tmp_path, layout, temperature):
    """So the first ratio is 1: the engine's draws, the actor's rows and the plain model agree."""
    trainer = grc_trainer(models[layout], tmp_path, num_iterations=2, temperature=temperature)
    seen, groups = watched(trainer)
    trainer.train()
    (_, batch), (found, signal) = seen[0], groups[0]
    active = signal.active.flatten().nonzero().flatten().tolist()
    assert batch["completion_ids"].tolist() == [found.rollouts.answers[row] for row in active]
    drawn = torch.tensor([found.rollouts.logps[row] for row in active])
    plain = Checkpoint.load(models[layout][1], "cpu")
    with torch.no_grad():
        slow = all_slow_logps(plain, batch, temperature)
    assert len(active) >= 2 * G
    torch.testing.assert_close(drawn, slow, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch["old_per_token_logps"], drawn, atol=1e-5, rtol=0)
    assert drawn.unique().numel() > 20, "they differ, so that agreeing means something"
    assert losses_of(trainer)[0] == pytest.approx(float(-batch["advantages"].mean()), abs=1e-5), "ratio 1, KL 0"
    assert trainer.state.log_history[0]["ppo_kl"] == pytest.approx(0, abs=1e-6)


def test_given_places_carry_no_loss(made, tmp_path):
    trainer = grc_trainer(made, tmp_path)
    seen, _ = watched(trainer)
    trainer.train()
    _, batch = seen[0]
    template = trainer.start.reflection.template
    slots = torch.tensor([place.kind == "slot" for place in template.places])
    assert slots.sum() == 3
    assert torch.equal(chosen(batch).bool(), ~slots.expand(len(batch["completion_ids"]), -1))
    tokens = set(batch["completion_ids"][:, slots].flatten().tolist())
    assert tokens == set(trainer.start.reflection.tokens.slots.tolist())
    assert batch["num_items_in_batch"] == chosen(batch).sum()


# ---- the loss


@pytest.mark.parametrize(("layout", "weighed"), [("parallel", True), ("parallel", False), ("causal", True)])
def test_two_steps_are_the_formula_written_out(models, tmp_path, layout, weighed):
    """Rewards, ranks, clipped ratios at 0.15 and KL at 0.03 by hand: loss and gradient of the step that reuses the
    rollouts, where the policy has left the old one, which is the reference.

    weighed  TRL's default: the KL term times the ratio, of which the mean over the old policy is the KL divergence
    """
    given = {} if weighed else {"use_bias_correction_kl": False}
    trainer = grc_trainer(models[layout], tmp_path, num_iterations=2, max_steps=2, learning_rate=0.2, **given)
    assert (trainer.args.epsilon, trainer.args.beta) == (0.15, 0.03), "the paper's are the defaults"
    seen, groups = watched(trainer)
    trainer.train()
    found, _ = groups[0]
    assert len(groups) == 1, "one generation, used twice"
    now = Checkpoint.load(models[layout][1], "cpu")
    with torch.no_grad():
        old = all_slow_logps(now, seen[1][1])  # of the weights before the first step: of the reference too
    weights, batch = seen[1]
    now.model.load_state_dict(weights)
    returns = returns_of(now, found.rollouts, found.targets.tolist())
    torch.testing.assert_close(found.rewards, torch.tensor(returns), atol=1e-4, rtol=1e-6)
    advantages = [a for group in returns if max(group) - min(group) > 1e-4 for a in slow_ranks(group)]
    torch.testing.assert_close(batch["advantages"], torch.tensor(advantages), atol=1e-5, rtol=0)

    logps = all_slow_logps(now, batch)
    slots = torch.tensor([place.kind == "slot" for place in now.reflection.template.places])
    ratio, gain = (logps - old).exp(), torch.tensor(advantages).unsqueeze(1)
    clipped = ratio.clamp(0.85, 1.15)
    kl = ((old - logps).exp() - (old - logps) - 1) * (ratio if weighed else 1)
    each = (-torch.minimum(ratio * gain, clipped * gain) + 0.03 * kl)[:, ~slots]
    loss = each.mean(dim=1).mean()
    assert ((ratio - clipped)[:, ~slots].abs() > 1e-3).any(), "nothing is clipped"
    assert 0.03 * kl[:, ~slots].mean().item() > 1e-3, "the KL term is nothing"
    assert losses_of(trainer)[1] == pytest.approx(loss.item(), abs=1e-5)
    drift = (old - logps)[:, ~slots].mean().item()
    assert trainer.state.log_history[1]["ppo_kl"] == pytest.approx(drift, rel=1e-4)
    loss.backward()
    wanted = {name: each.grad for name, each in now.model.named_parameters() if each.grad is not None}
    assert_same_gradients([trainer.gradients[1]], [wanted], tolerance=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"contrast": "boundary"}, {"loss_type": "dapo"}], ids=["rank", "boundary", "dapo"]
)
def test_accumulated_batches_are_one_batch(made, tmp_path, settings):
    given = {"shuffle_dataset": False, **settings}
    several = grc_trainer(
        made, tmp_path / "several", **given, per_device_train_batch_size=G, steps_per_generation=4,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    whole = grc_trainer(made, tmp_path / "whole", **given)
    several.train(), whole.train()
    assert_same_gradients(several.gradients, whole.gradients)


def test_ppo_epochs_and_accumulation(made, tmp_path):
    trainer = grc_trainer(
        made, tmp_path, num_iterations=2, max_steps=4, per_device_train_batch_size=2 * G, steps_per_generation=2,
        gradient_accumulation_steps=2, count=8, learning_rate=0.5,
    )  # fmt: skip
    _, groups = watched(trainer)
    trainer.train()
    assert len(groups) == 2, "each generation of two batches trains two steps"
    kls = [line["ppo_kl"] for line in trainer.state.log_history if "ppo_kl" in line]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert abs(kls[1]) > 1e-5
    assert all(torch.isfinite(torch.tensor(losses_of(trainer))))


# ---- rewards


HAND = [
    # draft, loc, said, item, and R_task, R_loc, R_sem, R_Δ as a reader can count them; the target is (1, 2) of K = 2
    # Wrong at level 2, said so, put right; of the two attributes one was said other and made the target's.
    ((1, 1), 2, (1, 0), (1, 2), 1 + 2 * 2, 1 + 1 / (1 + 1e-6), 1 + 0.5, 1),
    # The target itself, said so and kept: nothing is edited, nothing gained.
    ((1, 2), 3, (1, 1), (1, 2), 2 + 2 * 2, 1 + 0, 1 + 0, 0),
    # Right, doubted, and spoilt: level 2 is lost, the loss is no negative reward.
    ((1, 2), 2, (1, 0), (1, 1), 2 + 2 * 1, 0 + 0, 0.5 + 0, 0),
    # Wrong at level 1 and right at level 2: a hit counts whatever stands before it.
    ((0, 2), 1, (0, 0), (1, 2), 1 + 2 * 2, 1 + 1 / (2 + 1e-6), 1 + 1, 1),
]


@pytest.fixture
def by_hand(made, monkeypatch):
    """A checkpoint whose attributes are set so that HAND can be counted."""
    checkpoint = Checkpoint.load(made[1], "cpu")
    own = checkpoint.reflection.attributes
    ids = own.ids.clone()
    for codes, values in {(1, 2): (0, 0), (1, 1): (0, 1), (0, 2): (1, 1)}.items():
        ids[checkpoint.table.codes.tolist().index(list(codes))] = torch.tensor(values)
    checkpoint.__dict__["reflection"] = dataclasses.replace(
        checkpoint.reflection, attributes=dataclasses.replace(own, ids=ids)
    )
    return TrajectorySource(checkpoint)


def test_the_parts_as_trl_asks_for_them(by_hand):
    drafts, locs, said, items, *parts = zip(*HAND)
    labels = [[loc - 1, *some] for loc, some in zip(locs, said)]
    asked = {
        "codes": list(map(list, items)), "drafts": list(map(list, drafts)), "labels": labels,
        "target": [[1, 2]] * len(HAND), "prompts": None, "completions": None, "completion_ids": None,
    }  # fmt: skip
    for name, wanted in zip(PARTS, parts):
        reward = TrajectoryReward(name, by_hand)
        assert reward.__name__ == name
        assert reward(**asked) == pytest.approx(list(wanted), abs=1e-5), name
    assert TrajectoryReward("task", by_hand, 0.0)(**asked) == [1, 2, 2, 1], "β_last = 0: the draft's hits alone"
    assert TrajectoryReward("task", by_hand, 5.0)(**asked) == [11, 12, 7, 11]


def test_the_slow_reward_of_these_tests_is_right():
    attributes = {(1, 2): [0, 0], (1, 1): [0, 1], (0, 2): [1, 1]}
    for draft, loc, said, item, task, place, meant, gain in HAND:
        own = [attributes[draft], attributes[item], attributes[1, 2]]
        found = slow_reward(list(draft), loc, list(said), list(item), [1, 2], own)
        assert found == pytest.approx(task + 2.2 * (place + 0.8 * meant + gain))
    assert slow_ranks([3.0, 1.0, 1.0, 7.0]) == pytest.approx([0.5 / 1.5**0.5, *[-1 / 1.5**0.5] * 2, 1.5**0.5])
    assert slow_ranks([2.0] * 4) == [0] * 4


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, Weights()),
        ({"task_weight": 0}, Weights(task=0)),
        ({"beta_last": 0}, Weights(last=0)),
        ({"beta_cor": 0}, Weights(cor=0)),
        ({"beta_loc": 0}, Weights(loc=0)),
        ({"beta_sem": 0}, Weights(sem=0)),
        ({"beta_delta": 0}, Weights(delta=0)),
    ],
    ids=lambda value: next(iter(value), "all") if isinstance(value, dict) else "",
)
def test_a_weight_of_0_leaves_its_term_out(made, tmp_path, settings, weights):
    trainer = grc_trainer(made, tmp_path, learning_rate=0.0, **settings)
    _, groups = watched(trainer)
    trainer.train()
    found, signal = groups[0]
    wanted = returns_of(trainer.start, found.rollouts, found.targets.tolist(), weights)
    torch.testing.assert_close(found.rewards, torch.tensor(wanted), atol=1e-4, rtol=1e-6)
    if settings:
        full = returns_of(trainer.start, found.rollouts, found.targets.tolist())
        assert not torch.allclose(torch.tensor(full), found.rewards), "no trajectory tells the term from nothing"
    ranks = torch.tensor([slow_ranks([round(r, 3) for r in group]) for group in wanted])
    torch.testing.assert_close(signal.advantages.float(), ranks, atol=1e-5, rtol=0)
    log = trainer.state.log_history[0]
    assert {f"rewards/{name}/mean" for name in PARTS} <= log.keys()
    assert log["reward"] == pytest.approx(float(torch.tensor(wanted).mean()), abs=1e-3)


def test_the_log_says_how_reflection_went(made, tmp_path):
    trainer = grc_trainer(made, tmp_path, learning_rate=0.0)
    _, groups = watched(trainer)
    trainer.train()
    found, _ = groups[0]
    answers = found.rollouts
    targets = [target for target in found.targets.tolist() for _ in range(G)]
    drafts, items, labels = answers.drafts.tolist(), answers.codes.tolist(), answers.labels.tolist()
    first = [next((t for t in range(2) if draft[t] != target[t]), 2) for draft, target in zip(drafts, targets)]
    facts = [[facts_of(trainer.start, one) for one in some] for some in (drafts, targets)]
    wanted = {
        "acc_loc": [label[0] == place for label, place in zip(labels, first)],
        "kept": [label[0] == 2 for label in labels],
        "draft_hit": [draft == target for draft, target in zip(drafts, targets)],
        "put_right": [d != t == i for d, t, i in zip(drafts, targets, items)],
        "put_wrong": [d == t != i for d, t, i in zip(drafts, targets, items)],
        "acc_categories": [label[1] == (d[0] == t[0]) for label, d, t in zip(labels, *facts)],
        "acc_brand": [label[2] == (d[1] == t[1]) for label, d, t in zip(labels, *facts)],
    }
    log = trainer.state.log_history[0]
    for name, each in wanted.items():
        assert log[f"grc/{name}"] == pytest.approx(sum(each) / len(each)), name
    assert log["rollout/validity"] == 1


# ---- ReCast's boundary


def anchors_of(trainer, found, signal, batch):
    """The answers of the batch that were not drawn, with their draws."""
    replaced = [(group, which) for group, which in enumerate(signal.replaced.tolist()) if which >= 0]
    active = signal.active.flatten().nonzero().flatten().tolist()
    return [(group, group * G + which, active.index(group * G + which)) for group, which in replaced]


def common(codes: list[int], target: list[int]) -> int:
    """Levels from the first on that are the target's."""
    return next((level for level, (own, other) in enumerate(zip(codes, target)) if own != other), len(target))


def test_the_boundary_keeps_two_and_repairs_behind_a_draft_of_its_own(made, tmp_path):
    trainer = grc_trainer(made, tmp_path, contrast="boundary", boundary_weight=0.5, num_iterations=2, count=8,
                          per_device_train_batch_size=8 * G)  # fmt: skip
    seen, groups = watched(trainer)
    trainer.train()
    (found, signal), (_, batch) = groups[0], seen[0]
    hits = found.hits.any(dim=1)
    assert signal.active.sum(dim=1).tolist() == [0 if row.all() else 2 for row in found.hits]
    assert ((signal.replaced >= 0) == ~hits).all()
    assert not hits.all(), "nothing to repair"
    for group, target in enumerate(found.targets.tolist()):
        place, rows = group * G, range(group * G, group * G + G)
        scores = [
            max(common(codes[row].tolist(), target) for codes in (found.rollouts.drafts, found.rollouts.codes))
            for row in rows
        ]
        right = found.hits[group].tolist()
        if not any(right):
            place = scores.index(min(scores))  # what is furthest from the target makes room for the anchor
            assert signal.replaced[group] == place
            right[place], scores[place] = True, 2
        misses = [score if not hit else -1 for score, hit in zip(scores, right)]
        wanted = [0.0] * G
        if not all(right):
            wanted[right.index(True)], wanted[misses.index(max(misses))] = 1.0, -0.5
        assert signal.advantages[group].tolist() == wanted
    reflection, table = trainer.start.reflection, trainer.start.table
    names = {int(token): text for text, token in trainer.start.tokenizer.get_vocab().items()}
    plain = Checkpoint.load(made[1], "cpu")
    for group, row, place in anchors_of(trainer, found, signal, batch):
        draft, target = found.rollouts.drafts[row].tolist(), found.targets[group].tolist()
        loc = next((t + 1 for t in range(2) if draft[t] != target[t]), 3)
        facts = [facts_of(trainer.start, codes) for codes in (draft, target)]
        said = ["same" if own == other else "other" for own, other in zip(*facts)]
        text = lambda codes: "".join(table.text_of(table.items[table.codes.tolist().index(codes)]))  # noqa: E731
        ids = batch["completion_ids"][place].tolist()
        spoken = [names[one] for one in ids]
        assert trainer.start.tokenizer.decode(ids[:2]) == text(draft)
        assert trainer.start.tokenizer.decode(ids[-2:]) == text(target)
        assert spoken[5:8] == [f"<|loc_{loc}|>", f"<|categories_{said[0]}|>", f"<|brand_{said[1]}|>"]
        assert batch["advantages"][place] == 1
        with torch.no_grad():  # its own, and not those of the answer that it stands in for
            slow = slow_logps(plain, prompt_of(batch, place), ids, None, "children")
        torch.testing.assert_close(batch["old_per_token_logps"][place], slow, atol=1e-5, rtol=0)
    assert reflection.template.places[5].kind == "label"


def test_without_repair_a_group_without_a_hit_teaches_nothing(made, tmp_path):
    trainer = grc_trainer(made, tmp_path, contrast="boundary", repair=False, count=8, learning_rate=0.0,
                          per_device_train_batch_size=8 * G)  # fmt: skip
    _, groups = watched(trainer)
    trainer.train()
    found, signal = groups[0]
    mixed = found.hits.any(dim=1) & ~found.hits.all(dim=1)
    assert (signal.active.sum(dim=1) == 2 * mixed).all()
    assert (signal.replaced < 0).all()
    assert 0 < mixed.sum() < 8


# ---- refills, LoRA


def test_groups_without_a_signal_are_refilled_whole(made, tmp_path):
    """Drafts and labels go with their answers when groups are exchanged."""
    weights = {"beta_loc": 0, "beta_sem": 0, "beta_delta": 0, "beta_last": 0}  # only the draft's hits: ties
    trainer = grc_trainer(made, tmp_path, **weights, num_generations=2, per_device_train_batch_size=16, count=12,
                          refill_tries=3)  # fmt: skip
    _, groups = watched(trainer)
    trainer.train()
    found, _ = groups[0]
    assert trainer.state.log_history[0]["group/refilled"] > 0
    wanted = returns_of(trainer.start, found.rollouts, found.targets.tolist(), Weights(last=0, loc=0, sem=0, delta=0))
    torch.testing.assert_close(found.rewards, torch.tensor(wanted), atol=1e-4, rtol=0)
    levels = trainer.start.tokens.levels
    for row, answer in enumerate(found.rollouts.answers):
        for kind, codes in (("draft", found.rollouts.drafts[row]), ("item", found.rollouts.codes[row])):
            places = trainer.start.reflection.template.at(kind)
            assert [answer[place] for place in places] == [int(levels[t][code]) for t, code in enumerate(codes)]


def test_lora_trains_and_refers_to_the_model_without_it(made, tmp_path):
    modules = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens"]}
    lora = LoraConfig(r=4, ensure_weight_tying=True, **modules)
    trainer = grc_trainer(made, tmp_path, lora=lora, max_steps=3, learning_rate=0.5)
    trainer.train()
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-5


def test_settings_are_the_papers_by_default(tmp_path):
    own = GRCSettings(output_dir=str(tmp_path), per_device_train_batch_size=8)
    assert (own.beta_cor, own.beta_last, own.beta_loc, own.beta_sem) == (2.2, 2.0, 1.0, 0.8)
    assert (own.epsilon, own.beta, own.loss_type) == (0.15, 0.03, "grpo")
    assert own.reward_weights == pytest.approx([1, 2.2, 2.2 * 0.8, 2.2])
