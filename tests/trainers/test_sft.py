"""Supervised fine-tuning through the real SFTTrainer on a tiny Qwen3: what it learns, keeps, resumes and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import write_mixtures, write_small_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from recllm import Recommender
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.mixtures.encoding import encode
from recllm.mixtures.store import Mixture
from recllm.trainers.run import check_weights, shapes_of
from recllm.trainers.sft import RecSFTConfig, RecSFTTrainer
from recllm.trainers.sft_run import SFTData, run_sft

ROOT = Path(__file__).parents[2]
FAST = {
    "per_device_train_batch_size": 8, "num_train_epochs": 2, "bf16": False, "gradient_checkpointing": False,
    "learning_rate": 3e-3, "validation_users": 0, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data, model = write_small_model(tmp_path_factory.mktemp("sft"), items=12, users=30)
    alignment, reasoning = write_mixtures(data)
    return data, model, alignment, reasoning


def train(made, output, model=None, lora=None, kinds="ar", initialise="cluster", **settings):
    data, start, alignment, reasoning = made
    given = SFTData(
        str(data), [str(alignment)] if "a" in kinds else [], [str(reasoning)] if "r" in kinds else [],
        tiny_width=64, tiny_layers=2, initialise=initialise,
    )  # fmt: skip
    training = RecSFTConfig(output_dir=str(output), **{**FAST, **settings})
    return run_sft(given, training, ModelConfig(model_name_or_path=str(model or start), **(lora or {})))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(one, other) -> bool:
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_learns_and_the_folder_stands_alone(tmp_path):
    made = write_small_model(tmp_path, items=12, users=200)
    made = (*made, *write_mixtures(made[0], law=True))
    settings = {"num_train_epochs": 12, "learning_rate": 5e-3, "initialise": "random", "kinds": "a"}
    output = train(made, tmp_path / "out", model="tiny", **settings)
    assert not list(tmp_path.glob("*.work-*")), "work of a finished run is left"
    assert not list(output.rglob("*.bin"))
    recommender = Recommender.from_pretrained(output)
    mixture = Mixture.load(made[2], recommender.checkpoint.table, "…")
    rows = mixture.examples.to_list()
    found = recommender.recommend([row["history"] for row in rows], k=1)
    hits = sum(one[0].item == row["item"] for one, row in zip(found, rows)) / len(rows)
    assert hits > 0.25  # by chance 1/12
    AutoTokenizer.from_pretrained(output)
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.float32
    report = json.loads((output / "recllm.json").read_text())
    assert report["prompt"] == mixture.report["prompt"]
    assert "reasoning_prompt" not in report
    assert report["sft"]["steps"] == 12 * -(-len(rows) // 8)


def test_the_same_again_returns_at_once_and_another_is_refused(made, tmp_path, capsys):
    output = train(made, tmp_path / "out", max_steps=2)
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert train(made, tmp_path / "out", max_steps=2, logging_steps=3) == output
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another model"):
        train(made, tmp_path / "out", max_steps=3)
    train(made, tmp_path / "out", max_steps=3, overwrite=True)
    assert json.loads((output / "recllm.json").read_text())["sft"]["steps"] == 3


def test_reasoning_data_leaves_its_prompt_in_the_checkpoint(made, tmp_path):
    output = train(made, tmp_path / "out", max_steps=2)
    checkpoint = Checkpoint.load(output)
    assert "Think" in checkpoint.reasoning.template
    assert checkpoint.report["sft"]["reasoning_rows"] > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_in_the_middle_and_resumed_the_weights_are_the_same_bits(made, tmp_path, seed):
    """kill -9 between two saves, in the middle of an epoch."""
    settings = {"save_strategy": "steps", "save_steps": 3, "seed": seed, "train_sampling_strategy": "group_by_length"}
    whole = train(made, tmp_path / "whole", **settings)
    script = tmp_path / "go.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests' / 'trainers')!r}, {str(ROOT / 'tests')!r}]\n"
        "from test_sft import train\nfrom pathlib import Path\n"
        "from transformers import TrainerCallback\n"
        "from recllm.trainers import sft_run\n"
        f"made = tuple(map(Path, {[str(part) for part in made]!r}))\n"
        "class Slow(TrainerCallback):\n"
        "    def on_step_end(self, *args, **kwargs):\n"
        "        import time; time.sleep(0.2)\n"
        "if len(sys.argv) > 1:\n"
        "    make = sft_run.trainer_of\n"
        "    def slowly(*args):\n"
        "        trainer = make(*args); trainer.add_callback(Slow()); return trainer\n"
        "    sft_run.trainer_of = slowly\n"
        f"train(made, {str(tmp_path / 'killed')!r}, **{settings!r})\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, script, "slow"], env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("killed.work-*/steps/checkpoint-6/trainer_state.json")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists(), "a finished folder before the end"
    subprocess.run([sys.executable, script], env=environment, check=True, stderr=subprocess.PIPE)
    assert same(whole, tmp_path / "killed")


def test_early_stopping_looks_at_recall_of_decoding(made, tmp_path):
    output = train(
        made, tmp_path / "out", num_train_epochs=3, validation_users=20, validation_beams=10,
        early_stopping_patience=1, kinds="a",
    )  # fmt: skip
    log = json.loads((output / "recllm.json").read_text())["sft"]["log"]
    curve = [entry["eval_recall@10"] for entry in log if "eval_recall@10" in entry]
    assert curve
    assert all(0 <= value <= 1 for value in curve)


def test_a_plain_model_gets_its_rows_first(made, tmp_path):
    """`tiny` stands for any model without item tokens: it is built beside the run, and the run starts from it."""
    output = train(made, tmp_path / "out", model="tiny", max_steps=2)
    assert Checkpoint.load(output).report["base_model"] == "tiny"


# ---- new rows


def test_only_new_rows_move_in_the_first_steps(made, tmp_path):
    start = weights(made[1])
    first_new = json.loads((made[1] / "recllm.json").read_text())["tokens"]["text"]
    settings = {"rows_first_steps": 3, "rows_first_learning_rate": 1e-2, "max_steps": 1, "weight_decay": 0.1}
    output = train(made, tmp_path / "out", learning_rate=1e-30, **settings)  # the steps after it move nothing
    end, embedding = weights(output), "model.embed_tokens.weight"
    assert torch.allclose(end[embedding][:first_new], start[embedding][:first_new], atol=1e-12, rtol=0)
    assert (end[embedding][first_new:] - start[embedding][first_new:]).abs().max() > 1e-3
    for name in start:
        if name != embedding:
            assert torch.allclose(end[name], start[name], atol=1e-12, rtol=0), name


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_new_rows_and_is_merged(made, tmp_path, tied):
    start = made[1]
    if not tied:
        start = tmp_path / "untied"
        untie(made[1], start)
    before = weights(start)
    output = train(made, tmp_path / "out", model=start, lora={"use_peft": True, "lora_r": 4}, max_steps=4, kinds="a")
    after, first_new = weights(output), json.loads((start / "recllm.json").read_text())["tokens"]["text"]
    assert before.keys() == after.keys(), "the adapter is not merged"
    rows = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    for name in rows:
        assert (after[name][first_new:] - before[name][first_new:]).abs().max() > 1e-4, f"{name}: new rows untrained"
    attention = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after[attention], before[attention])
    Recommender.from_pretrained(output).recommend(["i1"], k=3)


def untie(folder: Path, to: Path) -> None:
    """The same model with a head of its own."""
    shutil.copytree(folder, to)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    head = model.get_input_embeddings().weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(to)
    assert "lm_head.weight" in load_file(to / "model.safetensors")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_target_modules": ["lm_head", "q_proj"]}, "names 'lm_head'"),
        ({"lora_target_modules": ["embed_tokens"]}, "names 'embed_tokens'"),
        ({"load_in_4bit": True}, "quantised"),
    ],
)
def test_settings_that_leave_new_rows_untrained_are_refused(made, tmp_path, lora, message):
    with pytest.raises(UserError, match=message):
        train(made, tmp_path / "out", lora={"use_peft": True, **lora}, max_steps=1)
    assert not (tmp_path / "out").exists()


def test_lora_keeps_the_best_epoch(made, tmp_path):
    """Validation decodes a model with an adapter; the best epoch's adapter is loaded again and merged."""
    output = train(
        made, tmp_path / "out", lora={"use_peft": True, "lora_r": 4}, kinds="a", num_train_epochs=2,
        validation_users=10, validation_beams=10, load_best_model_at_end=True,
    )  # fmt: skip
    assert not any("lora" in name for name in weights(output))
    Recommender.from_pretrained(output).recommend(["i1"], k=3)


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_what_sharded_weights_cannot_do_is_refused_before_the_hours(made, tmp_path, monkeypatch, way):
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError, match="LoRA with DeepSpeed or FSDP"):
        train(made, tmp_path / "out", lora={"use_peft": True})
    with pytest.raises(UserError, match="rows_first_steps needs whole weights"):
        train(made, tmp_path / "out", rows_first_steps=2)
    with pytest.raises(UserError, match="cannot be decoded"):
        train(made, tmp_path / "out", validation_users=5)


