"""The rule that keeps answers in the catalogue, without vLLM: all that it may write, and in HF `generate`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from recllm.errors import UserError
from recllm.models.tiny import TAGS, tiny_model, tiny_tokenizer
from recllm.rollouts import AnswerRule, AnswerSettings, CatalogueLogits, engine_arguments, keep_allowed
from recllm.semantic_ids import SemanticIdTable

CODES = [[0, 1, 2], [0, 1, 0], [1, -1, -1], [2, 0, -1], [2, 2, 1]]  # of three depths
TABLE = SemanticIdTable(tuple("pqrst"), np.array(CODES, np.int32), (3, 3, 3))


def tokenizer_of(table=TABLE, single_tags=True):
    tokenizer = tiny_tokenizer(["a cup of iron and <answer> tags"] * 3, 300)
    if not single_tags:  # as Qwen3's, to which <answer> is text
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=without_tags(tokenizer), eos_token="<|im_end|>")
    tokenizer.add_tokens(table.all_tokens())
    return tokenizer


def without_tags(tokenizer):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in TAGS]
    return Tokenizer.from_str(json.dumps(content))


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def everything(rule, written):
    """All continuations that the rule allows, to the end token."""
    allowed = rule.allowed_next(written)
    assert allowed is not None
    for id in allowed.tolist():
        yield from [[id]] if id == rule.eos else ([id, *rest] for rest in everything(rule, [*written, id]))


@pytest.mark.parametrize("single_tags", [True, False], ids=["one token a tag", "several tokens a tag"])
@pytest.mark.parametrize("chain", ["", "<think>hm</think>", "why? ", "old: <answer><|a_0|><|b_1|><|c_2|></answer>\n"])
def test_after_the_tag_the_answers_are_the_catalogue_and_nothing_else(single_tags, chain):
    tokenizer = tokenizer_of(single_tags=single_tags)
    rule = AnswerRule.of(tokenizer, TABLE, "<answer>", "</answer>")
    start = encode(tokenizer, chain + "<answer>")
    assert (len(encode(tokenizer, "<answer>")) == 1) == single_tags
    answers = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in everything(rule, start)]
    assert sorted(answers) == sorted(f"{TABLE.text_of(item)}</answer><|im_end|>" for item in TABLE.items)


def test_before_the_tag_anything_may_be_written():
    tokenizer = tokenizer_of()
    rule = AnswerRule.of(tokenizer, TABLE, "<answer>", "</answer>")
    free = [
        "",
        "a cup",
        "<think>",
        "<answer>a",
        "x<|a_0|>",
        "<|a_0|><|b_1|>",
        "<answer><|b_1|>",
        "</answer>",
        "<answer",
    ]
    free += ["<answer><|a_0|> <|b_1|>", "<answer><|a_0|></answer> so"]
    for text in free:
        assert rule.allowed_next(encode(tokenizer, text)) is None, text


def test_without_an_opening_the_first_token_is_a_code():
    tokenizer = tokenizer_of()
    expected = sorted(f"{TABLE.text_of(item)}<|im_end|>" for item in TABLE.items)
    for rule in (AnswerRule.of(tokenizer, TABLE), AnswerRule.of(tokenizer, TABLE, "<answer>", "</answer>").direct):
        assert sorted("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in everything(rule, [])) == expected
        finished = encode(tokenizer, TABLE.text_of("r"))
        assert rule.allowed_next([*finished, rule.eos]).tolist() == [rule.eos]  # an engine told to ignore the end


def test_the_tail_is_enough_and_a_dead_end_is_closed():
    tokenizer = tokenizer_of(single_tags=False)
    rule = AnswerRule.of(tokenizer, TABLE, "<answer>", "</answer>")
    for end in ("<answer>", "<answer><|a_2|>", "<answer><|a_1|>", "<answer><|a_1|></", "<answer><|a_0|><|b_1|><|c_2|>"):
        ids = encode(tokenizer, "a cup of <answer> iron " + end)
        assert torch.equal(rule.allowed_next(ids), rule.allowed_next(ids[-rule.reach :])), end
    nobody = encode(tokenizer, "<answer><|a_0|><|b_0|>")  # can only stand in a prompt
    assert rule.allowed_next(nobody).tolist() == list(rule.closing[:1])


def test_a_space_that_melts_into_the_tag_does_not_hide_it():
    tokenizer = tokenizer_of(single_tags=False)
    rule = AnswerRule.of(tokenizer, TABLE, "<answer>", "")
    spaced = encode(tokenizer, "so <answer>")
    assert spaced[-len(rule.openings[0]) :] != list(rule.openings[0])  # " <" is one token
    assert rule.allowed_next(spaced).tolist() == [tokenizer.convert_tokens_to_ids(f"<|a_{code}|>") for code in range(3)]


def test_masked_logits():
    logits = torch.arange(12.0).reshape(3, 4)
    kept = keep_allowed(logits.clone(), {0: torch.tensor([1, 3]), 2: torch.tensor([2])})
    inf = torch.inf
    assert kept.tolist() == [[-inf, 1, -inf, 3], [4, 5, 6, 7], [-inf, -inf, 0, -inf]]
    assert keep_allowed(logits.clone(), {}).equal(logits)


def test_every_answer_of_generate_is_an_item_of_the_catalogue():
    tokenizer = tokenizer_of()
    model = tiny_model(len(tokenizer), 64, 1)
    rule = AnswerRule.of(tokenizer, TABLE, "<answer>", "</answer>")
    chains = ["<|im_start|>a cup<answer>", "<|im_start|>iron<answer>"]
    for used, prompts in ((rule, chains), (rule.direct, ["history <|a_0|><|b_1|><|c_2|>", "a <|a_2|><|b_0|>"])):
        tokenizer.padding_side = "left"
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        length = batch["input_ids"].size(1)
        torch.manual_seed(0)
        written = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, top_k=0,
            num_return_sequences=30, max_new_tokens=8, logits_processor=[CatalogueLogits(used, length)],
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers = {text.replace("<|endoftext|>", "") for text in tokenizer.batch_decode(written[:, length:])}
        end = "</answer><|im_end|>" if used is rule else "<|im_end|>"
        assert answers == {TABLE.text_of(item) + end for item in TABLE.items}


def checkpoint(folder, table=TABLE, tokens=TABLE):
    tokenizer_of(tokens).save_pretrained(folder)
    table.save(folder / "semantic_ids.json")
    return folder


def test_settings_for_an_engine(tmp_path):
    made = engine_arguments(checkpoint(tmp_path), mode="direct")
    assert made["model"] == str(tmp_path)
    assert made["additional_config"]["recllm"]["mode"] == "direct"
    settings = AnswerSettings.from_dict(made["additional_config"]["recllm"], folder=made["model"])
    assert settings == AnswerSettings(str(tmp_path), mode="direct")
    assert sum(1 for _ in everything(settings.rule().direct, [])) == len(TABLE)


def test_bad_input_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"semantic_ids.json: the checkpoint's index does not exist. Fix: give a check"):
        engine_arguments(tmp_path)
    with pytest.raises(UserError, match=r"no semantic_ids.json can be had from 'nobody/nothing'"):
        engine_arguments("nobody/nothing")
    bigger = SemanticIdTable(("x", "y"), np.array([[0, 0], [4, 1]], np.int32), (5, 3))
    with pytest.raises(UserError, match="vocabulary lacks 2 of the index's 8 tokens"):
        engine_arguments(checkpoint(tmp_path / "other", table=bigger))
    with pytest.raises(UserError, match="mode 'slow' is not one of reason, direct, free"):
        engine_arguments(tmp_path, mode="slow")
    with pytest.raises(UserError, match="opening must be text"):
        engine_arguments(tmp_path, opening=7)
    with pytest.raises(UserError, match=r"holds no setting 'open'\. Fix: give some of folder, mode, opening, closing"):
        AnswerSettings.from_dict({"open": "x"}, "here")


def test_a_tag_that_is_no_token_and_an_end_that_is_none():
    letters = Tokenizer(models.BPE({"c": 0, "<end>": 1}, []))  # every other letter vanishes
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>")
    tokenizer.add_tokens(TABLE.all_tokens())
    with pytest.raises(UserError, match="encodes the opening tag '<ANSWER>' to nothing"):
        AnswerRule.of(tokenizer, TABLE, "<ANSWER>")
    with pytest.raises(UserError, match="encodes the closing tag '</ANSWER>' to nothing"):
        AnswerRule.of(tokenizer, TABLE, "c", "</ANSWER>")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        AnswerRule.of(tokenizer, TABLE, "c")


def test_it_needs_no_vllm():
    code = "import sys, recllm.rollouts; print(sorted(name for name in sys.modules if name.split('.')[0] == 'vllm'))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert imported.stdout.strip() == "[]", imported.stderr
