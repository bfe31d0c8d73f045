"""The shop's hidden facts, drawn from the seed: which items there are, what goes with what, who is popular.

Items are numbered 0 … N − 1, one leaf category after the other, inside it line after line, in a line tier after tier.
Leaf categories come in families of five (a department, in one style). All weights are plain factors, without exp or
matrix products, so that the same seed draws the same shop on every machine.
"""

import dataclasses
import math
from dataclasses import field

import numpy as np

from recllm.errors import UserError

TIERS = 4
FAMILY = 5  # leaf categories that complement each other
LEAF = 40  # items in a leaf category, about
BRANDS = 8
SYSTEMS = 4  # hidden standards, one a line: what fits what, told by no text
INTERESTS = np.array([0.34, 0.26, 0.19, 0.13, 0.08])  # weights of a customer's five leaf categories
POPULARITY = 0.45  # exponent of Zipf's law


@dataclasses.dataclass(frozen=True)
class ShopConfig:
    items: int = field(default=600, metadata={"help": "items in the catalogue, 60 or more."})
    users: int = field(default=2000, metadata={"help": "customers, 1 or more."})
    seed: int = field(default=0, metadata={"help": "the same seed makes the same shop."})
    stay: float = field(default=0.45, metadata={"help": "chance that the next item is of the same session."})
    complement: float = field(default=1.0, metadata={"help": "how strongly complements draw; 0: not at all."})
    upgrade: float = field(default=1.0, metadata={"help": "how strongly upgrades draw; 0: not at all."})
    loyalty: float = field(default=10.0, metadata={"help": "weight of the loved brand's items; 1: no loyalty."})
    thrift: float = field(default=2.0, metadata={"help": "power of the fit between price tier and budget; 0: no fit."})
    drift: float = field(default=0.1, metadata={"help": "chance, a session, that the taste, or the budget, moves on."})
    front_page: float = field(default=0.08, metadata={"help": "chance that a session starts at the bestsellers."})

    def __post_init__(self):
        def refuse(name: str, wanted: str):
            raise UserError(f"{name}: the shop needs {wanted}, not {getattr(self, name)!r}", fix=f"set {name} so")

        for name, least in (("items", 60), ("users", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                refuse(name, f"a whole number of {least} or more")
        for name, least, most in (
            *((name, 0, 1) for name in ("complement", "upgrade", "drift")),
            ("stay", 0, 0.95),
            ("loyalty", 1, 100),
            ("thrift", 0, 4),
            ("front_page", 0, 0.2),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                refuse(name, f"a number from {least} to {most}")


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no single truth of equality
class World:
    """N items in C leaf categories of at most S items each."""

    leaf: np.ndarray  # (N,) the item's leaf category
    line: np.ndarray  # (N,) the item's line within its leaf
    brand: np.ndarray  # (N,)
    tier: np.ndarray  # (N,) 0 … 3
    system: np.ndarray  # (N,) hidden
    quality: np.ndarray  # (N,) hidden, 0 … 1: what ratings are about
    popularity: np.ndarray  # (N,) Zipf
    upgrade: np.ndarray  # (N,) the next tier of the line, -1 at the top
    also_viewed: np.ndarray  # (N, 2) hidden: what is looked at next, in the same leaf
    members: np.ndarray  # (C, S) the leaf's items, -1 where there are fewer than S
    complements: np.ndarray  # (C, 2) which leaf is bought with which
    interests: np.ndarray  # (C, 5) the leaves of customers at each place of the ring of tastes
    bestsellers: np.ndarray  # (S,)
    appeal: np.ndarray  # (B, 4, C, S) weight of an item for a customer of that brand and budget, 0 where no item

    @property
    def items(self) -> int:
        return len(self.leaf)

    @property
    def leaves(self) -> int:
        return len(self.members)


def make_world(config: ShopConfig) -> World:
    rng = np.random.default_rng([config.seed, 0])
    N = config.items
    C = FAMILY * max(1, round(N / LEAF / FAMILY))
    leaf = np.arange(N) * C // N  # sizes differ by one at most
    start = np.searchsorted(leaf, np.arange(C))
    place = np.arange(N) - start[leaf]
    line, tier = place // TIERS, place % TIERS
    S = int(place.max()) + 1
    members = np.full((C, S), -1)
    members[leaf, place] = np.arange(N)

    brands = np.stack([rng.permutation(BRANDS) for _ in range(C)])  # no brand twice in a leaf while there are brands
    brand = brands[leaf, line % BRANDS]
    popularity = np.empty(N)
    popularity[rng.permutation(N)] = [round((rank + 1 + N / 100) ** -POPULARITY, 6) for rank in range(N)]
    popularity /= popularity.max()
    same_line = (leaf[1:] == leaf[:-1]) & (line[1:] == line[:-1])
    upgrade = np.append(np.where(same_line, np.arange(1, N), -1), -1)
    ring = rng.permutation(C)
    return World(
        leaf=leaf,
        line=line,
        brand=brand,
        tier=tier,
        system=rng.integers(SYSTEMS, size=(C, int(line.max()) + 1))[leaf, line],
        quality=rng.random(N),
        popularity=popularity,
        upgrade=upgrade,
        also_viewed=_also_viewed(rng, members, leaf, place),
        members=members,
        complements=_complements(rng, C),
        interests=ring[(np.arange(C)[:, None] + np.arange(len(INTERESTS))) % C],
        bestsellers=np.argsort(-popularity, kind="stable")[:S],
        appeal=_appeal(config, members, brand, tier, popularity),
    )


def _complements(rng: np.random.Generator, C: int) -> np.ndarray:
    """In each family a hidden circle; a leaf goes with the next two on it.   -> (C, 2)"""
    complements = np.empty((C, 2), int)
    for first in range(0, C, FAMILY):
        circle = first + rng.permutation(FAMILY)
        complements[circle] = np.stack([np.roll(circle, -1), np.roll(circle, -2)], axis=1)
    return complements


def _also_viewed(rng: np.random.Generator, members: np.ndarray, leaf: np.ndarray, place: np.ndarray) -> np.ndarray:
    """On a hidden circle through the leaf, the next two.   (C, S), (N,), (N,) -> (N, 2)"""
    following = np.empty((len(leaf), 2), int)
    for items in members:
        circle = rng.permutation(items[items >= 0])
        following[circle] = np.stack([np.roll(circle, -1), np.roll(circle, -2)], axis=1)
    return following


def _appeal(config: ShopConfig, members: np.ndarray, brand: np.ndarray, tier: np.ndarray, popularity: np.ndarray):
    """popularity × loyalty [of the loved brand] × (1 − d / 4)^(2 · thrift), d = |tier − budget|.

    -> (B, 4, C, S), indexed by loved brand and budget.
    """
    fit = np.array([round(math.pow((1 - d / TIERS), 2 * config.thrift), 9) for d in range(TIERS)])
    loved = np.where(np.arange(BRANDS)[:, None, None] == brand[members], config.loyalty, 1.0)  # (B, C, S)
    distance = abs(np.arange(TIERS)[:, None, None] - tier[members])  # (4, C, S)
    return loved[:, None] * fit[distance][None] * (popularity[members] * (members >= 0))