def test_weights_that_were_not_written_are_noticed_before_the_steps_go(made, tmp_path):
    start = Checkpoint.load(made[1])
    check_weights(made[1], shapes_of(start))
    with pytest.raises(UserError, match="not written whole"):
        check_weights(tmp_path, shapes_of(start))
    with pytest.raises(UserError, match="not written whole"):
        check_weights(made[1], shapes_of(start) | {"model.norm.weight": (3,)})


# ---- rows of the data set


def test_loss_is_on_the_completion_and_the_end_token(made):
    checkpoint = Checkpoint.load(made[1])
    mixture = Mixture.load(made[2], checkpoint.table, "…")
    encoded = encode([mixture], [], checkpoint.tokenizer, 200)
    row, example = encoded.rows[0], mixture.examples[0]
    answer = [id for id, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert answer == [*checkpoint.tokens.ids_of(example["item"]), checkpoint.tokenizer.eos_token_id]
    # What stands before is what the engine asks with.
    asked = checkpoint.writer_of(mixture.style).ids([example["history"]])[0]
    assert row["input_ids"][: len(asked)] == asked


def test_what_does_not_fit_is_left_out_whole(made):
    checkpoint = Checkpoint.load(made[1])
    mixture = Mixture.load(made[3], checkpoint.table, "…")
    everything = encode([], [mixture], checkpoint.tokenizer, 1000)
    limit = int(everything.lengths.max()) - 1
    some = encode([], [mixture], checkpoint.tokenizer, limit)
    assert some.too_long == int((everything.lengths > limit).sum()) > 0
    assert some.lengths.max() <= limit
    with pytest.raises(UserError, match="no example fits into 5 tokens"):
        encode([], [mixture], checkpoint.tokenizer, 5)


def test_packing_keeps_the_kinds_apart_and_trains_to_the_same_loss(made, tmp_path):
    """One step over everything: examples side by side in a row must not see each other."""
    checkpoint = Checkpoint.load(made[1])
    mixtures = [Mixture.load(path, checkpoint.table, "…") for path in made[2:]]
    packed = encode(mixtures[:1], mixtures[1:], checkpoint.tokenizer, 256, pack=True)
    plain = encode(mixtures[:1], mixtures[1:], checkpoint.tokenizer, 256)
    assert packed.lengths.sum() == plain.lengths.sum()
    assert len(packed.rows) < len(plain.rows) / 2
    alone = encode(mixtures[:1], [], checkpoint.tokenizer, 256, pack=True)
    assert packed.align == len(alone.rows)
    losses = []
    for packing, batch in ((True, len(alone.rows)), (False, alone.examples)):
        folder = train(
            made, tmp_path / str(packing), kinds="a", packing=packing, max_length=256, max_steps=1,
            per_device_train_batch_size=batch, logging_steps=1,
        )  # fmt: skip
        log = json.loads((folder / "recllm.json").read_text())["sft"]["log"]
        losses.append(next(entry["loss"] for entry in log if "loss" in entry))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- a user's mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy = 'sequential' has no place"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy = 'wrapped'"),
        ({"eos_token": "<|im_end|>"}, "eos_token"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"completion_only_loss": False}, "completion_only_loss"),
        ({"schedule": "random"}, "schedule 'random'"),
        ({"gamma": -1.0}, "gamma must be above 0"),
        ({"validation_users": 0, "load_best_model_at_end": True}, "chosen on validation users"),
        ({"validation_users": 5, "validation_beams": 5}, "at least 10"),
        ({"rows_first_steps": 5.5}, "whole number"),
        ({"max_length": None}, "max_length must be a number"),
        ({"trust_remote_code": True}, "stranger's code"),
    ],
)
def test_a_config_fails_at_construction(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        RecSFTConfig(output_dir=str(tmp_path), bf16=False, **settings)


def test_the_best_epoch_of_reasoning_alone_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="reasoning data alone does not teach"):
        train(made, tmp_path / "out", kinds="r", validation_users=5, load_best_model_at_end=True)


