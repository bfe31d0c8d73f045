"""Two processes on gloo train what one does with the same global batch; ZeRO-2 too where DeepSpeed runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import succeeded, torchrun, write_mixtures, write_small_model
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
# DeepSpeed is ignored in silence with use_cpu: this makes accelerate see gloo and the CPU as one of its backends.
SHIM = """
import os
from accelerate.state import PartialState
from accelerate.utils import DistributedType
ask = PartialState._prepare_backend
def on_cpu(self, cpu=False, sagemaker_dp=False, backend=None):
    return "gloo", DistributedType.MULTI_CPU
PartialState._prepare_backend = on_cpu
"""
PROGRAM = """
import os, sys
{shim}
from transformers import TrainerCallback
from trl import ModelConfig
from recllm import launch
from recllm.trainers import sft_run
from recllm.trainers.sft import RecSFTConfig
from recllm.trainers.sft_run import SFTData, run_sft
made = sft_run.trainer_of
def told(*args):
    trainer = made(*args)
    kind, count = trainer.accelerator.distributed_type.value, trainer.accelerator.num_processes
    print(f"RUNS {{kind}} {{count}}", flush=True)
    trainer.add_callback(Stops())
    return trainer
class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if str(state.global_step) == os.environ.get("STOP_AT"):
            os._exit(9)
sft_run.trainer_of = told
launch.run(run_sft, SFTData, RecSFTConfig, ModelConfig)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    data, model = write_small_model(folder, items=12, users=20)
    alignment, reasoning = write_mixtures(data)
    for name, shim in (("plain", ""), ("shim", SHIM)):
        (folder / f"{name}.py").write_text(PROGRAM.format(shim=shim))
    return folder, data, model, alignment, reasoning


def run(made, output, processes, batch, *more, program="plain", stop_at=None):
    folder, data, model, alignment, reasoning = made
    settings = [
        "--data", data, "--alignment", alignment, "--reasoning", reasoning, "--model_name_or_path", model,
        "--output_dir", output, "--per_device_train_batch_size", batch, "--max_steps", 6, "--num_train_epochs", 1,
        "--bf16", "false", "--gradient_checkpointing", "false", "--learning_rate", "1e-3", "--logging_steps", 1,
        "--validation_users", 12, "--validation_beams", 10, "--report_to", "none", "--eval_strategy", "steps",
        "--eval_steps", 6, "--disable_tqdm", "true", "--use_cpu", "true", *more,
    ]  # fmt: skip
    cpu = "true" if program == "plain" else "false"
    environment = {**os.environ, "ACCELERATE_USE_CPU": cpu, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [folder / f"{program}.py", *settings]
    command = torchrun(processes, *command) if processes > 1 else list(map(str, [sys.executable, *command]))
    if stop_at is not None:
        killed = {**environment, "STOP_AT": str(stop_at)}
        assert subprocess.run(command, env=killed, capture_output=True, timeout=400).returncode
        assert not Path(output).exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    succeeded(done)
    log = json.loads((Path(output) / "recllm.json").read_text())["sft"]["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    recalls = [entry["eval_recall@10"] for entry in log if "eval_recall@10" in entry]
    return done.stdout, losses, recalls, load_file(Path(output) / "model.safetensors")


def test_two_processes_train_what_one_does(made, tmp_path):
    said, losses, recalls, weights = run(made, tmp_path / "one", 1, 8)
    assert "RUNS NO 1" in said
    said, others, of_two, shared = run(made, tmp_path / "two", 2, 4)
    assert said.count("RUNS MULTI_CPU 2") == 2
    assert others == pytest.approx(losses, rel=1e-4)
    assert of_two == pytest.approx(recalls)  # each decoded its share of the users
    assert all(torch.allclose(weights[name], shared[name], atol=1e-5) for name in weights)


def test_two_processes_killed_in_the_second_epoch_go_on_in_its_order(made, tmp_path):
    """Each in its place of the second epoch: neither batches twice nor others never."""
    folder = made[0]
    rows = len(list((folder / "data").glob("*/*.arrow")))
    assert rows == 2
    settings = ("--max_steps", 16, "--save_strategy", "steps", "--save_steps", 12, "--validation_users", 0)
    settings += ("--eval_strategy", "no")
    *_, whole = run(made, tmp_path / "whole", 2, 4, *settings)
    *_, resumed = run(made, tmp_path / "resumed", 2, 4, *settings, stop_at=14)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_zero_2_trains_what_one_process_does(made, tmp_path):
    pytest.importorskip("deepspeed")
    _, losses, _, weights = run(made, tmp_path / "one", 1, 8)
    zero = tmp_path / "zero2.json"
    settings = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    settings |= {
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    zero.write_text(json.dumps(settings))
    said, others, _, shared = run(
        made, tmp_path / "two", 2, 4, "--deepspeed", zero, "--use_cpu", "false", program="shim"
    )  # fmt: skip
    assert said.count("RUNS DEEPSPEED 2") == 2
    assert others == pytest.approx(losses, rel=1e-3)
    assert all(torch.allclose(weights[name], shared[name], atol=1e-4) for name in weights)
