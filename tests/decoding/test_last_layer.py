"""The prompt's pass without what nobody reads: the same states where they are read, the same keys and values, less
computed."""

import pytest
import torch
from other_models import OTHERS, attend_by_lengths
from reference import shaken, some_model, some_prompts
from transformers import DynamicCache

from recllm.decoding.body import backbone
from recllm.decoding.branches import prefill
from recllm.decoding.last_layer import states_at
from recllm.decoding.prompts import PromptBatch


def eager():
    model = some_model()
    model.set_attn_implementation("eager")
    return model


MODELS = {
    "qwen3": some_model,
    "qwen3, eager": eager,
    **{name: lambda make=make: shaken(make()) for name, make in OTHERS.items()},
}
LEFT_ALONE = ("gpt2", "mistral with a window", "gemma2 with soft caps")
COUNT_PADDING = ("mistral with a window", "gemma2 with soft caps")  # in their windows: there only full rows are exact
READ = {"the end": lambda length: [], "some": lambda length: sorted({0, length // 2, length - 1})}


def made(name: str):
    torch.manual_seed(0)
    return MODELS[name]()


@torch.no_grad()
@pytest.mark.parametrize("prompts_a_pass", [1, 2, 512])
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("shared", [(), (5,), (5, 6, 7)])
@pytest.mark.parametrize("lengths", [(1, 5, 9), (7, 7), (1,)])
@pytest.mark.parametrize("name", MODELS)
def test_states_and_cache_are_those_of_the_whole_pass(name, lengths, shared, read, prompts_a_pass, monkeypatch):
    """Each prompt by itself through the stock model, beside all of them in one batch."""
    monkeypatch.setattr("recllm.decoding.branches.prompts_in_a_pass", lambda *_: prompts_a_pass)
    model, prompts = made(name), [[*shared, *prompt] for prompt in some_prompts(0, lengths)]
    asked = [[len(shared) + place for place in READ[read](length)] for length in lengths]
    ours, seen, states = prefill(model, PromptBatch.of(prompts, shared, read=asked))
    assert states.shape[1] == max(map(len, asked)) + 1
    for row, (prompt, places) in enumerate(zip(prompts, asked)):
        whole = DynamicCache(config=model.config)
        alone = backbone(model)(input_ids=torch.tensor([prompt]), past_key_values=whole, use_cache=True)
        expected = alone.last_hidden_state[0, [*places, -1]]
        found = torch.cat([states[row, : len(places)], states[row, -1:]])
        if name in COUNT_PADDING and not bool(seen[row].all()):
            continue
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for one, other in zip(ours.layers, whole.layers):
            for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
                own = mine[row, :, seen[row, -mine.size(2) :]]  # a window keeps the last ones
                torch.testing.assert_close(own, theirs[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_computes_what_is_read(name):
    model, positions = made(name), []
    prompts = some_prompts(0, (9, 4))
    for read in (None, [[2, 5], [1]]):
        prefill(model, PromptBatch.of(prompts, read=read))  # tries whether it can
    last = (model.model.layers if name != "gpt2" else model.transformer.h)[-1]
    last.mlp.register_forward_pre_hook(lambda _, given: positions.append(given[0].size(1)))
    for read in (None, [[2, 5], [1]]):
        prefill(model, PromptBatch.of(prompts, read=read))
    assert positions == ([9, 9] if name in LEFT_ALONE else [1, 3])


@torch.no_grad()
def test_a_prompt_without_anything_to_read_stands_beside_others():
    model, prompts = some_model(), some_prompts(0, (6, 3))
    states = prefill(model, PromptBatch.of(prompts, read=[[0, 4], []]))[2]
    plain = prefill(model, PromptBatch.of(prompts))[2]
    torch.testing.assert_close(states[:, -1:], plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[1, :2], plain[[1, 1], 0], atol=1e-5, rtol=1e-5)  # filled up with its end


@torch.no_grad()
@pytest.mark.parametrize("before", ["sdpa", "by lengths"])
@pytest.mark.parametrize("lengths", [(9, 4), (7, 7)])
def test_an_attention_that_takes_no_mask_is_not_given_one_whatever_was_tried_before(lengths, before):
    model, prompts = some_model(), some_prompts(0, lengths)
    expected = prefill(model, PromptBatch.of(prompts, read=[[2, 3], [1]]))[2]
    model = some_model() if before == "by lengths" else model
    attend_by_lengths(model)
    found = prefill(model, PromptBatch.of(prompts, read=[[2, 3], [1]]))[2]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_layer_that_is_left_out_needs_no_cache():
    model = some_model()
    model.model.layers = model.model.layers[:1]  # the config still says two
    prompts = some_prompts(0, (9, 4))
    states = prefill(model, PromptBatch.of(prompts))[2]
    alone = [model.model(input_ids=torch.tensor([prompt])).last_hidden_state[:, -1] for prompt in prompts]
    torch.testing.assert_close(states[:, -1], torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 2, 7])
def test_what_is_read_stands_in_the_prompt_behind_the_prefix(place):
    with pytest.raises(ValueError, match="prompt 1: a token that is read"):
        PromptBatch.of([[5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 3, 4]], (5, 6, 7), read=[[3], [place]])


@torch.no_grad()
def test_nothing_stays_behind():
    model, ids = some_model(), torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    prefill(model, PromptBatch.of([[5, 6, 7]], read=[[1]]))  # tries whether it can
    handle = model.model.layers[0].register_forward_pre_hook(_interrupted)
    with pytest.raises(KeyboardInterrupt):
        states_at(model, torch.tensor([[1, 2]]), ids, DynamicCache(config=model.config))
    handle.remove()
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def _interrupted(*_):
    raise KeyboardInterrupt


@torch.no_grad()
def test_a_layer_that_does_otherwise_is_left_alone():
    """Found out by trying, not by its class's name: these keys are scaled."""
    model, positions = some_model(), []
    attention = model.model.layers[-1].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **others: forward(hidden_states=3 * hidden_states, **others)
    batch = PromptBatch.of(some_prompts(0, (9, 4)), read=[[3], [1]])
    prefill(model, batch)
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: positions.append(given[0].size(1)))
    states = prefill(model, batch)[2]
    assert positions == [9]
    assert states.shape[1] == 2
