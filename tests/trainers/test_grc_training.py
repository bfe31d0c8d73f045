"""GRC's supervised stage against its formula, sequence by sequence; the steps, and the folder that comes out."""

import json

import polars as pl
import pytest
import torch
from grc_for_tests import slow_logps
from helpers import write_small_model
from rl_for_tests import SavesGradients, assert_same_gradients, losses_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from recllm.attributes import attributes_of
from recllm.checkpoint import Checkpoint
from recllm.mixtures.reflection import ReflectionConfig, ReflectionData, build_reflection
from recllm.reflection import Template
from recllm.trainers.grc_sft import GRCSFTConfig, GRCSFTTrainer
from recllm.trainers.grc_sft_run import GRCData, run_grc_sft, taught

ATTRIBUTES = ("categories", "brand")
TEMPLATES = {
    "parallel": Template(2, ATTRIBUTES),
    "causal": Template(2, ATTRIBUTES, "causal"),
    "gc": Template(2, (), labels=False),
}
FAST = {
    "per_device_train_batch_size": 8, "max_steps": 2, "bf16": False, "learning_rate": 1e-2, "validation_users": 0,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
    "lr_scheduler_type": "constant",
}  # fmt: skip
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(data, model, drafts): 12 items of two levels, of which two have no category and one no brand."""
    data, model = write_small_model(tmp_path_factory.mktemp("grc"), users=16)
    items = pl.read_parquet(model / "items.parquet")
    items = items.with_columns(
        categories=pl.when(pl.col("item").is_in(["i3", "i5"])).then(pl.lit([], pl.List(pl.String)))
        .otherwise(pl.col("categories")),
        brand=pl.when(pl.col("item") == "i3").then(pl.lit("")).otherwise(pl.col("brand")),
    )  # fmt: skip
    items.write_parquet(model / "items.parquet")
    checkpoint, generator = Checkpoint.load(model, "cpu"), torch.Generator().manual_seed(0)
    with torch.no_grad():  # so large that what stands before a token matters
        for parameter in checkpoint.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    checkpoint.model.save_pretrained(model)
    drafts = data / "reflection"
    asked = ReflectionConfig(
        str(data), str(model), str(drafts), attributes=list(ATTRIBUTES), drafts=6, keep=3, rl_targets="all",
        device="cpu",
    )  # fmt: skip
    build_reflection(asked)
    return data, model, drafts


def rows_of_data(made, start):
    """1, 2 or 3 drafts a prompt, and of the first rows one whose target's attributes are unknown."""
    rows = ReflectionData.load(made[2], start.table).examples
    unknown = [place for place, same in enumerate(rows["same"]) if same[0] == [-1, -1]]
    partly = [place for place, same in enumerate(rows["same"]) if same[0][0] == -1 and same[0][1] >= 0]
    assert min(map(len, (unknown, partly))), "no target of unknown category"
    order = [unknown[0], partly[0], *(place for place in range(len(rows)) if place not in (unknown[0], partly[0]))]
    return rows.select(order).map(
        lambda row, place: {name: row[name][: place % 3 + 1] for name in ("drafts", "loc", "same")}, with_indices=True
    )  # fmt: skip


def trainer_of(made, output, kind="parallel", rows=None, lora=None, **given) -> GRCSFTTrainer:
    """Ready to train; `.start` is its checkpoint and `.gradients` those of each step."""
    start = Checkpoint.load(made[1], "cpu")
    template = TEMPLATES[kind]
    start = taught(start, template, attributes_of(ATTRIBUTES, start.items), seed=0)
    args = GRCSFTConfig(
        output_dir=str(output), reflection_layout=template.layout, reflection=template.labels,
        **{**FAST, "eval_strategy": "no", **given},
    )  # fmt: skip
    gradients = SavesGradients()
    rows = rows_of_data(made, start) if rows is None else rows
    trainer = GRCSFTTrainer(start, args, rows, peft_config=lora, callbacks=[gradients])
    trainer.start, trainer.gradients = start, gradients.steps
    return trainer


def batch_of(trainer, places):
    return trainer.data_collator([trainer.train_dataset[place] for place in places])


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def ids_of(start, codes) -> list[int]:
    return [int(start.tokens.levels[level][code]) for level, code in enumerate(codes)]


def slow_loss(start, rows, weight: float) -> torch.Tensor:
    """L_MLE + λ L_rc, from rows of the data, by a run of the plain model for every sequence."""
    template, tokens = start.reflection.template, start.reflection.tokens
    kinds = [place.kind for place in template.places]
    total = 0.0
    for row in rows:
        target, own = ids_of(start, row["target"]), torch.zeros(())
        # The next item right behind the prompt, where nothing but a plain causal mask is needed.
        logits = start.model(input_ids=torch.tensor([[*row["prompt_ids"], *target]])).logits[0].log_softmax(-1)
        at = len(row["prompt_ids"]) - 1
        total += -(logits[at, target[0]] + logits[at + 1, target[1]]) / 2
        for draft, loc, same in zip(row["drafts"], row["loc"], row["same"]):
            labels = [loc - 1, *(max(one, 0) for one in same)] if template.labels else []
            answer = tokens.ids(ids_of(start, draft), labels, target)
            learnt = [place for place, kind in enumerate(kinds) if kind in ("label", "item")]
            if template.labels:
                unknown = [template.at("label")[1 + k] for k, one in enumerate(same) if one == -1]
                learnt = [place for place in learnt if place not in unknown]
            own = own - slow_logps(start, row["prompt_ids"], answer)[learnt].mean()
        total += weight * own / len(row["drafts"])
    return total / len(rows)


