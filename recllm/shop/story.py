"""The customers' story: from what a customer saw and did, and what we cannot see of her, to her next new item.

    P(next new item = i | seen, z) = Σ_k m_k · w_k(i) [i is new] / Σ_j w_k(j) [j is new]

z is hidden: (place on the ring of tastes, loved brand, budget). The ways k to the next item, and the weights w_k:

    continue     the session goes on in the last item's leaf      appeal(i; brand, budget) × ALSO_VIEWED if i follows it
    complement   a session in a leaf that goes with the anchor's  appeal(i; brand, budget) × SAME_SYSTEM if i fits it
    upgrade      the next tier of the anchor's line               1
    front page   a session at the bestsellers                     popularity
    interest     a session in one of the customer's five leaves   appeal(i; brand, budget)

The anchor is what she last put in the cart or paid, or else what she last saw. A way without a new item is closed and
the others share its chance. `next_items` is this formula; the sampler draws from it and the floor sums it.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from recllm.shop.world import BRANDS, INTERESTS, TIERS, ShopConfig, World

CHUNK = 1024  # customers simulated together; each chunk has its own generator
LONGEST = 40  # new items of one customer
ALSO_VIEWED = 2.0
SAME_SYSTEM = 10.0
FIRST_COMPLEMENT = 0.65  # the rest is the second one's
STAY_AFTER_PAY = 0.25  # of `stay`
COMPLEMENT_PULL = np.array([0.4, 0.55, 0.6])  # of a new session: by an anchor only seen, in the cart, paid
UPGRADE_PULL = np.array([0.0, 0.12, 0.2])


@dataclasses.dataclass
class State:
    """What anyone who reads the log knows of U customers before their next new item. -1: none yet."""

    seen: np.ndarray  # (U, N) bool
    last: np.ndarray  # (U,) the last new item
    anchor: np.ndarray  # (U,)
    strength: np.ndarray  # (U,) 0 the anchor was seen, 1 it was put into the cart, 2 it was paid
    compared: np.ndarray  # (U,) items of the last item's leaf in this session, before it
    paid: np.ndarray  # (U,) bool: the last step ended with a payment
    pending: np.ndarray  # (U,) in the cart, not paid

    @classmethod
    def fresh(cls, U: int, N: int) -> "State":
        none = np.full(U, -1)
        no = np.zeros(U, bool)
        return cls(np.zeros((U, N), bool), none, none, np.zeros(U, int), np.zeros(U, int), no, none)

    def take(self, rows: np.ndarray) -> "State":
        return State(*(getattr(self, part.name)[rows] for part in dataclasses.fields(self)))


@dataclasses.dataclass
class Hidden:
    """z, of U customers."""

    taste: np.ndarray  # (U,) 0 … C − 1, a place on the ring
    brand: np.ndarray  # (U,)
    budget: np.ndarray  # (U,) 0 … 3

    def take(self, rows: np.ndarray) -> "Hidden":
        return Hidden(self.taste[rows], self.brand[rows], self.budget[rows])


def fits(world: World, state: State, items: np.ndarray) -> np.ndarray:
    """Is the item the anchor's complement in a leaf that goes with it, or its upgrade?   (U,) -> (U,)"""
    anchor = state.anchor
    goes = (world.complements[world.leaf[anchor]] == world.leaf[items][:, None]).any(axis=1)
    complement = goes & (world.system[anchor] == world.system[items])
    return (anchor >= 0) & (complement | (world.upgrade[anchor] == items))


def way_chances(config: ShopConfig, state: State) -> np.ndarray:
    """continue, first and second complement, upgrade, front page, interests: before closed ways.   -> (U, 6)"""
    started = state.last >= 0
    stay = np.where(started, config.stay * np.where(state.paid, STAY_AFTER_PAY, 1.0), 0.0)
    complement = np.where(started, config.complement * COMPLEMENT_PULL[state.strength], 0.0)
    upgrade = np.where(started, config.upgrade * UPGRADE_PULL[state.strength], 0.0)
    front = np.full(len(stay), config.front_page)
    interests = 1 - complement - upgrade - front
    shares = [FIRST_COMPLEMENT * complement, (1 - FIRST_COMPLEMENT) * complement, upgrade, front, interests]
    return np.stack([stay, *((1 - stay) * share for share in shares)], axis=1)


