"""`expected: true` through the real trainers: chains are drawn, their items are not waited for."""

import json

import pytest
import torch
from safetensors.torch import load_file
from taught import write_reasoning_model
from trl import ModelConfig

from recllm.errors import UserError
from recllm.trainers.grpo import GRPOSettings, RecGRPO
from recllm.trainers.recast import ReCast, ReCastSettings
from recllm.trainers.rl_run import Method, RLData, run_rl
from recllm.trainers.srpo import SRPO, SRPOSettings

METHODS = {
    "grpo": (Method("grpo", RecGRPO, ()), GRPOSettings, {"rewards": ["hit"]}),
    "srpo": (Method("srpo", SRPO, ()), SRPOSettings, {"rewards": ["prefix", "hit"], "pass_k": 2}),
    "recast": (Method("recast", ReCast, ()), ReCastSettings, {"rewards": ["hit"]}),
}
FAST = {
    "num_generations": 4, "per_device_train_batch_size": 16, "max_steps": 2, "max_completion_length": 48,
    "learning_rate": 1e-3, "bf16": False, "validation_users": 0, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "expected": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def reasons(tmp_path_factory):
    return write_reasoning_model(tmp_path_factory.mktemp("expected"), steps=80)


def run(reasons, output, name, mode, **settings):
    data, start = reasons
    method, config, own = METHODS[name]
    training = config(output_dir=str(output), **{**FAST, **own, **settings})
    given = RLData(data=str(data), rl_targets="all", mode=mode)
    return run_rl(method, given, training, ModelConfig(model_name_or_path=str(start)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", ["reason", "joint"])
def test_two_steps(reasons, tmp_path, name, mode):
    output = run(reasons, tmp_path / "out", name, mode, beta=0.01)
    before, after = (load_file(folder / "model.safetensors") for folder in (reasons[1], output))
    assert any(not torch.equal(before[part], after[part]) for part in before)
    log = json.loads((output / "recllm.json").read_text())["rl"]["log"]
    entries = [entry for entry in log if "loss" in entry]
    assert all(0 < entry["expected/hit"] < 1 for entry in entries)
    # Of every group something is learnt, though drawn items would have missed in most.
    assert all(entry["actor/width"] >= (1.9 if name == "recast" else 3.9) for entry in entries)


def test_what_is_refused(reasons, tmp_path):
    with pytest.raises(UserError, match=r"recipes/exact\.py"):
        run(reasons, tmp_path / "out", "grpo", "direct")
    with pytest.raises(UserError, match="expected needs one of the rewards"):
        run(reasons, tmp_path / "out", "grpo", "reason", rewards=["format"])
    with pytest.raises(UserError, match="leaves nothing to repair"):
        run(reasons, tmp_path / "out", "recast", "reason", contrast="group")
