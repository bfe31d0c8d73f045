"""Prefix and beams over a prompt computed once against the same prompts written out whole."""

import numpy as np
import pytest
import torch
from reference import LEVELS, SIZES, shaken, some_codes, some_model
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from recllm.decoding import Decoder
from recllm.decoding.branches import ExpandedBranches
from recllm.decoding.prefixed import Choice, PrefixedDecoder, Shown
from recllm.errors import UserError
from recllm.objectives.rclrec import ascending_top_k
from recllm.trie import SemanticIdTrie

CODES = some_codes(1)
TRIE = SemanticIdTrie.from_codes(CODES, SIZES)
BEFORE, OPENING, KINDS = (5, 6), 40, (40, 41, 42)
COMMON = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)  # noqa: C408
WINDOWED = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=7)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=16, sliding_window=7)),
}


def codes_of(row: int) -> list[int]:
    return [int(LEVELS[level][code]) for level, code in enumerate(CODES[row]) if code >= 0]


def histories(seed: int, lengths=(5, 0, 2, 1, 9)) -> tuple[list[list[int]], list[Shown]]:
    """Prompts of events: a behaviour's token and the item's codes, behind what all begin with."""
    random = np.random.default_rng(seed)
    prompts, shown = [], []
    for length in lengths:
        prompt, ends, rows = [*BEFORE, 7], [], random.integers(len(CODES), size=length).tolist()
        for row in rows:
            prompt += [int(random.choice(KINDS)), *codes_of(row)]
            ends.append(len(prompt) - 1)
        prompts.append(prompt)
        shown.append(Shown(ends, rows))
    return prompts, shown


def query(seed: int = 0):
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


def chooser(k: int, seed: int = 0):
    """By the states of the events and of the prompt's end."""

    def choose(history):
        relevance = (history.states * (query(seed) + history.last.unsqueeze(1))).sum(dim=-1)
        return Choice(ascending_top_k(relevance, k, history.mask), relevance)

    return choose


@torch.no_grad()
def slowly(model, prompt, shown, k):
    """Events and relevance, from one plain forward pass over the prompt alone."""
    states = model.get_decoder()(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    relevance = states[torch.tensor(shown.ends, dtype=torch.int64)] @ (query() + states[-1])
    order = relevance.argsort(stable=True)[-k:].tolist() if k else []
    return order, relevance[order]


def compare(model, k, width=6, prefix=BEFORE, seed=0, batch_size=None, **filters):
    prompts, shown = histories(seed)
    decoder = Decoder(model, LEVELS, TRIE, prefix=prefix, batch_size=batch_size)
    ours = PrefixedDecoder(decoder, OPENING, chooser(k) if k else None, k).beams(prompts, shown, width, **filters)
    whole = []
    for place, (prompt, some) in enumerate(zip(prompts, shown)):
        order, relevance = slowly(model, prompt, some, k)
        assert ours.events[place].tolist() == [-1] * (k - len(order)) + order
        torch.testing.assert_close(ours.relevance[place, k - len(order) :], relevance, atol=1e-4, rtol=1e-4)
        assert ours.relevance[place, : k - len(order)].isnan().all()
        whole.append([*prompt, OPENING, *(token for event in order for token in codes_of(some.rows[event]))])
    slow = Decoder(model, LEVELS, TRIE).beams(whole, width, **filters)
    assert torch.equal(ours.found.rows, slow.rows)
    assert torch.equal(ours.found.codes, slow.codes)
    torch.testing.assert_close(ours.found.scores, slow.scores, atol=1e-5, rtol=1e-5)
    return ours


@pytest.mark.parametrize("k", [0, 1, 3, 12])
@pytest.mark.parametrize("prefix", [(), BEFORE])
def test_the_answers_are_those_after_the_whole_text(k, prefix):
    assert compare(some_model(k), k, prefix=prefix, seed=k).events.size(1) == k


def test_filters_are_those_of_the_decoder():
    allowed = torch.from_numpy(np.random.default_rng(3).random(len(CODES)) < 0.5)
    exclude = [some.rows for some in histories(0)[1]]
    found = compare(some_model(), 2, allowed=allowed, exclude=exclude).found
    for rows, own in zip(found.rows.tolist(), exclude):
        assert not set(rows) & set(own)
        assert all(allowed[row] for row in rows)


def test_batches_and_expanded_caches_change_nothing(monkeypatch):
    model, together = some_model(), compare(some_model(), 3)
    for batch_size in (1, 2):
        alone = compare(model, 3, batch_size=batch_size)
        assert torch.equal(alone.found.rows, together.found.rows)
    monkeypatch.setattr("recllm.decoding.decoder.branches_of", ExpandedBranches)
    assert torch.equal(compare(model, 3).found.rows, together.found.rows)


@pytest.mark.parametrize("name", WINDOWED)
def test_models_with_a_window_read_whole_prompts(name):
    torch.manual_seed(0)
    assert bool((compare(shaken(WINDOWED[name](), 0), 2).events >= 0).any()), "nothing was chosen"


def test_a_batch_that_runs_out_of_memory_is_done_in_halves(monkeypatch):
    expected, calls = compare(some_model(), 2), []
    from recllm.decoding import prefixed

    def beams(walk, width):
        calls.append(len(walk.branches.seen))
        if calls[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(walk, width)

    real = prefixed.beams
    monkeypatch.setattr(prefixed, "beams", beams)
    prompts, shown = histories(0)
    decoder = Decoder(some_model(), LEVELS, TRIE, prefix=BEFORE)
    found = PrefixedDecoder(decoder, OPENING, chooser(2), 2).beams(prompts, shown, 6)
    assert calls[0] == 5
    assert calls[-1] <= 2
    assert torch.equal(found.found.rows, expected.found.rows)
    assert torch.equal(found.events, expected.events)


def test_no_prompts_no_answers():
    decoder = Decoder(some_model(), LEVELS, TRIE)
    found = PrefixedDecoder(decoder, OPENING, chooser(2), 2).beams([], [], 3)
    assert found.found.rows.shape == (0, 3)
    assert found.events.shape == (0, 2)


def test_what_cannot_be_is_refused():
    decoder = Decoder(some_model(), LEVELS, TRIE, prefix=BEFORE)
    ours = PrefixedDecoder(decoder, OPENING, chooser(2), 2)
    with pytest.raises(UserError, match="at least one answer"):
        ours.beams(*histories(0), 0)
    with pytest.raises(ValueError, match="prompt 0: each event"):
        ours.beams([[5, 6, 7]], [Shown([1], [0])], 2)
    decoder.model.config.max_position_embeddings = 30
    with pytest.raises(UserError, match="an answer of 13 do not fit the model's context of 30"):  # 1 + 2·4 + 4
        ours.beams(*histories(0), 2)
