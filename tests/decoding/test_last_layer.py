"""The prompt's pass without what nobody reads: the same last state, the same keys and values, less computed."""

import pytest
import torch
from other_models import OTHERS
from reference import shaken, some_model, some_prompts

from recllm.decoding.branches import prefill
from recllm.decoding.last_layer import only_the_last_state
from recllm.decoding.prompts import PromptBatch

MODELS = {"qwen3": some_model, **{name: lambda make=make: shaken(make()) for name, make in OTHERS.items()}}
LEFT_ALONE = ("gpt2", "mistral with a window", "gemma2 with soft caps")


def made(name: str):
    torch.manual_seed(0)
    return MODELS[name]()


@torch.no_grad()
@pytest.mark.parametrize("shared", [(), (5,), (5, 6, 7)])
@pytest.mark.parametrize("lengths", [(1, 5, 9), (7, 7), (1,)])
@pytest.mark.parametrize("name", MODELS)
def test_the_last_state_and_the_cache_are_those_of_the_whole_pass(name, lengths, shared):
    model, prompts = made(name), [[*shared, *prompt] for prompt in some_prompts(0, lengths)]
    batch = PromptBatch.of(prompts, shared)
    whole, seen, states = prefill(model, batch, states=True)
    ours, also_seen, last = prefill(model, batch)
    assert states.shape[1] == max(lengths)
    torch.testing.assert_close(last[:, -1], states[:, -1], atol=1e-5, rtol=1e-5)
    assert torch.equal(seen, also_seen)
    for one, other in zip(ours.layers, whole.layers):
        for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
            shown = seen[:, None, -theirs.size(2) :, None]  # a window keeps the last ones
            torch.testing.assert_close(
                mine.masked_fill(~shown, 0), theirs.masked_fill(~shown, 0), atol=1e-5, rtol=1e-5
            )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_computes_one_position_of_a_prompt(name):
    model, positions = made(name), []
    last = (model.model.layers if name != "gpt2" else model.transformer.h)[-1]
    prefill(model, PromptBatch.of(some_prompts(0, (3,))))  # tries whether it can
    last.mlp.register_forward_pre_hook(lambda _, given: positions.append(given[0].size(1)))
    prefill(model, PromptBatch.of(some_prompts(0, (9, 4))))
    assert positions == [9 if name in LEFT_ALONE else 1]


@torch.no_grad()
def test_nothing_stays_behind():
    model, ids = some_model(), torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with pytest.raises(KeyboardInterrupt), only_the_last_state(model):
        raise KeyboardInterrupt
    torch.testing.assert_close(model(input_ids=ids).logits, before)


@torch.no_grad()
def test_a_layer_that_does_otherwise_is_left_alone():
    """Found out by trying, not by its class's name: these keys are scaled."""
    model = some_model()
    attention = model.model.layers[-1].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **others: forward(hidden_states=3 * hidden_states, **others)
    batch = PromptBatch.of(some_prompts(0, (9, 4)))
    assert prefill(model, batch)[2].shape[1] == 9
