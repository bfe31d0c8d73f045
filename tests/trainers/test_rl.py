"""The seam with its methods: what is dropped, what is injected, what stays when there is nothing to learn."""

import pytest
import torch
from peft import LoraConfig
from rl_for_tests import (
    G,
    KnownSource,
    P,
    assert_same_gradients,
    losses_of,
    prompts_of,
    trainer_of,
    write_uneven_model,
)
from taught import write_reasoning_model

from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.objectives.group import group_normalised, has_signal
from recllm.objectives.srpo import prefix_reward
from recllm.trainers.batches import rows_of
from recllm.trainers.groups import RolloutGroups, Signal
from recllm.trainers.grpo import GRPOSettings, RecGRPO
from recllm.trainers.recast import ReCast, ReCastSettings
from recllm.trainers.srpo import SRPO, SRPOSettings

HITS = {"rewards": ["hit"], "normaliser": "children"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_uneven_model(tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return write_reasoning_model(tmp_path_factory.mktemp("taught"))


def spied(trainer):
    """Batches as the loss is given them, one a call."""
    seen, compute = [], trainer._compute_loss

    def spy(model, inputs):
        seen.append({name: part.clone() if isinstance(part, torch.Tensor) else part for name, part in inputs.items()})
        return compute(model, inputs)

    trainer._compute_loss = spy
    return seen


def weights(trainer):
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


def moved(before, after) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def slow_logps(model, ids, mask, answers, temperature=1.0):
    """By one plain forward for each answer, over the whole vocabulary. (R, C)"""
    found = torch.zeros(answers.shape)
    for row in range(len(answers)):
        prompt, answer = ids[row][mask[row] > 0], answers[row]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, answer]).unsqueeze(0)).logits[0]
        logits = logits[len(prompt) - 1 : -1] / temperature
        found[row] = logits.log_softmax(-1).gather(1, answer.unsqueeze(1)).squeeze(1)
    return found


# ---- groups without a signal


@pytest.mark.parametrize(
    ("loss", "beta"),
    [("grpo", 0.1), ("dapo", 0.1),
     *(pytest.param(loss, beta, marks=pytest.mark.slow) for loss, beta in [
         ("grpo", 0.0), ("dr_grpo", 0.1), ("bnpo", 0.1), ("luspo", 0.1), ("vespo", 0.1)])],
)  # fmt: skip
def test_a_group_without_a_signal_contributes_nothing(made, tmp_path, beta, loss):
    """The gradient is that of a batch which never held it, its KL term included."""
    given = {"beta": beta, "loss_type": loss, "num_iterations": 2, "max_steps": 2, "shuffle_dataset": False}
    trainer = trainer_of(made, tmp_path / "some", alike=2, **given)
    seen = spied(trainer)
    trainer.train()
    assert [len(batch["completion_ids"]) for batch in seen] == [2 * G] * 2, "they are not computed at all"
    prompts = prompts_of(made[0], Checkpoint.load(made[1], "cpu"))
    alone = trainer_of(made, tmp_path / "alone", **given, prompts=prompts.select(range(2, P)),
                       per_device_train_batch_size=2 * G)  # fmt: skip
    alone.source = KnownSource(alone.source.own, prompts)  # the same answers as among four
    alone.train()
    assert_same_gradients(trainer.gradients, alone.gradients)
    assert losses_of(trainer) == pytest.approx(losses_of(alone), rel=1e-5, abs=1e-6)


def test_where_nothing_differs_a_step_is_nothing(made, tmp_path):
    trainer = trainer_of(made, tmp_path, alike=P, beta=0.1, max_steps=2, num_iterations=2)
    before = weights(trainer)
    trainer.train()
    assert losses_of(trainer) == [0.0, 0.0]
    assert all(not each.any() for step in trainer.gradients for each in step.values())
    assert not moved(before, weights(trainer))
    first = trainer.state.log_history[0]
    assert (first["actor/width"], first["actor/active"], first["group/trainable"]) == (0, 0, 0)
    assert first["actor/tokens"] <= 1


def test_the_kl_term_of_a_group_without_a_signal_stays_if_asked(made, tmp_path):
    given = {"alike": P, "beta": 0.1, "num_iterations": 2, "max_steps": 4, "keep_zero_signal": True}
    trainer = trainer_of(made, tmp_path, **given)
    with torch.no_grad():  # away from the reference
        for parameter in trainer.model.parameters():
            parameter += 0.02
    trainer.train()
    assert all(entry["kl"] > 0 for entry in trainer.state.log_history if "kl" in entry)
    assert all(any(each.any() for each in step.values()) for step in trainer.gradients)
    assert trainer.state.log_history[0]["actor/width"] == G


