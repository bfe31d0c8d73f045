"""The exact expectation: against every item of a small catalogue, against sampled gradients, and as a training."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import succeeded, torchrun, write_small_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from trl import ModelConfig

from recllm import launch
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.errors import UserError
from recllm.mixtures.targets import rl_prompts
from recllm.objectives.exact import expected_prefix_reward, expected_success, prefix_reward_std
from recllm.objectives.srpo import prefix_reward
from recllm.trainers.batches import rows_of
from recllm.trainers.exact import ExactConfig, ExactTrainer, expectations, with_gradient
from recllm.trainers.exact_run import run_exact
from recllm.trainers.paths import kl_divergence
from recllm.trainers.rl_run import RLData

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "recipes" / "exact").glob("*.yaml"))
FAST = {
    "per_device_train_batch_size": 8, "max_steps": 2, "bf16": False, "learning_rate": 1e-3, "validation_users": 0,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
    "kl_weight": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """13 items of two levels, one of which ends after the first."""
    return write_small_model(tmp_path_factory.mktemp("exact"), items=13, users=30)


def train(made, output, lora=None, limit=None, **settings):
    data, start = made
    training = ExactConfig(output_dir=str(output), **{**FAST, **settings})
    return run_exact(
        RLData(data=str(data), rl_targets="all", limit=limit), training,
        ModelConfig(model_name_or_path=str(start), **(lora or {})),
    )  # fmt: skip


def trainer_of(made, tmp_path, lora=None, **settings) -> ExactTrainer:
    checkpoint = Checkpoint.load(made[1], "cpu", "float32")
    prompts = rl_prompts(
        Catalogue.load(made[0]), checkpoint, which="all", mode="direct", limit=None, seed=0, new_tokens=2
    )
    config = ExactConfig(output_dir=str(tmp_path), **{**FAST, "eval_strategy": "no", **settings})
    trainer = ExactTrainer(checkpoint, config, prompts, peft_config=lora)
    trainer.checkpoint = checkpoint
    return trainer


def batch_of(trainer, places):
    rows = trainer.train_dataset
    return trainer.data_collator([rows[place] for place in places])


def gradients(trainer, batch) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return {name: each.grad.clone() for name, each in trainer.model.named_parameters() if each.grad is not None}


# ---- against the catalogue


def codes_of(trainer) -> torch.Tensor:
    """(N, L)"""
    return torch.tensor(trainer.checkpoint.table.codes.tolist())


def item_logps(trainer, prompt: list[int]) -> torch.Tensor:
    """log π of every item after one prompt, with gradient. (N,)"""
    targets = [{"prompt_ids": prompt, "target": codes} for codes in trainer.checkpoint.table.codes.tolist()]
    batch = trainer.data_collator(targets)
    return trainer.scorer.score(trainer.model, rows_of(batch)).logps.sum(dim=1)


def test_mean_and_variance_are_those_over_all_items(made, tmp_path):
    trainer = trainer_of(made, tmp_path, normaliser="children")
    codes = codes_of(trainer)
    prompt = trainer.train_dataset[0]["prompt_ids"]
    with torch.no_grad():
        chances = item_logps(trainer, prompt).double().exp()
        assert chances.sum().item() == pytest.approx(1.0, abs=1e-5)
        for item in (0, 5, 12):  # the last of them has one code
            rewards = prefix_reward(codes.unsqueeze(0), codes[item : item + 1], 0.5)[0].double()
            batch = trainer.data_collator([{"prompt_ids": prompt, "target": codes[item].tolist()}])
            scores = trainer.model(answer_rows=rows_of(batch))
            lengths = batch["completion_mask"].sum(dim=1)
            mean = (chances * rewards).sum().item()
            std = ((chances * rewards**2).sum().item() - mean**2) ** 0.5
            assert expected_prefix_reward(scores.logps, 0.5, lengths).item() == pytest.approx(mean, rel=1e-4)
            assert prefix_reward_std(scores.logps, 0.5, lengths).item() == pytest.approx(std, rel=1e-4)
            found = expectations(scores.logps, lengths, 4, 0.5)
            p = chances[item].item()
            assert [one.item() for one in found["hit"][:2]] == pytest.approx([p, (p * (1 - p)) ** 0.5], rel=1e-4)
            s = 1 - (1 - p) ** 4
            assert [one.item() for one in found["success"][:2]] == pytest.approx([s, (s * (1 - s)) ** 0.5], rel=1e-4)


@pytest.fixture(scope="module")
def sampled(made, tmp_path_factory):
    """Of one prompt: 24,000 of the decoder's draws (n,), and ∇log π of every item, block by block (N, block)."""
    trainer = trainer_of(made, tmp_path_factory.mktemp("sampled"))
    checkpoint, prompt = trainer.checkpoint, trainer.train_dataset[3]["prompt_ids"]
    decoder = Decoder(checkpoint.model, checkpoint.tokens, prefix=checkpoint.writer.prefix)
    drawn = torch.cat([decoder.samples([prompt], 4_000, seed=seed).rows[0] for seed in range(6)])
    of_items: dict[str, list[torch.Tensor]] = {}
    for logp in item_logps(trainer, prompt):
        trainer.model.zero_grad()
        logp.backward(retain_graph=True)
        for name, each in trainer.model.named_parameters():
            if each.grad is not None:
                of_items.setdefault(name, []).append(each.grad.flatten().double())
    return drawn, {name: torch.stack(some) for name, some in of_items.items()}


