"""Loss and gradients of the seam against TRL's own GRPOTrainer: same model, prompts, answers and advantages."""

import pytest
import torch
from rl_for_tests import (
    QUIET,
    G,
    KnownSource,
    P,
    SavesGradients,
    TRLsAdvantages,
    assert_same_gradients,
    losses_of,
    prompts_of,
    trainer_of,
    write_uneven_model,
)
from trl import GRPOConfig, GRPOTrainer

from recllm.checkpoint import Checkpoint
from recllm.rewards import reward_functions
from recllm.trainers.rollouts import RolloutSettings, RolloutSource

OURS = ("rewards", "normaliser", "validation_users", "layout")
SEQUENCE = {"importance_sampling_level": "sequence"}
# Answers of a batch are all of one generation (S = 1): TRL's shuffling of them changes nothing.
CASES = [
    {"loss_type": "grpo", "beta": 0.0, "num_iterations": 1, "layout": "padded"},
    {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "layout": "auto", "temperature": 0.7},
    {"loss_type": "dapo", "beta": 0.1, "num_iterations": 2, "layout": "row", "epsilon_high": 0.28},
    {"loss_type": "cispo", "beta": 0.0, "num_iterations": 2, "layout": "row", "epsilon_high": 1.5},
    {"loss_type": "luspo", "beta": 0.1, "num_iterations": 2, "layout": "row", **SEQUENCE},
    {"loss_type": "vespo", "beta": 0.1, "num_iterations": 2, "layout": "auto"},
]  # fmt: skip
MORE = [
    {"loss_type": "dr_grpo", "beta": 0.1, "num_iterations": 2, "layout": "auto"},
    {"loss_type": "bnpo", "beta": 0.1, "num_iterations": 2, "layout": "padded"},
    {"loss_type": "sapo", "beta": 0.1, "num_iterations": 2, "layout": "auto"},
    {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "layout": "row"},
    {"loss_type": "grpo", "beta": 0.0, "num_iterations": 2, "layout": "cache", **SEQUENCE},
    {"loss_type": "grpo", "beta": 0.1, "num_iterations": 1, "layout": "row", "use_bias_correction_kl": True},
    {"loss_type": "dr_grpo", "beta": 0.0, "num_iterations": 1, "layout": "padded"},
    {"loss_type": "dapo", "beta": 0.0, "num_iterations": 1, "layout": "auto", **SEQUENCE},
    {"loss_type": "bnpo", "beta": 0.0, "num_iterations": 2, "layout": "row", **SEQUENCE},
    {"loss_type": "cispo", "beta": 0.1, "num_iterations": 1, "layout": "auto", "epsilon_high": 1.5},
    {"loss_type": "sapo", "beta": 0.0, "num_iterations": 2, "layout": "padded", **SEQUENCE},
    {"loss_type": "luspo", "beta": 0.0, "num_iterations": 1, "layout": "padded", **SEQUENCE},
    {"loss_type": "vespo", "beta": 0.0, "num_iterations": 1, "layout": "row"},
    {"loss_type": "grpo", "beta": 0.0, "num_iterations": 2, "layout": "row", "delta": 1.3},
    {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "layout": "row", "top_entropy_quantile": 0.5},
    {"loss_type": "dapo", "beta": 0.1, "num_iterations": 2, "layout": "row", "entropy_coef": 0.05},
    {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "layout": "row", "gradient_checkpointing": True},
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_uneven_model(tmp_path_factory.mktemp("equality"))


def stock_of(made, output, alike=0, **given):
    """TRL's trainer with the same answers, through its `rollout_func`."""
    checkpoint = Checkpoint.load(made[1], "cpu")
    prompts = prompts_of(made[0], checkpoint)
    source = KnownSource(RolloutSource.of(checkpoint, RolloutSettings()), prompts, alike)
    rewards = reward_functions(given.get("rewards", QUIET["rewards"]))
    settings = {name: value for name, value in {**QUIET, **given}.items() if name not in OURS}
    settings = {"loss_type": "grpo", "temperature": 1.0, "gradient_checkpointing": False, "use_cpu": True} | settings

    def roll_out(texts, trainer):
        rows = [prompts[prompts["prompt"].index(text)] for text in texts]
        found = source(rows[::G], G, 0, [])
        return {
            "prompt_ids": [row["prompt_ids"] for row in rows],
            "completion_ids": found.answers,
            "logprobs": None,
            "codes": found.codes.tolist(),
        }

    gradients = SavesGradients()
    trainer = GRPOTrainer(
        checkpoint.model, rewards, GRPOConfig(output_dir=str(output), **settings), prompts,
        processing_class=checkpoint.tokenizer, rollout_func=roll_out, callbacks=[gradients],
    )  # fmt: skip
    trainer.gradients = gradients.steps
    return trainer


def assert_equal_to_stock(made, tmp_path, alike=0, **given):
    ours = trainer_of(made, tmp_path / "ours", TRLsAdvantages, alike=alike, **given)
    stock = stock_of(made, tmp_path / "stock", alike, **given)
    ours.train(), stock.train()
    assert losses_of(ours) == pytest.approx(losses_of(stock), rel=1e-5, abs=1e-6)
    assert_same_gradients(ours.gradients, stock.gradients)
    return ours, stock


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda case: "-".join(map(str, case.values())),
)  # fmt: skip
def test_two_steps_have_the_gradients_of_trl(made, tmp_path, case):
    ours, stock = assert_equal_to_stock(made, tmp_path, max_steps=2, **case)
    figures = ("kl", "entropy", "clip_ratio/region_mean", "reward", "reward_std", "rewards/prefix/mean")
    for own, others in zip(ours.state.log_history[:2], stock.state.log_history[:2]):
        for name in figures:
            assert (name in own) == (name in others)
            assert own.get(name, 0) == pytest.approx(others.get(name, 0), rel=1e-4, abs=1e-5), name
    if case["num_iterations"] > 1 and "top_entropy_quantile" not in case:
        assert abs(ours.state.log_history[1]["ppo_kl"]) > 1e-3, "the policy did not move between the uses of answers"