def test_the_log_counts_what_was_drawn_and_what_trains(made, tmp_path):
    trainer = trainer_of(made, tmp_path, alike=1, **HITS)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["group/trainable"] == log["group/single_hit"] + log["group/richer"] == 0.75
    assert log["group/all_zero"] == 0.25
    assert (log["actor/width"], log["actor/active"]) == (3 * G / P, 3 * G)
    assert log["rollout/validity"] == 1
    assert log["reward"] == pytest.approx(1 - log["group/zero_reward"])
    for name in ("completions/clipped_ratio", "completions/mean_terminated_length"):
        assert name not in log


@pytest.mark.parametrize(
    ("loss", "accumulation"),
    [("grpo", 1), ("grpo", 4),
     *(pytest.param(loss, steps, marks=pytest.mark.slow) for loss, steps in [
         ("grpo", 2), ("dr_grpo", 2), ("dr_grpo", 4), ("sapo", 4), ("luspo", 4)])],
)  # fmt: skip
def test_uneven_batches_are_the_mean_over_the_answers_that_train(made, tmp_path, accumulation, loss):
    """Some answers of some groups, in four batches: the gradient of a step is that of one batch of its answers."""
    active = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]).bool()

    class Some(RecGRPO):
        def build_signal(self, groups):
            return Signal(group_normalised(groups.rewards), active)

    given = {"beta": 0.1, "loss_type": loss, "shuffle_dataset": False, "learning_rate": 0.0, "temperature": 0.9}
    several = trainer_of(made, tmp_path / "several", Some, **given, per_device_train_batch_size=G, max_steps=4,
                         steps_per_generation=4, gradient_accumulation_steps=accumulation)  # fmt: skip
    seen = spied(several)
    several.train()
    rows = {
        tuple(map(tuple, (batch["prompt_ids"][row].tolist(), batch["completion_ids"][row].tolist())))
        for batch in seen
        for row in range(len(batch["completion_ids"]))
        if batch["completion_mask"][row].any()
    }
    assert rows
    assert sum(int(batch["completion_mask"].any(1).sum()) for batch in seen[:4]) == 7
    whole = trainer_of(made, tmp_path / "whole", Some, **given)
    whole.train()
    if accumulation == 4:
        assert_same_gradients(several.gradients[:1], whole.gradients)
        return
    # A step of fewer batches has the mean over its own answers: weighed by how many they are it is the same.
    counts = [int(batch["completion_mask"].any(1).sum()) for batch in seen[:4]]
    steps = 4 // accumulation
    counts = [sum(counts[step * accumulation : (step + 1) * accumulation]) for step in range(steps)]
    total = {
        name: sum(step[name] * count / 7 for step, count in zip(several.gradients, counts))
        for name in several.gradients[0]
    }
    assert_same_gradients([total], whole.gradients)


def test_more_accumulation_than_batches_is_the_mean_of_the_generations(made, tmp_path):
    """8 micro-batches a step, 4 a generation: two generations of equally many answers."""
    given = {"learning_rate": 0.0, "beta": 0.1, "count": 2 * P, "shuffle_dataset": False}
    two = trainer_of(made, tmp_path / "two", **given, per_device_train_batch_size=G, steps_per_generation=4,
                     gradient_accumulation_steps=8)  # fmt: skip
    one = trainer_of(made, tmp_path / "one", **given, per_device_train_batch_size=2 * P * G)
    two.train(), one.train()
    assert (two._step, one._step) == (8, 1)
    assert_same_gradients(two.gradients, one.gradients)


def test_a_generation_that_ends_in_the_middle_of_a_step(made, tmp_path):
    """6 batches a generation and 4 a step, all alike but for their answers: three steps are two generations' mean."""
    given = {"learning_rate": 0.0, "beta": 0.1, "count": 6, "shuffle_dataset": False}
    parts = trainer_of(made, tmp_path / "parts", **given, per_device_train_batch_size=G, steps_per_generation=6,
                       gradient_accumulation_steps=4, num_train_epochs=2, max_steps=-1)  # fmt: skip
    parts.train()
    whole = trainer_of(made, tmp_path / "whole", **given, per_device_train_batch_size=6 * G, max_steps=1)
    whole.train()
    assert all(len(step) for step in parts.gradients)
    # Of an epoch: a step of four batches, one of the two that are left, divided by two.
    total = {
        name: (4 * parts.gradients[0][name] + 2 * parts.gradients[1][name]) / 6 for name in parts.gradients[0]
    }  # fmt: skip
    assert_same_gradients([total], whole.gradients)