@pytest.mark.parametrize(
    ("weights", "k"),
    [
        ({"hit_weight": 1.0}, 1),
        ({"prefix_weight": 1.0, "hit_weight": 0.0}, 1),
        ({"prefix_weight": 0.5, "hit_weight": 2.0}, 1),
        ({"success_weight": 1.0, "hit_weight": 0.0, "pass_k": 4}, 4),
    ],
    ids=["hit", "prefix", "both", "success"],
)
def test_the_gradient_is_the_mean_of_sampled_ones(made, tmp_path, sampled, weights, k):
    """REINFORCE without a baseline, with the decoder's draws: Σ_i ∇log π(a_i) · r(a_1 … a_k), over groups of k answers.

    An item's ∇log π is the same whenever it is drawn, so a sampled gradient is a row of coefficients times N gradients,
    and its covariance is that of the coefficients.
    """
    trainer = trainer_of(made, tmp_path, normalise="none", **weights)
    exact = gradients(trainer, batch_of(trainer, [3]))
    again = gradients(trainer, batch_of(trainer, [3]))
    assert all(torch.equal(exact[name], again[name]) for name in exact), "its variance is zero"
    drawn, of_items = sampled
    drawn = drawn.view(-1, k)
    codes, target = codes_of(trainer), torch.tensor([trainer.train_dataset[3]["target"]])
    hits, near = (codes == target).all(dim=1).double(), prefix_reward(codes.unsqueeze(0), target)[0].double()
    if k > 1:
        rewards = hits[drawn].amax(dim=1)
    else:
        rewards = weights.get("prefix_weight", 0.0) * near[drawn[:, 0]] + weights["hit_weight"] * hits[drawn[:, 0]]
    times = torch.nn.functional.one_hot(drawn, len(codes)).sum(dim=1).double()  # (n, N)
    coefficients = times * rewards.unsqueeze(1)
    mean, covariance = coefficients.mean(dim=0), coefficients.T.cov() / len(coefficients)
    assert of_items.keys() == exact.keys()
    for name, items in of_items.items():
        wanted = -exact[name].flatten().double()
        difference = mean @ items - wanted
        # Along the gradient itself a standard error is a number; in the whole block it is the root of the trace.
        direction = wanted / wanted.norm()
        along = ((items @ direction) @ covariance @ (items @ direction)).sqrt()
        whole = (covariance * (items @ items.T)).sum().sqrt()
        assert along < 0.1 * wanted.norm(), f"{name}: too few samples to tell"
        assert abs(difference @ direction) < 4 * along, name
        assert difference.norm() < 4 * whole, name


# ---- the objective


