"""What to do when several items get the same codes. Each policy returns codes that are distinct and prefix-free.

extra-level      every item of a colliding bucket gets one code more (0, 1, 2, …); the others do not
extra-level-all  every item gets it (0 where nothing collides): all IDs are equally deep
reassign         the best-fitting item keeps the codes, the others move to free last codes; what stays gets a level
"""

import itertools

import numpy as np
from torch import Tensor, from_numpy

from recllm.errors import UserError
from recllm.semantic_ids.prefixes import PADDING, tuple_keys
from recllm.semantic_ids.quantizer import Quantizer

POLICIES = ("extra-level", "extra-level-all", "reassign", "refuse")
CELLS = 32_000_000  # distances held at a time while items are reassigned (128 MB)


def resolve(
    codes: np.ndarray, sizes: tuple[int, ...], policy: str, quantizer: Quantizer | None = None, embeddings=None
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Distinct, prefix-free codes and their sizes. (N, L) -> (N, L) or (N, L + 1)

    "reassign" needs the quantizer and the embeddings (N, D). "refuse" changes nothing: the table says what collides.
    """
    if policy == "refuse":
        return codes, sizes
    if policy == "reassign":
        if quantizer is None or embeddings is None:
            raise UserError("the collision policy reassign needs embeddings and their quantizer", fix="use extra-level")
        codes, staying = reassign(codes, quantizer, embeddings)
        if not staying:
            return codes, sizes
        policy = "extra-level"
    return add_level(codes, sizes, policy)


def buckets(key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted by key (stable), and for each of these: the place within its bucket, and the bucket's size."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(key)])
    return order, np.arange(len(key)) - np.repeat(starts, counts), np.repeat(counts, counts)


def add_level(codes: np.ndarray, sizes: tuple[int, ...], policy: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """The policies that need no embedding. (N, L) -> (N, L) or (N, L + 1), and the sizes."""
    if policy not in ("extra-level", "extra-level-all"):
        raise UserError(f"{policy!r} is no collision policy", fix=f"choose one of {', '.join(POLICIES)}")
    order, place, count = buckets(tuple_keys(codes, sizes))
    chosen = np.ones(len(codes), bool) if policy == "extra-level-all" else count > 1
    rows, extra = order[chosen], place[chosen]
    if not len(rows):
        return codes, sizes
    depth = (codes[rows] != PADDING).sum(axis=1)
    codes = np.pad(codes, ((0, 0), (0, 1)), constant_values=PADDING)
    codes[rows, depth] = extra  # right after the item's own codes, whatever its depth
    needed = np.zeros(len(sizes) + 1, np.int64)
    np.maximum.at(needed, depth, extra + 1)
    sizes = tuple(np.maximum([*sizes, 0], needed).tolist())
    return (codes, sizes) if sizes[-1] else (codes[:, :-1], sizes[:-1])


def reassign(codes: np.ndarray, quantizer: Quantizer, embeddings: Tensor) -> tuple[np.ndarray, int]:
    """Move items of colliding buckets to free last codes of the same prefix, at the least cost. (N, L) -> (N, L)

    In each bucket the item nearest to its centroid keeps the codes. The other items of a prefix and its free codes are
    paired greedily: the cheapest pair first. Items for which no code is left stay where they are:
    how many is returned too.
    """
    last, size = codes.shape[1] - 1, quantizer.sizes[-1]
    prefix = tuple_keys(codes[:, :last], quantizer.sizes[:last])
    order, _, count = buckets(prefix * size + codes[:, last])
    colliding = order[count > 1]
    if not len(colliding):
        return codes, 0
    codes, staying = codes.copy(), 0
    # Only prefixes with collisions matter from here on: number them, and mark which of their codes are taken.
    names = np.unique(prefix[colliding])
    number = np.searchsorted(names, prefix).clip(max=len(names) - 1)
    inside = names[number] == prefix
    taken = np.zeros((len(names), size), bool)
    taken[number[inside], codes[inside, last]] = True
    colliding = colliding[np.argsort(number[colliding], kind="stable")]
    ends = np.flatnonzero(np.r_[number[colliding][1:] != number[colliding][:-1], True]) + 1
    for rows in np.split(colliding, _cuts(ends, CELLS // size)):  # whole prefixes, a bounded number of items at a time
        part = from_numpy(codes[rows])
        costs = quantizer.costs(quantizer.residual(embeddings[from_numpy(rows)], part, last), last).cpu().numpy()
        moving, to = _moves(number[rows], codes[rows, last], costs, taken)
        codes[rows[moving], last] = to
        staying += len(rows) - len(moving) - len(np.unique(number[rows] * size + part[:, last].numpy()))
    return codes, staying


def _cuts(ends: np.ndarray, limit: int) -> list[int]:
    """Where to cut so that parts end at some of `ends` and are at most `limit` long (or one span, if longer)."""
    cuts, start = [], 0
    for end, following in itertools.pairwise(ends.tolist()):
        if following - start > limit:
            cuts.append(end)
            start = end
    return cuts


def _moves(prefix: np.ndarray, code: np.ndarray, costs: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of M colliding items move to which code. prefix, code (M,), costs (M, V), taken (prefixes, V)

    Deferred acceptance: every item without a place asks for its cheapest code, a code keeps the cheapest of those who
    ask, the others ask for their next one. Both sides value a pair by its cost, so the outcome is the greedy one.
    """
    size = costs.shape[1]
    own = costs[np.arange(len(code)), code]
    by_fit = np.lexsort((own, prefix * size + code))  # ties: the earlier row
    bucket = (prefix * size + code)[by_fit]
    keeps = np.zeros(len(code), bool)
    keeps[by_fit[np.r_[True, bucket[1:] != bucket[:-1]]]] = True
    movers = np.flatnonzero(~keeps)
    cost = np.where(taken[prefix[movers]], np.inf, costs[movers])  # (movers, V)
    slots = prefix[movers] * size
    holder = np.full(taken.size, -1)  # which mover holds which (prefix, code)
    asking = np.arange(len(movers))
    while len(asking):
        wish = cost[asking].argmin(axis=1)
        price = cost[asking, wish]
        asking, wish, price = (part[np.isfinite(price)] for part in (asking, wish, price))  # the rest stay
        slot = slots[asking] + wish
        held = holder[slot]
        rivals = np.r_[asking, held[held >= 0]]
        slot = np.r_[slot, slot[held >= 0]]
        price = np.r_[price, cost[held[held >= 0], slot[len(asking) :] % size]]
        first = np.lexsort((rivals, price, slot))
        wins = np.r_[True, slot[first][1:] != slot[first][:-1]] if len(first) else np.zeros(0, bool)
        holder[slot[first[wins]]] = rivals[first[wins]]
        lost = first[~wins]
        lost = lost[holder[slot[lost]] != rivals[lost]]  # a holder stands once for each one who asks
        cost[rivals[lost], slot[lost] % size] = np.inf
        asking = np.unique(rivals[lost])
    slot = np.flatnonzero(holder >= 0)
    return movers[holder[slot]], slot % size
