"""Every YAML of recipes/{grc_sft,grc} is read, runs two steps on a tiny model, and opens with its command."""

import json
from pathlib import Path

import pytest
import torch
from helpers import write_small_model
from reflecting_for_tests import write_reflecting_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from recllm import launch
from recllm.checkpoint import Checkpoint
from recllm.mixtures.reflection import ReflectionConfig, build_reflection
from recllm.trainers.grc import GRCSettings
from recllm.trainers.grc_run import GRC_RUN
from recllm.trainers.grc_sft import GRCSFTConfig
from recllm.trainers.grc_sft_run import GRCData, run_grc_sft
from recllm.trainers.rl_run import RLData, run_rl

RECIPES = Path(__file__).parents[1] / "recipes"
SUPERVISED, REWARDED = (sorted((RECIPES / name).glob("*.yaml")) for name in ("grc_sft", "grc"))
SIZES = sorted((RECIPES / "sizes" / "rl").glob("*.yaml"))
HERE = ("--bf16", "false", "--report_to", "none")  # whatever the machine
SMALL = {
    "max_steps": 2, "validation_users": 5, "validation_beams": 10, "learning_rate": 0.01, "logging_steps": 1,
    "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 2,
}  # fmt: skip
LORA = {"use_peft": "true", "lora_r": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grc-recipes")
    data, plain = write_small_model(folder / "plain", users=16)
    attributes = ["categories", "brand"]
    build_reflection(
        ReflectionConfig(
            str(data), str(plain), str(data / "reflection"), attributes=attributes, drafts=6, keep=2, rl_targets="all",
            device="cpu",
        )
    )  # fmt: skip
    return data, plain, write_reflecting_model(folder / "reflecting", users=16)[1]


def read(path, given, *more):
    args = ["--config", str(path), *more, *HERE]
    for name, value in given.items():
        args += [f"--{name}", str(value)]
    kinds = (GRCData, GRCSFTConfig) if path in SUPERVISED else (RLData, GRCSettings)
    return launch.parse(*kinds, ModelConfig, args=args)


def run(path, made, output, **more):
    data, plain, reflecting = made
    given = {"data": data, "output_dir": output, **SMALL, **more}
    if path in SUPERVISED:
        given |= {"drafts": data / "reflection", "model_name_or_path": plain}
        return plain, run_grc_sft(*read(path, given))
    given |= {"model_name_or_path": reflecting, "rl_targets": "all", "num_generations": 4}
    return reflecting, run_rl(GRC_RUN, *read(path, given))


CASES = [*((path, {}) for path in (*SUPERVISED, *REWARDED)), (SUPERVISED[0], LORA), (REWARDED[0], LORA)]


@pytest.mark.parametrize(
    ("path", "more"), CASES, ids=[f"{p.parent.name}-{p.stem}{'-lora' if more else ''}" for p, more in CASES]
)
def test_a_yaml_runs_two_steps(path, more, made, tmp_path):
    start, output = run(path, made, tmp_path / "out", **more)
    report = json.loads((output / "recllm.json").read_text())
    method, part = path.parent.name, report["grc_sft" if path in SUPERVISED else "rl"]
    assert (report["method"], report["papers"], part["steps"]) == (method, ["grc"], 2)
    assert any("eval_recall@10" in line and "eval_acc_loc@10" in line for line in part["log"])
    assert {"README.md", "training.yaml"} <= {file.name for file in output.iterdir()}

    begun, found = Checkpoint.load(start, "cpu"), Checkpoint.load(output, "cpu")
    assert found.table.fingerprint == begun.table.fingerprint
    assert found.reflection.attributes.names == ("categories", "brand")
    assert len(found.tokenizer) == len(begun.tokenizer) + (10 if path in SUPERVISED else 0)  # 3 slots, 3 + 2 + 2 labels
    before, after = (load_file(folder / "model.safetensors") for folder in (start, output))
    assert before.keys() == after.keys(), "an adapter is merged"
    rows = "model.embed_tokens.weight"
    moved = [name for name in before if name != rows and not torch.equal(before[name], after[name])]
    assert len(moved) == (len(before) - 1 if not more else 4), "q and v of two layers, or all"
    ids = [token for some in found.reflection.tokens.labels for token in some.tolist()]
    if path in REWARDED:
        assert any(not torch.equal(before[rows][one], after[rows][one]) for one in ids)

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    asked = tokenizer("one two <|reflect_loc|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(asked).logits, found.model(asked).logits)


@pytest.mark.parametrize("size", SIZES, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", REWARDED, ids=lambda path: path.stem)
def test_every_size_of_every_yaml_is_read(path, size):
    given, training, model = read(path, {}, "--config", str(size))
    assert given.data.startswith("runs/")
    assert model.model_name_or_path == f"{given.data}/grc_sft", "the stage before it"
    answers = training.per_device_train_batch_size * training.steps_per_generation
    assert answers % training.num_generations == 0  # on one process, which a group must fit into


@pytest.mark.parametrize("path", REWARDED, ids=lambda path: path.stem)
def test_the_papers_constants(path):
    _, training, _ = read(path, {})
    assert (training.epsilon, training.beta, training.contrast) == (0.15, 0.03, "rank")
    assert (training.beta_cor, training.beta_last, training.beta_loc, training.beta_sem) == (2.2, 2.0, 1.0, 0.8)


@pytest.mark.parametrize("path", SUPERVISED, ids=lambda path: path.stem)
def test_stages_follow_each_other(path):
    given, training, model = read(path, {})
    assert training.reflection_weight == 1.2
    assert model.model_name_or_path == f"{given.data}/sft"
    assert given.drafts == f"{given.data}/reflection"
    _, after, following = read(RECIPES / "grc" / path.name, {})
    assert following.model_name_or_path == training.output_dir
    assert after.output_dir == f"{given.data}/grc"


@pytest.mark.parametrize("path", [*SUPERVISED, *REWARDED], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_yaml_opens_with_its_command(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    method = path.parent.name
    assert any(f"recipes/{method}.py --config recipes/{method}/{path.name}" in line for line in head)
    assert len(path.read_text().splitlines()) <= 45


def test_each_data_set_has_both_stages():
    assert [path.stem for path in SUPERVISED] == [path.stem for path in REWARDED] == ["beauty", "instruments", "shop"]
