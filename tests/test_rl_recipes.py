"""Every YAML of recipes/{grpo,srpo,recast,exact} is read with every size, and runs two steps on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from helpers import write_small_model
from safetensors.torch import load_file
from trl import ModelConfig

from recllm import launch
from recllm.checkpoint import Checkpoint
from recllm.trainers.exact import ExactConfig
from recllm.trainers.exact_run import run_exact
from recllm.trainers.grpo import GRPOSettings
from recllm.trainers.methods import GRPO_RUN, RECAST_RUN, SRPO_RUN
from recllm.trainers.recast import ReCastSettings
from recllm.trainers.rl_run import RLData, run_rl
from recllm.trainers.srpo import SRPOSettings

RECIPES = Path(__file__).parents[1] / "recipes"
SETTINGS = {"grpo": GRPOSettings, "srpo": SRPOSettings, "recast": ReCastSettings, "exact": ExactConfig}
RUNS = {"grpo": GRPO_RUN, "srpo": SRPO_RUN, "recast": RECAST_RUN}
YAMLS = sorted(path for name in SETTINGS for path in (RECIPES / name).glob("*.yaml"))
SIZES = sorted((RECIPES / "sizes" / "rl").glob("*.yaml"))
HERE = ("--bf16", "false", "--report_to", "none")  # whatever the machine


def read(path, *args):
    kind = SETTINGS[path.parent.name]
    return launch.parse(RLData, kind, ModelConfig, args=["--config", str(path), *map(str, args), *HERE])


def name_of(path):
    return f"{path.parent.name}-{path.stem}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("rl"))


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_a_yaml_runs_two_steps(path, made, tmp_path):
    data, model = made
    method = path.parent.name
    small = [
        "--data", data, "--model_name_or_path", model, "--output_dir", tmp_path / "out", "--rl_targets", "all",
        "--max_steps", 2, "--validation_users", 5, "--validation_beams", 10, "--eval_steps", 2, "--learning_rate", 0.05,
        "--per_device_train_batch_size", 4, "--logging_steps", 1,
    ]  # fmt: skip
    drawn = ["--num_generations", 4, "--beta", 0.1]
    drawn += {"grpo": ["--rewards", "prefix"], "srpo": ["--pass_k", 2]}.get(method, [])
    given, training, start = read(path, *small, *([] if method == "exact" else drawn))
    output = run_exact(given, training, start) if method == "exact" else run_rl(RUNS[method], given, training, start)
    report = json.loads((output / "recllm.json").read_text())
    assert report["method"] == method
    assert report["rl"]["steps"] == 2
    assert {"README.md", "training.yaml"} <= {file.name for file in output.iterdir()}
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (model, output))
    assert Checkpoint.load(output).table.fingerprint == Checkpoint.load(model).table.fingerprint
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("size", SIZES, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", [path for path in YAMLS if path.parent.name != "exact"], ids=name_of)
def test_every_size_of_every_yaml_is_read(path, size):
    given, training, model = read(path, "--config", size)
    assert given.data.startswith("runs/")
    assert model.model_name_or_path == f"{given.data}/sft"
    answers = training.per_device_train_batch_size * training.steps_per_generation
    assert answers % training.num_generations == 0  # on one process, which a group must fit into


@pytest.mark.parametrize("path", [*YAMLS, *SIZES], ids=name_of)
def test_a_yaml_opens_with_its_command(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    recipe = "srpo" if path in SIZES else path.parent.name
    assert any(f"recipes/{recipe}.py" in line for line in head)
    assert len(path.read_text().splitlines()) <= 45