def test_a_finished_run_whose_end_was_killed_is_completed(made, tmp_path):
    output = train(made, tmp_path / "out", max_steps=1)
    (output / "README.md").unlink()
    left = output.with_name(f"out.work-{json.loads((output / 'recllm.json').read_text())['sft']['made_of'][:16]}")
    left.mkdir()
    train(made, tmp_path / "out", max_steps=1)
    assert (output / "README.md").exists()
    assert not left.exists()


def test_nothing_published_names_a_place_of_this_machine(made, tmp_path):
    output = train(made, tmp_path / "out", max_steps=1)
    for path in output.iterdir():
        if path.suffix in (".json", ".md", ".yaml"):
            assert str(tmp_path.parent) not in path.read_text(), path.name


def test_another_mixture_under_the_same_name_trains_anew(made, tmp_path):
    """A teacher's late answers change the rows of a mixture, not what was asked."""
    data, start, alignment, reasoning = made
    copied = shutil.copytree(alignment, tmp_path / "alignment")
    train((data, start, copied, reasoning), tmp_path / "out", max_steps=1, kinds="a")
    shutil.rmtree(copied)
    shutil.copytree(reasoning, copied)
    with pytest.raises(UserError, match="holds another model"):
        train((data, start, copied, reasoning), tmp_path / "out", max_steps=1, kinds="a")


