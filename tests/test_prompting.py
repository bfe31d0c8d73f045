"""One place says how a history is written."""

import pytest
from helpers import write_small_model

from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.prompting import PromptStyle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint.load(write_small_model(tmp_path_factory.mktemp("prompts"))[1])


def test_a_prompt_is_the_template_with_the_items_tokens(checkpoint):
    style = PromptStyle(template="Took {history}, next:", separator=" ")
    writer = checkpoint.writer_of(style)
    (ids,) = writer.ids([["i1", "i6"]])
    assert checkpoint.tokenizer.decode(ids) == "Took <|a_0|><|b_1|> <|a_1|><|b_2|>, next:"
    item = checkpoint.tokens.ids_of("i6")
    assert any(ids[at : at + 2] == item for at in range(len(ids)))


def test_the_most_recent_items_are_kept(checkpoint):
    writer = checkpoint.writer_of(PromptStyle(template="{history}", max_history=2))
    assert writer.ids([["i1", "i2", "i3"]]) == writer.ids([["i2", "i3"]])


def test_the_prefix_is_what_all_prompts_begin_with(checkpoint):
    for chat in (False, True):
        writer = checkpoint.writer_of(PromptStyle(template="Some words: {history} and more", chat=chat))
        prompts = writer.ids([["i1"], ["i9", "i2"], ["i5", "i5", "i7"]])
        assert len(writer.prefix) > 3
        assert all(tuple(prompt[: len(writer.prefix)]) == writer.prefix for prompt in prompts)
        after = {prompt[len(writer.prefix)] for prompt in prompts}
        assert after <= set(checkpoint.tokens.levels[0].tolist())
    assert checkpoint.writer_of(PromptStyle(template="{history}")).prefix == ()


def test_chat_opens_the_assistants_turn(checkpoint):
    (ids,) = checkpoint.writer_of(PromptStyle(template="{history}", chat=True)).ids([["i1"]])
    text = checkpoint.tokenizer.decode(ids)
    assert text == "<|im_start|>user\n<|a_0|><|b_1|><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("history", "sentence"),
    [([], "the history is empty"), (["i1", "zz", "yy"], "no item 'zz' .and 1 more"), ("i1", "is a list of items")],
)
def test_bad_histories_are_one_sentence(checkpoint, history, sentence):
    with pytest.raises(UserError, match=sentence):
        checkpoint.writer.ids([["i1"], history])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"template": "no place"}, "has {history} once"), ({"max_history": 0}, "max_history must be at least 1")],
)
def test_bad_styles_fail_at_construction(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        PromptStyle(**settings)


def test_a_style_of_a_later_version_is_refused():
    assert PromptStyle.read(None) == PromptStyle()
    with pytest.raises(UserError, match="unknown here"):
        PromptStyle.read({"template": "{history}", "emoji": True})
