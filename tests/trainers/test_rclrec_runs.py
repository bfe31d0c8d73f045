"""RCLRec as a training: the recipes, the folder that comes out, going on after a kill, a user's mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from events_for_tests import random_shop, write_events
from helpers import succeeded, torchrun
from rclrec_for_tests import FAST, SMALL, slow_nll, trainer_of, write_stage_1
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import ModelConfig

from recllm import launch
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.event_prompts import TEMPLATE, EventWriter
from recllm.hub import belonging
from recllm.mixtures.conversion_cases import cases, histories_of
from recllm.mixtures.conversions import ConversionsConfig, build_conversions
from recllm.models.build import BuildModelConfig, build_model
from recllm.models.prefix_module import PrefixModule
from recllm.prompting import PromptStyle
from recllm.trainers import rclrec_run, rl_run
from recllm.trainers.conversion_validation import ConversionValidation
from recllm.trainers.prefixed import NLL_BASE
from recllm.trainers.rclrec import RCLRecConfig
from recllm.trainers.rclrec_run import RCLRecData, run_rclrec

YAMLS = sorted((Path(__file__).parents[2] / "recipes" / "rclrec").glob("*.yaml"))
MODULE = "prefix_module.safetensors"
LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_stage_1(tmp_path_factory.mktemp("runs"))


def train(made, output, lora=None, **settings) -> Path:
    training = RCLRecConfig(output_dir=str(output), **{**FAST, **settings})
    model = ModelConfig(model_name_or_path=str(made[1]), **(lora or {}))
    return run_rclrec(RCLRecData(data=str(made[0])), training, model)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "recllm.json").read_text())


def logged(folder: Path, name: str) -> list[float]:
    return [entry[name] for entry in report_of(folder)["rclrec"]["log"] if name in entry]


def same(one: Path, other: Path, name: str) -> bool:
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    return all(torch.equal(first[part], second[part]) for part in first)


# ---- the folder


def test_two_steps_move_model_and_module_and_the_folder_says_what_it_is(made, tmp_path):
    output = train(made, tmp_path / "out", validation_users=10, eval_strategy="steps", eval_steps=1)
    report = report_of(output)
    assert report["method"] == "rclrec"
    assert report["papers"] == ["rclrec"]
    assert report["rclrec"]["steps"] == 2
    assert report["conversion"]["settings"] == {
        "k": 3, "temperature": 1.0, "selection": "learned", "target_behaviour": "pay", "user_width": 4, "seed": 42,
        "query_start": "random",
    }  # fmt: skip
    assert PromptStyle.read(report["conversion"]["prompt"]) == PromptStyle(TEMPLATE, events=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (made[1], output))
    assert before.keys() == after.keys(), "the module is inside the model"
    assert all(not torch.equal(before[name], after[name]) for name in before)
    module, users = PrefixModule.load(output), Catalogue.load(made[0]).interactions["user"].unique()
    assert set(module.users) <= set(users)
    first = PrefixModule(module.settings, 64, module.users)
    assert not torch.equal(first.query[2].weight, module.query[2].weight)
    assert MODULE in belonging(output)
    assert "prefix_module.json" in belonging(output)
    assert len(logged(output, "eval_recall@10")) == 2
    names = {"rclrec/nll", "rclrec/target_nll", "rclrec/base_nll", "rclrec/quality", "rclrec/helped", "rclrec/age"}
    assert names <= next(entry.keys() for entry in report["rclrec"]["log"] if "loss" in entry)
    assert Checkpoint.load(output).report["conversion"] == report["conversion"]
    assert not list(tmp_path.glob("out.work-*"))


def test_it_learns_its_conversions(made, tmp_path):
    output = train(made, tmp_path / "out", max_steps=40, learning_rate=2e-3)
    loss = logged(output, "rclrec/target_nll")
    assert sum(loss[-5:]) < 0.5 * sum(loss[:5])
    assert sum(logged(output, "rclrec/helped")[-5:]) > sum(logged(output, "rclrec/helped")[:5])


def own_logps(checkpoint: Checkpoint, ids: list[int], level: int) -> torch.Tensor:
    """Of the codes of a level, as the next token. (V,)"""
    return checkpoint.model(input_ids=torch.tensor([ids])).logits[0, -1, checkpoint.tokens.levels[level]].log_softmax(0)


def test_validation_decodes_with_the_module(made, tmp_path):
    """Recall@10 of the trained model by one search a user, its prefix chosen by the loaded module."""
    output = train(
        made, tmp_path / "out", k=2, validation_users=40, validation_beams=13, eval_strategy="steps", eval_steps=2
    )
    checkpoint, module = Checkpoint.load(output, "cpu"), PrefixModule.load(output)
    writer = EventWriter(PromptStyle(TEMPLATE, events=True), checkpoint.table, checkpoint.tokenizer)
    found, table, hits = cases(Catalogue.load(made[0]), "valid", 50), checkpoint.table, []
    everything = torch.tensor(table.codes).long()
    opening = writer.opening("pay")
    for history, item, user in zip(histories_of(found), found["item"], found["user"]):
        (prompt,), (ends,) = writer.ids([history]), writer.ends([history])
        with torch.no_grad():
            hidden = checkpoint.model.model(input_ids=torch.tensor([prompt])).last_hidden_state
            behaviour = checkpoint.model.get_input_embeddings().weight[opening]
            states = hidden[:, ends]
            there = torch.ones(1, len(ends), dtype=torch.bool)
            chosen = module.choose(states, there, hidden[:, -1], behaviour, module.user_rows([user]))[0].tolist()
            prefix = [id for one in chosen if one >= 0 for id in checkpoint.tokens.ids_of(history[one][0])]
            scores, first, levels = [], [*prompt, opening, *prefix], checkpoint.tokens.levels
            roots = own_logps(checkpoint, first, 0)  # normalised over each level, as in decoding
            after = [own_logps(checkpoint, [*first, int(id)], 1) for id in levels[0]]
            for one, other in everything.tolist():
                scores.append(float(roots[one] + (after[one][other] if other >= 0 else 0.0)))
        rank = sum(score > scores[table.row_of[item]] for score in scores)
        hits.append(rank < 10)
    assert len(hits) > 3
    assert logged(output, "eval_recall@10")[-1] == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("selection", ["recent", "random", "none"])
def test_ablations(made, tmp_path, selection):
    output = train(made, tmp_path / "out", selection=selection, validation_users=5, eval_strategy="steps", eval_steps=2)
    assert report_of(output)["conversion"]["settings"]["selection"] == selection
    assert (output / MODULE).exists() == (selection != "none")
    if selection != "none":
        assert PrefixModule.load(output).settings.selection == selection
    assert bool(logged(output, "rclrec/base_nll")) == (selection != "none")


def test_lora_saves_a_plain_model_and_its_module(made, tmp_path):
    output = train(made, tmp_path / "out", lora=LORA)
    before, after = (load_file(folder / "model.safetensors") for folder in (made[1], output))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before if "proj" in name)
    module = PrefixModule.load(output)
    first = PrefixModule(module.settings, 64, module.users)
    assert not torch.equal(first.query[2].weight, module.query[2].weight)
    assert Checkpoint.load(output).table.items


# ---- ℓ_base


def test_the_baseline_is_the_start_without_a_prefix_and_computed_once(made, tmp_path, monkeypatch):
    asked = []
    before = rclrec_run.nlls_of
    monkeypatch.setattr(rclrec_run, "nlls_of", lambda *args: asked.append(before(*args)) or asked[-1])
    kept = {}
    monkeypatch.setattr(
        rclrec_run, "RCLRecTrainer",
        lambda start, training, prompts, *rest, **more: kept.update(rows=prompts) or stop(),
    )  # fmt: skip

    def stop():
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(made, tmp_path / "out")
    assert len(asked) == 1, "computed again after a kill"
    checkpoint = Checkpoint.load(made[1], "cpu")
    opening = checkpoint.tokenizer.get_vocab()["<|pay|>"]
    for row in kept["rows"]:
        assert row[NLL_BASE] == pytest.approx(slow_nll(checkpoint, row, opening, [])[1].item(), rel=1e-4)


# ---- going on


PROGRAM = """
import os
from transformers import TrainerCallback
from trl import ModelConfig
from recllm import launch
from recllm.trainers import rclrec_run, rl_run
from recllm.trainers.rclrec import RCLRecConfig
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
launch.run(rclrec_run.run_rclrec, rclrec_run.RCLRecData, RCLRecConfig, ModelConfig)
"""


def launched(made, tmp_path, output, processes=1, stop_at=None, **settings) -> subprocess.CompletedProcess:
    script = tmp_path / "go.py"
    script.write_text(PROGRAM)
    given = {"data": made[0], "model_name_or_path": made[1], "output_dir": output, **FAST, **settings}
    command = torchrun(processes, script) if processes > 1 else [sys.executable, script]
    command += [part for name, value in given.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    if stop_at is not None:
        environment["STOP_AT"] = str(stop_at)
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)


def test_killed_and_resumed_the_weights_are_the_same_bits(made, tmp_path):
    """kill -9 in the third epoch, between two saves."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 9, "user_dropout": 0.5}
    whole = train(made, tmp_path / "whole", **settings)
    killed = launched(made, tmp_path, tmp_path / "killed", stop_at=5, **settings)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert list(tmp_path.glob("killed.work-*/steps/checkpoint-3"))
    resumed = train(made, tmp_path / "killed", **settings)
    assert same(whole, resumed, "model.safetensors")
    assert same(whole, resumed, MODULE)
    assert logged(whole, "loss") == logged(resumed, "loss")


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_interrupted_in_one_process_it_goes_on_with_its_module(made, tmp_path, monkeypatch, lora):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 9}
    whole = train(made, tmp_path / "whole", lora, **settings)

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    make = rl_run.trainer_of

    def stopping(*args):
        trainer = make(*args)
        trainer.add_callback(Stops())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(rl_run, "trainer_of", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(made, tmp_path / "out", lora, **settings)
    assert list(tmp_path.glob("out.work-*/steps/checkpoint-2"))
    resumed = train(made, tmp_path / "out", lora, **settings)
    assert same(whole, resumed, "model.safetensors")
    assert same(whole, resumed, MODULE)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_the_best_evaluations_module_is_kept(made, tmp_path, monkeypatch, lora):
    figures = iter([1.0, 0.0, 0.0])
    monkeypatch.setattr(ConversionValidation, "values", lambda *_: {"recall@10": torch.tensor([next(figures)])})
    kept = {"validation_users": 5, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    best = train(made, tmp_path / "best", lora, max_steps=3, **kept)
    one = train(made, tmp_path / "one", lora, max_steps=1)
    assert same(best, one, MODULE)
    assert same(best, one, "model.safetensors")


def test_two_processes_train_what_one_does(made, tmp_path):
    one = train(made, tmp_path / "one")
    succeeded(launched(made, tmp_path, tmp_path / "two", processes=2, per_device_train_batch_size=4))
    for name in ("model.safetensors", MODULE):
        first, second = load_file(one / name), load_file(tmp_path / "two" / name)
        assert all(torch.allclose(first[part], second[part], atol=1e-4) for part in first), name
    assert logged(one, "rclrec/base_nll") == pytest.approx(logged(tmp_path / "two", "rclrec/base_nll"), rel=1e-4)


# ---- recipes and mistakes


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_recipe_runs_two_steps(path, made, tmp_path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"recipes/rclrec.py --config recipes/rclrec/{path.name}" in line for line in head)
    assert len(path.read_text().splitlines()) <= 45
    small = ["--data", made[0], "--model_name_or_path", made[1], "--output_dir", tmp_path / "out"]
    small += ["--max_steps", 2, "--per_device_train_batch_size", 8, "--validation_users", 5, "--validation_beams", 10]
    small += ["--bf16", "false", "--report_to", "none", "--use_cpu", "true", "--num_train_epochs", 1]
    args = list(map(str, ["--config", path, *small]))
    output = run_rclrec(*launch.parse(RCLRecData, RCLRecConfig, ModelConfig, args=args))
    assert report_of(output)["rclrec"]["steps"] == 2
    assert {"README.md", "training.yaml", MODULE} <= {file.name for file in output.iterdir()}


def test_no_conversions(made, tmp_path):
    data = RCLRecData(data=str(made[0]), conversions=str(tmp_path / "nothing"))
    training, model = RCLRecConfig(output_dir=str(tmp_path / "out"), **FAST), ModelConfig(str(made[1]))
    with pytest.raises(UserError, match=r"the conversions does not exist.*build_conversions\.py.*--stage target"):
        run_rclrec(data, training, model)
    build_conversions(ConversionsConfig(data=str(made[0]), stage="all", output=str(tmp_path / "all")))
    with pytest.raises(UserError, match=r"holds no conversions alone.*--stage target"):
        run_rclrec(RCLRecData(data=str(made[0]), conversions=str(tmp_path / "all")), training, model)
    build_conversions(
        ConversionsConfig(
            data=str(made[0]), stage="target", output=str(tmp_path / "other"), template="Events: {history}"
        )
    )
    with pytest.raises(UserError, match=r"the conversions' prompts are 'Events: \{history\}' and the model was taught"):
        run_rclrec(RCLRecData(data=str(made[0]), conversions=str(tmp_path / "other")), training, model)


def test_conversions_of_another_index(made, tmp_path):
    write_events(tmp_path, random_shop(12, items=9, seed=5))
    build_conversions(ConversionsConfig(data=str(tmp_path / "data"), stage="target"))
    data = RCLRecData(data=str(made[0]), conversions=str(tmp_path / "data" / "conversions_target"))
    training = RCLRecConfig(output_dir=str(tmp_path / "out"), **FAST)
    with pytest.raises(UserError, match="other semantic IDs than the model's"):
        run_rclrec(data, training, ModelConfig(str(made[1])))


def test_a_start_that_lacks_the_behaviours_token(made, tmp_path):
    """Made from data of clicks alone, with the same items."""
    clicks = tmp_path / "clicks"
    events = Catalogue.load(made[0]).item_ids
    write_events(clicks, {f"u{user}": [(item, "click") for item in events] for user in range(3)}, split="leave-one-out")
    shutil.copy(made[0] / "semantic_ids.json", clicks / "data" / "semantic_ids.json")
    build_model(BuildModelConfig(data=str(clicks / "data"), output=str(tmp_path / "model"), **SMALL))
    report = report_of(tmp_path / "model") | {"prompt": report_of(made[1])["prompt"]}
    (tmp_path / "model" / "recllm.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="no token for the behaviour 'pay'"):
        train((made[0], tmp_path / "model"), tmp_path / "out")


def test_a_start_that_was_taught_other_prompts(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "model")
    report = report_of(made[1])
    del report["prompt"]
    (tmp_path / "model" / "recllm.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"the model was taught.*recipes/sft\.py"):
        train((made[0], tmp_path / "model"), tmp_path / "out")


def test_a_prefix_longer_than_the_context(made, tmp_path):
    trainer = trainer_of(made, tmp_path)
    trainer.checkpoint.model.config.max_position_embeddings = 20
    conversions = rclrec_run.conversions_of(RCLRecData(data=str(made[0])), trainer.checkpoint)
    with pytest.raises(UserError, match=r"the model's context is 20.*max_history"):
        rclrec_run.rows_of(conversions, trainer.checkpoint, 3)