# ---- ReCast


def recast(made, output, **given):
    return trainer_of(made, output, ReCast, ReCastSettings, **{**HITS, **given})


def test_recast_updates_two_answers_of_each_group(made, tmp_path):
    """A hit and the best miss; where there is no hit, the truth and the best miss."""
    trainer = recast(made, tmp_path, alike=2, beta=0.1, num_iterations=2, max_steps=2, shuffle_dataset=False)
    seen = spied(trainer)
    trainer.train()
    assert [len(batch["completion_ids"]) for batch in seen] == [2 * P] * 2
    batch = seen[0]
    assert batch["completion_mask"].any(dim=1).all()
    assert sorted(batch["advantages"].tolist()) == [-1.0] * P + [1.0] * P
    prompts = prompts_of(made[0], Checkpoint.load(made[1], "cpu"))
    table, tokens = trainer.source.own.checkpoint.table, trainer.source.own.checkpoint.tokens
    for row in range(2 * P):
        text = batch["prompt_ids"][row][batch["prompt_mask"][row] > 0].tolist()
        place = prompts["prompt_ids"].index(text)
        codes = [code for code in prompts["target"][place] if code >= 0]
        truth = [int(tokens.levels[level][code]) for level, code in enumerate(codes)]
        answer = batch["completion_ids"][row][batch["completion_mask"][row] > 0].tolist()
        assert (answer == truth) == (batch["advantages"][row] == 1)
    assert len(table) == 13
    log = trainer.state.log_history[0]
    assert (log["recast/repaired"], log["actor/active"], log["actor/width"]) == (0.5, 2 * P, 2)
    assert log["group/all_zero"] == 0.5, "what was drawn, before it was repaired"


def test_an_anchor_has_old_and_reference_log_probs_of_its_own(made, tmp_path):
    trainer = recast(
        made, tmp_path, alike=P, beta=0.1, num_iterations=2, normaliser="full", temperature=0.8, max_steps=2
    )  # fmt: skip
    start = Checkpoint.load(made[1], "cpu").model
    seen = spied(trainer)
    trainer.train()
    batch = seen[0]
    assert (batch["advantages"] == 1).sum() == P
    expected = slow_logps(
        start, batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], temperature=0.8
    ) * batch["completion_mask"]  # fmt: skip
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        assert torch.allclose(batch[name], expected, atol=1e-4), name
    assert torch.equal(seen[1]["old_per_token_logps"], batch["old_per_token_logps"])
    assert losses_of(trainer)[0] == pytest.approx(0.0, abs=1e-6)  # 1 and -1, and both ratios are 1
    assert batch["sampling_per_token_logps"].isnan().all()  # the engine drew these: no other sampler is to be corrected


