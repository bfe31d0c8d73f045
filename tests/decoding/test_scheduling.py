"""Schedules of the engine against a loop over all pairs of a draft and an item."""

import numpy as np
import pytest
import torch
from reference import LEVELS, SIZES, some_codes, some_model, some_prompts
from whole_sequence import CODES, TEMPLATES, force, listed, reflector, slow_schedule, tokens_of

from recllm.decoding import Decoder
from recllm.decoding.branches import TreeBranches
from recllm.decoding.decoder import Behind
from recllm.decoding.reflecting import Reflector, merged
from recllm.decoding.search import beams
from recllm.errors import UserError
from recllm.reflection import Template
from recllm.trie import SemanticIdTrie

SMALL = np.unique(np.random.default_rng(2).integers(0, 3, (12, 2)), axis=0)  # at most nine items


@pytest.mark.parametrize(
    ("layout", "labels", "weight", "skip", "seed"),
    [
        ("parallel", True, 0.2, True, 0),
        ("parallel", True, 0.0, True, 1),
        ("parallel", True, 5.0, True, 2),
        ("parallel", True, 0.2, False, 0),
        ("causal", True, 0.2, True, 3),
        ("parallel", False, 0.2, True, 4),
    ],
)
@pytest.mark.parametrize("beams", [4, len(SMALL)])
def test_the_schedule_is_that_of_a_loop_over_all_pairs(layout, labels, weight, skip, seed, beams):
    template = Template(2, ("brand",), layout, labels)
    ours = reflector(template, seed, SMALL)
    prompts = some_prompts(seed, (4, 1))
    found = ours.scheduled(prompts, beams, entropy_weight=weight, skip=skip)
    for place, prompt in enumerate(prompts):
        rows, said, doubts, kept, starts, pairs = slow_schedule(ours, prompt, beams, weight, skip, SMALL)
        items, scores, sources = listed(rows, starts, pairs, beams)
        assert found.drafts.rows[place].tolist() == rows
        assert found.labels[place].tolist() == said
        assert found.kept[place].tolist() == kept
        assert np.allclose(found.entropies[place].numpy(), np.array(doubts), atol=1e-5)
        assert found.found.rows[place].tolist() == items
        assert np.allclose(found.found.scores[place].numpy(), scores, atol=1e-4)
        assert found.source[place].tolist() == sources
        assert np.array_equal(found.found.codes[place].numpy(), SMALL[items])


def test_one_level_is_a_template_too():
    """All pairs fit the search: nothing is cut before its end."""
    codes = np.arange(6)[:, None]
    ours = reflector(Template(1, ("brand",)), 5, codes)
    prompt = some_prompts(5)[1]
    found = ours.scheduled([prompt], 6, skip=False)
    rows, *_, starts, pairs = slow_schedule(ours, prompt, 6, 0.2, False, codes)
    assert found.found.rows[0].tolist() == listed(rows, starts, pairs, 6)[0]


def test_the_schedules_that_were_compared_do_keep_some_and_correct_some():
    """Else the comparison above would be one of nothing."""
    kept = torch.cat([
        reflector(Template(2, ("brand",)), seed, SMALL).scheduled(some_prompts(seed, (4, 1)), 4).kept.flatten()
        for seed in (0, 1, 2)
    ])  # fmt: skip
    assert 0.1 < kept.float().mean() < 0.9


def test_drafts_that_are_called_right_cost_no_label_and_no_correction(monkeypatch):
    counts, advance = [], TreeBranches._advance
    monkeypatch.setattr(TreeBranches, "_advance", lambda self, t, *a: counts.append(t.numel()) or advance(self, t, *a))
    template, prompts = TEMPLATES["parallel"], [some_prompts(0)[1]]
    ours = reflector(template)
    force(ours, 4)
    ours.scheduled(prompts, 1)  # the model is tried once, whether it takes the mask
    counts.clear()
    found = ours.scheduled(prompts, 10, entropy_weight=0.0)
    assert counts[3:] == [10 * 4]  # the draft's last code and three slots, and that was all
    assert found.kept.all()
    assert torch.equal(found.found.rows, found.drafts.rows)
    assert torch.equal(found.found.scores, found.drafts.scores)
    assert found.source[0].tolist() == list(range(10))
    force(ours, 0)
    counts.clear()
    assert not ours.scheduled(prompts, 10).kept.any()
    assert counts[3:] == [10 * 4, 10 * 3, 10, 10, 10]


