"""Every YAML in recipes/ is read and runs two steps on the tiny model; every size and every accelerate config loads."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from helpers import write_mixtures, write_small_model
from trl import ModelConfig

from recllm import launch
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.trainers.sft import RecSFTConfig
from recllm.trainers.sft_run import SFTData, run_sft

RECIPES = Path(__file__).parents[1] / "recipes"
DATA_SETS = sorted((RECIPES / "gream").glob("*.yaml"))
SIZES = sorted((RECIPES / "sizes").glob("*.yaml"))
HERE = ("--bf16", "false", "--report_to", "none")  # whatever the machine


def read(*args):
    return launch.parse(SFTData, RecSFTConfig, ModelConfig, args=list(map(str, args)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data, _ = write_small_model(tmp_path_factory.mktemp("recipes"))
    return data, *write_mixtures(data)


@pytest.mark.parametrize("path", DATA_SETS, ids=lambda path: path.stem)
def test_a_data_set_runs_two_steps_at_the_tiny_size(path, made, tmp_path):
    data, alignment, reasoning = made
    asked, *_ = read("--config", path, "--config", RECIPES / "sizes" / "tiny.yaml", *HERE)
    # A list on the command line replaces the file's: only what the recipe trains on is put in its place.
    places = ["--data", data, "--alignment", alignment] + (["--reasoning", reasoning] if asked.reasoning else [])
    small = ["--tiny_layers", 1, "--tiny_width", 64, "--max_steps", 2, "--validation_users", 5]
    configs = read(
        "--config", path, "--config", RECIPES / "sizes" / "tiny.yaml", *HERE, *places, *small,
        "--validation_beams", 10, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    output = run_sft(*configs)
    report = json.loads((output / "recllm.json").read_text())["sft"]
    assert report["steps"] == 2
    losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
    assert all(loss > 0 for loss in losses)
    assert {"README.md", "training.yaml"} <= {file.name for file in output.iterdir()}
    assert Checkpoint.load(output).report["base_model"] == "tiny"


@pytest.mark.parametrize("size", SIZES, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", DATA_SETS, ids=lambda path: path.stem)
def test_every_size_of_every_data_set_is_read(path, size):
    data, training, model = read("--config", path, "--config", size, *HERE)
    assert data.data.startswith("runs/")
    assert model.model_name_or_path == "tiny" or model.model_name_or_path.startswith("Qwen/Qwen3-")
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert batch == (32 if size.stem == "tiny" else 128)
    assert training.num_train_epochs == (5 if path.stem == "shop" else 3)  # GREAM's 3, and more from scratch


def test_a_later_file_goes_before_an_earlier_one_and_the_command_line_before_both(tmp_path):
    (tmp_path / "a.yaml").write_text("data: runs/a\nalignment: [x]\nlearning_rate: 1.0e-3\ngamma: 2.0\n")
    (tmp_path / "b.yaml").write_text("learning_rate: 2.0e-3\ngamma: 3.0\n")
    _, training, _ = read("--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml", "--gamma", 4, *HERE)
    assert (training.learning_rate, training.gamma) == (2e-3, 4)
    (tmp_path / "c.yaml").write_text("learning_rat: 1.0\n")
    with pytest.raises(UserError, match=r"c\.yaml: `learning_rat` is not a setting.*did you mean `learning_rate`"):
        read("--config", tmp_path / "a.yaml", "--config", tmp_path / "c.yaml")


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_accelerate_config_loads(path):
    config = load_config_from_file(str(path))
    expected = {"one_gpu": "NO", "ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    expected["multi_node_vllm"] = "DEEPSPEED"
    assert config.distributed_type == expected[path.stem]


@pytest.mark.parametrize("path", [*DATA_SETS, *SIZES, *sorted((RECIPES / "accelerate").glob("*.yaml"))], ids=str)
def test_a_yaml_opens_with_its_command(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    recipe = "recipes/srpo.py" if path.stem == "multi_node_vllm" else "recipes/sft.py"
    assert any(recipe in line for line in head)
    assert len(path.read_text().splitlines()) <= 45
