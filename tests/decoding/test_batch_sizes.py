"""How many prompts are computed at once: what a pass holds stays near the processor's caches."""

import pytest
import torch
from reference import LEVELS, SIZES, some_codes, some_model, some_prompts

from recllm.decoding import Decoder
from recllm.decoding.memory import PASS_BYTES, prompts_in_a_pass
from recllm.trie import SemanticIdTrie


@pytest.mark.parametrize("tokens", [1, 50, 4_000, 10**7])
def test_no_activation_of_a_pass_is_wider_than_said_and_one_prompt_is_computed_always(tokens):
    model = some_model()
    size = prompts_in_a_pass(model, tokens)
    one = model.config.intermediate_size * tokens * 4
    assert size == 1 or size * one <= PASS_BYTES < (size + 1) * one


@pytest.mark.parametrize("normaliser", ["full", "level", "children"])
def test_a_batch_in_several_passes_finds_what_one_pass_finds(normaliser, monkeypatch):
    model, prompts = some_model(), some_prompts(3, (3, 12, 1, 7, 5, 2, 9))
    decoder = Decoder(model, LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES), normaliser=normaliser)
    whole, passes = decoder.beams(prompts, 10), []
    monkeypatch.setattr("recllm.decoding.branches.prompts_in_a_pass", lambda *_: 3)
    model.model.layers[0].register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    found = decoder.beams(prompts, 10)
    assert passes[:3] == [3, 3, 1]
    assert set(passes[3:]) == {7}  # the steps are of all
    assert torch.equal(found.rows, whole.rows)
    torch.testing.assert_close(found.scores, whole.scores)
