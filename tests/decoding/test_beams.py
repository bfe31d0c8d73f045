"""Beam search is exact: the same ranking as scoring every item, and as HF generate."""

import numpy as np
import pytest
import torch
from other_models import COMMON, OTHERS, attend_by_lengths
from reference import LEVELS, SIZES, item_scores, shaken, some_codes, some_model, some_prompts
from transformers import MistralConfig, MistralForCausalLM

from recllm.decoding import Decoder, beam_search, common_prefix
from recllm.decoding.branches import ExpandedBranches, TreeBranches, takes_tree_mask
from recllm.errors import UserError
from recllm.models.tiny import tiny_model
from recllm.trie import SemanticIdTrie

NORMALISERS = ("full", "level", "children")


def assert_exact(model, prompts, codes, normaliser, allowed=None, atol=1e-4, **settings):
    decoder = Decoder(model, LEVELS, SemanticIdTrie.from_codes(codes, SIZES), normaliser=normaliser, **settings)
    found = decoder.beams(prompts, len(codes), allowed)
    for place, prompt in enumerate(prompts):
        slow = item_scores(model, prompt, codes, normaliser, allowed)
        count = int(slow.isfinite().sum())
        assert found.rows[place, :count].tolist() == slow.argsort(descending=True)[:count].tolist()
        torch.testing.assert_close(found.scores[place, :count].double(), slow.sort(descending=True).values[:count],
                                   atol=atol, rtol=0)  # fmt: skip
        assert (found.rows[place, count:] == -1).all()
        assert (found.codes[place, count:] == -1).all()
        assert torch.isneginf(found.scores[place, count:]).all()
        assert np.array_equal(found.codes[place, :count].numpy(), codes[found.rows[place, :count].numpy()])
    return found


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("seed", range(10))
def test_every_item_in_the_order_of_exhaustive_scoring(seed, normaliser):
    assert_exact(some_model(seed), some_prompts(seed), some_codes(seed), normaliser)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_filters_keep_exactness(normaliser):
    codes = some_codes(3)
    allowed = torch.from_numpy(np.random.default_rng(3).random(len(codes)) < 0.3)
    assert_exact(some_model(3), some_prompts(3), codes, normaliser, allowed)


def test_the_probabilities_of_all_items_sum_to_one():
    found = assert_exact(some_model(), some_prompts(0), some_codes(), "children")
    torch.testing.assert_close(found.scores.exp().sum(dim=1), torch.ones(3))


def test_normalisers_rank_differently():
    codes, prompts, model = some_codes(), some_prompts(0, (4,) * 8), some_model()
    rows = {name: assert_exact(model, prompts, codes, name).rows for name in NORMALISERS}
    assert not torch.equal(rows["full"], rows["level"])
    assert not torch.equal(rows["level"], rows["children"])


@pytest.mark.parametrize("beams", [1, 3, 20])
def test_narrow_beams_are_those_of_hf_generate(beams):
    """HF's beam search scores over the whole vocabulary; the prefix function is exact."""
    codes = some_codes(shallow=False)
    trie = SemanticIdTrie.from_codes(codes, SIZES)
    prompts = some_prompts(5, (6, 6, 6, 6))
    model = some_model(5)

    def allowed(_, ids):
        prefix = [int((LEVELS[h] == token).nonzero()) for h, token in enumerate(ids[6:])]
        return [int(LEVELS[len(prefix)][code]) for code in trie.allowed_next(prefix)]

    theirs = model.generate(
        torch.tensor(prompts), attention_mask=torch.ones(4, 6, dtype=torch.long), num_beams=beams, do_sample=False,
        num_return_sequences=beams, max_new_tokens=4, prefix_allowed_tokens_fn=allowed, eos_token_id=None,
    )[:, 6:]  # fmt: skip
    ours, scores = beam_search(model, prompts, trie, beams, LEVELS, "full")
    ids = torch.stack([LEVELS[h][ours[..., h]] for h in range(4)], dim=-1)
    assert torch.equal(ids.flatten(0, 1), theirs)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_greedy_is_one_beam():
    decoder = Decoder(some_model(), LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES))
    prompts = some_prompts(0)
    assert torch.equal(decoder.greedy(prompts).rows, decoder.beams(prompts, 1).rows)


# ---- models of other kinds


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    torch.manual_seed(0)
    model = shaken(OTHERS[name](), 0)
    for normaliser in ("full", "level"):
        assert_exact(model, some_prompts(1), some_codes(1), normaliser)