@given(st.lists(st.floats(1e-4, 1 - 1e-4), min_size=1, max_size=4), st.integers(1, 64))
def test_the_weights_are_the_gradients_and_over_its_std_a_hit_weighs_the_root_of_the_odds(probs, k):
    logps, lengths = torch.tensor([probs], dtype=torch.double).log().requires_grad_(), torch.tensor([len(probs)])
    found, p = expectations(logps, lengths, k, 0.5), math.prod(probs)
    functions = {
        "prefix": expected_prefix_reward(logps, 0.5, lengths),
        "hit": logps.sum(dim=1).exp(),
        "success": expected_success(logps, k, lengths),
    }
    for name, function in functions.items():
        (gradient,) = torch.autograd.grad(function.sum(), logps, retain_graph=True)
        assert torch.allclose(found[name].weights, gradient, rtol=1e-6, atol=1e-12), name
        assert found[name].mean.item() == pytest.approx(function.item(), rel=1e-9)
        value = with_gradient(found[name].mean, found[name].weights, logps)
        assert value.item() == pytest.approx(function.item(), rel=1e-9)
        assert torch.equal(torch.autograd.grad(value, logps)[0], found[name].weights)
    assert found["hit"].over_std()[0].tolist() == pytest.approx([(p / (1 - p)) ** 0.5] * len(probs), rel=1e-6)
    s = -math.expm1(k * math.log1p(-p))
    expected = k * (1 - p) ** (k / 2 - 1) * p / math.sqrt(s)
    assert found["success"].over_std()[0].tolist() == pytest.approx([expected] * len(probs), rel=1e-6, abs=1e-100)


def test_certain_and_impossible_targets_move_nothing_and_break_nothing():
    logps = torch.tensor([[0.0, 0.0], [-80.0, -80.0], [-0.5, -1.0], [-1e-9, -1e-9]])
    for name, found in expectations(logps, torch.tensor([2, 2, 1, 2]), 64, 0.5).items():
        weights = found.over_std()
        assert weights.isfinite().all()
        if name == "log":  # supervised training's: 1 whatever the probability
            assert weights.tolist() == [[1, 1], [1, 1], [1, 0], [1, 1]]
            continue
        assert not weights[0].any()
        assert weights[1, 1] < 1e-20
        assert weights[2, 0] > 0
        assert weights[2, 1] == 0, "beyond the item's last code"
        if name == "success":
            assert weights[3].abs().max() < 1e-100, "one of 64 is right already"


def test_kl_of_distributions():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    logps = p.log().requires_grad_()
    found = kl_divergence(logps, q.log())
    assert found.item() == pytest.approx(expected)
    found.sum().backward()
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("normaliser", ["children", "level", "full"])
def test_kl_is_of_the_codes_of_each_level_along_the_path(made, tmp_path, normaliser):
    trainer = trainer_of(made, tmp_path, kl_weight=1.0, normaliser=normaliser, temperature=0.7)
    batch = batch_of(trainer, range(6))
    assert len(set(map(tuple, batch["completion_mask"].tolist()))) > 1 or any(
        min(row["target"]) < 0 for row in trainer.train_dataset
    ), "no short item"
    trainer.compute_loss(trainer.model, batch)
    assert trainer.health.shares["kl"] == [pytest.approx(0.0, abs=1e-5), 6.0]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for each in trainer.model.parameters():
            each += 0.05 * torch.randn(each.shape, generator=generator)
    expected = 0.0
    trie_codes = trainer.checkpoint.table.codes.tolist()
    for place in range(6):
        row = trainer.train_dataset[place]
        ids = batch_of(trainer, [place])["completion_ids"][0].tolist()
        tokens = torch.tensor([[*row["prompt_ids"], *ids]])
        with torch.no_grad():
            both = [
                type(model).forward(model, input_ids=tokens).logits[0] for model in (trainer.model, trainer.reference)
            ]
        for level in range(len(ids)):
            allowed = list(range(trainer.checkpoint.table.sizes[level]))
            if normaliser == "children":
                so_far = row["target"][:level]
                allowed = sorted({codes[level] for codes in trie_codes if codes[:level] == so_far} - {-1})
            columns = trainer.checkpoint.tokens.levels[level][allowed]
            own, reference = (
                (logits[len(row["prompt_ids"]) - 1 + level, columns] / 0.7).log_softmax(dim=-1) for logits in both
            )
            expected += (own.exp() * (own - reference)).sum().item()
    trainer.health.shares.clear()
    trainer.compute_loss(trainer.model, batch)
    assert expected > 0.01
    assert trainer.health.shares["kl"][0] == pytest.approx(expected, rel=1e-3)