@pytest.mark.parametrize(
    ("settings", "active", "repaired"),
    [
        ({}, 2 * P, 0.5),
        ({"repair": "never"}, 2 * (P - 2), 0.0),
        ({"contrast": "group"}, G * P, 0.5),
        ({"boundary_advantages": "srpo", "pass_k": 2}, 2 * P, 0.5),
        ({"keep_zero_signal": True, "repair": "never"}, 2 * (P - 2) + 2 * G, 0.0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_halves_of_recast(made, tmp_path, settings, active, repaired):
    trainer = recast(made, tmp_path, alike=2, beta=0.1, **settings)
    before = weights(trainer)
    seen = spied(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["actor/active"] == active
    assert trainer.state.log_history[0]["recast/repaired"] == repaired
    assert moved(before, weights(trainer))
    assert int(seen[0]["completion_mask"].any(1).sum()) == active


def test_adaptive_repair_follows_the_running_share(made, tmp_path):
    """q is 3/4 in every generation: the first repairs by q = 0, so always; then a quarter, so few or none."""
    given = {"alike": 1, "repair": "adaptive", "learning_rate": 0.0}
    trainer = recast(made, tmp_path, max_steps=12, **given)
    trainer.train()
    repaired = [entry["recast/repaired"] for entry in trainer.state.log_history if "recast/repaired" in entry]
    assert repaired[0] == 0.25
    assert sum(repaired[1:]) / 11 < 0.2
    assert trainer.running["trainable_share"] == pytest.approx(0.75)


# ---- SRPO


def srpo(made, output, **given):
    settings = {"rewards": ["hit"], "normaliser": "children", "pass_k": 2, "temperature": 1.0, "count": 20}
    return trainer_of(made, output, SRPO, SRPOSettings, **{**settings, **given})


def test_srpo_refills_until_groups_differ_or_tries_are_spent(made, tmp_path):
    """The first eight prompts of the data have no signal: asked in order, all of them are rejected."""
    given = {"alike": 8, "shuffle_dataset": False, "max_steps": 2, "beta": 0.0}
    found = {}
    for tries in (0, 1, 6):
        trainer = srpo(made, tmp_path / str(tries), refill_tries=tries, **given)
        trainer.train()
        found[tries] = trainer.state.log_history[:2]
    assert [entry["actor/active"] for entry in found[0]] == [0, 0]
    assert all("group/rejected" not in entry for entry in found[0])
    assert [entry["actor/active"] for entry in found[6]] == [P * G, P * G]
    for tries in (1, 6):
        for entry in found[tries]:
            assert entry["group/trainable"] == 0, "the shares are those of what was asked first"
            assert entry["group/rejected"] > 0
    for entry in found[1]:
        assert entry["actor/active"] == entry["group/refilled"] * P * G
        assert entry["group/rejected"] == 1


def test_dynamic_sampling_is_a_function_of_the_seed(made, tmp_path):
    def drawn(seed, name):
        trainer = srpo(made, tmp_path / name, refill_tries=3, alike=8, shuffle_dataset=False, seed=seed, max_steps=2)
        seen = spied(trainer)
        trainer.train()
        return [batch["prompt_ids"].tolist() for batch in seen], losses_of(trainer)

    assert drawn(1, "a") == drawn(1, "b")
    assert drawn(1, "c")[0] != drawn(2, "d")[0]


def test_srpo_adds_its_bonus(made, tmp_path):
    trainer = srpo(made, tmp_path, count=P, refill_tries=0, shuffle_dataset=False)
    seen = spied(trainer)
    trainer.train()
    # One hit of four, k = 2: ρ = 1/2, σ = 1/2, a hit 1, a miss (1/2 − 2/3) / (1/2) = −1/3; normalised 3/2 and −1/2.
    expected = sorted([2.5, -5 / 6, -5 / 6, -5 / 6] * P)
    if trainer.state.log_history[0]["group/single_hit"] == 1:
        assert sorted(seen[0]["advantages"].tolist()) == pytest.approx(expected)
    assert trainer.state.log_history[0]["srpo/bonus_abs_mean"] > 0


# ---- rewards and logs


def test_rewards_are_weighed(made, tmp_path):
    found = {}

    class Looks(RecGRPO):
        def build_signal(self, groups):
            found.update(rewards=groups.rewards, hits=groups.hits.float(), codes=groups.codes, targets=groups.targets)
            return super().build_signal(groups)

    trainer = trainer_of(made, tmp_path, Looks, rewards=["hit", "prefix"], reward_weights=[2.0, -0.5], reward_beta=1.0)
    trainer.train()
    expected = 2 * found["hits"] - 0.5 * prefix_reward(found["codes"], found["targets"], 1.0)
    assert torch.allclose(found["rewards"], expected, atol=1e-6)
    assert found["hits"].any()


def test_an_evaluation_says_nothing_of_the_training(made, tmp_path):
    """And takes nothing from the next line about it: both would be on half of the steps."""
    trainer = trainer_of(
        made, tmp_path, validation=True, max_steps=4, logging_steps=2, eval_steps=1, validation_users=10,
        validation_beams=10,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history
    evaluations = [line for line in log if any(name.startswith("eval_") for name in line)]
    assert [set(line) for line in evaluations] == [{"eval_recall@10", "eval_ndcg@10", "epoch", "step"}] * 4
    training = [line for line in log if "reward" in line]
    assert [line["step"] for line in training] == [2, 4]
    assert all(line["actor/active"] == P * G for line in training), "an amount a step, of both steps"


# ---- adapters, memory, precision, modes


def test_the_reference_of_lora_is_the_start(made, tmp_path):
    start = Checkpoint.load(made[1], "cpu").model
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )  # fmt: skip
    trainer = trainer_of(made, tmp_path, beta=0.1, lora=lora, max_steps=3, num_iterations=1, learning_rate=0.5)
    before = weights(trainer)
    seen = spied(trainer)
    trainer.train()
    changed = {name for name, each in weights(trainer).items() if not torch.equal(each, before[name])}
    assert any("lora_B" in name for name in changed)
    assert any("embed_tokens" in name for name in changed)
    for batch in seen:
        expected = slow_logps(start, batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"])
        expected = expected * batch["completion_mask"]
        assert torch.allclose(batch["ref_per_token_logps"], expected, atol=1e-4)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert kl[-1] > 1e-6, "the adapter was on when the reference was asked"


def test_gradient_checkpointing_changes_nothing(made, tmp_path):
    found = []
    for on in (False, True):
        trainer = trainer_of(made, tmp_path / str(on), gradient_checkpointing=on, beta=0.1, num_iterations=2,
                             max_steps=2)  # fmt: skip
        trainer.train()
        found.append(trainer.gradients)
    assert_same_gradients(*found)


def test_bf16(made, tmp_path):
    trainer = trainer_of(made, tmp_path, bf16=True, beta=0.1, num_iterations=2, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert all(each.dtype == torch.float32 for each in weights(trainer).values())
    assert moved(before, weights(trainer))
    assert losses_of(trainer)[0] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("sampling", ["samples", "distinct", "beams"])
def test_direct_answers_of_every_kind(made, tmp_path, sampling):
    trainer = trainer_of(
        made, tmp_path, known=False, count=12, max_steps=3, beta=0.1, sampling=sampling, normaliser="children",
        rewards=["dcg"] if sampling == "beams" else ["prefix"],
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    assert moved(before, weights(trainer))
    log = trainer.state.log_history[0]
    assert log["rollout/validity"] == 1
    if sampling != "samples":
        assert log["rollout/distinct"] == 1


@pytest.mark.parametrize(
    ("kind", "settings"), [(RecGRPO, GRPOSettings), (ReCast, ReCastSettings), (SRPO, SRPOSettings)],
    ids=["grpo", "recast", "srpo"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["reason", "joint"])
def test_answers_after_reasoning(taught, tmp_path, kind, settings, mode):
    own = {"pass_k": 2} if kind is SRPO else {}
    trainer = trainer_of(
        taught, tmp_path, kind, settings, known=False, mode=mode, count=8, max_steps=2, beta=0.05, num_iterations=2,
        max_completion_length=40, rewards=["hit"] if kind is ReCast else ["prefix"], normaliser="children",
        temperature=1.0, learning_rate=0.05, layout="auto", **own,
    )  # fmt: skip
    before = weights(trainer)
    seen = spied(trainer)
    trainer.train()
    assert moved(before, weights(trainer))
    assert all(torch.isfinite(torch.tensor(losses_of(trainer))))
    chains = seen[0]["completion_mask"].sum(1)
    assert chains.max() > 10
    if kind is ReCast:
        groups = seen[0]["advantages"].numel() // 2
        assert sorted(seen[0]["advantages"].tolist()) == [-1.0] * groups + [1.0] * groups
        assert rows_of(seen[0]).packed.rows.tolist() == list(range(2 * groups))


def test_the_policy_learns_what_is_rewarded(made, tmp_path):
    """One prompt set, its own draws: the expected reward rises."""
    trainer = trainer_of(
        made, tmp_path, known=False, count=P, max_steps=25, normaliser="children", learning_rate=0.02,
        optim="adamw_torch", num_generations=8, per_device_train_batch_size=8 * P, rewards=["hit"],
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5 > 0


def test_a_signal_of_one_number_a_token(made, tmp_path):
    class ByToken(RecGRPO):
        def build_signal(self, groups: RolloutGroups) -> Signal:
            each = group_normalised(groups.rewards)
            return Signal(each.unsqueeze(-1).repeat(1, 1, 2), has_signal(groups.rewards)[:, None].expand_as(each))

    found = []
    for kind in (ByToken, RecGRPO):
        trainer = trainer_of(made, tmp_path / kind.__name__, kind, beta=0.1, num_iterations=2, max_steps=2)
        trainer.train()
        found.append(trainer.gradients)
    assert_same_gradients(*found)


def test_a_method_without_a_signal_says_so(made, tmp_path):
    from recllm.trainers.base import RecGRPOTrainer

    with pytest.raises(NotImplementedError):
        trainer_of(made, tmp_path, RecGRPOTrainer).train()


def test_a_group_has_to_lie_whole_in_a_generation(tmp_path):
    with pytest.raises(UserError, match="does not divide the 10 answers"):
        GRPOSettings(output_dir=str(tmp_path), per_device_train_batch_size=10, num_generations=4)