@pytest.mark.parametrize("window", [5, 8])
def test_windows_shorter_than_the_prompts(window):
    """Eight is more than the check's own tokens fill; and padding must not stand between prefix and prompt."""
    torch.manual_seed(0)
    config = MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=window)
    model = shaken(MistralForCausalLM(config), 0)
    prompts = [[5, 6, 7, *prompt] for prompt in some_prompts(1, (2, 20, 13))]
    assert_exact(model, prompts, some_codes(1), "level")
    assert_exact(model, prompts, some_codes(1), "level", prefix=(5, 6, 7))


def test_which_models_take_the_mask():
    assert takes_tree_mask(some_model())
    assert takes_tree_mask(OTHERS["llama"]().eval())
    assert not takes_tree_mask(OTHERS["gemma2 with soft caps"]().eval())


def test_eager_attention_takes_an_additive_mask():
    model = some_model()
    model.set_attn_implementation("eager")
    assert takes_tree_mask(model)
    assert_exact(model, some_prompts(0), some_codes(), "level")


def test_a_model_whose_attention_is_changed_later_is_tried_again():
    model, prompts = some_model(), some_prompts(0)
    decoder = Decoder(model, LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES))
    expected = decoder.beams(prompts, 10)
    attend_by_lengths(model)
    assert not takes_tree_mask(model)
    found = decoder.beams(prompts, 10)
    assert torch.equal(found.rows, expected.rows)


def test_expanded_caches_give_the_same(monkeypatch):
    model, codes, prompts = some_model(), some_codes(), some_prompts(0)
    ours = assert_exact(model, prompts, codes, "level")
    used = []
    monkeypatch.setattr(
        "recllm.decoding.decoder.branches_of", lambda *a: used.append(1) or ExpandedBranches(*a)
    )  # fmt: skip
    assert torch.equal(assert_exact(model, prompts, codes, "level").rows, ours.rows)
    assert used


def test_bf16_stays_close_to_fp32():
    codes, prompts = some_codes(), some_prompts(2)
    exact = Decoder(some_model(2), LEVELS, SemanticIdTrie.from_codes(codes, SIZES)).beams(prompts, 10)
    model = some_model(2).to(torch.bfloat16)
    rough = Decoder(model, LEVELS, SemanticIdTrie.from_codes(codes, SIZES)).beams(prompts, 10)
    torch.testing.assert_close(rough.scores, exact.scores, atol=0.3, rtol=0)
    for one, other in zip(rough.rows.tolist(), exact.rows.tolist()):
        assert len(set(one) & set(other)) >= 7