# ---- training


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_two_steps_raise_the_objective_and_the_folder_says_what_it_is(made, tmp_path):
    output = train(
        made, tmp_path / "out", max_steps=2, gradient_accumulation_steps=2, kl_weight=0.2, learning_rate=3e-3
    )
    before, after = weights(made[1]), weights(output)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    report = json.loads((output / "recllm.json").read_text())
    assert report["method"] == "exact"
    assert report["rl"]["steps"] == 2
    assert report["rl"]["settings"]["kl_weight"] == 0.2
    first = next(entry for entry in report["rl"]["log"] if "loss" in entry)
    names = {"reward", "success", "rewards/hit/mean", "rewards/prefix/mean", "kl", "entropy", "time/update",
             "time/reference", "actor/tokens", "grad_norm"}  # fmt: skip
    assert names <= first.keys()
    assert 0 < first["rewards/hit/mean"] <= first["rewards/prefix/mean"] < 1
    assert Checkpoint.load(output).table.items


def test_it_learns_its_targets(made, tmp_path):
    settings = {"max_steps": 40, "learning_rate": 3e-3, "validation_users": 20, "eval_strategy": "steps"}
    output = train(made, tmp_path / "out", limit=8, eval_steps=40, **settings)
    log = json.loads((output / "recllm.json").read_text())["rl"]["log"]
    hits = [entry["rewards/hit/mean"] for entry in log if "rewards/hit/mean" in entry]
    assert hits[-1] > 4 * hits[0]
    assert any("eval_recall@10" in entry for entry in log)


