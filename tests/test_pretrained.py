"""Models and tokenizers that are whole are loaded; each way of being broken is one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from recllm.embeddings import HFEncoder
from recllm.errors import UserError
from recllm.models.tiny import tiny_model, tiny_tokenizer
from recllm.pretrained import load_causal_lm, load_tokenizer, which_model

TEXTS = ["red blue tea cup garden hose"] * 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny_tokenizer(TEXTS, 512)
    tiny_model(len(tokenizer), 64, 2, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def test_a_whole_model_is_loaded_with_its_weights_and_its_head_tied(folder):
    model, tokenizer = load_causal_lm(str(folder), torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"].bfloat16())
    assert tokenizer.decode(tokenizer("red cup").input_ids) == "red cup"
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


def without(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def changed(change):
    def break_it(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return break_it


def anothers_tokenizer(folder):
    config = Qwen3Config(**json.loads((folder / "config.json").read_text()) | {"vocab_size": 2000})
    Qwen3ForCausalLM(config).save_pretrained(folder)


def few_rows(folder):
    config = Qwen3Config(**json.loads((folder / "config.json").read_text()) | {"vocab_size": 200})
    Qwen3ForCausalLM(config).save_pretrained(folder)


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("load", [lambda name: load_causal_lm(name, "float32"), lambda name: HFEncoder(name)._parts])
@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (without("token*"), "has no tokenizer"),
        (without("tokenizer.json"), r"cannot be loaded \(tokenizer\)"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'), r"\(tokenizer\): KeyError: 'added_tokens'"),
        (lambda folder: (folder / "tokenizer.json").write_text("[1"), r"cannot be loaded \(tokenizer\)"),
        (truncated, r"tiny/model\.safetensors: not readable as safetensors"),
        (pickled, r"pytorch_model\.bin: weights stored as a pickle"),
        (without("*"), "holds no weights"),
        (without("config.json"), "cannot be loaded"),
        (changed(lambda tensors: tensors.pop(NORM)), r"lacks weights, such as .*layers\.0\.input_layernorm\.weight"),
        (changed(lambda tensors: tensors.update({NORM: torch.zeros(7)})), "cannot be loaded: RuntimeError"),
        (anothers_tokenizer, "tokens do not fit the 2,000 rows"),
        (few_rows, "tokens do not fit the 200 rows"),
    ],
)
def test_what_is_broken_is_one_sentence(folder, load, break_it, sentence):
    break_it(folder)
    with pytest.raises(UserError, match=sentence) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_a_causal_lm_whose_own_head_is_missing_is_refused(folder):
    config = Qwen3Config(**json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False})
    Qwen3ForCausalLM(config).save_pretrained(folder)
    changed(lambda tensors: tensors.pop("lm_head.weight"))(folder)
    with pytest.raises(UserError, match="lacks weights, such as lm_head"):
        load_causal_lm(str(folder), "float32")
    HFEncoder(str(folder)).encode(["red cup"])  # which reads no head


def test_the_name_of_a_folder_changes_with_what_lies_in_it(folder):
    before = which_model(str(folder))
    assert before.startswith("tiny@sha256:")
    assert which_model(str(folder)) == before
    changed(lambda tensors: tensors[NORM].add_(1))(folder)
    assert which_model(str(folder)) != before
    assert which_model("org/name", "abc") == "org/name@abc"
    assert which_model("org/name") == "org/name@main"
