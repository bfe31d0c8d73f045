"""The floor is what the sampler draws from, and no more: against Monte Carlo, and against a slow filter."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from recllm.shop import ShopConfig, entropy_floor
from recllm.shop.floor import believed_distribution, known_distribution, learn
from recllm.shop.story import Hidden, State, next_items, walk, way_chances
from recllm.shop.world import BRANDS, TIERS, make_world

DEFAULT = ShopConfig()
CROWDED = ShopConfig(items=60, users=1000, stay=0.9)  # customers see most of a leaf: ways close all the time


@functools.cache
def floor_of(config: ShopConfig):
    return entropy_floor(config)


@functools.cache
def first_events(config: ShopConfig) -> list[list[int]]:
    sequences: list[list[int]] = [[] for _ in range(config.users)]
    world = make_world(config)
    for chunk in range(-(-config.users // 1024)):
        for step in walk(world, config, chunk):
            for row, item in zip(step.rows, step.item):
                sequences[1024 * chunk + row].append(int(item))
    return [sequence for sequence in sequences if len(sequence) >= 5]


@pytest.mark.parametrize("config", [DEFAULT, CROWDED, ShopConfig(seed=5, users=1100, items=300)])
def test_the_drawn_targets_score_as_the_floor_foretells(config):
    """Recall@10 scored is a mean of coin throws whose chances average to the floor: within 4 standard errors."""
    floor = floor_of(config)
    assert floor.users == len(first_events(config))
    error = 0.5 / np.sqrt(floor.users)
    assert abs(floor.oracle_scored - floor.oracle_recall) < 4 * error
    assert abs(floor.observer_scored - floor.observer_recall) < 4 * error
    assert floor.observer_recall < floor.oracle_recall + 0.005
    assert 0 < floor.observer_ndcg < floor.observer_recall


def test_many_draws_from_one_state_fall_as_its_distribution_says():
    """One customer's fourth step, drawn 40,000 times by the sampler's own rule: χ² over items, and Recall@10."""
    world = make_world(CROWDED)
    step = next(itertools.islice(walk(world, CROWDED, 0), 3, None))
    one = step.take(np.zeros(1, int))
    p = known_distribution(world, CROWDED, one.state, one.z)[0]
    items, chances = next_items(world, CROWDED, one.state, one.z)
    drawn = np.random.default_rng(0).choice(items.size, size=40_000, p=chances.ravel() / chances.sum())
    counts = np.bincount(items.ravel()[drawn], minlength=world.items)
    expected = 40_000 * p
    assert counts[p == 0].sum() == 0
    usual = expected > 5
    chi2 = ((counts - expected)[usual] ** 2 / expected[usual]).sum()
    assert abs(chi2 - usual.sum()) < 5 * np.sqrt(2 * usual.sum())
    best = np.argsort(-p)[:10]
    assert abs(counts[best].sum() / 40_000 - p[best].sum()) < 4 * 0.5 / np.sqrt(40_000)


@pytest.mark.parametrize("config", [DEFAULT, CROWDED, ShopConfig(complement=1.0, upgrade=1.0, front_page=0.2)])
def test_the_next_item_is_new_and_its_chances_sum_to_one(config):
    world = make_world(config)
    for step in walk(world, config, 0):
        assert way_chances(config, step.state).min() >= 0
        p = known_distribution(world, config, step.state, step.z)
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)
        assert p.min() >= 0
        assert p[step.state.seen].sum() == 0
        assert (p[np.arange(len(p)), step.item] > 0).all()


@pytest.mark.parametrize("config", [ShopConfig(items=60, users=6, stay=0.9, seed=2), ShopConfig(items=240, users=4)])
def test_the_observers_belief_is_bayes_rule_over_every_hidden_state(config):
    """Slow reference: each z one by one through `next_items`, the drift as a loop over where z may go."""
    world = make_world(config)
    states = [(c, b, t) for c in range(world.leaves) for b in range(BRANDS) for t in range(TIERS)]
    place = {state: number for number, state in enumerate(states)}
    z = Hidden(*(np.array(part) for part in zip(*states)))
    shape = (world.leaves, BRANDS, TIERS)
    quick = np.full((config.users, *shape), 1 / len(states))
    slow = np.full((config.users, len(states)), 1 / len(states))
    for index, step in enumerate(walk(world, config, 0)):
        if index > 11:
            break
        rows = step.rows
        foretold = believed_distribution(world, config, step.state, quick[rows])
        quick[rows] = learn(world, config, quick[rows], step)
        for place_in_step, row in enumerate(rows):
            state: State = step.state.take(np.full(len(states), place_in_step))
            items, chances = next_items(world, config, state, z)
            p = known_distribution(world, config, state, z)
            np.testing.assert_allclose(foretold[place_in_step], slow[row] @ p, atol=1e-12)
            began = step.way[place_in_step] > 0
            open_ways = slice(1, None) if began else slice(0, 1)
            seen = (chances * (items == step.item[place_in_step]))[:, open_ways].sum(axis=(1, 2))
            posterior = slow[row] * seen
            posterior /= posterior.sum()
            slow[row] = _drift_one_by_one(config, posterior, states, place, world.leaves) if began else posterior
            np.testing.assert_allclose(quick[row].ravel(), slow[row], atol=1e-12)


def _drift_one_by_one(config, belief, states, place, leaves):
    moved = np.zeros_like(belief)
    for chance, (taste, brand, budget) in zip(belief, states):
        for new_taste, share in (((taste + 1) % leaves, config.drift), (taste, 1 - config.drift)):
            for new_budget, part in (
                (min(budget + 1, TIERS - 1), config.drift),
                (max(budget - 1, 0), config.drift / 2),
                (budget, 1 - 1.5 * config.drift),
            ):
                moved[place[new_taste, brand, new_budget]] += chance * share * part
    return moved


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_methods_separate_on_the_default_shop(seed):
    """Popularity < one-step counts < neighbours by recency < observer < oracle, each step a clear one."""
    config = replace(DEFAULT, seed=seed)
    sequences, N = first_events(config), config.items
    past, target = [sequence[:-1] for sequence in sequences], [sequence[-1] for sequence in sequences]
    popularity = np.bincount(np.concatenate(past), minlength=N).astype(float)
    follows, together = np.zeros((N, N)), np.zeros((N, N))
    for sequence in past:
        np.add.at(follows, (sequence[:-1], sequence[1:]), 1)
        together[np.ix_(sequence, sequence)] += 1
    np.fill_diagonal(together, 0)
    cosine = together / np.sqrt(np.outer(popularity, popularity))

    def recall(score) -> float:
        hits = 0
        for sequence, wanted in zip(past, target):
            scores = score(sequence) + 1e-6 * popularity
            scores[sequence] = -1
            hits += wanted in np.argsort(-scores, kind="stable")[:10]
        return hits / len(past)

    def fading(sequence):
        return (cosine[sequence] * 0.7 ** np.arange(len(sequence))[::-1, None]).sum(axis=0)

    floor = floor_of(config)
    figures = {
        "popularity": recall(lambda sequence: popularity.copy()),
        "one-step counts": recall(lambda sequence: follows[sequence[-1]]),
        "item-kNN": recall(lambda sequence: cosine[sequence].sum(axis=0)),
        "item-kNN, fading": recall(fading),
    }
    print(figures, floor)  # the table of docs/shop.md: pytest -s
    assert figures["popularity"] < 0.065
    assert 0.10 < figures["one-step counts"] < 0.20
    assert 0.10 < figures["item-kNN"] < 0.20
    assert 0.20 < figures["item-kNN, fading"] < 0.25
    assert figures["item-kNN, fading"] + 0.1 < floor.clicks_scored < floor.observer_scored
    assert floor.observer_recall > 1.8 * figures["item-kNN, fading"]
    assert 0.45 < floor.observer_recall < floor.oracle_recall < 0.6
