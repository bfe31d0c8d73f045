"""Reflected answers: log-probabilities and gradients are those of each answer by itself, under its form's mask."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from answers import gradient
from decoding.reference import LEVELS, shaken, some_model
from reflected import LABELS, PARALLEL, TEMPLATES, TRIE, assert_as_slow, fast, form_rows, slow_form_scores
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from recllm.actor import AnswerRows, AnswerScorer
from recllm.errors import UserError
from recllm.models.attention import use_fp32_attention

LAYOUTS = ["padded", "row", "cache"]
SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normaliser", ["children", "full"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_drafts_and_whole_answers_behind_prompts_of_all_lengths(name, normaliser, layout):
    template = TEMPLATES[name]
    scorer = assert_as_slow(some_model(), form_rows(template), template, normaliser, 0.7, layout=layout)
    assert scorer.layout_run == layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_whole_answers_of_one_length_need_no_gathering(name, layout):
    template = TEMPLATES[name]
    assert_as_slow(some_model(), form_rows(template, 1, (6, 6), drafts=False), template, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_weights_and_wrappings_of_attention(layout):
    """An untied head, gradient checkpointing, the attention that stays in fp32; codes over their whole level."""
    model = some_model(tied=False).train()
    use_fp32_attention(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_as_slow(model, form_rows(PARALLEL, 2), PARALLEL, "level", layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_bf16_it_stays_near(layout):
    rows, mixed = form_rows(PARALLEL), some_model()
    wanted = slow_form_scores(some_model(), rows, PARALLEL)[0]
    half = fast(some_model().bfloat16(), rows, PARALLEL, layout=layout)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = fast(mixed, rows, PARALLEL, layout=layout)[0]
    for logps in (half, found):
        assert logps.dtype == torch.float32
        torch.testing.assert_close(logps, wanted, atol=0.15, rtol=0)
    plain = some_model()
    theirs = gradient(plain, slow_form_scores(plain, rows, PARALLEL)[0])
    assert torch.cosine_similarity(gradient(mixed, found), theirs, dim=0) > 0.995


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["parallel", "causal"])
def test_parts_of_answers(name, layout):
    """Equally many tokens at different places, with gaps between them: the causal order then counts with gaps too."""
    template = TEMPLATES[name]
    rows = form_rows(template, lengths=(6, 6), drafts=False)
    slots, labels, item = template.at("slot"), template.at("label"), template.at("item")
    # An item behind the last label alone, and two labels without an item.
    parts = ([slots[2], labels[2], *item[:3]], [*slots, *labels[:2]])
    mask = torch.zeros_like(rows.answer_mask)
    mask[:, :4] = 1
    for row, part in enumerate((1, 0, 1, 0, 0, 1)):
        mask[row, parts[part]] = 1
    assert_as_slow(some_model(), dataclasses.replace(rows, answer_mask=mask), template, layout=layout)


def test_attention_without_sdpa_takes_the_mask_in_the_padded_batch():
    torch.manual_seed(0)
    model = shaken(LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")))
    rows = form_rows(PARALLEL, lengths=(4, 3))
    plain = LlamaForCausalLM(LlamaConfig(**SHAPE))
    plain.load_state_dict(model.state_dict())
    logps, _, scorer = fast(model, rows, PARALLEL)
    torch.testing.assert_close(logps, slow_form_scores(plain.eval(), rows, PARALLEL)[0], atol=1e-5, rtol=1e-5)
    assert scorer.layout_run == "padded"


def test_attention_in_windows_is_refused_where_a_mask_is_needed_and_serves_the_causal_order():
    windows = Qwen3Config(**SHAPE, head_dim=16, use_sliding_window=True, sliding_window=30, max_window_layers=1)
    model = shaken(Qwen3ForCausalLM(windows))  # a window that nothing here goes beyond
    assert "sliding_attention" in windows.layer_types
    with pytest.raises(UserError, match="parallel reflection needs a mask"):
        fast(copy.deepcopy(model), form_rows(PARALLEL), PARALLEL)
    rows = form_rows(TEMPLATES["causal"])
    wanted = slow_form_scores(model, rows, TEMPLATES["causal"])[0]
    torch.testing.assert_close(fast(model, rows, TEMPLATES["causal"])[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_are_blind_to_each_other(layout):
    """Another token in the slot of `brand`: its own label's probability moves, all others not by a bit."""
    rows = form_rows(PARALLEL, drafts=False)
    other = rows.answer_ids.clone()
    slot, label = PARALLEL.at("slot")[1], PARALLEL.at("label")[1]
    other[:, slot] = 60
    changed = dataclasses.replace(rows, answer_ids=other)
    model = some_model()
    before, after = (fast(model, some, PARALLEL, layout=layout)[0] for some in (rows, changed))
    moved = (before != after).any(dim=0)
    assert moved.nonzero().flatten().tolist() == [label]
    assert (before != after)[:, label].all()