# ---- the loss


@pytest.mark.parametrize(("kind", "weight"), [("parallel", 1.2), ("causal", 1.2), ("gc", 1.2), ("parallel", 0.3)])
def test_loss_and_gradients_are_the_formula(made, tmp_path, kind, weight):
    trainer = trainer_of(made, tmp_path, kind, reflection_weight=weight)
    slow = trainer_of(made, tmp_path, kind).start  # whose model nothing has touched but the Trainer
    places = [0, 1, 2, 5, 6]
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, places))
    wanted = slow_loss(slow, [trainer.train_dataset[place] for place in places], weight)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward(), wanted.backward()
    assert_same_gradients([gradients(trainer.model)], [gradients(slow.model)], tolerance=1e-4)
    assert GRCSFTConfig(output_dir=str(tmp_path)).reflection_weight == 1.2


def test_what_tokens_weigh(made, tmp_path):
    """A prompt of the batch weighs 1/n: its truth 1 in all, its trajectories λ, equally; drafts and slots nothing."""
    trainer = trainer_of(made, tmp_path)
    batch = batch_of(trainer, [0, 1, 2])  # 1, 2 and 3 drafts
    weights, present = batch["weights"], batch["completion_mask"]
    assert weights.shape == (3 + 1 + 2 + 3, 10)
    truths = [0, 2, 5]
    expected = [1 / 3 if row in truths else 0.0 for row in range(9)]
    for row, count in {1: 1, **dict.fromkeys((3, 4), 2), **dict.fromkeys((6, 7, 8), 3)}.items():
        expected[row] = 1.2 / count / 3
    assert weights.sum(1).tolist() == pytest.approx(expected)
    assert present.sum(1).tolist() == [2 if row in truths else 10 for row in range(9)]
    learnt = weights > 0
    places = trainer.template.places
    drafts, slots = (torch.tensor([place.kind == kind for place in places]) for kind in ("draft", "slot"))
    trajectories = torch.tensor([row not in truths for row in range(9)])
    assert not learnt[trajectories][:, drafts | slots].any(), "a draft is context, never a target"
    assert learnt[truths][:, drafts].all()
    # First row: the target's category and brand are unknown, so place and item are learnt; second: brand as well.
    assert learnt[1].tolist() == [False] * 5 + [True, False, False] + [True] * 2
    assert learnt[3].tolist() == [False] * 5 + [True, False, True] + [True] * 2


def test_a_draft_is_read_and_not_learnt(made, tmp_path):
    """Another draft is another loss of what follows; of the draft's own prediction nothing is in it."""
    trainer = trainer_of(made, tmp_path)
    batch = batch_of(trainer, [2])
    only = {**batch, "weights": batch["weights"] * batch["completion_mask"].all(dim=1, keepdim=True)}  # no L_MLE
    loss = trainer.compute_loss(trainer.model, only).item()
    row = int(batch["completion_mask"].all(dim=1).nonzero()[0])
    losses = set()
    for token in trainer.start.tokens.levels[0].tolist():
        other = batch["completion_ids"].clone()
        other[row, 0] = token
        losses.add(round(trainer.compute_loss(trainer.model, {**only, "completion_ids": other}).item(), 6))
    assert len(losses) == len(trainer.start.tokens.levels[0])
    assert round(loss, 6) in losses
    logps = []
    score = trainer.scorer.score
    trainer.scorer.score = lambda *given, **more: logps.append(score(*given, **more)) or logps[-1]
    trainer.compute_loss(trainer.model, batch)
    found = logps[0][0]
    drafts = trainer.template.at("draft")
    whole = batch["completion_mask"].all(dim=1)
    assert not found[whole][:, drafts].any()
    assert (found[~whole][:, drafts] < 0).all()