@pytest.mark.parametrize(
    "loss", ["grpo", "dapo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dr_grpo", "cispo", "sapo",
                                                                                      "luspo", "vespo"))]
)  # fmt: skip
def test_an_accumulated_step_has_the_gradient_of_trl(made, tmp_path, loss):
    """TRL shuffles single answers over the batches of a step: a mean over all of them does not see it."""
    given = {"per_device_train_batch_size": G, "gradient_accumulation_steps": P, "beta": 0.1, "loss_type": loss}
    given |= SEQUENCE if loss == "luspo" else {}
    assert_equal_to_stock(made, tmp_path, max_steps=2, **given)


@pytest.mark.slow
def test_a_generation_that_several_accumulated_steps_share(made, tmp_path):
    """Two optimizer steps over one generation, twice each: with no rate to learn by, their sum is TRL's."""
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    given |= {"num_iterations": 2, "beta": 0.1, "learning_rate": 0.0, "max_steps": 4}
    ours = trainer_of(made, tmp_path / "ours", TRLsAdvantages, **given)
    stock = stock_of(made, tmp_path / "stock", **given)
    ours.train(), stock.train()
    sums = [
        [{name: sum(step[name] for step in trainer.gradients[start : start + 2]) for name in trainer.gradients[0]}]
        for trainer in (ours, stock)
        for start in (0, 2)
    ]
    assert_same_gradients(sums[0], sums[2])
    assert_same_gradients(sums[1], sums[3])


def test_groups_without_a_signal_have_a_kl_term_in_trl_and_here_if_asked(made, tmp_path):
    given = {"alike": 2, "beta": 0.1, "num_iterations": 2, "max_steps": 2}
    _, stock = assert_equal_to_stock(made, tmp_path, **given)
    kept = trainer_of(made, tmp_path / "kept", keep_zero_signal=True, **given)
    dropped = trainer_of(made, tmp_path / "dropped", **given)
    kept.train(), dropped.train()
    # TRL's 1e-4 beside the std is all that is between the two.
    assert_same_gradients(kept.gradients, stock.gradients, tolerance=1e-3)
    with pytest.raises(AssertionError):
        assert_same_gradients(dropped.gradients, stock.gradients, tolerance=1e-2)


def test_the_normaliser_decides_what_a_code_is_compared_with(made, tmp_path):
    found = {}
    for normaliser in ("full", "level", "children"):
        trainer = trainer_of(made, tmp_path / normaliser, normaliser=normaliser)
        trainer.train()
        found[normaliser] = trainer.gradients[0]
        assert losses_of(trainer) == pytest.approx([0.0], abs=1e-6)  # on-policy: advantages sum to 0
    assert all(torch.isfinite(each).all() for each in found["children"].values())
    for one, other in (("full", "level"), ("level", "children")):
        with pytest.raises(AssertionError):
            assert_same_gradients([found[one]], [found[other]], tolerance=1e-2)
