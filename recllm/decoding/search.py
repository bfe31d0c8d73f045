"""Walks down the trie, for a batch of prompts at once: beam search, samples with and without replacement.

A walk holds branches: the node that each has reached. At every level the children of all branches are candidates, B × C
of them, of which some become the next branches: the best, one drawn for each branch, or the best after Gumbel noise.
Filters and per-prompt exclusions take nodes away, so that a branch which is left ends in an item that is allowed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recllm.decoding.allowed import Allowed
from recllm.decoding.branches import Branches
from recllm.decoding.head import Head, Normaliser
from recllm.trie import SemanticIdTrie

NONE = float("-inf")
Noise = Callable[[int, torch.Size], Tensor]  # (depth, (P, B, C)) -> standard Gumbel noise


class Found(NamedTuple):
    """Leaves of the trie, -1 where there are fewer; `scores` under the normaliser; `logps` as they were drawn."""

    leaves: Tensor  # (P, G) int64
    scores: Tensor  # (P, G) Σ over the codes
    logps: Tensor | None = None  # (P, G, L) of samples: log-probability of each draw; 0 where an item had ended
    parents: Tensor | None = None  # (P, G) the branch of the last step that each leaf's code, never fed, belongs to
    origins: Tensor | None = None  # (P, G) of beams: the branch of the start that each has grown from


class Start(NamedTuple):
    """Branches that a walk begins with: one a prompt, or several."""

    nodes: Tensor  # (P, B) int64, of depth 0: the root
    hidden: Tensor  # (P, B, D) the state that the first code is predicted from
    scores: Tensor  # (P, B) what each brings along
    finished: Tensor | None = None  # (P, B) the leaf at which a branch has ended already, for sure; -1 of the others


class Candidates(NamedTuple):
    nodes: Tensor  # (P, B, C) children
    valid: Tensor  # (P, B, C) is there one, and is it allowed?
    padding: Tensor | None  # (P, B, C) no code: the item ended above
    logits: Tensor  # (P, B, C) of the children's codes
    over_level: Tensor  # (P, B, V)
    hidden: Tensor  # (P, B, D)


@dataclass(frozen=True)
class Walk:
    """What stays the same from level to level."""

    branches: Branches
    head: Head
    trie: SemanticIdTrie
    normaliser: Normaliser
    allowed: Allowed

    def start(self) -> Start:
        """The root of each prompt."""
        return self.start_from(self.branches.last.unsqueeze(1))

    def start_from(self, hidden: Tensor, scores: Tensor | None = None, finished: Tensor | None = None) -> Start:
        """The root once for each hidden state (P, B, D)."""
        nodes = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return Start(
            nodes, hidden, torch.zeros_like(nodes, dtype=torch.float32) if scores is None else scores, finished
        )

    def candidates(self, depth: int, nodes: Tensor, hidden: Tensor) -> Candidates:
        """Every step from `nodes` (P, B) of `depth`, given hidden states (P, B, D)."""
        children, valid = self.trie.children(depth, nodes)
        if (keep := self.allowed.nodes(self.trie, depth + 1, children)) is not None:
            valid = valid & keep
        over_level = self.head.logits(hidden, depth)
        logits = over_level.gather(-1, self.trie.codes(depth + 1, children))
        return Candidates(children, valid, self.trie.is_padding(depth + 1, children), logits, over_level, hidden)

    def scores(self, found: Candidates) -> Tensor:
        """log-probability of each step under the normaliser, -inf where there is none. (P, B, C)"""
        if self.normaliser == "children":
            return over_children(found)
        if self.normaliser == "level":
            total = found.over_level.logsumexp(dim=-1)
        else:
            total = self.head.full_normaliser(found.hidden)
        return _certain(found, found.logits - total.unsqueeze(-1))

    def step(self, depth: int, nodes: Tensor, parents: Tensor, finished: Tensor | None = None) -> Tensor:
        """Hidden states at `nodes` (P, B) of `depth`, whose parents are branches of the step before. (P, B, D)

        The model is not asked about items that have ended: a level that few items have costs few positions.
        """
        tokens = self.head.ids[depth - 1][self.trie.codes(depth, nodes)]
        first_child = self.trie.ptr[depth][nodes].long()
        ended = self.trie.is_padding(depth + 1, first_child)
        needed = None if ended is None else ~ended
        if finished is not None:
            needed = (finished < 0) if needed is None else needed & (finished < 0)
        return self.branches.advance(tokens, parents, needed)

    def along(self, depth: int, found: Candidates, steps: Tensor, finished: Tensor) -> Tensor:
        """Scores of the steps (P, B, C) where finished branches (P, B) go on to their leaf with probability one."""
        on_the_way = torch.searchsorted(self.trie.leaves[depth + 1], finished.int(), right=True).unsqueeze(-1) - 1
        certain = torch.where(found.valid & (found.nodes == on_the_way), 0.0, NONE)
        return torch.where((finished >= 0).unsqueeze(-1), certain, steps)


def over_children(found: Candidates, temperature: float = 1.0) -> Tensor:
    """log softmax over the children that are allowed; a branch without any stays at -inf. (P, B, C)"""
    logits = (found.logits / temperature).masked_fill(~found.valid, NONE)
    total = logits.logsumexp(dim=-1, keepdim=True)
    return _certain(found, logits - total.masked_fill(total == NONE, 0))


def _certain(found: Candidates, logps: Tensor) -> Tensor:
    """An item that ended above says nothing more, with probability one."""
    if found.padding is not None:
        logps = logps.masked_fill(found.padding, 0.0)
    return logps.masked_fill(~found.valid, NONE)


def keep_top_p(logps: Tensor, top_p: float) -> Tensor:
    """The fewest children whose probabilities sum to `top_p`, renormalised; the others -inf. (…, C) -> (…, C)"""
    if top_p >= 1:
        return logps
    ordered, order = logps.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    kept = logps.masked_fill(torch.zeros_like(logps, dtype=torch.bool).scatter(-1, order, before >= top_p), NONE)
    total = kept.logsumexp(dim=-1, keepdim=True)
    return kept - total.masked_fill(total == NONE, 0)


def conditional_gumbel(logps: Tensor, top: Tensor) -> Tensor:
    """Gumbel noise of children, given that its maximum is the parent's: `logps` come in with plain noise added.

    Kool et al. 2019 (Stochastic Beams), Appendix B.3:  Z = max φ̃,  v = T − φ̃ + log(1 − e^(φ̃ − Z)),
    T − max(0, v) − log(1 + e^(−|v|)).   (P, B, C), (P, B) -> (P, B, C)
    """
    top = top.unsqueeze(-1)
    highest = logps.amax(dim=-1, keepdim=True)
    gap = (logps - highest).clamp(max=0)  # -inf where there is no child
    below = torch.where(gap > -0.693, torch.log(-torch.expm1(gap)), torch.log1p(-torch.exp(gap)))  # log(1 − e^gap)
    v = top - logps + below
    noisy = top - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    return torch.where(logps == NONE, NONE, torch.where(gap == 0, top, noisy))


def beams(walk: Walk, width: int, start: Start | None = None) -> Found:
    """The `width` most probable items, best first; from several branches, pairs of a branch and an item."""
    nodes, hidden, scores, finished = start or walk.start()
    starts = nodes.size(1)
    origins = torch.arange(starts, device=nodes.device).expand_as(nodes)
    for depth in range(walk.trie.levels):
        found = walk.candidates(depth, nodes, hidden)
        steps = walk.scores(found)
        if finished is not None:
            steps = walk.along(depth, found, steps, finished)
        total = (scores.unsqueeze(-1) + steps).flatten(1)  # (P, B·C)
        scores, best = total.topk(min(width, total.size(1), starts * walk.trie.nodes(depth + 1)), dim=1)
        nodes, parents = found.nodes.flatten(1).gather(1, best), best // found.nodes.size(-1)
        origins = origins.gather(1, parents)
        finished = None if finished is None else finished.gather(1, parents)
        if depth + 1 < walk.trie.levels:
            hidden = walk.step(depth + 1, nodes, parents, finished)
    return Found(nodes.masked_fill(scores == NONE, -1), scores, parents=parents, origins=origins)


def samples(
    walk: Walk, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0, start: Start | None = None
) -> Found:
    """One item for each row of `uniform` (P, G, L), numbers in [0, 1) that decide the draws; items may repeat.

    `start` has one branch for all G, or G.
    """
    nodes, hidden, scores, _ = start or walk.start()
    answers = uniform.size(1)
    scores = scores.expand(-1, answers)
    branches = torch.arange(answers, device=nodes.device).expand(len(nodes), -1)
    parents = branches if nodes.size(1) == answers else torch.zeros_like(branches)
    drawn = []
    for depth in range(walk.trie.levels):
        found = walk.candidates(depth, nodes, hidden)
        logps = keep_top_p(over_children(found, temperature), top_p)
        chosen = draw(logps, uniform[:, :, depth])  # (P, G, 1)

        def take(values: Tensor, chosen: Tensor = chosen) -> Tensor:
            return values.expand(-1, answers, -1).gather(2, chosen).squeeze(2)

        scores, nodes = scores + take(walk.scores(found)), take(found.nodes)
        drawn.append(take(logps))
        if depth + 1 < walk.trie.levels:
            hidden = walk.step(depth + 1, nodes, parents)
            parents = branches
    return Found(nodes.masked_fill(scores == NONE, -1), scores, torch.stack(drawn, dim=-1), parents)


def draw(logps: Tensor, uniform: Tensor) -> Tensor:
    """The first child whose cumulated probability exceeds the number; the last one that is possible takes the rest.

    `logps` of one branch for all G, or of G: (P, 1 or G, C), (P, G) in [0, 1) -> (P, G, 1)
    """
    answers = uniform.size(1)
    cumulated = logps.exp().cumsum(dim=-1)
    cumulated = cumulated / cumulated[..., -1:].clamp(min=1e-30)
    chosen = torch.searchsorted(
        cumulated.expand(-1, answers, -1).contiguous(), uniform.unsqueeze(-1).contiguous(), right=True
    )
    possible = logps > NONE
    last = possible.size(-1) - 1 - possible.flip(-1).long().argmax(dim=-1, keepdim=True)
    return torch.minimum(chosen, last.expand(-1, answers, -1))


def distinct_samples(walk: Walk, noise: Noise, answers: int, temperature: float = 1.0, top_p: float = 1.0) -> Found:
    """`answers` different items, as drawn one after another without replacement: stochastic beam search.

    Every item's log-probability gets Gumbel noise, drawn from the top down: a node's noise is the largest of its
    children's, so the best `answers` nodes of a level are the only ones that can lead to the best items.
    """
    nodes, hidden, scores, _ = walk.start()
    so_far, perturbed, drawn = torch.zeros_like(scores), torch.zeros_like(scores), None
    for depth in range(walk.trie.levels):
        found = walk.candidates(depth, nodes, hidden)
        step = keep_top_p(over_children(found, temperature), top_p)
        total = so_far.unsqueeze(-1) + step  # (P, B, C) log-probability of the prefix
        keys = conditional_gumbel(total + noise(depth, total.shape), perturbed)
        perturbed, best = keys.flatten(1).topk(min(answers, keys[0].numel(), walk.trie.nodes(depth + 1)), dim=1)
        parents = best // total.size(-1)

        def take(values: Tensor, best: Tensor = best) -> Tensor:
            return values.flatten(1).gather(1, best)

        scores = scores.gather(1, parents) + take(walk.scores(found))
        nodes, so_far, this = take(found.nodes), take(total), take(step).unsqueeze(-1)
        if drawn is not None:
            this = torch.cat([drawn.gather(1, parents.unsqueeze(-1).expand(-1, -1, depth)), this], dim=-1)
        drawn = this
        if depth + 1 < walk.trie.levels:
            hidden = walk.step(depth + 1, nodes, parents)
    none = perturbed == NONE
    return Found(nodes.masked_fill(none, -1), scores.masked_fill(none, NONE), drawn)