def test_accumulated_batches_are_one_batch(made, tmp_path):
    """Prompts with few and with many drafts weigh the same, in one batch or two."""
    one = trainer_of(made, tmp_path / "one", **SGD)
    two = trainer_of(made, tmp_path / "two", **SGD, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    one.train(), two.train()
    assert_same_gradients(one.gradients, two.gradients)
    assert losses_of(one) == pytest.approx(losses_of(two), rel=1e-4)


def test_the_log_tells_the_parts_apart(made, tmp_path):
    trainer = trainer_of(made, tmp_path, max_steps=1, learning_rate=0.0, shuffle_dataset=False)
    slow = trainer_of(made, tmp_path).start
    trainer.train()
    sums = {name: [] for name in ("initial", "reflection", "correction")}
    batch = batch_of(trainer, range(8))
    with torch.no_grad():
        for row, weights in enumerate(batch["weights"]):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row] > 0].tolist()
            held = batch["completion_mask"][row].nonzero().flatten().tolist()
            logps = slow_logps(slow, prompt, batch["completion_ids"][row].tolist(), held)
            for place in (weights > 0).nonzero().flatten().tolist():
                kind = trainer.template.places[place].kind
                sums[{"draft": "initial", "label": "reflection", "item": "correction"}[kind]].append(-logps[place])
    log = trainer.state.log_history[0]
    for name, each in sums.items():
        assert log[f"grc/{name}_nll"] == pytest.approx(torch.stack(each).mean().item(), rel=1e-4), name
    wanted = slow_loss(slow, [trainer.train_dataset[place] for place in range(8)], 1.2)
    assert log["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    no_labels = trainer_of(made, tmp_path, "gc", max_steps=1)
    no_labels.train()
    assert "grc/reflection_nll" not in no_labels.state.log_history[0]


# ---- runs


def run(made, output, lora=None, overwrite=False, **settings):
    training = GRCSFTConfig(output_dir=str(output), overwrite=overwrite, **{**FAST, **settings})
    model = ModelConfig(model_name_or_path=str(made[1]), **(lora or {}))
    return run_grc_sft(GRCData(data=str(made[0]), drafts=str(made[2])), training, model)


def new_rows(start) -> list[int]:
    return start.tokenizer.convert_tokens_to_ids(start.reflection.template.new_tokens)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("parallel", {}), ("causal", {}), ("gc", {}), ("parallel", {"use_peft": True, "lora_r": 4})],
    ids=["parallel", "causal", "gc", "lora"],
)
def test_the_checkpoint_is_whole(made, tmp_path, kind, lora):
    template = TEMPLATES[kind]
    output = run(made, tmp_path / "out", lora, reflection=template.labels, reflection_layout=template.layout)
    found, start = Checkpoint.load(output, "cpu"), Checkpoint.load(made[1], "cpu")
    begun = taught(start, template, attributes_of(ATTRIBUTES, start.items), seed=42)  # the Trainer's default seed
    assert found.reflection.template == template
    assert found.reflection.attributes.names == ATTRIBUTES
    assert torch.equal(found.reflection.attributes.ids, begun.reflection.attributes.ids)
    assert found.table.fingerprint == start.table.fingerprint
    report = json.loads((output / "recllm.json").read_text())
    assert (report["method"], report["papers"], report["grc_sft"]["steps"]) == ("grc_sft", ["grc"], 2)
    assert report["grc_sft"]["start"] == start.weights
    assert {"README.md", "training.yaml", "items.parquet", "semantic_ids.json"} <= {f.name for f in output.iterdir()}
    assert not list(tmp_path.glob("*.work-*"))

    ids = new_rows(begun)
    rows, before = (one.model.get_input_embeddings().weight.detach() for one in (found, begun))
    assert rows.shape == before.shape
    assert all(not torch.equal(rows[one], before[one]) for one in ids), "a new token's row is as it was made"
    trained = dict(found.model.named_parameters())
    moved = [name for name, each in begun.model.named_parameters() if not torch.equal(each, trained[name])]
    assert any("q_proj" in name for name in moved)
    assert lora or len(moved) == len(trained)

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in template.new_tokens] == [
        [i] for i in ids
    ]
    asked = torch.tensor([[1, 2, *ids]])
    with torch.no_grad():
        assert torch.equal(plain(asked).logits, found.model(asked).logits)


def test_a_second_run_leaves_it_and_a_third_with_other_settings_refuses(made, tmp_path, monkeypatch):
    output = run(made, tmp_path / "out", max_steps=1)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    monkeypatch.setattr(GRCSFTTrainer, "training_step", lambda *args, **kwargs: pytest.fail("a step was taken"))
    assert run(made, tmp_path / "out", max_steps=1) == output
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    with pytest.raises(Exception, match="holds another model"):
        run(made, tmp_path / "out", max_steps=1, reflection_weight=1.1)


def test_it_learns_to_judge_and_to_correct(made, tmp_path):
    """Thirty steps on the same few prompts: what it says of a draft and makes of it gets likelier, part by part."""
    trainer = trainer_of(made, tmp_path, rows=None, max_steps=30, learning_rate=1e-2)
    trainer.train_dataset = trainer.train_dataset.select(range(8))
    trainer.train()
    log = [line for line in trainer.state.log_history if "grc/initial_nll" in line]
    for name in ("initial", "reflection", "correction"):
        assert log[-1][f"grc/{name}_nll"] < 0.6 * log[0][f"grc/{name}_nll"], name


def test_a_taught_model_goes_on_with_its_template_alone(made, tmp_path):
    first = run(made, tmp_path / "first", max_steps=1)
    again = run((made[0], first, made[2]), tmp_path / "again", max_steps=1)
    one, other = (load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (first, again))
    assert one.shape == other.shape
    assert Checkpoint.load(again).reflection.template == TEMPLATES["parallel"]
    for settings in ({"reflection": False}, {"reflection_layout": "causal"}):
        with pytest.raises(Exception, match="taught to reflect in another way"):
            run((made[0], first, made[2]), tmp_path / "other", **settings)
