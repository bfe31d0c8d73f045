"""GRC's runs: killed and resumed to the same bits, two processes as one, and what cannot work said in a sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import succeeded, torchrun, write_mixtures, write_small_model
from reflecting_for_tests import write_reflecting_model
from safetensors.torch import load_file
from trl import ModelConfig

from recllm import launch
from recllm.attributes import Attribute, attributes_of
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.mixtures.reflection import ReflectionConfig, build_reflection
from recllm.reflection import Template
from recllm.trainers.grc import GRC, GRCSettings
from recllm.trainers.grc_run import GRC_RUN
from recllm.trainers.grc_sft import GRCSFTConfig, GRCSFTTrainer
from recllm.trainers.grc_sft_run import GRCData, run_grc_sft, taught
from recllm.trainers.rl_run import RLData, run_rl

PROGRAM = """
import os, signal, sys
from transformers import TrainerCallback
from trl import ModelConfig
from recllm import launch
from recllm.trainers import rl_run
from recllm.trainers.grc import GRCSettings
from recllm.trainers.grc_run import GRC_RUN
from recllm.trainers.grc_sft import GRCSFTConfig
from recllm.trainers.grc_sft_run import GRCData, run_grc_sft
made = rl_run.trainer_of
class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if str(state.global_step) == os.environ.get("STOP_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
def told(*args):
    trainer = made(*args)
    print("RUNS", trainer.accelerator.num_processes, flush=True)
    trainer.add_callback(Stops())
    return trainer
rl_run.trainer_of = told
if sys.argv.pop(1) == "grc_sft":
    launch.run(run_grc_sft, GRCData, GRCSFTConfig, ModelConfig)
else:
    launch.run(lambda *given: rl_run.run_rl(GRC_RUN, *given), rl_run.RLData, GRCSettings, ModelConfig)
"""
SMALL = {
    "bf16": "false", "learning_rate": "1e-2", "logging_steps": 1, "validation_users": 0, "report_to": "none",
    "disable_tqdm": "true", "use_cpu": "true", "lr_scheduler_type": "constant", "save_strategy": "no", "max_steps": 2,
}  # fmt: skip
KINDS = {
    "grc_sft": {"per_device_train_batch_size": 8},
    "grc": {"per_device_train_batch_size": 8, "num_generations": 4, "rl_targets": "all", "limit": 24},
}
CLOCK = ("time/", "step_time", "runtime", "per_second", "train_loss")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Starts and drafts of each kind: {"data", "plain", "grc_sft" (its start), "grc" (its start), "drafts", "go"}."""
    folder = tmp_path_factory.mktemp("grc-runs")
    data, plain = write_small_model(folder / "plain", users=20)
    drafts = folder / "drafts"
    build_reflection(
        ReflectionConfig(str(data), str(plain), str(drafts), drafts=6, keep=2, rl_targets="all", device="cpu")
    )
    _, reflecting = write_reflecting_model(folder / "reflecting", users=20)
    (folder / "go.py").write_text(PROGRAM)
    return {"data": data, "grc_sft": plain, "grc": reflecting, "drafts": drafts, "go": folder / "go.py"}


def line(made, kind, output, **given):
    places = {"data": made["data"], "model_name_or_path": made[kind], "output_dir": output}
    places |= {"drafts": made["drafts"]} if kind == "grc_sft" else {}
    settings = {**places, **SMALL, **KINDS[kind], **given}
    found = []
    for name, value in settings.items():
        found += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def go(made, kind, output, **given):
    """In this process, as the recipe does it."""
    args = line(made, kind, output, **given)
    if kind == "grc_sft":
        return run_grc_sft(*launch.parse(GRCData, GRCSFTConfig, ModelConfig, args=args))
    return run_rl(GRC_RUN, *launch.parse(RLData, GRCSettings, ModelConfig, args=args))


def launched(made, kind, output, processes=1, stop_at=None, **given):
    command = [made["go"], kind, *line(made, kind, output, **given)]
    command = torchrun(processes, *command) if processes > 1 else [sys.executable, *command]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment |= {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    environment |= {"STOP_AT": str(stop_at)} if stop_at else {}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=400)


def result(output, kind):
    log = json.loads((Path(output) / "recllm.json").read_text())["rl" if kind == "grc" else kind]["log"]
    figures = [
        {name: value for name, value in entry.items() if not any(part in name for part in CLOCK)} for entry in log
    ]
    return figures, load_file(Path(output) / "model.safetensors")


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        # Saved at 3, after three of the four steps that share a generation, and killed at 5.
        ("grc", {"steps_per_generation": 2, "num_iterations": 2, "contrast": "boundary", "max_steps": 7}),
        # In the middle of the second epoch.
        pytest.param("grc_sft", {"max_steps": 12, "per_device_train_batch_size": 16}, marks=pytest.mark.slow),
    ],
    ids=["grc", "grc_sft"],
)
def test_killed_and_resumed_the_bits_are_the_same(made, tmp_path, kind, settings):
    settings |= {"save_strategy": "steps", "save_steps": 3}
    log, whole = result(go(made, kind, tmp_path / "whole", **settings), kind)
    stop = settings["max_steps"] - 2
    killed = launched(made, kind, tmp_path / "killed", stop_at=stop, **settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "killed").exists()
    assert list(tmp_path.glob("killed.work-*/steps/checkpoint-*")), "nothing was saved"
    again, resumed = result(go(made, kind, tmp_path / "killed", **settings), kind)
    assert same(whole, resumed)
    assert again[:-1] == log[:-1]  # the last line is a summary of the process' own time
    assert not same(whole, load_file(made[kind] / "model.safetensors"))
    assert max(entry["epoch"] for entry in log) > 1 or kind == "grc"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grc", {"num_iterations": 2}),
        ("grc", {"contrast": "boundary", "gradient_accumulation_steps": 2}),
        ("grc_sft", {}),
    ],
    ids=["grc-rank", "grc-boundary", "grc_sft"],
)
def test_two_processes_train_what_one_does(made, tmp_path, kind, settings):
    settings |= {"max_steps": 3, "optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0}
    log, weights = result(go(made, kind, tmp_path / "one", **settings, per_device_train_batch_size=16), kind)
    done = launched(made, kind, tmp_path / "two", processes=2, **settings)
    succeeded(done)
    assert done.stdout.count("RUNS 2") == 2
    others, shared = result(tmp_path / "two", kind)
    start = load_file(made[kind] / "model.safetensors")
    names = [name for name in start if start[name].shape == weights[name].shape]
    assert max(float((weights[name] - start[name]).abs().max()) for name in names) > 1e-3
    for name in weights:
        assert torch.allclose(weights[name], shared[name], atol=2e-5), name
    for own, other in zip(log[:3], others[:3]):
        for name in ("loss", "reward", "grc/acc_loc", "grc/initial_nll", "grc/correction_nll", "actor/active"):
            assert own.get(name, -1) == pytest.approx(other.get(name, -1), rel=1e-3, abs=1e-5), name


def test_what_reflects_can_be_trained_on_from_stage_to_stage(made, tmp_path):
    """The supervised stage's checkpoint is the start of the other, which keeps all that the first has written."""
    first = go(made, "grc_sft", tmp_path / "sft", max_steps=1)
    second = go({**made, "grc": first}, "grc", tmp_path / "rl", max_steps=1)
    one, other = (json.loads((folder / "recllm.json").read_text()) for folder in (first, second))
    assert other["reflection"] == one["reflection"]
    assert (other["method"], other["papers"], other["rl"]["steps"]) == ("grc", ["grc"], 1)
    assert other["grc_sft"] == one["grc_sft"]
    assert Checkpoint.load(second).reflection.template == Template(2, ("categories",))


def test_training_yaml_is_what_was_run(made, tmp_path):
    """The parts' weights, that is, though reward_weights are made of them."""
    output = go(made, "grc", tmp_path / "out", max_steps=1, beta_loc=0.5, beta_last=1)
    again = launch.parse(RLData, GRCSettings, ModelConfig, args=["--config", str(output / "training.yaml")])
    assert (again[1].beta_loc, again[1].beta_last) == (0.5, 1.0)
    assert again[1].reward_weights == [1.0, 2.2 * 0.5, 2.2 * 0.8, 2.2]
    other = go(made, "grc", tmp_path / "other", max_steps=1, beta_loc=0.5, beta_last=3)
    tasks = [result(folder, "grc")[0][0]["rewards/task/mean"] for folder in (output, other)]
    assert tasks[1] > tasks[0], "the same draws, of which the correction's hits count three times as much"


# ---- one sentence


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("grc_sft", {"reflection_weight": 0}, "reflection_weight, λ_rc, must be above 0 and finite, got 0"),
        ("grc_sft", {"reflection_weight": -1}, "reflection_weight, λ_rc, must be above 0"),
        ("grc_sft", {"reflection_weight": "nan"}, "reflection_weight, λ_rc, must be above 0"),
        ("grc_sft", {"reflection_weight": "inf"}, "reflection_weight, λ_rc, must be above 0"),
        ("grc_sft", {"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number from 1"),
        ("grc_sft", {"per_device_train_batch_size": 900}, "fewer than the 900 of one step"),
        ("grc_sft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ("grc_sft", {"drafts": "nowhere"}, r"nowhere.*build_reflection\.py"),
        ("grc_sft", {"model_name_or_path": None}, "model_name_or_path is not set"),
        ("grc_sft", {"output_dir": None}, "output_dir is not set"),
        ("grc", {"rewards": ["prefix"]}, r"rewards = \['prefix'\] has no place"),
        ("grc", {"reward_weights": [1.0]}, r"reward_weights = \[1.0\] has no place"),
        ("grc", {"reward_weights": [1.0, 1.0, 1.0, 1.0]}, "reward_weights = .* has no place"),
        ("grc", {"sampling": "distinct"}, "sampling = 'distinct' has no place"),
        ("grc", {"sampling": "beams"}, "sampling = 'beams' has no place"),
        ("grc", {"use_vllm": True}, "use_vllm = True has no place"),
        ("grc", {"expected": True}, "expected = True has no place"),
        ("grc", {"reward_gate": True}, "reward_gate = True has no place"),
        ("grc", {"mode": "reason"}, "mode 'reason': a draft is an item"),
        ("grc", {"mode": "joint"}, "mode 'joint': a draft is an item"),
        ("grc", {"beta_cor": -1}, "beta_cor must be at least 0 and finite, got -1"),
        ("grc", {"beta_delta": -0.5}, "beta_delta must be at least 0"),
        ("grc", {"beta_last": "nan"}, "beta_last must be at least 0 and finite"),
        ("grc", {"task_weight": "inf"}, "task_weight must be at least 0 and finite"),
        ("grc", {"task_weight": 0, "beta_cor": 0}, "every part of the reward weighs 0"),
        ("grc", {"task_weight": 0, "beta_loc": 0, "beta_sem": 0, "beta_delta": 0}, "every part of the reward weighs 0"),
        ("grc", {"boundary_weight": 0.5}, "boundary_weight is of the boundary alone"),
        ("grc", {"num_generations": 3}, "num_generations 3 does not divide"),
        ("grc", {"temperature": 0}, "temperature 0.0 must be above 0"),
        ("grc", {"rl_targets": "held_out"}, "kept no target out"),
        ("grc", {"limit": 1}, "1 prompts are fewer than the 2"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_setting_is_refused_at_the_start(made, tmp_path, kind, given, message, monkeypatch):
    for trainer in (GRC, GRCSFTTrainer):
        monkeypatch.setattr(trainer, "training_step", lambda *args, **kwargs: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match=message) as caught:
        go(made, kind, tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "given"),
    [(GRCSFTConfig, {"reflection_layout": "rings"}), (GRCSettings, {"contrast": "group"})],
    ids=["reflection_layout", "contrast"],
)
def test_a_choice_that_there_is_not(tmp_path, config, given):
    with pytest.raises(UserError, match="is not one of"):
        config(output_dir=str(tmp_path), **given)


def test_starts_that_do_not_reflect(made, tmp_path):
    with pytest.raises(UserError, match=r"was not taught to reflect.*recipes/grc_sft\.py"):
        go({**made, "grc": made["grc_sft"]}, "grc", tmp_path / "out")
    data, without_labels = write_reflecting_model(tmp_path / "gc", labels=False)
    with pytest.raises(UserError, match=r"without reflecting \(GC\).*reflection: true"):
        go({**made, "data": data, "grc": without_labels}, "grc", tmp_path / "out")
    lost = tmp_path / "lost"
    shutil.copytree(made["grc"], lost)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made["grc_sft"] / name, lost)
    with pytest.raises(UserError, match=r"lacks '<\|reflect_loc\|>'.*recipes/grc_sft\.py"):
        go({**made, "grc": lost}, "grc", tmp_path / "out")
    with pytest.raises(UserError, match=r"prepared data, not a checkpoint|knows no items"):
        go({**made, "grc_sft": made["data"]}, "grc_sft", tmp_path / "out")


def test_drafts_of_something_else(made, tmp_path):
    data, model = write_small_model(tmp_path / "other", items=16)
    with pytest.raises(UserError, match="written with other semantic IDs than the model's"):
        go({**made, "data": data, "grc_sft": model}, "grc_sft", tmp_path / "out")
    alignment, _ = write_mixtures(made["data"])
    with pytest.raises(UserError, match=r"is no reflection data.*build_reflection\.py"):
        go({**made, "drafts": alignment}, "grc_sft", tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(made["drafts"], broken)
    next(broken.glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable data set"):
        go({**made, "drafts": broken}, "grc_sft", tmp_path / "out")


def test_attributes_that_are_not_the_starts(made, tmp_path):
    """The reflecting model was taught categories and brand; the drafts are labelled by the category alone."""
    with pytest.raises(UserError, match="taught to reflect in another way"):
        go({**made, "grc_sft": made["grc"]}, "grc_sft", tmp_path / "out")
    start = Checkpoint.load(made["grc_sft"], "cpu")
    known = taught(start, Template(2, ("categories",)), attributes_of(["categories"], start.items), 0)
    for other in (Attribute("categories", "brand"), Attribute("categories", "categories", (1.0,))):
        with pytest.raises(UserError, match="in another way"):
            taught(known, Template(2, ("categories",)), (other,), 0)


def test_an_attribute_that_the_checkpoint_lacks(made, tmp_path):
    start = Checkpoint.load(made["grc_sft"], "cpu")
    with pytest.raises(UserError, match=r"no column 'colour'.*categories"):
        taught(start, Template(2, ("colour",)), (Attribute("colour", "colour"),), 0)


def test_items_of_unequal_depth(tmp_path):
    _, model = write_small_model(tmp_path, items=13)
    start = Checkpoint.load(model, "cpu")
    with pytest.raises(UserError, match=r"1 items have fewer than 2 codes.*build_semantic_ids\.py"):
        taught(start, Template(2, ("categories",)), attributes_of(["categories"], start.items), 0)


def test_the_real_recipes_end_with_one_line(made, tmp_path):
    root = Path(__file__).parents[2]
    given = line({**made, "grc": made["grc_sft"]}, "grc", tmp_path / "out")
    done = subprocess.run(
        list(map(str, [sys.executable, root / "recipes" / "grc.py", *given])), capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(said) == 1
    assert "was not taught to reflect" in said[0]
    assert done.stdout == ""