def test_max_steps_decides_what_the_last_epoch_is(made, tmp_path):
    """The schedule is laid out for the steps that are run: D to R comes to reasoning."""
    checkpoint = Checkpoint.load(made[1])
    mixtures = [Mixture.load(path, checkpoint.table, "…") for path in made[2:]]
    rows = encode(mixtures[:1], mixtures[1:], checkpoint.tokenizer, 256)
    a_pass = sum(-(-part // 8) for part in (rows.align, len(rows.rows) - rows.align))
    args = RecSFTConfig(
        output_dir=str(tmp_path), **{**FAST, "num_train_epochs": 9}, max_steps=2 * a_pass,
        schedule="direct_then_reasoning",
    )  # fmt: skip
    sampler = RecSFTTrainer(checkpoint.model, args, rows, checkpoint.tokenizer, None)._get_train_sampler()
    kinds = [kind for order in sampler.orders for kind, _, _ in order]
    assert len(sampler.orders) == 2
    assert kinds == sorted(kinds)  # align before reason
    assert kinds.count("reason") * 2 == pytest.approx(len(kinds), abs=2)


def test_without_data_or_a_model_one_sentence_says_so(made, tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        train(made, tmp_path / "out", kinds="")
    given = SFTData(str(made[0]), [str(made[2])])
    with pytest.raises(UserError, match="model_name_or_path is not set"):
        run_sft(given, RecSFTConfig(output_dir=str(tmp_path / "out"), **FAST), ModelConfig())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no checkpoint of ours"):
        train(made, tmp_path / "full")


def test_a_mixture_of_another_index_is_refused(made, tmp_path):
    other, _ = write_small_model(tmp_path / "other", items=10, users=20)
    write_mixtures(other)
    with pytest.raises(UserError, match="other semantic IDs than the model's"):
        train((made[0], made[1], other / "alignment", made[3]), tmp_path / "out", kinds="a")
    with pytest.raises(UserError, match="the mixture does not exist"):
        train((made[0], made[1], tmp_path / "none", made[3]), tmp_path / "out2", kinds="a")
