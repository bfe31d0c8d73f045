"""What cannot work is said at the start, in one sentence: no step is taken, nothing is left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_catalogue, write_small_model
from trl import ModelConfig

from recllm import launch
from recllm.errors import UserError
from recllm.trainers.grpo import GRPOSettings, RecGRPO
from recllm.trainers.recast import ReCast, ReCastSettings
from recllm.trainers.rl_run import Method, RLData, run_rl
from recllm.trainers.srpo import SRPO, SRPOSettings

ROOT = Path(__file__).parents[2]
METHODS = {"grpo": (RecGRPO, GRPOSettings), "srpo": (SRPO, SRPOSettings), "recast": (ReCast, ReCastSettings)}
SMALL = {
    "rl_targets": "all", "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2, "bf16": False,
    "validation_users": 0, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("bad"), items=13)


def line(data, model, output, **given):
    found = ["--data", data, "--model_name_or_path", model, "--output_dir", output]
    for name, value in {**SMALL, **given}.items():
        found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return list(map(str, found))


def go(made, output, method="grpo", **given):
    """As a recipe does it, settings and all."""
    trainer, settings = METHODS[method]
    given = {"data": made[0], "model": made[1], **given}
    configs = launch.parse(
        RLData, settings, ModelConfig, args=line(given.pop("data"), given.pop("model"), output, **given)
    )  # fmt: skip
    return run_rl(Method(method, trainer, ()), *configs)


def test_what_is_right_runs(made, tmp_path):
    assert (go(made, tmp_path / "out") / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.work-*"))
    generation = {"generation_batch_size": 16, "overwrite": True}
    assert (go(made, tmp_path / "out", **generation) / "model.safetensors").exists()


CASES = [
    # a group and its batch
    ({"num_generations": 3}, "num_generations 3 does not divide the 8 answers"),
    ({"num_generations": 16}, "does not divide the 8 answers"),
    ({"num_generations": 1}, "must be at least 2"),
    ({"num_generations": 0}, "num_generations must be a whole number from 1, got 0"),
    ({"num_generations": -4}, "num_generations must be a whole number from 1, got -4"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number from 1"),
    ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be a whole number from 1"),
    ({"num_iterations": 0}, "num_iterations must be a whole number from 1"),
    ({"steps_per_generation": 0}, "steps_per_generation must be a whole number from 1"),
    ({"steps_per_generation": -2}, "steps_per_generation must be a whole number from 1"),
    ({"generation_batch_size": 10}, "does not divide the 10 answers"),
    ({"generation_batch_size": 12}, "generation_batch_size"),
    ({"generation_batch_size": 16, "steps_per_generation": 2}, "generation_batch_size"),
    ({"per_device_train_batch_size": 400}, "72 prompts are fewer than the 100 of one step"),
    ({"limit": 1}, "1 prompts are fewer than the 2"),
    ({"limit": 0}, "limit is 0"),
    # rollouts
    ({"temperature": 0}, "temperature 0.0 must be above 0"),
    ({"temperature": "nan"}, "temperature nan must be above 0"),
    ({"top_p": 1.5}, r"top_p 1.5 in \(0, 1]"),
    ({"top_k": 5}, "top_k = 5 has no place"),
    ({"max_completion_length": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"max_completion_length": -5}, "max_new_tokens must be at least 1, got -5"),
    ({"sampling": "distinct", "num_generations": 16, "per_device_train_batch_size": 16}, "above the 13 items"),
    ({"sampling": "beams", "num_generations": 16, "per_device_train_batch_size": 16}, "above the 13 items"),
    ({"sampling": "distinct", "top_p": 0.01}, "may leave fewer items than are to be distinct"),
    ({"use_vllm": True}, "vLLM writes chains of thought"),
    # rewards and losses
    ({"rewards": ["hits"]}, "did you mean 'hit'"),
    ({"rewards": ["hit", "hit"]}, "names a reward twice"),
    ({"rewards": ["collaborative"]}, "needs a trained SASRec"),
    ({"reward_weights": [1.0, 2.0]}, "2 reward_weights for 1 rewards"),
    ({"reward_beta": -1}, "reward_beta must be above 0"),
    ({"beta": -0.1}, "beta, the weight of the KL term, must be at least 0"),
    ({"loss_type": "ppo"}, "loss_type 'ppo' is not one of grpo"),
    ({"importance_sampling_level": "word"}, "importance_sampling_level 'word' is not one of token, sequence"),
    ({"scale_rewards": "batch"}, "the signal is the method's own"),
    ({"mask_truncated_completions": True}, "has no place in this training"),
    ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model = True has no place"),
    ({"remove_unused_columns": True}, "remove_unused_columns = True has no place"),
    ({"refill_tries": -1}, "refill_tries must be a whole number from 0"),
    # what the model was not taught, and what was not kept for it
    ({"mode": "reason"}, "was not taught to reason"),
    ({"mode": "joint"}, "was not taught to reason"),
    ({"mode": "reason", "sampling": "beams"}, "sampling beams is of direct answers alone"),
    ({"rl_targets": "held_out"}, "kept no target out"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), CASES, ids=lambda value: str(value)[:60])
def test_a_sentence_at_the_start(made, tmp_path, given, message, monkeypatch):
    monkeypatch.setattr(RecGRPO, "training_step", lambda *args, **kwargs: pytest.fail("a step was taken"))
    if given.get("sampling") == "distinct" and "top_p" in given:
        monkeypatch.undo()  # known when it is drawn, and no sooner
    with pytest.raises(UserError, match=message) as caught:
        go(made, tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("srpo", {"pass_k": 5}, "pass_k 5 is not among 1 … 4"),
        ("srpo", {"pass_k": 0}, "pass_k 0 is not among 1 … 4"),
        ("recast", {"boundary_advantages": "srpo", "pass_k": 9}, "pass_k 9 is not among 1 … 4"),
        ("recast", {"boundary_weight": 0}, "boundary_weight must be above 0"),
        ("recast", {"boundary_weight": "inf"}, "boundary_weight"),
        ("recast", {"repair": "never", "contrast": "group"}, "neither repair nor boundary"),
        ("recast", {"refill_tries": 2}, "refill_tries replaces the groups that ReCast repairs"),
    ],
)  # fmt: skip
def test_a_sentence_of_the_method(made, tmp_path, method, given, message):
    with pytest.raises(UserError, match=message):
        go(made, tmp_path / "out", method, **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_generations", 4.5), ("pass_k", 2.5), ("limit", 2.5), ("repair", "sometimes"), ("mode", "quickly")],
)
def test_a_value_of_the_wrong_kind(made, tmp_path, name, value, capsys):
    """On the command line, and in a file."""
    with pytest.raises(SystemExit, match="2"):
        go(made, tmp_path / "out", "recast", **{name: value})
    assert f"--{name}" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "a.yaml").write_text(f"{name}: {value}\n")
    start = line(*made, tmp_path / "out")
    with pytest.raises(UserError, match=f"{name}: '?{value}'? is not of type"):
        launch.parse(
            RLData, ReCastSettings, ModelConfig,
            args=["--config", str(tmp_path / "a.yaml"), *start[:6], "--rl_targets", "all"],
        )  # fmt: skip


def test_the_model(made, tmp_path):
    data, model = made
    training = GRPOSettings(output_dir=str(tmp_path / "out"), validation_users=0)
    with pytest.raises(UserError, match="model_name_or_path is not set"):
        run_rl(Method("grpo", RecGRPO, ()), RLData(data=str(data), rl_targets="all"), training, ModelConfig())
    with pytest.raises(UserError, match="no such folder"):
        go(made, tmp_path / "out", model=tmp_path / "nothing")
    with pytest.raises(UserError, match="prepared data, not a checkpoint"):
        go(made, tmp_path / "out", model=data)
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    (plain / "semantic_ids.json").unlink()
    with pytest.raises(UserError, match=r"holds no semantic_ids\.json: the model knows no items"):
        go(made, tmp_path / "out", model=plain)


def test_prompts_longer_than_the_context(made, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(made[1], short)
    config = json.loads((short / "config.json").read_text())
    config["max_position_embeddings"] = 12
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"prompts, the longest of .* leave no room for 2 more in the model's context"):
        go(made, tmp_path / "out", model=short)


def test_the_data(made, tmp_path):
    with pytest.raises(UserError):
        go(made, tmp_path / "out", data=tmp_path / "nothing")
    other = tmp_path / "other"
    write_catalogue(other, ["x1", "x2", "x3"], {"u": ["x1", "x2", "x3", "x1"]})
    with pytest.raises(UserError, match="no semantic ID in the model"):
        go(made, tmp_path / "out", data=other, per_device_train_batch_size=4)
    short = tmp_path / "short"
    write_catalogue(short, [f"i{number}" for number in range(13)], {"u": ["i1", "i2", "i3"]})
    with pytest.raises(UserError, match="no user has two training events"):
        go(made, tmp_path / "out", data=short, per_device_train_batch_size=4)


def test_another_model_in_the_folder(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are no checkpoint of ours"):
        go(made, tmp_path / "out")
    assert (tmp_path / "out" / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("srpo", {"pass_k": 9}, "error: pass_k 9 is not among 1 … 4"),
        ("recast", {"rl_targets": "held_out"}, "kept no target out"),
    ],
)
def test_the_real_recipe_ends_with_one_line(made, tmp_path, recipe, given, message):
    command = [sys.executable, ROOT / "recipes" / f"{recipe}.py", *line(*made, tmp_path / "out", **given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
