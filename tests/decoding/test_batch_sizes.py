"""How many prompts are computed at once: what a pass holds stays near the processor's caches."""

import pytest
import torch
from reference import LEVELS, SIZES, some_codes, some_model, some_prompts

from recllm.decoding import Decoder
from recllm.decoding.branches import TreeBranches, branches_of
from recllm.decoding.memory import PASS_BYTES, prompts_in_a_pass
from recllm.decoding.prefixed import Choice, PrefixedDecoder, Shown
from recllm.decoding.prompts import PromptBatch
from recllm.trie import SemanticIdTrie


def test_passes_are_even_and_their_activations_as_wide_as_said():
    model, widths = some_model(), []
    for module in model.model.layers[0].modules():
        module.register_forward_hook(
            lambda *given: widths.append(given[-1].nbytes) if torch.is_tensor(given[-1]) else None
        )
    batch = PromptBatch.of(some_prompts(0, (200,) * 120))
    TreeBranches(model, batch)  # tries the model out
    widths.clear()
    TreeBranches(model, batch)
    assert PASS_BYTES / 2 < max(widths) <= PASS_BYTES
    assert prompts_in_a_pass(model, 120, 200) == 40  # of at most 54
    assert prompts_in_a_pass(model, 7, 200) == 7
    assert prompts_in_a_pass(model, 7, 10**7) == 1


SEARCHES = {
    "beams": lambda decoder, prompts: decoder.beams(prompts, 4),
    "more beams than items": lambda decoder, prompts: decoder.beams(prompts, 10**6),
    "samples": lambda decoder, prompts: decoder.samples(prompts, 7),
    "more samples than items": lambda decoder, prompts: decoder.samples(prompts, 300),
    "different samples": lambda decoder, prompts: decoder.samples(prompts, 7, replacement=False),
    "behind a prefix": lambda decoder, prompts: PrefixedDecoder(decoder, 9, most_recent, 2).beams(
        prompts, [Shown([1, 3], [0, 1])] * len(prompts), 5
    ),
}


def most_recent(history):
    return Choice(torch.tensor([[0, 1]] * len(history.mask)))


@pytest.mark.parametrize("search", SEARCHES)
def test_what_is_said_is_written_beside_the_prompt_and_no_key_is_copied(search, monkeypatch):
    """The cache has room for all of it from the start, and for not much more than there are items."""
    codes, caches = some_codes(), []

    def watched(*given):
        branches = branches_of(*given)
        caches.append((branches.cache.layers[0], branches.cache.layers[0].keys.data_ptr()))
        return branches

    monkeypatch.setattr("recllm.decoding.decoder.branches_of", watched)
    decoder = Decoder(some_model(), LEVELS, SemanticIdTrie.from_codes(codes, SIZES))
    SEARCHES[search](decoder, some_prompts(0, (9, 4)))
    for layer, before in caches:
        assert layer.keys.data_ptr() == before
        assert layer.keys.size(2) > 9
        assert layer.room[0].size(2) <= 9 + 3 * (300 if "more samples" in search else len(codes))


@torch.no_grad()
def test_what_is_put_behind_prompts_computes_its_end_alone_in_the_last_layer():
    model, positions = some_model(), []
    branches = TreeBranches(model, PromptBatch.of(some_prompts(0, (9, 4))))
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: positions.append(given[0].size(1)))
    branches.extend(torch.tensor([[5, 6, 7], [0, 5, 6]]), torch.tensor([[1, 1, 1], [0, 1, 1]]).bool())
    assert positions == [1]


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