def new_in_leaf(world: World, seen: np.ndarray, leaf: np.ndarray, brand: np.ndarray, budget: np.ndarray):
    """The leaf's items and their appeal under Z pairs of brand and budget, 0 for what was seen.

    (U, N), (U,), (U, Z), (U, Z) -> items (U, S), weights (U, Z, S)
    """
    items = world.members[leaf]
    new = ~np.take_along_axis(seen, items, axis=1)
    return items, world.appeal[brand, budget, leaf[:, None]] * new[:, None]


def known_ways(world: World, state: State, brand: np.ndarray, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The five ways that do not depend on the taste.   (U, Z) × 2 -> items (U, 5, S), weights (U, Z, 5, S)"""
    U, Z, S = len(state.last), brand.shape[1], world.members.shape[1]
    first, second = world.complements[world.leaf[state.anchor]].T
    items, weights = np.empty((U, 5, S), int), np.zeros((U, Z, 5, S))
    for way, leaf in enumerate((world.leaf[state.last], first, second)):
        items[:, way], weights[:, :, way] = new_in_leaf(world, state.seen, leaf, brand, budget)
    follows = (items[:, 0, :, None] == world.also_viewed[state.last][:, None]).any(axis=2)
    weights[:, :, 0] *= np.where(follows, ALSO_VIEWED, 1.0)[:, None]
    fitting = world.system[items[:, 1:3]] == world.system[state.anchor][:, None, None]
    weights[:, :, 1:3] *= np.where(fitting, SAME_SYSTEM, 1.0)[:, None]
    items[:, 3] = -1
    items[:, 3, 0] = upgrade = world.upgrade[state.anchor]
    open_upgrade = (state.anchor >= 0) & (upgrade >= 0) & ~state.seen[np.arange(U), upgrade]
    weights[:, :, 3, 0] = open_upgrade[:, None]
    items[:, 4] = world.bestsellers
    weights[:, :, 4] = (world.popularity[world.bestsellers] * ~state.seen[:, world.bestsellers])[:, None]
    return items, weights


def next_items(world: World, config: ShopConfig, state: State, z: Hidden) -> tuple[np.ndarray, np.ndarray]:
    """The distribution of the next new item: way 0 continues, 1–4 as `known_ways`, 5–9 the customer's interests.

    -> items (U, 10, S), chances (U, 10, S) that sum to 1 for each customer; an item may stand on several ways.
    """
    chances = way_chances(config, state)
    chances = np.concatenate([chances[:, :5], chances[:, 5:] * INTERESTS], axis=1)  # (U, 10)
    brand, budget = z.brand[:, None], z.budget[:, None]
    items, weights = known_ways(world, state, brand, budget)
    own = [new_in_leaf(world, state.seen, leaf, brand, budget) for leaf in world.interests[z.taste].T]
    items = np.concatenate([items, np.stack([items for items, _ in own], axis=1)], axis=1)
    weights = np.concatenate([weights[:, 0], np.concatenate([weights for _, weights in own], axis=1)], axis=1)
    total = weights.cumsum(axis=2)[:, :, -1]  # a running sum has one order on every machine
    chances = chances * (total > 0)
    chances = chances / chances.cumsum(axis=1)[:, -1:]
    return items, weights * (chances / np.where(total > 0, total, 1))[:, :, None]


# -- the walk ---------------------------------------------------------------------------------------------------------

FUNNEL = ("first", "back", "favourite", "cart", "pay", "return", "pay_pending")  # a step's events, in order


@dataclasses.dataclass
class Step:
    """One new item of each of A customers, and what came with it. `state` and `z` are from before the step."""

    rows: np.ndarray  # (A,) which customers of the chunk
    state: State
    z: Hidden
    final: np.ndarray  # (A,) bool: it is the customer's last new item
    item: np.ndarray  # (A,)
    way: np.ndarray  # (A,) 0: the session went on
    fit: np.ndarray  # (A,) bool: the anchor's complement or upgrade
    direct: np.ndarray  # (A,) bool: paid at once, without a click
    happened: np.ndarray  # (A, 7) bool, by FUNNEL
    subject: np.ndarray  # (A, 7) the item of each event

    def take(self, rows: np.ndarray) -> "Step":
        parts = [getattr(self, part.name) for part in dataclasses.fields(self)]
        return Step(*(part.take(rows) if isinstance(part, State | Hidden) else part[rows] for part in parts))


def walk(world: World, config: ShopConfig, chunk: int) -> Iterator[Step]:
    """The steps of customers CHUNK · chunk and following, all customers' first, then all second ones …"""
    U = min(CHUNK, config.users - chunk * CHUNK)
    rng = np.random.default_rng([config.seed, 1, chunk])
    lengths = _lengths(rng, U, world.items)
    rows = np.arange(U)
    state = State.fresh(U, world.items)
    z = Hidden(rng.integers(world.leaves, size=U), rng.integers(BRANDS, size=U), rng.integers(TIERS, size=U))
    for index in range(int(lengths.max())):
        going = lengths[rows] > index
        if not going.all():
            rows, state, z = rows[going], state.take(going), z.take(going)
        step = _step(world, config, rng, rows, state, z, lengths[rows] == index + 1)
        yield step
        state = _after(world, step)
        z = _drifted(world, config, rng, z, step.way > 0)


def _lengths(rng: np.random.Generator, U: int, N: int) -> np.ndarray:
    """New items a customer: 14 on average, one in 33 below 5, some up to LONGEST.   -> (U,)"""
    usual = 5 + rng.integers(9, size=U) + rng.integers(9, size=U)
    long = np.where(rng.random(U) < 0.15, rng.integers(LONGEST - 21, size=U), 0)
    return np.where(rng.random(U) < 0.03, 1 + rng.integers(4, size=U), usual + long)


def _step(world, config, rng, rows, state: State, z: Hidden, final: np.ndarray) -> Step:
    items, chances = next_items(world, config, state, z)
    A, _, S = items.shape
    edges = chances.reshape(A, -1).cumsum(axis=1)
    drawn = (edges <= rng.random(A)[:, None] * edges[:, -1:]).sum(axis=1)
    item, way = items.reshape(A, -1)[np.arange(A), drawn], drawn // S

    fit = fits(world, state, item)
    near = (way == 0) & (state.last >= 0)
    compared = np.where(near, np.minimum(state.compared + 1, 3), 0)
    luck = rng.random((A, 7))
    direct = fit & (luck[:, 0] < 0.04)
    cart = ~direct & (luck[:, 3] < 0.03 + 0.05 * compared + 0.15 * fit)
    pay = cart & (luck[:, 4] < 0.12)
    late = (way > 0) & (state.pending >= 0) & (luck[:, 6] < 0.2)
    back = (state.last >= 0) & (luck[:, 1] < 0.15)
    favourite = ~direct & (luck[:, 2] < 0.05 + 0.05 * fit)
    happened = np.stack([np.ones(A, bool), back, favourite, cart, pay, late, late], axis=1)
    subject = np.stack([item, state.last, item, item, item, state.pending, state.pending], axis=1)
    return Step(rows, state, z, final, item, way, fit, direct, happened, subject)


def _after(world: World, step: Step) -> State:
    """What the log tells once the step's events are over. The order is that of FUNNEL: a late payment is the last."""
    state, item = step.state, step.item
    _, _, _, cart, pay, _, late = step.happened.T
    pay = pay | step.direct
    viewed = state.strength == 0
    strength = np.select([late | pay, cart], [2, 1], state.strength)
    anchor = np.select([late, pay | cart | viewed], [state.pending, item], state.anchor)
    pending = np.select([cart & ~pay, late], [item, -1], state.pending)
    seen = state.seen.copy()
    seen[np.arange(len(item)), item] = True
    compared = np.where(step.way == 0, state.compared + 1, 0)
    return State(seen, item, anchor, strength, compared, pay | late, pending)


def _drifted(world: World, config: ShopConfig, rng: np.random.Generator, z: Hidden, started: np.ndarray) -> Hidden:
    """After the first item of a session, taste moves on by a place, and the budget by a tier, twice as often up."""
    luck = rng.random((len(started), 2))
    taste = (z.taste + (started & (luck[:, 0] < config.drift))) % world.leaves
    up = started & (luck[:, 1] < config.drift)
    down = started & ~up & (luck[:, 1] > 1 - config.drift / 2)
    return Hidden(taste, z.brand, np.clip(z.budget + up - down.astype(int), 0, TIERS - 1))
