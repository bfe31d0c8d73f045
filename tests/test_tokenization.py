"""Tokens into tokenizers and models. A public tokenizer is used where $RECLLM_DATA holds one; a tiny BPE otherwise."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from recllm.errors import UserError
from recllm.models.tiny import tiny_model, tiny_tokenizer
from recllm.semantic_ids import SemanticIdTable
from recllm.tokenization import ItemTokens, add_tokens, behaviour_token, cluster_means, initialise, resize

TEXTS = {"cup": "a blue cup", "mug": "a red mug", "pan": "an iron pan"}
QWEN3 = Path(os.environ.get("RECLLM_DATA", "nowhere")) / "qwen3-tokenizer"


def table(pattern: str = "<|{level}_{code}|>") -> SemanticIdTable:
    """cup and mug share their first code; pan has a deeper tuple than they have."""
    codes = np.array([[0, 1, -1], [0, 2, -1], [3, 1, 0]], np.int32)
    return SemanticIdTable(tuple(TEXTS), codes, (4, 3, 1), pattern)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(TEXTS.values(), vocabulary=300)


@pytest.fixture(params=["tied", "untied"])
def model(request, tokenizer):
    return tiny_model(len(tokenizer), width=64, layers=1, tied=request.param == "tied")


# ---- tokenizer


@pytest.mark.parametrize("pattern", ["<|{level}_{code}|>", "<{level}_{code}>"])
def test_an_item_is_one_token_a_level_and_survives_decoding(tokenizer, pattern):
    ids = table(pattern)
    add_tokens(tokenizer, ids.all_tokens())
    items = ItemTokens.of(tokenizer, ids)
    for item in TEXTS:
        text = ids.text_of(item)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == items.ids_of(item)
        assert tokenizer.decode(items.ids_of(item), skip_special_tokens=True) == text
        assert ids.parse(f"so <answer>{text}</answer>.") == [ids.codes_of(item)]
    mixed = f"I like {ids.text_of('pan')} and\n{ids.text_of('cup')}!"
    assert tokenizer.decode(tokenizer(mixed, add_special_tokens=False)["input_ids"], skip_special_tokens=True) == mixed


def test_added_twice_is_added_once(tokenizer):
    first = add_tokens(tokenizer, table().all_tokens())
    size = len(tokenizer)
    assert add_tokens(tokenizer, table().all_tokens()) == first
    assert len(tokenizer) == size


def test_codes_and_ids_are_inverse_and_foreign_ids_are_minus_one(tokenizer):
    add_tokens(tokenizer, table().all_tokens()[::-1])  # ids in another order than codes
    items = ItemTokens.of(tokenizer, table())
    for level, ids in enumerate(items.levels):
        assert items.codes_of_ids(ids, level).tolist() == list(range(len(ids)))
        foreign = torch.tensor([[0, int(items.levels[(level + 1) % 3][0])]])
        assert items.codes_of_ids(foreign, level).tolist() == [[-1, -1]]


def test_a_tokenizer_without_the_index_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"lacks 8 of the index's 8 tokens, '<\|a_0\|>' first"):
        ItemTokens.of(tokenizer, table())


def test_one_token_for_two_things_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"'<\|a_1\|>' would stand for two things"):
        add_tokens(tokenizer, [*table().all_tokens(), behaviour_token("a_1")])
    with pytest.raises(UserError, match="would stand for two things"):
        add_tokens(tokenizer, [behaviour_token("add to cart"), behaviour_token("add_to_cart")])


def test_a_behaviour_that_is_a_chat_marker_is_refused(tokenizer):
    with pytest.raises(UserError, match="is a special token"):
        add_tokens(tokenizer, [behaviour_token("im_end")])


# ---- model


def test_rows_are_a_multiple_of_64_and_never_fewer(tokenizer, model):
    add_tokens(tokenizer, table().all_tokens())
    assert resize(model, tokenizer) == 320  # 300 + 4 tags + 8 tokens of the index → 5 × 64
    assert model.get_output_embeddings().weight.shape == (320, 64)
    big = Qwen3ForCausalLM(Qwen3Config(**model.config.to_dict() | {"vocab_size": 640}))
    assert resize(big, tokenizer) == 640


@pytest.mark.parametrize("method", ["cluster", "mean", "random"])
def test_old_rows_stay_and_new_ones_are_where_they_should_be(tokenizer, model, method):
    new = add_tokens(tokenizer, table().all_tokens())
    resize(model, tokenizer)
    matrices = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    before = [matrix.detach().clone() for matrix in matrices]
    initialise(model, tokenizer, new, method, ItemTokens.of(tokenizer, table()), TEXTS)
    first = min(new)
    for matrix, old in zip(matrices, before):
        torch.testing.assert_close(matrix[:first], old[:first], rtol=0, atol=0)
        trained, fresh = old[:first], matrix[new].detach()
        assert len({tuple(row.tolist()) for row in fresh}) == len(new), "no two rows are equal"
        spread = (fresh - trained.mean(0)).norm(dim=1) / trained.std(0).norm()
        if method == "random":
            assert 0.6 < spread.mean() < 1.4
        if method == "mean":
            assert spread.max() < 0.05


def test_a_cluster_row_is_the_mean_of_its_members_texts(tokenizer, model):
    new = add_tokens(tokenizer, table().all_tokens())
    resize(model, tokenizer)
    items = ItemTokens.of(tokenizer, table())
    initialise(model, tokenizer, new, "cluster", items, TEXTS)
    weight = model.get_input_embeddings().weight.detach()

    def text_mean(item):
        return weight[tokenizer(TEXTS[item], add_special_tokens=False)["input_ids"]].mean(0)

    noise = 0.05 * weight[: min(new)].std(0).norm()
    a_0, b_1 = weight[items.levels[0][0]], weight[items.levels[1][1]]
    assert (a_0 - (text_mean("cup") + text_mean("mug")) / 2).norm() < noise  # cup and mug begin with a_0
    assert (b_1 - (text_mean("cup") + text_mean("pan")) / 2).norm() < noise  # cup and pan have b_1
    a_2 = weight[items.levels[0][2]]  # nobody's
    assert (a_2 - weight[: min(new)].mean(0)).norm() < noise


@pytest.mark.parametrize("at_once", [1, 2, 4096])
def test_cluster_means_name_used_codes_only_however_many_items_at_once(tokenizer, monkeypatch, at_once):
    monkeypatch.setattr("recllm.tokenization.ITEMS_AT_ONCE", at_once)
    add_tokens(tokenizer, table().all_tokens())
    items = ItemTokens.of(tokenizer, table())
    one_for_each = torch.eye(len(tokenizer))
    ids, [rows] = cluster_means([one_for_each], tokenizer, items, TEXTS)
    used = [items.levels[0][0], items.levels[0][3], items.levels[1][1], items.levels[1][2], items.levels[2][0]]
    assert ids.tolist() == sorted(map(int, used))
    torch.testing.assert_close(rows.sum(1), torch.ones(len(ids)))  # shares of text tokens
    a_0 = rows[ids.tolist().index(int(items.levels[0][0]))]
    cup, mug = (tokenizer(TEXTS[item], add_special_tokens=False)["input_ids"] for item in ("cup", "mug"))
    expected = torch.zeros(len(tokenizer))
    for text in (cup, mug):
        for id in text:
            expected[id] += 1 / len(text) / 2
    torch.testing.assert_close(a_0, expected)


def test_plain_auto_classes_load_the_same_ids_and_logits(tmp_path, tokenizer, model):
    new = add_tokens(tokenizer, [*table().all_tokens(), behaviour_token("pay")])
    resize(model, tokenizer)
    initialise(model, tokenizer, new, "mean")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = f"<|im_start|>user\nwhat next?<|im_end|>\n<|pay|>{table().text_of('pan')}"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    again = AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt")["input_ids"]
    assert again.tolist() == ids.tolist()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


# ---- the real Qwen3 tokenizer


@pytest.mark.data
def test_round_trips_with_the_real_qwen3_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(QWEN3)
    size = len(tokenizer)
    codes = np.stack(np.unravel_index(np.arange(1000) * 7919 % 256**4, (256,) * 4), 1).astype(np.int32)
    ids = SemanticIdTable(tuple(map(str, range(1000))), codes, (256,) * 4)
    new = add_tokens(tokenizer, [*ids.all_tokens(), behaviour_token("pay")])
    assert (min(new), max(new)) == (size, size + 1024)
    items = ItemTokens.of(tokenizer, ids)
    for item in ids.items[::37]:
        text = f"<think>\nStep 1: naïve – 3×4 {ids.text_of(item)}\n</think>\n<answer>{ids.text_of(item)}</answer>"
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(encoded, skip_special_tokens=True) == text
        assert [id for id in encoded if id >= size] == items.ids_of(item) * 2
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=True,
        )
    )
    assert resize(model, tokenizer) == 152704  # 151,669 + 1,025 = 152,694 → 2,386 × 64
    initialise(model, tokenizer, new, "cluster", items, {item: f"item number {item}" for item in ids.items})
    assert torch.isfinite(model.get_input_embeddings().weight).all()