def test_a_branch_that_has_ended_goes_one_way():
    """The last node of a level stands in for children that a node does not have: it must not count twice."""
    codes = np.array([[0, 0], [0, 1], [0, 2], [1, 0]])
    trie = SemanticIdTrie.from_codes(codes, SIZES[:2])
    decoder, hidden = Decoder(some_model(), LEVELS[:2], trie), torch.zeros(1, 2, 64)
    found = []

    def work(walk, _):
        start = walk.start_from(hidden, torch.tensor([[-1.0, -2.0]]), torch.tensor([[3, 1]]))
        found.append(beams(walk, 3, start))

    decoder.walk([[5, 6]], Behind(2, 3, 6), work)
    assert found[0].leaves.tolist() == [[3, 1, -1]]
    assert found[0].scores.tolist() == [[-1.0, -2.0, float("-inf")]]
    assert found[0].origins[0, :2].tolist() == [0, 1]


def test_the_weight_of_doubt_reorders_the_drafts():
    ours = reflector(TEMPLATES["parallel"])
    force(ours, 4)
    prompts = some_prompts(0)
    plain, doubted = (ours.scheduled(prompts, 8, entropy_weight=weight) for weight in (0.0, 3.0))
    assert torch.equal(plain.found.rows, plain.drafts.rows)
    wanted = doubted.drafts.scores + 3 * doubted.entropies.mean(dim=-1)
    order = wanted.argsort(dim=1, descending=True)
    assert torch.equal(doubted.source, order)
    torch.testing.assert_close(doubted.found.scores, wanted.gather(1, order), atol=1e-5, rtol=1e-5)
    assert not torch.equal(order, torch.arange(8).expand(3, -1))


def test_only_some_drafts_are_reflected_on():
    ours, prompts = reflector(TEMPLATES["parallel"]), some_prompts(0)
    some = ours.scheduled(prompts, 8, reflect_on=3)
    fewer = ours.scheduled(prompts, 3)
    assert torch.equal(some.drafts.rows[:, :1], fewer.drafts.rows[:, :1])
    assert some.labels.shape == some.entropies.shape == (3, 3, 3)
    assert int(some.source[:, 0].max()) < 3  # what leads the list was corrected, or kept
    for rows, drafts in zip(some.found.rows.tolist(), some.drafts.rows.tolist()):
        assert len(set(rows)) == 8
        assert set(rows) >= set(drafts) or len(set(rows) - set(drafts)) <= 3
    everything = ours.scheduled(prompts, 8, reflect_on=8)
    assert torch.equal(everything.found.rows, ours.scheduled(prompts, 8).found.rows)


def test_merging_keeps_the_best_of_an_item_and_lets_no_score_rise():
    """Item 7 twice, an item that is not there, then drafts: 7 again, and 4 with a better score than stands before."""
    leaves = torch.tensor([[7, 3, 7, -1, 7, 4, 3]])
    scores = torch.tensor([[-1.0, -2.0, -3.0, float("-inf"), -0.5, -1.5, -9.0]])
    sources = torch.tensor([[2, 0, 1, 1, 0, 1, 2]])
    found = merged(leaves, scores, sources, 4, 4)
    assert found[0].tolist() == [[7, 3, 4, -1]]
    assert found[1].tolist() == [[-1.0, -2.0, -2.0, float("-inf")]]
    assert found[2].tolist() == [[2, 0, 1, -1]]
    assert found[3].tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("skip", [True, False])
