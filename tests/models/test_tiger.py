"""TIGER-style: a real two-epoch training, its checkpoint, and what it never sees."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from helpers import write_small_model
from transformers import AutoModelForCausalLM

from recllm import Recommender
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.models.attention import use_fp32_attention
from recllm.models.tiger import (
    TEMPLATE,
    Collator,
    NextItemTrainer,
    TigerConfig,
    add_dropout,
    last_whole_step,
    sequences_of,
    train_tiger,
)
from recllm.prompting import PromptStyle

SMALL = {"width": 64, "layers": 1, "epochs": 2, "batch": 8, "validation_users": 20, "beams": 5, "bf16": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("tiger"), users=60)


@pytest.fixture(scope="module")
def trained(folders):
    return train_tiger(TigerConfig(data=str(folders[0]), output=str(folders[0].parent / "tiger"), **SMALL))


def test_the_result_is_a_checkpoint_that_recommends(trained):
    AutoModelForCausalLM.from_pretrained(trained)
    recommender = Recommender.from_pretrained(trained)
    assert len(recommender.recommend(["i1", "i2"], k=5)) == 5
    assert recommender.checkpoint.style == PromptStyle(template=TEMPLATE)
    report = json.loads((trained / "recllm.json").read_text())
    assert len(report["tiger"]["validation"]) == 2
    assert not list(trained.parent.glob("tiger.work*"))


def test_training_changes_the_weights(trained, folders):
    start = Checkpoint.load(folders[1]).model.state_dict()
    assert set(start) >= set(Checkpoint.load(trained).model.state_dict())
    model = Checkpoint.load(trained).model
    spread = model.get_input_embeddings().weight[Checkpoint.load(trained).tokens.levels[0]].std(0).mean()
    assert spread > 0.005


def test_trained_again_it_returns_at_once_and_other_settings_are_refused(trained, folders):
    before = (trained / "model.safetensors").stat().st_mtime_ns
    config = {"data": str(folders[0]), "output": str(trained), **SMALL}
    assert train_tiger(TigerConfig(**config)) == trained
    assert (trained / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another model"):
        train_tiger(TigerConfig(**config | {"lr": 1e-4}))
    assert train_tiger(TigerConfig(**config)) == trained  # and the refusal leaves nothing in the way


def test_killed_after_an_epoch_it_goes_on_to_the_same_weights(trained, folders, tmp_path, monkeypatch):
    config = TigerConfig(data=str(folders[0]), output=str(tmp_path / "tiger"), **SMALL)
    evaluate, seen = NextItemTrainer.evaluate, []

    def stop_in_the_second(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(NextItemTrainer, "evaluate", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_tiger(config)
    assert not (tmp_path / "tiger").exists()
    monkeypatch.setattr(NextItemTrainer, "evaluate", evaluate)
    train_tiger(config)
    resumed = Checkpoint.load(tmp_path / "tiger").model.state_dict()
    for name, tensor in Checkpoint.load(trained).model.state_dict().items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_run_of_other_settings_is_never_gone_on_from(trained, folders, tmp_path, monkeypatch):
    evaluate = NextItemTrainer.evaluate

    def stop_in_the_second(self, *args, **kwargs):
        if self.state.epoch > 1.5:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(NextItemTrainer, "evaluate", stop_in_the_second)
    other = {"data": str(folders[0]), "output": str(tmp_path / "tiger"), **SMALL, "lr": 1e-2}
    with pytest.raises(KeyboardInterrupt):
        train_tiger(TigerConfig(**other))
    monkeypatch.setattr(NextItemTrainer, "evaluate", evaluate)
    train_tiger(TigerConfig(**other | {"lr": TigerConfig.lr}))
    clean = Checkpoint.load(trained).model.state_dict()
    for name, tensor in Checkpoint.load(tmp_path / "tiger").model.state_dict().items():
        assert torch.equal(tensor, clean[name]), name


def test_a_step_that_was_cut_off_is_not_gone_on_from(tmp_path):
    for step, whole in ((30, "{}"), (60, "{}"), (90, None), (120, '{"epo')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if whole is not None:
            (folder / "trainer_state.json").write_text(whole)
    assert last_whole_step(tmp_path) == str(tmp_path / "checkpoint-60")
    assert not (tmp_path / "checkpoint-90").exists()
    assert not (tmp_path / "checkpoint-120").exists()
    assert last_whole_step(tmp_path / "nothing") is None


def test_no_sequence_holds_a_validation_or_test_target(folders):
    catalogue, checkpoint = Catalogue.load(folders[0]), Checkpoint.load(folders[1])
    style = PromptStyle(template=TEMPLATE, max_history=50)
    sequences = sequences_of(catalogue, checkpoint, style)
    histories = dict(catalogue.training_sequences().select("user", "items").iter_rows())
    assert sequences == checkpoint.writer_of(style).ids(list(histories.values()))
    held = catalogue.interactions.filter(pl.col("split").is_in(["valid", "test"]))
    assert all(len(items) == len(catalogue.interactions.filter(pl.col("user") == user)) - 2
               for user, items in histories.items())  # fmt: skip
    assert len(held) == 2 * len(histories)


def test_long_sequences_come_in_pieces_that_lose_nothing(folders):
    catalogue, checkpoint = Catalogue.load(folders[0]), Checkpoint.load(folders[1])
    whole = sequences_of(catalogue, checkpoint, PromptStyle(template=TEMPLATE, max_history=50))
    pieces = sequences_of(catalogue, checkpoint, PromptStyle(template=TEMPLATE, max_history=1))
    assert max(map(len, pieces)) <= 1 + 2 * 2
    assert sum(len(ids) - 1 for ids in pieces) == sum(len(ids) - 1 for ids in whole)


def test_padding_is_no_target():
    batch = Collator(0.0, torch.tensor([2]))([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]


def test_item_dropout_leaves_out_whole_items():
    thin, seen = Collator(0.4, torch.tensor([10, 11])), set()
    torch.manual_seed(0)
    for _ in range(100):
        ids = thin.thinned(torch.tensor([1, 10, 5, 11, 6, 10, 7])).tolist()
        assert ids[0] == 1
        pairs = [tuple(ids[at : at + 2]) for at in range(1, len(ids), 2)]
        assert pairs == [pair for pair in [(10, 5), (11, 6), (10, 7)] if pair in pairs]
        seen.add(len(pairs))
    assert seen == {0, 1, 2, 3}


def test_dropout_acts_in_training_alone(folders):
    model, ids = Checkpoint.load(folders[1]).model, torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    add_dropout(model, 0.5)
    assert torch.equal(model.eval()(ids).logits, before)
    assert not torch.allclose(model.train()(ids).logits, before)


def test_fp32_attention_changes_nothing_but_its_precision(folders):
    model, ids = Checkpoint.load(folders[1]).model, torch.tensor([[1, 2, 3, 4]])
    before = model(ids).logits
    use_fp32_attention(model)
    torch.testing.assert_close(model(ids).logits, before)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids).logits
    assert np.allclose(rough.float().detach(), before.detach(), atol=0.05)


@pytest.mark.parametrize("settings", [{"dropout": 1.0}, {"lr": 0.0}, {"epochs": 0}, {"beams": 0}])
def test_bad_settings_fail_at_construction(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        TigerConfig(data="d", output="o", **settings)


def test_without_validation_targets_there_is_nothing_to_choose_by(tmp_path):
    from helpers import write_catalogue

    from recllm.semantic_ids import SemanticIdTable

    catalogue = write_catalogue(tmp_path, ["a", "b", "c"], {"u": ["a", "b", "c"]}, split="train")
    table = SemanticIdTable(("a", "b", "c"), np.array([[0], [1], [2]]), (4,))
    table.save(catalogue.folder / "semantic_ids.json")
    with pytest.raises(UserError, match="no validation target"):
        train_tiger(TigerConfig(data=str(tmp_path), output=str(tmp_path / "tiger"), **SMALL))
