"""Trajectories of the engine against the whole sequence in one plain forward pass; what sees what."""

import dataclasses

import numpy as np
import pytest
import torch
from reference import LEVELS, some_model, some_prompts
from torch import Tensor
from whole_sequence import CODES, TEMPLATES, place_logps, reflector, tokens_of, whole_logits

from recllm.decoding.branches import Block, ExpandedBranches, TreeBranches
from recllm.decoding.prompts import PromptBatch
from recllm.decoding.reflecting import passes_of
from recllm.errors import UserError
from recllm.reflection import Template

# ---- trajectories


@pytest.mark.parametrize("name", TEMPLATES)
def test_trajectories_have_the_log_probabilities_of_the_whole_sequence(name):
    template, prompts = TEMPLATES[name], [[5, 6, *prompt] for prompt in some_prompts(0)]
    ours = reflector(template, prefix=(5, 6))
    drawn = ours.samples(prompts, 6)
    for place, prompt in enumerate(prompts):
        for draft, labels, item, logps in zip(
            *(part[place].tolist() for part in (drawn.drafts, drawn.labels, drawn.items)), drawn.logps[place]
        ):
            slow = place_logps(ours.decoder.model, prompt, template, draft, labels, item)
            torch.testing.assert_close(logps.double(), slow, atol=1e-5, rtol=1e-5)
    assert np.array_equal(CODES[drawn.draft_rows.numpy()], drawn.drafts.numpy())
    assert np.array_equal(CODES[drawn.item_rows.numpy()], drawn.items.numpy())
    assert drawn.labels.shape == (3, 6, len(template.slots))


def test_expanded_caches_serve_the_causal_layout_alone(monkeypatch):
    template, prompts = TEMPLATES["causal"], some_prompts(0)
    expected = reflector(template).samples(prompts, 6, seed=3), reflector(template).scheduled(prompts, 8)
    monkeypatch.setattr("recllm.decoding.decoder.branches_of", ExpandedBranches)
    found = reflector(template).samples(prompts, 6, seed=3), reflector(template).scheduled(prompts, 8)
    for ours, theirs in ((found[0], expected[0]), (found[1].found, expected[1].found)):
        for field in dataclasses.fields(ours):
            if getattr(ours, field.name) is not None:
                torch.testing.assert_close(getattr(ours, field.name), getattr(theirs, field.name), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="layout: causal"):
        reflector(TEMPLATES["parallel"]).samples(prompts, 2)
    reflector(TEMPLATES["GC"]).samples(prompts, 2)


def test_draws_depend_on_seed_and_key_and_not_on_batches():
    prompts, template = some_prompts(7, (3, 12, 1, 7)), TEMPLATES["parallel"]
    together = reflector(template).samples(prompts, 5, seed=1, keys="abcd")
    alone = reflector(template, batch_size=1).samples(prompts[::-1], 5, seed=1, keys="dcba")
    other = reflector(template).samples(prompts, 5, seed=2, keys="abcd")
    for field in ("drafts", "labels", "items", "draft_rows", "item_rows"):
        assert torch.equal(getattr(together, field), getattr(alone, field).flip(0))
        assert not torch.equal(getattr(together, field), getattr(other, field))
    torch.testing.assert_close(together.logps, alone.logps.flip(0), atol=1e-5, rtol=1e-5)