def test_filters_hold_for_drafts_and_corrections(skip):
    allowed = torch.from_numpy(np.random.default_rng(1).random(len(CODES)) < 0.5)
    banned = allowed.nonzero().flatten()[:4].tolist()
    possible = int(allowed.sum())
    ours = reflector(TEMPLATES["parallel"])
    force(ours, 4 if skip else 0)  # what is not there would be called right, too
    found = ours.scheduled([some_prompts(0)[1]] * 2, possible, allowed=allowed, exclude=[banned, []], skip=skip)
    for answers in (found.drafts, found.found):
        assert allowed[answers.rows[answers.rows >= 0]].all()
        assert not set(banned) & set(answers.rows[0].tolist())
        assert (answers.rows[0] < 0).sum() == 4
        assert sorted(answers.rows[1].tolist()) == allowed.nonzero().flatten().tolist()
    assert (found.source[0, -4:] == -1).all()
    assert torch.isneginf(found.found.scores[0, -4:]).all()
    assert not found.kept[0, -4:].any()


def test_schedules_do_not_depend_on_the_batch_or_on_memory(monkeypatch, capsys):
    prompts = some_prompts(7, (3, 12, 1, 7, 5))
    template = TEMPLATES["parallel"]
    expected = reflector(template, batch_size=5).scheduled(prompts, 8)

    def tight(model, batch, room):
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("full")
        return TreeBranches(model, batch, room)

    monkeypatch.setattr("recllm.decoding.decoder.branches_of", tight)
    found = reflector(template).scheduled(prompts, 8)
    assert torch.equal(found.found.rows, expected.found.rows)
    assert torch.equal(found.source, expected.source)
    torch.testing.assert_close(found.found.scores, expected.found.scores, atol=1e-5, rtol=1e-5)
    assert "out of memory" in capsys.readouterr().err


def test_the_weights_are_those_of_now_without_dropout():
    ours, prompts = reflector(TEMPLATES["parallel"]), some_prompts(0)
    before = ours.scheduled(prompts, 5)
    model = ours.decoder.model
    with torch.no_grad():
        model.get_output_embeddings().weight *= 3
    model.train()
    model.get_input_embeddings().register_forward_hook(
        lambda module, _, output: torch.nn.functional.dropout(output, 0.5, module.training)
    )  # fmt: skip
    found = ours.scheduled(prompts, 5)
    assert model.training
    model.eval()
    fresh = Reflector(Decoder(model, LEVELS, ours.decoder.trie), tokens_of(ours.template)).scheduled(prompts, 5)
    assert torch.equal(found.entropies, fresh.entropies)
    assert not torch.allclose(found.entropies, before.entropies, atol=1e-2)


# ---- bad input


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda ours: ours.scheduled([[1]], 99), f"99 beams and only {len(CODES)} items"),
        (lambda ours: ours.scheduled([[1]], 0), "at least one draft"),
        (lambda ours: ours.scheduled([[1]], 5, reflect_on=6), "between 1 and the 5 beams"),
        (lambda ours: ours.scheduled([[]], 5), "prompt 0 is empty"),
        (lambda ours: ours.scheduled([[1] * 4090], 5), "an answer of 10 do not fit the model's context"),
        (lambda ours: ours.samples([[1]], 0), "at least one draft"),
        (lambda ours: ours.samples([[1]], 2, temperature=0), "temperature 0 must be above 0"),
        (lambda ours: Reflector(ours.decoder, tokens_of(Template(3, ("brand",)))), "3 codes, the index has 4"),
        (lambda _: reflector(TEMPLATES["parallel"], codes=some_codes()), "fewer codes than others"),
    ],
)
def test_bad_input_is_one_sentence(ask, sentence):
    with pytest.raises(UserError, match=sentence):
        ask(reflector(TEMPLATES["parallel"]))


def test_no_prompts_are_no_answers():
    ours = reflector(TEMPLATES["parallel"])
    assert ours.scheduled([], 5).found.rows.shape == (0, 5)
    assert ours.samples([], 5).items.shape == (0, 5, 4)