def test_accumulated_batches_are_one_batch(made, tmp_path):
    one = train(made, tmp_path / "one", per_device_train_batch_size=8)
    two = train(made, tmp_path / "two", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    one, two = weights(one), weights(two)
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_lora_refers_to_the_model_without_its_adapter(made, tmp_path):
    lora = {"use_peft": True, "lora_r": 4}
    output = train(made, tmp_path / "out", lora=lora, kl_weight=0.1, max_steps=3, learning_rate=1e-2)
    log = [entry for entry in json.loads((output / "recllm.json").read_text())["rl"]["log"] if "kl" in entry]
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert log[-1]["kl"] > 1e-4
    before, after = weights(made[1]), weights(output)
    assert before.keys() == after.keys(), "the adapter is not merged"
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


PROGRAM = """
import os, sys
from transformers import TrainerCallback
from trl import ModelConfig
from recllm import launch
from recllm.trainers import exact_run, rl_run
from recllm.trainers.exact import ExactConfig
from recllm.trainers.paths import kl_divergence
from recllm.trainers.rl_run import RLData
make = rl_run.trainer_of
class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if str(state.global_step) == os.environ.get("STOP_AT"):
            os.kill(os.getpid(), 9)
def told(*args):
    trainer = make(*args)
    print("RUNS", trainer.accelerator.num_processes, flush=True)
    trainer.add_callback(Stops())
    return trainer
rl_run.trainer_of = told
launch.run(exact_run.run_exact, RLData, ExactConfig, ModelConfig)
"""


def launched(made, tmp_path, output, processes=1, stop_at=None, **settings):
    script = tmp_path / "go.py"
    script.write_text(PROGRAM)
    given = {
        "data": made[0], "model_name_or_path": made[1], "rl_targets": "all", "output_dir": output,
        **FAST, **settings,
    }  # fmt: skip
    command = torchrun(processes, script) if processes > 1 else [sys.executable, script]
    command += [part for name, value in given.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    if stop_at is not None:
        environment["STOP_AT"] = str(stop_at)
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


def test_killed_and_resumed_the_weights_are_the_same_bits(made, tmp_path):
    """kill -9 in the middle of the second epoch, between two saves; the copy that KL refers to is the start again."""
    settings = {"max_steps": 14, "save_strategy": "steps", "save_steps": 5, "kl_weight": 0.1, "num_train_epochs": 9}
    whole = train(made, tmp_path / "whole", **settings)
    killed = launched(made, tmp_path, tmp_path / "killed", stop_at=13, **settings)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert not (tmp_path / "killed").exists()
    assert list(tmp_path.glob("killed.work-*/steps/checkpoint-10"))
    resumed = train(made, tmp_path / "killed", **settings)
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [json.loads((folder / "recllm.json").read_text())["rl"]["log"] for folder in (whole, resumed)]
    for name in ("loss", "kl", "actor/tokens"):
        assert [entry[name] for entry in logs[0] if name in entry] == [
            entry[name] for entry in logs[1] if name in entry
        ]


def test_two_processes_train_what_one_does(made, tmp_path):
    one = train(made, tmp_path / "one", kl_weight=0.1, max_steps=3)
    done = launched(
        made, tmp_path, tmp_path / "two", processes=2, kl_weight=0.1, max_steps=3, per_device_train_batch_size=4
    )
    succeeded(done)
    assert done.stdout.count("RUNS 2") == 2
    first, second = weights(one), weights(tmp_path / "two")
    assert all(torch.allclose(first[name], second[name], atol=2e-5) for name in first)
    logs = [json.loads((tmp_path / name / "recllm.json").read_text())["rl"]["log"] for name in ("one", "two")]
    for name in ("loss", "kl", "reward"):
        values = [[entry[name] for entry in log if name in entry] for log in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5)


# ---- recipes and mistakes


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_recipe_runs_two_steps(path, made, tmp_path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"recipes/exact.py --config recipes/exact/{path.name}" in line for line in head)
    places = ["--data", made[0], "--model_name_or_path", made[1], "--output_dir", tmp_path / "out"]
    small = ["--max_steps", 2, "--per_device_train_batch_size", 8, "--validation_users", 5, "--validation_beams", 10]
    small += ["--rl_targets", "all", "--bf16", "false", "--report_to", "none", "--use_cpu", "true"]
    args = list(map(str, ["--config", path, *places, *small]))
    run_exact(*launch.parse(RLData, ExactConfig, ModelConfig, args=args))
    assert json.loads((tmp_path / "out" / "recllm.json").read_text())["rl"]["steps"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hit_weight": 0.0}, "are all 0"),
        ({"hit_weight": -1.0}, "hit_weight must not be below 0"),
        ({"kl_weight": float("nan")}, "kl_weight must not be below 0"),
        ({"pass_k": 0}, "pass_k must be a whole number from 1"),
        ({"pass_k": 2.5}, "pass_k must be a whole number from 1"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"reward_beta": 0.0}, "must be above 0"),
        ({"normalise": "group"}, "normalise 'group'"),
        ({"normaliser": "trie"}, "normaliser 'trie'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"trust_remote_code": True}, "stranger's code"),
    ],
)
def test_a_config_fails_at_construction(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        ExactConfig(output_dir=str(tmp_path), **{**FAST, **settings})


def test_what_a_run_refuses(made, tmp_path):
    data, start = made
    config = ExactConfig(output_dir=str(tmp_path / "out"), **FAST)
    model = ModelConfig(model_name_or_path=str(start))
    with pytest.raises(UserError, match=r"drawn.*recipes/grpo\.py.*expected true"):
        run_exact(RLData(data=str(data), rl_targets="all", mode="reason"), config, model)
    with pytest.raises(UserError, match=r"holds no semantic_ids\.json"):
        run_exact(RLData(data=str(data), rl_targets="all"), config, ModelConfig(model_name_or_path=str(data.parent)))
    with pytest.raises(UserError, match="fewer than the 5000 of one step"):
        train(made, tmp_path / "out", per_device_train_batch_size=5000)
    with pytest.raises(UserError, match="kept no target out"):
        run_exact(RLData(data=str(data)), config, model)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
