"""However answers are laid out, log-probabilities and gradients are those of each answer by itself."""

import copy
import itertools

import numpy as np
import pytest
import torch
from answers import (
    CODES,
    TRIE,
    assert_same,
    gradient,
    ids_of,
    mixed_rows,
    rows_of,
    scored,
    short_rows,
    slow_scores,
    text,
)
from decoding.reference import LEVELS, SIZES, shaken, some_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recllm.actor import AnswerRows, AnswerScorer
from recllm.decoding import Decoder
from recllm.errors import UserError
from recllm.models.attention import use_fp32_attention
from recllm.trie import SemanticIdTrie

LAYOUTS = ["padded", "row", "cache"]
SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normaliser", ["children", "level", "full"])
def test_answers_of_all_kinds_as_if_each_stood_alone(layout, normaliser):
    scorer = assert_same(some_model(), mixed_rows(), normaliser, temperature=0.7, layout=layout)
    assert scorer.layout_run == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_lengths_need_no_gathering_and_are_the_same(layout):
    assert_same(some_model(), short_rows(), layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_double_precision_hardly_anything_differs(layout):
    """RMSNorm computes in fp32 even there, so gradients agree to its rounding."""
    model = some_model().double()
    wanted = slow_scores(model, mixed_rows(3), "children")[0]
    ours = scored(copy.deepcopy(model), mixed_rows(3), layout=layout)[0]
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)


def test_each_prompt_is_computed_once_and_empty_answers_not_at_all():
    """Prompts of 5, 9, 1 and 4 tokens; an answer of n tokens is fed n − 1 of them."""
    rows = mixed_rows()
    lengths = rows.answer_mask.sum(dim=1)
    fed = int((lengths - 1).clamp(min=0).sum())
    for layout in ("row", "cache"):
        assert scored(some_model(), rows, layout=layout)[2].tokens_run == 5 + 9 + 1 + 4 + fed
    kept = int((lengths > 0).sum())
    assert scored(some_model(), rows, layout="padded")[2].tokens_run == kept * (9 + int(lengths.max()) - 1)


def test_padding_of_the_batch_changes_nothing():
    model, narrow = some_model(), short_rows()
    pad = torch.nn.functional.pad
    wide = AnswerRows(
        pad(narrow.prompt_ids, (7, 0), value=3), pad(narrow.prompt_mask, (7, 0)),
        pad(narrow.answer_ids, (0, 5), value=3), pad(narrow.answer_mask, (0, 5)), narrow.starts,
    )  # fmt: skip
    scorer = AnswerScorer(model, LEVELS, TRIE)
    scorer.install(model)
    first = model(answer_rows=narrow)[0]
    tokens = scorer.tokens_run
    assert torch.equal(first, model(answer_rows=wide)[0][:, :4])
    assert scorer.tokens_run == tokens


def test_no_answer_at_all_gives_zeros_that_reach_every_weight():
    model = some_model()
    rows = rows_of([[1, 2], [3]], [[], []], [0, 0])
    logps, entropies, _ = scored(model, rows)
    assert not logps.any()
    assert not entropies.any()
    assert not gradient(model, logps).any()


def test_the_items_probabilities_sum_to_one_under_children():
    """Every item of the catalogue as an answer to one prompt: items of one to four codes."""
    prompt = text(np.random.default_rng(0), 6)
    rows = rows_of([prompt] * len(CODES), [ids_of(item) for item in range(len(CODES))], [0] * len(CODES))
    for layout in LAYOUTS:
        logps = scored(some_model(), rows, entropy=False, layout=layout, temperature=0.6)[0]
        assert abs(logps.sum(dim=1).exp().sum().item() - 1) < 1e-5


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_what_the_engine_drew_has_the_log_probability_it_was_drawn_with(temperature):
    model, random = some_model(), np.random.default_rng(5)
    prompts = [text(random, length) for length in (3, 11, 6)]
    drawn = Decoder(model, LEVELS, TRIE).samples(prompts, 8, temperature=temperature)
    answers = [ids_of(int(item)) for item in drawn.rows.flatten()]
    rows = rows_of([prompt for prompt in prompts for _ in range(8)], answers, [0] * 24, spare=0)
    logps = scored(model, rows, entropy=False, temperature=temperature)[0]
    torch.testing.assert_close(logps, drawn.logps.flatten(0, 1)[:, : logps.size(1)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_untied_head(layout):
    model = some_model(tied=False)
    assert_same(model, mixed_rows(1), layout=layout)
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing(layout):
    model = some_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = slow_scores(some_model(), mixed_rows(), "children")[0]
    plain, rows = some_model(), mixed_rows()
    found = scored(model, rows, entropy=False, layout=layout)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    theirs = gradient(plain, slow_scores(plain, rows, "children")[0])
    assert (gradient(model, found) - theirs).norm() <= 1e-5 * theirs.norm()


def other_models() -> dict:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE))
    windows = Qwen3ForCausalLM(
        Qwen3Config(
            **SHAPE,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0, resid_pdrop=0))
    gemma = Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=2.0, query_pre_attn_scalar=16, sliding_window=4)
    )
    eager = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager"))
    return {"llama": llama, "windows": windows, "gpt2": gpt2, "gemma": gemma, "eager": eager}