def test_draws_come_as_often_as_their_probabilities_say():
    """Of the draft that came most often: its labels; and of the labels that came most often: the first code."""
    prompt, draws = some_prompts(0)[1], 4000
    drawn = reflector(TEMPLATES["parallel"], seed=1).samples([prompt] * (draws // 100), 100)
    rows, labels, items = drawn.draft_rows.flatten(), drawn.labels.flatten(0, 1), drawn.items.flatten(0, 1)
    own = rows == rows.mode().values
    assert own.sum() > 150
    at = TEMPLATES["parallel"].at
    for number, place in enumerate([*at("label"), at("item")[0]]):
        logps = drawn.logps.flatten(0, 1)[own, place]
        said = labels[own, number] if number < 3 else items[own, 0]
        if number == 3:  # the first code depends on the labels before it
            alike = (labels[own] == labels[own].mode(dim=0).values).all(dim=1)
            said, logps = said[alike], logps[alike]
        for value in said.unique():
            share, wanted = (said == value).double().mean(), logps[said == value][0].double().exp()
            error = (wanted * (1 - wanted) / len(said)).sqrt()
            assert abs(share - wanted) < 5 * error + 1e-3


def test_temperature_and_top_p_hold_for_codes_and_labels():
    template, prompt = TEMPLATES["parallel"], some_prompts(0)[1]
    ours = reflector(template)
    cold = ours.samples([prompt], 8, temperature=1e-3)
    assert len(cold.draft_rows.unique()) == len(cold.item_rows.unique()) == 1
    assert len(cold.labels.flatten(0, 1).unique(dim=0)) == 1
    narrow = ours.samples([prompt], 8, top_p=1e-6)
    assert torch.equal(narrow.items, cold.items)
    assert float(narrow.logps.abs().max()) < 1e-5  # the only thing that could be drawn
    warm = ours.samples([prompt], 4, temperature=2.0)
    logits = whole_logits(ours.decoder.model, prompt, template, *(
        part[0, 0].tolist() for part in (warm.drafts, warm.labels, warm.items)
    ))  # fmt: skip
    place, ids = template.at("label")[0], tokens_of(template).labels[0]
    wanted = (logits[place][ids] / 2).log_softmax(0)[warm.labels[0, 0, 0]]
    torch.testing.assert_close(warm.logps[0, 0, place].double(), wanted, atol=1e-5, rtol=1e-5)


# ---- what sees what


def states(template: Template, tokens: list[list[int]]) -> tuple[list[Tensor], Tensor]:
    """Hidden states of each pass for one branch after three draft codes, and of a code of the item."""
    branches = TreeBranches(some_model(), PromptBatch.of([[5, 6, 7]]))
    zero = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        for level in range(3):
            branches.advance(LEVELS[level][:1][None], zero)
        found = [
            branches.advance_block(torch.tensor([[ids]]), zero, which.block)[0, 0]
            for which, ids in zip(passes_of(template), tokens)
        ]
        return found, branches.advance(LEVELS[0][:1][None], zero)[0, 0]


def test_slots_are_blind_to_each_other_and_read_by_nobody():
    (first, labels), item = states(TEMPLATES["parallel"], [[30, 40, 41, 42], [50, 51, 52]])
    (other, same_labels), same_item = states(TEMPLATES["parallel"], [[30, 40, 49, 42], [50, 51, 52]])
    assert torch.equal(first[[0, 1, 3]], other[[0, 1, 3]])
    assert float((first[2] - other[2]).abs().max()) > 1e-2
    assert torch.equal(labels, same_labels)
    assert torch.equal(item, same_item)


@pytest.mark.parametrize("name", ["parallel", "causal"])
def test_the_correction_sees_draft_and_labels(name):
    template = TEMPLATES[name]
    tokens = {"parallel": [[30, 40, 41, 42], [50, 51, 52]], "causal": [[30, 40], [50, 41], [51, 42], [52]]}[name]
    _, item = states(template, tokens)
    for row, column in [(0, 0), *((r, c) for r, some in enumerate(tokens) for c, t in enumerate(some) if t >= 50)]:
        changed = [list(some) for some in tokens]
        changed[row][column] += 5
        assert float((states(template, changed)[1] - item).abs().max()) > 1e-3


def test_passes_are_as_few_as_the_template_allows():
    """L = 4, three slots: draft 0-3; parallel slots 4-6, labels 7-9; causal 4-9 in turns; GC one token more."""
    places = {name: [which.places for which in passes_of(template)] for name, template in TEMPLATES.items()}
    assert places["parallel"] == [(3, 4, 5, 6), (7, 8, 9)]
    assert places["causal"] == [(3, 4), (5, 6), (7, 8), (9,)]
    assert places["GC"] == [(3, 4)]
    assert [which.block.causal for which in passes_of(TEMPLATES["parallel"])] == [False, False]
    assert all(which.block.causal for name in ("causal", "GC") for which in passes_of(TEMPLATES[name]))


@pytest.mark.parametrize("kind", [TreeBranches, ExpandedBranches])
def test_a_causal_block_is_what_its_tokens_are_one_after_another(kind):
    model, batch = some_model(), PromptBatch.of([[5, 6, 7], [8]])
    tokens = torch.randint(3, 100, (2, 3, 2), generator=torch.Generator().manual_seed(0))
    parents, own = torch.tensor([[2, 0, 0], [1, 1, 2]]), torch.arange(3).expand(2, -1)
    found = []
    for size in (1, 2):
        branches = kind(model, batch)
        with torch.no_grad():
            branches.advance(tokens[..., 0], torch.zeros_like(own))
            if size == 1:
                steps = [branches.advance(tokens[..., 0], parents), branches.advance(tokens[..., 1], own)]
                hidden = torch.stack(steps, dim=2)
            else:
                block = Block(torch.ones(2, 2).tril().bool(), torch.tensor([1, 2]), torch.ones(2).bool(), 3)
                hidden = branches.advance_block(tokens, parents, block)
            found.append((hidden, branches.advance(tokens[..., 1], parents)))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_branches_that_are_not_needed_cost_nothing_and_change_nothing(monkeypatch):
    model, block = some_model(), passes_of(TEMPLATES["parallel"])[0].block
    tokens = torch.randint(3, 100, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    parents = torch.tensor([[4, 3, 0, 1, 2], [0, 0, 2, 2, 1]])
    needed = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]).bool()
    counts, advance = [], TreeBranches._advance
    monkeypatch.setattr(TreeBranches, "_advance", lambda self, t, *a: counts.append(t.size(1)) or advance(self, t, *a))
    found = []
    for some in (None, needed):
        branches = TreeBranches(model, PromptBatch.of([[5, 6, 7], [8]]))
        with torch.no_grad():
            branches.advance(tokens[..., 0], torch.zeros(2, 5, dtype=torch.int64))
            hidden = branches.advance_block(tokens, parents, block, some)
            after = branches.advance(tokens[:, :2, 0], torch.tensor([[1, 4], [0, 0]]))
        found.append((hidden[needed], after))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert counts == [5, 5, 2, 5, 2, 2]
    assert not hidden[0][~needed[0]].any()
