"""The entropy floor: how well the next new item can be told at all, computed from the generator itself.

For each customer's last new item (the test target of leave-one-out over first events), with p the distribution that
the sampler drew it from, sorted downwards, p₁ ≥ p₂ ≥ …:

    Recall@k = Σ_{r ≤ k} p_r        NDCG@k = Σ_{r ≤ k} p_r / log₂(r + 1)        averaged over customers

No ranking can expect more. Two readers are measured. Both know every parameter and hidden fact of the shop:
the oracle knows z as well, the customer's taste, brand and budget; the observer infers z from the events before the
target, by Bayes' rule over all C · 8 · 4 values of z (a forward filter, exact). The observer's figure is the best that
any model of the history can reach; a model of fewer events, or one that must learn the parameters, stays below it.

The usual protocol keeps first events only, where carts and later payments are not to be seen. The clicks reader is a
filter that takes every anchor for the last item seen: not exact, so its score is one that can be reached, not a bound.
"""

import dataclasses

import numpy as np

from recllm.shop.story import (
    CHUNK,
    Hidden,
    State,
    Step,
    known_ways,
    new_in_leaf,
    next_items,
    walk,
    way_chances,
)
from recllm.shop.world import BRANDS, INTERESTS, TIERS, ShopConfig, World, make_world

SHORTEST = 5  # customers with fewer new items are left out, as 5-core filtering leaves them out
PAIRS = BRANDS * TIERS
BRAND, BUDGET = np.divmod(np.arange(PAIRS)[None], TIERS)  # (1, Z): every pair, for each customer
BLOCK = 64  # customers whose full distributions are in memory together


@dataclasses.dataclass(frozen=True)
class Floor:
    """Expected figures at k = 10, and what the ranking by p scored on the items that were really drawn."""

    users: int
    oracle_recall: float
    oracle_ndcg: float
    oracle_scored: float  # Recall@10 of the oracle's ranking on the drawn targets
    observer_recall: float
    observer_ndcg: float
    observer_scored: float
    clicks_scored: float  # Recall@10 of the clicks reader's ranking