def test_a_bias_of_the_head_counts():
    """Phi's head has one."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    assert_exact(shaken(PhiForCausalLM(PhiConfig(**COMMON)), 1), some_prompts(1), some_codes(1), "full")


def test_lora_adapters_are_heeded():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(some_model(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert_exact(model.eval(), some_prompts(0), some_codes(), "level")


# ---- the model


def test_a_decoder_follows_the_weights_and_ignores_dropout():
    model, codes, prompts = some_model(), some_codes(), some_prompts(0)
    decoder = Decoder(model, LEVELS, SemanticIdTrie.from_codes(codes, SIZES))
    with torch.no_grad():
        model.lm_head.weight *= 3
    model.train()
    model.get_input_embeddings().register_forward_hook(
        lambda module, _, output: torch.nn.functional.dropout(output, 0.5, module.training)
    )  # fmt: skip
    found = decoder.beams(prompts, 10)
    assert model.training
    assert torch.equal(found.scores, Decoder(model.eval(), LEVELS, decoder.trie).beams(prompts, 10).scores)


def test_a_forward_that_accelerate_wrapped_in_autocast_is_no_strange_head():
    """In the middle of a bf16 training run: its rounding had come to more than the check allowed."""
    from accelerate import Accelerator

    model, codes, prompts = shaken(tiny_model(128, 64, layers=4, seed=1), 1), some_codes(), some_prompts(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # as far from fp32 as bf16 gets
    expected = Decoder(model, LEVELS, SemanticIdTrie.from_codes(codes, SIZES)).beams(prompts, 10)
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.equal(wrapped(tokens).logits, type(wrapped).forward(wrapped, tokens).logits)
    found = Decoder(wrapped.eval(), LEVELS, SemanticIdTrie.from_codes(codes, SIZES)).beams(prompts, 10)
    assert torch.equal(found.scores, expected.scores)


def test_weights_that_are_not_finite_are_refused():
    model = some_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        Decoder(model, LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES))


# ---- batches


def test_answers_do_not_depend_on_the_batch():
    codes, model = some_codes(), some_model()
    prompts = some_prompts(7, (3, 12, 1, 7, 5, 2, 9))
    trie = SemanticIdTrie.from_codes(codes, SIZES)
    together = Decoder(model, LEVELS, trie, batch_size=7).beams(prompts, 10)
    alone = Decoder(model, LEVELS, trie, batch_size=1).beams(prompts, 10)
    assert torch.equal(together.rows, alone.rows)
    torch.testing.assert_close(together.scores, alone.scores)


def test_a_common_prefix_is_computed_once(monkeypatch):
    codes, model = some_codes(), some_model()
    prompts = [[5, 6, 7, 8, *rest] for rest in some_prompts(1)]
    assert common_prefix(prompts) == (5, 6, 7, 8)
    assert common_prefix([[5, 6, 7], [5, 6]]) == (5,)  # each keeps a token of its own
    assert_exact(model, prompts, codes, "level", prefix=(5, 6, 7, 8))
    lengths = []
    body = model.get_decoder()
    forward = body.forward
    monkeypatch.setattr(body, "forward", lambda *a, **kw: lengths.append(kw["input_ids"].shape) or forward(*a, **kw))
    Decoder(model, LEVELS, SemanticIdTrie.from_codes(codes, SIZES), prefix=(5, 6, 7, 8)).beams(prompts, 5)
    assert (1, 4) in lengths
    assert (3, 9) in lengths  # of 13


def test_out_of_memory_lowers_the_batch_and_nothing_else(monkeypatch, capsys):
    codes, model = some_codes(), some_model()
    prompts = some_prompts(7, (3, 12, 1, 7, 5, 2, 9))
    trie = SemanticIdTrie.from_codes(codes, SIZES)
    expected = Decoder(model, LEVELS, trie).beams(prompts, 10)
    sizes = []

    def tight(model, batch, room):
        sizes.append(len(batch.ids))
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("full")
        return TreeBranches(model, batch, room)

    monkeypatch.setattr("recllm.decoding.decoder.branches_of", tight)
    decoder = Decoder(model, LEVELS, trie)
    found = decoder.beams(prompts, 10)
    assert torch.equal(found.rows, expected.rows)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "as many beams" in capsys.readouterr().err


def test_the_lowered_batch_is_remembered(monkeypatch):
    sizes = []

    def tight(model, batch, room):
        sizes.append(len(batch.ids))
        if len(batch.ids) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return TreeBranches(model, batch, room)

    monkeypatch.setattr("recllm.decoding.decoder.branches_of", tight)
    decoder = Decoder(some_model(), LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES))
    for _ in range(2):
        decoder.beams(some_prompts(7, (3, 2, 1, 7)), 10)
    assert sizes == [4, 2, 2, 2, 2]


def test_one_prompt_that_does_not_fit_is_said(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("recllm.decoding.decoder.branches_of", full)
    with pytest.raises(UserError, match="one prompt alone does not fit"):
        Decoder(some_model(), LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES)).beams([[1, 2]], 3)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("recllm.decoding.decoder.branches_of", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        Decoder(some_model(), LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES)).beams([[1, 2]], 3)


def test_a_level_of_few_items_costs_few_positions(monkeypatch):
    """Of the 20 beams at most 3 are of items with a fourth code: three positions are computed there, not 20."""
    codes = some_codes(shallow=False)[:40].copy()
    codes[3:, 3] = -1
    codes = np.unique(codes, axis=0)
    model = some_model()
    counts = []
    advance = TreeBranches._advance
    monkeypatch.setattr(TreeBranches, "_advance", lambda self, t, *a: counts.append(t.size(1)) or advance(self, t, *a))
    takes_tree_mask(model)
    counts.clear()
    assert_exact(model, some_prompts(0), codes, "level")
    assert counts[0] > 5
    assert 1 <= counts[2] <= 3


# ---- bad input


@pytest.mark.parametrize(
    ("prompts", "settings", "sentence"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1] * 4096], {}, "do not fit the model's context of 4,096"),
        ([[1, 2]], {"prefix": (3,)}, "does not begin with the prefix"),
        ([[1, 2]], {"normaliser": "codes"}, "full, level, children"),
        ([[1, 2]], {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(prompts, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Decoder(some_model(), LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES), **settings).beams(prompts, 3)


def test_a_filter_that_leaves_nothing_is_said():
    codes = some_codes()
    decoder = Decoder(some_model(), LEVELS, SemanticIdTrie.from_codes(codes, SIZES))
    with pytest.raises(UserError, match="leaves no item"):
        decoder.beams([[1]], 3, torch.zeros(len(codes), dtype=torch.bool))


def test_tokens_that_do_not_fit_the_index_are_refused():
    trie = SemanticIdTrie.from_codes(some_codes(), SIZES)
    with pytest.raises(UserError, match="do not fit the index"):
        Decoder(some_model(), LEVELS[:3], trie)
    with pytest.raises(UserError, match="token 999 and the model has 128 rows"):
        Decoder(some_model(), [*LEVELS[:3], torch.arange(994, 1000)], trie)