@pytest.mark.parametrize(
    ("name", "shared"), [("llama", True), ("gpt2", True), ("windows", False), ("gemma", False), ("eager", False)]
)
def test_other_architectures_share_the_prompt_or_fall_back_to_the_padded_batch(name, shared):
    model, rows = shaken(other_models()[name]), short_rows(length=20)
    scorer = assert_same(model, rows, temperature=0.7)
    assert (scorer.layout_run != "padded") == shared
    if not shared:
        with pytest.raises(UserError, match="needs full attention computed by sdpa"):
            scored(shaken(other_models()[name]), rows, layout="row")


def test_a_soft_cap_on_text_too():
    model = shaken(other_models()["gemma"])
    assert_same(model, mixed_rows(2, lengths=(3, 2, 1, 2)), "full", temperature=0.7)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_fp32"])
def test_bf16_weights_and_bf16_autocast_stay_near_fp32(attention):
    rows = mixed_rows()
    wanted = slow_scores(some_model(), rows, "children")[0]
    for layout in LAYOUTS:
        half, mixed = some_model().bfloat16(), some_model()
        if attention == "sdpa_fp32":
            use_fp32_attention(half)
            use_fp32_attention(mixed)
        found = scored(half, rows, layout=layout)[0]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, atol=0.15, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            found = scored(mixed, rows, layout=layout)[0]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, atol=0.15, rtol=0)
        theirs = some_model()
        theirs = gradient(theirs, slow_scores(theirs, rows, "children")[0])
        for model, logps in ((mixed, found), (half, scored(half, rows, layout=layout)[0])):
            assert torch.cosine_similarity(gradient(model, logps), theirs, dim=0) > 0.995


def test_every_other_call_of_the_model_is_as_before():
    model, ids = some_model(), torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    before = model(input_ids=ids, attention_mask=mask).logits
    said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    found = Decoder(model, LEVELS, TRIE).beams([[3, 4, 5]], 5)
    scored(model, short_rows())
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False), said)
    assert torch.equal(Decoder(model, LEVELS, TRIE).beams([[3, 4, 5]], 5).rows, found.rows)


def test_policy_and_reference_share_a_scorer_and_weights_may_change():
    policy, reference, rows = some_model(0), some_model(1), mixed_rows()
    scorer = AnswerScorer(policy, LEVELS, TRIE)
    for model in (policy, reference):
        scorer.install(model)
    for _ in range(2):
        for model in (policy, reference):
            with torch.no_grad():
                wanted = slow_scores(model, rows, "children")[0]
                torch.testing.assert_close(model(answer_rows=rows)[0], wanted, atol=1e-5, rtol=1e-5)
        shaken(policy, seed=7)


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    model = some_model()
    scored(model, short_rows())
    model.save_pretrained(tmp_path)
    assert "_answers" not in (tmp_path / "config.json").read_text()
    again = Qwen3ForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        slow_scores(again, short_rows(), "level")[0], slow_scores(model, short_rows(), "level")[0]
    )


def test_the_layout_that_costs_least_is_taken():
    """Codes behind a long prompt share it in one way or another; one answer a prompt shares nothing; long answers to a
    short prompt are never laid into one row."""
    assert scored(some_model(), short_rows(length=60))[2].layout_run in ("row", "cache")
    assert scored(some_model(), short_rows(group=1))[2].layout_run == "padded"
    random = np.random.default_rng(0)
    prompt = text(random, 20)
    answers = [text(random, 200) for _ in range(8)]
    long = rows_of([prompt] * 8, answers, [200] * 8, spare=0)
    assert scored(some_model(), long)[2].layout_run in ("cache", "padded")


@pytest.mark.parametrize(
    ("answer", "start", "words"),
    [
        ([50, int(LEVELS[1][0])], 0, "holds token 50 where a code of level 0 belongs"),
        ([*ids_of(int(np.flatnonzero(CODES[:, 3] >= 0)[0])), 50], 0, "goes on after the 4 codes"),
        ([int(LEVELS[0][0]), int(LEVELS[1][5]), int(LEVELS[2][1])], 0, "where no item has it"),
    ],
)
def test_answers_that_have_no_probability_are_refused(answer, start, words):
    assert TRIE.allowed_next([0, 5]) == [0, 3, 4]
    rows = rows_of([[1, 2]] * 2, [ids_of(1), answer], [0, start])
    with pytest.raises(UserError, match=f"answer 1 .*{words}"):
        scored(some_model(), rows)


def test_what_no_item_has_still_has_a_probability_among_the_codes_of_its_level():
    answer = next(
        list(codes) for codes in itertools.product(range(8), range(6), range(6), range(6)) if TRIE.row_of(codes) is None
    )
    answer = [int(LEVELS[level][code]) for level, code in enumerate(answer)]
    assert_same(some_model(), rows_of([[1, 2]] * 2, [ids_of(1), answer], [0, 0]), "level")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": "rows"}, "layout 'rows'"), ({"normaliser": "trie"}, "normaliser 'trie'"),
        ({"temperature": 0.0}, "temperature 0.0"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        AnswerScorer(some_model(), LEVELS, TRIE, **settings)


def test_an_index_that_does_not_fit_the_model_is_refused():
    with pytest.raises(UserError, match="needs token 135 and the model has 128 rows"):
        AnswerScorer(some_model(), [ids + 100 for ids in LEVELS], TRIE)
    with pytest.raises(UserError, match="do not fit the index's"):
        AnswerScorer(some_model(), LEVELS, SemanticIdTrie.from_codes(CODES[:, :3][:4].clip(0), SIZES[:3]))
    with pytest.raises(UserError, match="the prompt of answer 0 is empty"):
        scored(some_model(), AnswerRows(*(torch.tensor([[n]]) for n in (1, 0, 30, 1)), torch.tensor([1])))