def test_an_item_sees_draft_and_labels_and_labels_see_the_draft():
    rows = form_rows(PARALLEL, drafts=False, lengths=(5,), group=1)
    items, model = PARALLEL.at("item"), some_model()
    before = fast(model, rows, PARALLEL, normaliser="full")[0][0]
    for place, blind in ((0, []), (PARALLEL.at("label")[0], PARALLEL.at("label")[1:])):
        other = rows.answer_ids.clone()
        other[0, place] = 61
        after = fast(model, dataclasses.replace(rows, answer_ids=other), PARALLEL, normaliser="full")[0][0]
        assert (before != after)[items].all()
        assert torch.equal(before[blind], after[blind])


@pytest.mark.parametrize("layout", [*LAYOUTS, "auto"])
def test_a_draft_alone_is_a_plain_answer_at_the_price_of_one(layout):
    """Bit for bit; beside whole answers to within rounding."""
    rows = form_rows(PARALLEL)
    alone = dataclasses.replace(rows, answer_mask=rows.answer_mask * (torch.arange(14) < 4))
    plain = AnswerRows(
        rows.prompt_ids, rows.prompt_mask, rows.answer_ids[:, :4], alone.answer_mask[:, :4], torch.zeros(9).long()
    )
    direct = AnswerScorer(some_model(), LEVELS, TRIE, layout=layout)
    model = some_model()
    direct.install(model)
    wanted, wanted_entropies = model(answer_rows=plain, entropy=True)
    logps, entropies, scorer = fast(some_model(), alone, PARALLEL, layout=layout)
    assert torch.equal(logps[:, :4], wanted)
    assert torch.equal(entropies[:, :4], wanted_entropies)
    assert not logps[:, 4:].any()
    assert (scorer.tokens_run, scorer.layout_run) == (direct.tokens_run, direct.layout_run)
    beside = fast(some_model(), rows, PARALLEL, layout=layout)[0]
    torch.testing.assert_close(beside[:, :4], wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_prompt_is_computed_once_and_an_answer_s_last_token_never(name):
    """Prompts of 5, 9 and 1 tokens; of nine answers five are drafts of 4 tokens, three whole, one empty."""
    template = TEMPLATES[name]
    for layout in ("row", "cache"):
        scorer = fast(some_model(), form_rows(template), template, layout=layout)[2]
        assert scorer.tokens_run == 5 + 9 + 1 + 5 * 3 + 3 * (template.form.places - 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_predicted_where_a_token_is_given(name):
    template = TEMPLATES[name]
    rows = form_rows(template, drafts=False)
    logps, entropies, _ = fast(some_model(), rows, template)
    given = [place for place, (kind, _) in enumerate(template.places) if kind in ("slot", "correct")]
    assert not logps[:, given].any()
    assert not entropies[:, given].any()
    # Whatever else is chosen has a probability below one, but for a code that is the only one left.
    assert (logps != 0).any(dim=0).sum() == template.form.places - len(given)
    everything = dataclasses.replace(rows, scored=torch.ones_like(rows.answer_ids))
    assert torch.equal(fast(some_model(), everything, template)[0], logps)


def test_scored_tokens_alone_go_through_the_head(monkeypatch):
    """Labels and items behind a draft that is context; at rows where nothing is scored stands 0."""
    rows = form_rows(PARALLEL, drafts=False)
    scored = torch.ones_like(rows.answer_mask)
    scored[:, :4] = 0
    scored[2] = 0
    rows = dataclasses.replace(rows, scored=scored)
    for layout in LAYOUTS:
        assert_as_slow(some_model(), rows, PARALLEL, layout=layout)
    seen, whole = [], AnswerScorer._scores

    def watched(own, finish, hidden, *more):
        seen.append(len(hidden))
        return whole(own, finish, hidden, *more)

    monkeypatch.setattr(AnswerScorer, "_scores", watched)
    logps = fast(some_model(), rows, PARALLEL)[0]
    assert seen == [8 * (3 + 4)]
    assert not logps[2].any()


def test_scored_tokens_of_plain_answers():
    rows = form_rows(PARALLEL, lengths=(5, 3))
    plain = AnswerRows(
        rows.prompt_ids, rows.prompt_mask, rows.answer_ids[:, :4], rows.answer_mask[:, :4], torch.zeros(6).long()
    )
    scored = torch.tensor([[0, 1, 0, 1]] * 6)
    whole = fast(some_model(), plain, TEMPLATES["gc"])[0]
    some = fast(some_model(), dataclasses.replace(plain, scored=scored), TEMPLATES["gc"])[0]
    torch.testing.assert_close(some, whole * scored, atol=1e-6, rtol=1e-6)


def test_nothing_scored_gives_zeros_that_reach_every_weight():
    rows = form_rows(PARALLEL)
    model = some_model()
    logps, entropies, scorer = fast(
        model, dataclasses.replace(rows, scored=torch.zeros_like(rows.answer_ids)), PARALLEL
    )
    assert logps.shape == rows.answer_ids.shape
    assert not logps.any()
    assert not entropies.any()
    assert not gradient(model, logps).any()
    assert scorer.tokens_run == 1


def test_labels_of_a_slot_share_its_probability():
    """All labels of `loc` after one draft, one row each: their probabilities sum to 1, at any temperature."""
    rows = form_rows(PARALLEL, lengths=(6,), group=5, drafts=False)
    place = PARALLEL.at("label")[0]
    answers = rows.answer_ids[:1].repeat(5, 1)
    answers[:, place] = LABELS[0]
    rows = dataclasses.replace(rows, answer_ids=answers)
    cold, warm = (fast(some_model(), rows, PARALLEL, temperature=t)[0][:, place].exp() for t in (0.5, 2.0))
    assert cold.sum().item() == pytest.approx(1, abs=1e-5)
    assert warm.sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(cold, (warm**4 / (warm**4).sum()), atol=1e-5, rtol=1e-5)


def test_the_cost_rule_knows_that_a_mask_of_its_own_costs():
    """Whole answers share a long prompt; one answer a prompt, or a short one, leaves nothing to share."""
    for name in TEMPLATES:
        template = TEMPLATES[name]
        scorer = assert_as_slow(some_model(), form_rows(template, lengths=(60, 60), group=6), template)
        assert scorer.layout_run in ("row", "cache")
    scorer = fast(some_model(), form_rows(TEMPLATES["gc"], lengths=(20, 20), group=1, drafts=False), TEMPLATES["gc"])[2]
    assert scorer.layout_run == "padded"
    assert_as_slow(some_model(), form_rows(PARALLEL, lengths=(20, 20), group=1, drafts=False), PARALLEL)


def broken(place: int | None, token: int | None = None) -> AnswerRows:
    rows = form_rows(PARALLEL, drafts=False)
    answers, mask = rows.answer_ids.clone(), rows.answer_mask.clone()
    if token is None:
        mask[1, place] = 0
    else:
        answers[1, place] = token
    return dataclasses.replace(rows, answer_ids=answers, answer_mask=mask)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (broken(4), "answer 1 holds place 7 of its form and not place 4, which predicts it"),
        (broken(9), "answer 1 holds place 10 of its form and not place 9"),
        (broken(8, 110), "answer 1 holds token 110 where a label of slot 1 belongs"),
        (broken(11, 110), "answer 1 holds token 110 where a code of level 1 belongs"),
    ],
)
def test_answers_that_are_not_of_the_form_are_refused(rows, words):
    with pytest.raises(UserError, match=words):
        fast(some_model(), rows, PARALLEL)


def test_a_second_item_that_no_item_is_is_refused_by_its_own_walk():
    codes = next(codes for codes in np.ndindex(3, 3, 3, 3) if TRIE.row_of(codes) is None)
    rows = form_rows(PARALLEL, drafts=False)
    answers = rows.answer_ids.clone()
    answers[1, 10:] = torch.tensor([int(LEVELS[level][code]) for level, code in enumerate(codes)])
    rows = dataclasses.replace(rows, answer_ids=answers)
    with pytest.raises(UserError, match=r"answer 1 .*where no item has it"):
        fast(some_model(), rows, PARALLEL)
    assert_as_slow(some_model(), rows, PARALLEL, "level")


def test_a_form_that_the_scorer_has_no_labels_for_is_refused():
    with pytest.raises(UserError, match="answers of 7 levels and slots, and a scorer for 4 levels and 0 slots"):
        fast(some_model(), form_rows(PARALLEL), TEMPLATES["gc"])
    with pytest.raises(UserError, match="needs token 500 and the model has 128 rows"):
        AnswerScorer(some_model(), LEVELS, TRIE, labels=[torch.tensor([500])])
