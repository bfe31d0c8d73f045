"""Runs in processes of their own: killed and resumed to the same bits; two on gloo that train what one does; ZeRO-2."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import succeeded, torchrun, write_small_model
from safetensors.torch import load_file
from test_processes import SHIM
from trl import ModelConfig

from recllm import launch
from recllm.trainers.grpo import GRPOSettings, RecGRPO
from recllm.trainers.recast import ReCast, ReCastSettings
from recllm.trainers.rl_run import Method, RLData, run_rl

PROGRAM = """
import os, signal, sys
{shim}
from transformers import TrainerCallback
from trl import ModelConfig
from recllm import launch
from recllm.trainers import rl_run
from recllm.trainers.grpo import GRPOSettings, RecGRPO
from recllm.trainers.recast import ReCast, ReCastSettings
from recllm.trainers.srpo import SRPO, SRPOSettings
from recllm.trainers.rl_run import Method, RLData, run_rl
made = rl_run.trainer_of
class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if str(state.global_step) == os.environ.get("STOP_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
def told(*args):
    trainer = made(*args)
    kind, count = trainer.accelerator.distributed_type.value, trainer.accelerator.num_processes
    print(f"RUNS {{kind}} {{count}}", flush=True)
    trainer.add_callback(Stops())
    return trainer
rl_run.trainer_of = told
name = sys.argv.pop(1)
trainer, settings = dict(grpo=(RecGRPO, GRPOSettings), recast=(ReCast, ReCastSettings), srpo=(SRPO, SRPOSettings))[name]
launch.run(lambda *given: run_rl(Method(name, trainer, ()), *given), RLData, settings, ModelConfig)
"""
METHODS = {"grpo": (RecGRPO, GRPOSettings), "recast": (ReCast, ReCastSettings)}
TIMES = ("time/", "step_time", "runtime", "per_second", "train_loss")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl-processes")
    data, model = write_small_model(folder, items=13, users=20)
    for name, shim in (("plain", ""), ("shim", SHIM)):
        (folder / f"{name}.py").write_text(PROGRAM.format(shim=shim))
    return folder, data, model


def settings_of(made, output, *more):
    _, data, model = made
    return list(map(str, [
        "--data", data, "--model_name_or_path", model, "--output_dir", output, "--rl_targets", "all",
        "--num_generations", 4, "--bf16", "false", "--learning_rate", "1e-2", "--logging_steps", 1,
        "--validation_users", 0, "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true",
        "--lr_scheduler_type", "constant", "--limit", 24, "--beta", 0.05, *more,
    ]))  # fmt: skip


def result(output):
    log = json.loads((Path(output) / "recllm.json").read_text())["rl"]["log"]
    return log, load_file(Path(output) / "model.safetensors")


def run_here(made, method, output, *more):
    """In this process: one less to start."""
    trainer, settings = METHODS[method]
    configs = launch.parse(RLData, settings, ModelConfig, args=settings_of(made, output, *more))
    run_rl(Method(method, trainer, ()), *configs)
    return result(output)


def run(made, method, output, *more, processes=2, program="plain", stop_at=None):
    """What it said, its log and its weights; where it is stopped, what it said."""
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true" if program == "plain" else "false", "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(torch.get_num_threads()) if processes == 1 else "1",
    }  # fmt: skip
    if stop_at is not None:
        environment["STOP_AT"] = str(stop_at)
    command = [made[0] / f"{program}.py", method, *settings_of(made, output, *more)]
    command = torchrun(processes, *command) if processes > 1 else list(map(str, [sys.executable, *command]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    if stop_at is None:
        succeeded(done)
        return done.stdout, *result(output)
    assert done.returncode == (-signal.SIGKILL if processes == 1 else 1), done.stderr[-3000:]
    assert not Path(output).exists()
    assert list(Path(output).parent.glob(f"{Path(output).name}.work-*/steps/checkpoint-*")), "nothing was saved"
    return done.stdout


def figures(log):
    """All that is logged but for the clock's."""
    return [{name: value for name, value in line.items() if not any(part in name for part in TIMES)} for line in log]


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SAVING = ("--save_strategy", "steps", "--save_steps", 3)


@pytest.mark.parametrize(
    ("method", "stop_at", "settings"),
    [
        # Saved at 12 and killed at 14, both in the middle of the second generation.
        pytest.param("grpo", 14, ("--per_device_train_batch_size", 4, "--steps_per_generation", 4, "--num_iterations",
                                  2, "--max_steps", 20), marks=pytest.mark.slow),
        # 8 prompts a generation, each used twice: three of 8 steps make an epoch. Killed in the second one.
        ("recast", 32, ("--per_device_train_batch_size", 8, "--steps_per_generation", 4, "--num_iterations", 2,
                        "--max_steps", 36, "--repair", "adaptive")),
    ],
    ids=["grpo", "recast"],
)  # fmt: skip
def test_killed_in_the_use_of_a_generation_and_resumed_to_the_same_bits(made, tmp_path, method, stop_at, settings):
    log, whole = run_here(made, method, tmp_path / "whole", *settings, *SAVING)
    run(made, method, tmp_path / "killed", *settings, *SAVING, processes=1, stop_at=stop_at)
    again, resumed = run_here(made, method, tmp_path / "killed", *settings, *SAVING)
    assert same(whole, resumed)
    assert figures(again)[:-1] == figures(log)[:-1]  # the last line is a summary of the process' own time
    assert not same(whole, load_file(made[2] / "model.safetensors"))
    if method == "recast":
        assert max(line["epoch"] for line in log) > 1


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        # Old log-probabilities, of a policy that has moved when they are used again.
        ("recast", ("--repair", "adaptive", "--num_iterations", 2)),
        pytest.param(
            "grpo",
            ("--num_iterations", 2, "--gradient_accumulation_steps", 2, "--rewards", "prefix"),
            marks=pytest.mark.slow,
        ),
        pytest.param("recast", ("--repair", "never", "--gradient_accumulation_steps", 2), marks=pytest.mark.slow),
        pytest.param("grpo", ("--loss_type", "dapo", "--num_iterations", 2), marks=pytest.mark.slow),
    ],
    ids=["recast-adaptive", "grpo", "recast-never", "dapo"],
)
def test_two_processes_train_what_one_does(made, tmp_path, method, settings):
    """Answers that train are unevenly many on the two, and on one of them at times none."""
    given = ("--max_steps", 4, "--optim", "sgd", "--learning_rate", 0.2, "--max_grad_norm", 0)
    log, weights = run_here(made, method, tmp_path / "one", *settings, *given, "--per_device_train_batch_size", 16)
    said, others, shared = run(
        made, method, tmp_path / "two", *settings, *given, "--per_device_train_batch_size", 8
    )  # fmt: skip
    assert said.count("RUNS MULTI_CPU 2") == 2
    start = load_file(made[2] / "model.safetensors")
    assert max(float((weights[name] - start[name]).abs().max()) for name in start) > 1e-3
    for name in weights:
        assert torch.allclose(weights[name], shared[name], atol=2e-5), name
    for own, other in zip(log[:4], others[:4]):
        # TRL's figures are means of batches' means, so that they depend on which answers share a batch.
        names = ("loss", "reward", "group/all_zero", "actor/active", "actor/width", "recast/repaired")
        for name in (*names, "kl") if "--gradient_accumulation_steps" not in settings else names:
            assert own.get(name, -1) == pytest.approx(other.get(name, -1), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_two_processes_refill_as_often_as_each_other(made, tmp_path):
    """One lacks more than the other: both ask until neither does, and their batches are equally wide."""
    given = ("--max_steps", 6, "--per_device_train_batch_size", 16, "--refill_tries", 3, "--pass_k", 2)
    _, log, weights = run(made, "srpo", tmp_path / "two", *given)
    _, again, same_again = run(made, "srpo", tmp_path / "again", *given)
    assert same(weights, same_again)
    assert figures(log)[:-1] == figures(again)[:-1]
    assert any(line.get("group/refilled", 0) > 0 for line in log)
    assert any(line["group/rejected"] != line["group/refilled"] for line in log if "group/rejected" in line)


@pytest.mark.slow
def test_two_processes_killed_in_the_use_of_a_generation_go_on(made, tmp_path):
    given = ("--max_steps", 10, "--per_device_train_batch_size", 4, "--steps_per_generation", 2,
             "--num_iterations", 2, "--gradient_accumulation_steps", 1, "--repair", "adaptive", *SAVING)  # fmt: skip
    _, _, whole = run(made, "recast", tmp_path / "whole", *given)
    run(made, "recast", tmp_path / "killed", *given, stop_at=8)
    _, _, resumed = run(made, "recast", tmp_path / "killed", *given)
    assert same(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "recast"])
def test_zero_2_trains_what_one_process_does(made, tmp_path, method):
    pytest.importorskip("deepspeed")
    given = ("--max_steps", 4, "--optim", "adamw_torch", "--learning_rate", "1e-3", "--num_iterations", 2)
    log, weights = run_here(made, method, tmp_path / "one", *given, "--per_device_train_batch_size", 16)
    zero = tmp_path / "zero2.json"
    settings = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    settings |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    settings |= {"zero_allow_untested_optimizer": True}
    zero.write_text(json.dumps(settings))
    said, others, shared = run(
        made, method, tmp_path / "two", *given, "--per_device_train_batch_size", 8, "--deepspeed", zero, "--use_cpu",
        "false", program="shim",
    )  # fmt: skip
    assert said.count("RUNS DEEPSPEED 2") == 2
    assert [line["loss"] for line in others if "loss" in line] == pytest.approx(
        [line["loss"] for line in log if "loss" in line], rel=1e-2, abs=1e-4
    )
    assert all(torch.allclose(weights[name], shared[name], atol=1e-3) for name in weights)
