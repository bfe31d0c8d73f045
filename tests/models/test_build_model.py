"""The stage that makes a checkpoint: complete, reproducible, and refusing what does not fit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import write_catalogue
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recllm.errors import UserError
from recllm.models.build import BuildModelConfig, build_model
from recllm.models.tiny import tiny_model, tiny_tokenizer
from recllm.semantic_ids import SemanticIdTable
from recllm.tokenization import ItemTokens

ITEMS = [{"item": name, "title": f"{name} of iron", "brand": "Nord"} for name in ("cup", "mug", "pan")]
SIZE = {"tiny_width": 64, "tiny_layers": 1, "tiny_vocabulary": 512}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    catalogue = write_catalogue(folder, ITEMS, {"u": [("cup", "click"), ("mug", "click"), ("pan", "pay")]})
    codes = np.array([[0, 0], [0, 1], [1, 0]], np.int32)
    SemanticIdTable(tuple(catalogue.item_ids), codes, (2, 2)).save(folder / "semantic_ids.json")
    return folder


def make(folder, tmp_path, **settings):
    return build_model(BuildModelConfig(**{"data": str(folder), "output": str(tmp_path / "model")} | SIZE | settings))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_complete_by_itself(data, tmp_path):
    folder = make(data, tmp_path, extra_tokens=["<|reflect_loc|>"])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    table = SemanticIdTable.load(folder / "semantic_ids.json")
    items = ItemTokens.of(tokenizer, table)
    assert all(len(items.ids_of(item)) == 2 for item in table.items)
    for token in ("<|click|>", "<|pay|>", "<|reflect_loc|>", "<think>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    assert model.get_input_embeddings().num_embeddings % 64 == 0
    assert json.loads((folder / "recllm.json").read_text())["semantic_ids"] == table.fingerprint
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_one_seed_gives_the_same_bytes_and_another_gives_others(data, tmp_path):
    first = content(make(data, tmp_path))
    assert content(make(data, tmp_path, output=str(tmp_path / "again"))) == first
    other = content(make(data, tmp_path, output=str(tmp_path / "other"), seed=1))
    assert other["model.safetensors"] != first["model.safetensors"]


def save_base(folder):
    """A model as others publish it: weights and tokenizer, no item tokens."""
    tokenizer = tiny_tokenizer([str(item) for item in ITEMS], vocabulary=400)
    tiny_model(len(tokenizer), width=64, layers=1, seed=7).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_published_model_keeps_its_rows_and_a_changed_one_is_made_again(data, tmp_path):
    base = save_base(tmp_path / "base")
    folder = make(data, tmp_path, model=str(base))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, folder))
    rows = len(before.get_input_embeddings().weight)
    assert torch.equal(after.get_input_embeddings().weight[:rows], before.get_input_embeddings().weight)
    assert torch.equal(after.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        before.model.layers[0].mlp.up_proj.weight += 1
    before.save_pretrained(base)
    with pytest.raises(UserError, match="holds another checkpoint"):
        make(data, tmp_path, model=str(base))


def test_a_model_that_holds_item_tokens_is_no_base(data, tmp_path):
    made = make(data, tmp_path)
    with pytest.raises(UserError, match="holds item tokens already"):
        make(data, tmp_path, model=str(made), output=str(tmp_path / "second"))


@pytest.mark.parametrize("harm", ["no tokenizer", "weights missing", "truncated"])
def test_a_broken_base_is_a_sentence(data, tmp_path, harm):
    base = save_base(tmp_path / "base")
    weights = base / "model.safetensors"
    if harm == "no tokenizer":
        for path in base.glob("*token*"):
            path.unlink()
    elif harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError):
        make(data, tmp_path, model=str(base))
    assert not (tmp_path / "model").exists()


def test_again_leaves_it_and_other_settings_need_overwrite(data, tmp_path):
    folder = make(data, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make(data, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="holds another checkpoint"):
        make(data, tmp_path, seed=1)
    make(data, tmp_path, seed=1, overwrite=True)


def test_a_catalogue_without_text_falls_back_to_the_mean(tmp_path):
    folder = tmp_path / "bare"
    catalogue = write_catalogue(folder, ["a", "b", "c"], {"u": ["a", "b", "c"]})
    codes = np.array([[0], [1], [2]], np.int32)
    SemanticIdTable(tuple(catalogue.item_ids), codes, (3,)).save(folder / "semantic_ids.json")
    assert json.loads((make(folder, tmp_path) / "recllm.json").read_text())["initialise"] == "mean"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "no/such-folder"}, "cannot be loaded"),
        ({"dtype": "float8"}, "is not one of float32"),
        ({"tiny_width": 100}, "multiple of 64"),
        ({"data": "nowhere"}, "does not exist"),
        ({"text_columns": ["titel"]}, "titel"),
        ({"output": "/proc/nothing"}, "cannot be written"),
    ],
)
def test_bad_settings_are_a_sentence(data, tmp_path, settings, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=sentence):
        make(data, tmp_path, **settings)
    assert not (tmp_path / "model").exists()


def test_an_index_of_another_catalogue_is_refused(data, tmp_path):
    codes = np.array([[0], [1]], np.int32)
    SemanticIdTable(("x", "y"), codes, (2,)).save(data / "semantic_ids.json")
    with pytest.raises(UserError, match="catalogue"):
        make(data, tmp_path)


def test_an_index_of_an_earlier_preparation_is_refused_unless_named(data, tmp_path):
    table = SemanticIdTable.load(data / "semantic_ids.json")
    replace(table, report={"made_from": {"catalogue": "an earlier one"}}).save(data / "semantic_ids.json")
    with pytest.raises(UserError, match="before the data were prepared anew"):
        make(data, tmp_path)
    assert make(data, tmp_path, semantic_ids=str(data / "semantic_ids.json")).exists()


def test_a_folder_of_something_else_is_never_replaced(data, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of ours"):
        make(data, tmp_path, output=str(data), overwrite=True)
    assert (data / "catalogue.json").exists()