def entropy_floor(config: ShopConfig, most_users: int = 2000) -> Floor:
    """Over the first `most_users` customers, those of SHORTEST new items or more."""
    world = make_world(config)
    figures: list[list[np.ndarray]] = [[], [], []]  # oracle, observer, clicks reader
    for chunk in range(-(-min(config.users, most_users) // CHUNK)):
        counted = min(CHUNK, most_users - chunk * CHUNK, config.users - chunk * CHUNK)
        start = np.full((counted, world.leaves, BRANDS, TIERS), 1 / (world.leaves * PAIRS))
        beliefs = [start, start.copy()]
        for index, step in enumerate(walk(world, config, chunk)):
            for rows in _blocks(step.rows < counted):
                part = step.take(rows)
                last = part.take(np.flatnonzero(part.final))
                if scored := index + 1 >= SHORTEST and len(last.item) > 0:
                    figures[0].append(_figures(known_distribution(world, config, last.state, last.z), last.item))
                for reader, (belief, seen_by) in enumerate(zip(beliefs, (_everything, _clicks)), 1):
                    if scored:
                        known = belief[last.rows]
                        guess = believed_distribution(world, config, seen_by(last.state), known)
                        figures[reader].append(_figures(guess, last.item))
                    seen = dataclasses.replace(part, state=seen_by(part.state))
                    belief[part.rows] = learn(world, config, belief[part.rows], seen)
    if not figures[0]:
        return Floor(0, *[0.0] * 7)
    oracle, observer, clicks = (np.concatenate(parts, axis=1) for parts in figures)
    means = [*oracle.mean(axis=1), *observer.mean(axis=1), clicks[2].mean()]
    return Floor(oracle.shape[1], *(round(float(mean), 6) for mean in means))


def _everything(state: State) -> State:
    return state


def _clicks(state: State) -> State:
    """Of a log of first clicks: nothing was put into a cart or paid."""
    nothing = np.zeros(len(state.last), int)
    return dataclasses.replace(state, anchor=state.last, strength=nothing, paid=nothing > 0, pending=nothing - 1)


def known_distribution(world: World, config: ShopConfig, state: State, z: Hidden) -> np.ndarray:
    """`next_items`, summed over the ways to an item.   -> (U, N)"""
    items, chances = next_items(world, config, state, z)
    return _scatter(items.reshape(len(items), -1), chances.reshape(len(items), -1), world.items)


def believed_distribution(world: World, config: ShopConfig, state: State, belief: np.ndarray) -> np.ndarray:
    """Σ_z belief(z) · P(i | seen, z).   (U, C, B, T) -> (U, N)

    The taste acts only through which five leaves are of interest, so the sum over it is taken before that over items.
    """
    U, C = belief.shape[:2]
    chances = way_chances(config, state)
    items, weights = known_ways(world, state, BRAND, BUDGET)
    shares, alive = _normalised(weights)  # (U, Z, 5, S), (U, Z, 5)
    spread = belief.reshape(U, C, PAIRS) / _open(world, state, chances, alive)  # belief(z) / (what is open to z)
    ways = np.einsum("uz,uzws->uws", spread.sum(axis=1), shares) * chances[:, :5, None]
    result = _scatter(items.reshape(U, -1), ways.reshape(U, -1), world.items)
    mass = np.zeros((U, C, PAIRS))  # of the interest in a leaf, by brand and budget
    for slot, share in enumerate(INTERESTS):
        mass[:, world.interests[:, slot]] += share * spread
    for leaf in range(C):
        items, appeal = new_in_leaf(world, state.seen, np.full(U, leaf), BRAND, BUDGET)
        own = np.einsum("uz,uzs->us", mass[:, leaf], _normalised(appeal)[0]) * chances[:, 5:]
        real = items[0] >= 0
        result[:, items[0][real]] += own[:, real]
    return result


def learn(world: World, config: ShopConfig, belief: np.ndarray, step: Step) -> np.ndarray:
    """Bayes' rule for one step, then the drift.   (U, C, B, T) -> (U, C, B, T)

    The observer saw the item and whether a session began (a gap in time); the funnel's events say nothing more of z.
    """
    state, began = step.state, (step.way > 0)[:, None]
    chances = way_chances(config, state)
    items, weights = known_ways(world, state, BRAND, BUDGET)
    shares, alive = _normalised(weights)
    of_way = (shares * (items == step.item[:, None, None])[:, None]).sum(axis=3) * chances[:, None, :5]  # (U, Z, 5)
    known = np.where(began, of_way[:, :, 1:].sum(axis=2), of_way[:, :, 0])  # (U, Z)
    leaf = world.leaf[step.item]
    items, appeal = new_in_leaf(world, state.seen, leaf, BRAND, BUDGET)
    in_leaf = (_normalised(appeal)[0] * (items == step.item[:, None])[:, None]).sum(axis=2) * chances[:, 5:] * began
    taste = ((world.interests[None] == leaf[:, None, None]) * INTERESTS).sum(axis=2)  # (U, C)
    likelihood = known[:, None] + taste[:, :, None] * in_leaf[:, None]  # (U, C, Z)
    likelihood /= _open(world, state, chances, alive)
    after = belief * likelihood.reshape(belief.shape)
    total = after.sum(axis=(1, 2, 3), keepdims=True)
    belief = np.where(total > 0, after / np.where(total > 0, total, 1), belief)  # 0 only for a reader of clicks alone
    return np.where(began[:, :, None, None], _drift(config, belief), belief)


def _drift(config: ShopConfig, belief: np.ndarray) -> np.ndarray:
    """The transition of `story._drifted` after the first item of a session."""
    belief = (1 - config.drift) * belief + config.drift * np.roll(belief, 1, axis=1)
    up, down = config.drift, min(config.drift / 2, 1 - config.drift)
    moved = (1 - up - down) * belief
    moved[..., 1:] += up * belief[..., :-1]
    moved[..., -1] += up * belief[..., -1]
    moved[..., :-1] += down * belief[..., 1:]
    moved[..., 0] += down * belief[..., 0]
    return moved


def _normalised(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares within each way, and whether it is open.   (…, S) -> (…, S), (…)"""
    total = weights.sum(axis=-1)
    return weights / np.where(total > 0, total, 1)[..., None], total > 0


def _open(world: World, state: State, chances: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The chance of all open ways together, by taste and pair: what `next_items` divides by.   -> (U, C, Z)"""
    left = (~state.seen[:, world.members] & (world.members >= 0)).any(axis=2)  # (U, C)
    interest = (left[:, world.interests] * INTERESTS).sum(axis=2)  # (U, C)
    others = (chances[:, None, :5] * alive).sum(axis=2)  # (U, Z)
    return others[:, None] + interest[:, :, None] * chances[:, 5, None, None]


def _scatter(items: np.ndarray, values: np.ndarray, N: int) -> np.ndarray:
    """(U, M), (U, M) -> (U, N), the values of each item summed; item -1 is none."""
    U = len(items)
    places = (np.arange(U)[:, None] * N + items)[items >= 0]
    return np.bincount(places, values[items >= 0], minlength=U * N).reshape(U, N)


def _blocks(wanted: np.ndarray) -> list[np.ndarray]:
    rows = np.flatnonzero(wanted)
    return np.array_split(rows, -(-len(rows) // BLOCK)) if len(rows) else []


def _figures(chances: np.ndarray, target: np.ndarray, k: int = 10) -> np.ndarray:
    """Expected Recall@k, expected NDCG@k, and whether the target is among the first k.   (U, N), (U,) -> (3, U)"""
    best = np.argsort(-chances, axis=1, kind="stable")[:, :k]
    top = np.take_along_axis(chances, best, axis=1)
    discount = np.log2(np.arange(2, k + 2))
    return np.stack([top.sum(axis=1), (top / discount).sum(axis=1), (best == target[:, None]).any(axis=1)])
