"""Samples follow the distribution that is stated, with the log-probabilities that they were drawn with."""

import numpy as np
import pytest
import torch
from reference import LEVELS, SIZES, item_scores, some_codes, some_model, some_prompts

from recllm.decoding import Decoder
from recllm.decoding.search import conditional_gumbel, keep_top_p
from recllm.errors import UserError
from recllm.trie import SemanticIdTrie

PROMPT = some_prompts(0)[1]
DRAWS = 6_000


def decoder(**settings) -> Decoder:
    return Decoder(some_model(), LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES), **settings)


def shares(rows: torch.Tensor, items: int) -> torch.Tensor:
    return torch.bincount(rows.flatten(), minlength=items).double() / rows.numel()


def assert_follows(seen: torch.Tensor, wanted: torch.Tensor, draws: int) -> None:
    """Every share within five standard errors; a share of ten items a thousand times is not chance."""
    error = (wanted * (1 - wanted) / draws).sqrt()
    assert ((seen - wanted).abs() <= 5 * error + 1e-4).all()


def test_with_replacement_items_come_as_often_as_they_are_probable():
    codes = some_codes()
    wanted = item_scores(some_model(), PROMPT, codes, "children").exp()
    found = decoder().samples([PROMPT] * (DRAWS // 50), 50)
    assert_follows(shares(found.rows, len(codes)), wanted, DRAWS)
    # Without temperature and cut, what was drawn from is the distribution over items itself.
    torch.testing.assert_close(found.logps.sum(-1).exp().double(), wanted[found.rows], atol=1e-5, rtol=1e-3)


def test_temperature_sharpens_the_logits_of_the_children():
    codes, model = some_codes(), some_model()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    first = np.unique(codes[:, 0])
    wanted = torch.softmax(logits[LEVELS[0][first]].double() / 0.5, 0)
    found = decoder().samples([PROMPT] * (DRAWS // 50), 50, temperature=0.5)
    assert_follows(shares(found.codes[..., 0], 8)[first], wanted, DRAWS)
    place = torch.from_numpy(np.searchsorted(first, found.codes[..., 0].numpy()))
    torch.testing.assert_close(found.logps[..., 0].double(), wanted.log()[place], atol=1e-5, rtol=1e-4)


def test_top_p_draws_from_the_fewest_that_reach_it():
    logps = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    torch.testing.assert_close(keep_top_p(logps, 0.7).exp(), torch.tensor([0.625, 0.375, 0.0, 0.0]))
    torch.testing.assert_close(keep_top_p(logps, 0.45).exp(), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(keep_top_p(logps.flip(0), 0.79).exp(), torch.tensor([0.0, 0, 0.375, 0.625]))
    assert torch.equal(keep_top_p(logps, 1.0), logps)
    found = decoder().samples([PROMPT] * 10, 50, top_p=0.3)
    everything = decoder().samples([PROMPT] * 10, 50)
    assert len(found.rows.unique()) < len(everything.rows.unique())


def test_scores_are_those_of_the_normaliser_not_of_the_draw():
    codes = some_codes()
    for normaliser in ("full", "level", "children"):
        wanted = item_scores(some_model(), PROMPT, codes, normaliser)
        for replacement in (True, False):
            found = decoder(normaliser=normaliser).samples([PROMPT], 20, temperature=0.7, replacement=replacement)
            torch.testing.assert_close(found.scores[0].double(), wanted[found.rows[0]], atol=1e-4, rtol=0)


def test_without_replacement_all_differ_and_the_first_is_a_fair_draw():
    codes = some_codes()
    wanted = item_scores(some_model(), PROMPT, codes, "children").exp()
    prompts = [PROMPT] * 1500
    found = decoder().samples(prompts, 6, replacement=False)
    assert all(len(set(row)) == 6 for row in found.rows.tolist())
    assert_follows(shares(found.rows[:, 0], len(codes)), wanted, 1500)
    # The second, given the first, is drawn from what is left: the share of pairs (i, j) is p_i p_j / (1 − p_i).
    best, second = wanted.topk(2).indices.tolist()
    pair = ((found.rows[:, 0] == best) & (found.rows[:, 1] == second)).double().mean()
    probability = wanted[best] * wanted[second] / (1 - wanted[best])
    assert abs(pair - probability) < 5 * (probability / 1500).sqrt()


def test_without_replacement_takes_every_item_when_asked_for_all():
    codes = some_codes()
    found = decoder().samples([PROMPT], len(codes) + 5, replacement=False)
    assert sorted(found.rows[0, : len(codes)].tolist()) == list(range(len(codes)))
    assert (found.rows[0, len(codes) :] == -1).all()


def test_conditional_noise_has_the_parents_as_its_maximum():
    logps = torch.randn(5, 3, 7)
    logps[0, 0, :3] = float("-inf")
    noisy = logps - torch.log(-torch.log(torch.rand(logps.shape)))
    top = torch.randn(5, 3)
    keys = conditional_gumbel(noisy, top)
    torch.testing.assert_close(keys.amax(-1), top)
    assert torch.equal(keys.argsort(-1), noisy.argsort(-1))
    assert torch.isneginf(keys[0, 0, :3]).all()


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_depend_on_seed_and_place_not_on_batches(replacement):
    prompts = some_prompts(7, (3, 12, 1, 7, 5))
    draw = {"answers": 6, "replacement": replacement}
    together = decoder(batch_size=5).samples(prompts, seed=4, **draw)
    alone = decoder(batch_size=2).samples(prompts, seed=4, **draw)
    assert torch.equal(together.rows, alone.rows)
    assert not torch.equal(together.rows, decoder().samples(prompts, seed=5, **draw).rows)


def test_two_equal_prompts_draw_differently():
    found = decoder().samples([PROMPT, PROMPT], 10)
    assert not torch.equal(found.rows[0], found.rows[1])


@pytest.mark.parametrize("replacement", [True, False])
def test_filters_and_exclusions_hold_for_every_draw(replacement):
    codes = some_codes()
    allowed = torch.from_numpy(np.random.default_rng(1).random(len(codes)) < 0.5)
    banned = allowed.nonzero().flatten()[:8].tolist()
    found = decoder().samples([PROMPT, PROMPT], 15, replacement=replacement, allowed=allowed, exclude=[banned, []])
    assert allowed[found.rows[found.rows >= 0]].all()
    assert not set(banned) & set(found.rows[0].tolist())
    assert set(banned) & set(found.rows[1].tolist())


def test_exclusions_of_each_prompt_are_exact():
    """Whole branches die with their last item; the others' ranking stays."""
    codes, model, prompts = some_codes(), some_model(), some_prompts(0)
    exclude = [[*np.flatnonzero(codes[:, 0] == 2).tolist(), 0, 1], [], [5, 5, 9]]
    for allowed in (None, torch.arange(len(codes)) % 3 > 0):
        found = decoder().beams(prompts, len(codes), allowed, exclude)
        for place, prompt in enumerate(prompts):
            keep = torch.ones(len(codes), dtype=torch.bool) if allowed is None else allowed.clone()
            keep[exclude[place]] = False
            slow = item_scores(model, prompt, codes, "level", keep)
            count = int(keep.sum())
            assert found.rows[place, :count].tolist() == slow.argsort(descending=True)[:count].tolist()
            assert (found.rows[place, count:] == -1).all()


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_that_draw_nothing_are_refused(settings):
    with pytest.raises(UserError, match="temperature"):
        decoder().samples([PROMPT], 3, **settings)
