"""Rao–Blackwell: a chain is drawn, what it is worth is not. `expected: true` of GRPO, SRPO and ReCast. Ours.

After each chain that opened its answer, the reward of the one item that was drawn is replaced by its expectation over
all items, from one teacher-forced pass over the target: hit by P_H, prefix by E[r]. Other rewards stay as measured.
Same mean as before and never more variance, and the answers of a group differ although none is right.

    the chain's tokens      the method's advantage, computed from the expectations
    the target's tokens     stand in for the drawn item's: the gradient of the expectation itself, Σ_j a_j ∇log p_j

What is divided by the std of a group still is, by the std that drawn items would have shown: σ² = Var over the group
of E[r | chain] + mean of Var[r | chain]. The expectations' own std would not do: where chains matter little it is tiny,
and a division by it would blow up both parts.

GRPO     (E − mean) / σ;  a_j / σ
SRPO     its bonus is of the hits that were drawn; the target's tokens get, beside a_j / σ, what the bonus of an answer
         gains by a hit, times P_H: the exact expectation of the bonus' own gradient, the other answers as they are
ReCast   i⁺ has the largest expectation, i⁻ the smallest of the other chains that opened an answer; 1 and −λ for the
         chains, a_j for the target's tokens after both. Nothing is repaired: no expectation is 0

A chain that never opened its answer is worth 0 and gets no target. A direct prompt has the empty chain: all answers are
the target, with a_j; they stay G rows, so that a prompt of either kind weighs the same. A KL term of TRL's, drawn for
the chain, is at the target's tokens a pull to the reference along the target's path.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from recllm.actor import AnswerRows
from recllm.objectives.exact import expected_prefix_reward, prefix_reward_std, prefix_token_weights
from recllm.objectives.group import code_count, has_signal
from recllm.objectives.srpo import bonus_advantage
from recllm.trainers.batches import padded
from recllm.trainers.groups import RolloutGroups, Signal

EXPECTED = ("hit", "prefix")  # rewards that are a function of the target's path
Score = Callable[[AnswerRows], Tensor]  # log-probabilities of answers (R, T), without gradient


@dataclasses.dataclass(frozen=True, eq=False)
class ExpectedGroups(RolloutGroups):
    """`rewards` are expectations given the chains; answers and codes are still those drawn."""

    weights: Tensor  # (P, G, L) a_j, so that ∇E[r | chain] = Σ_j a_j ∇log p_j
    hit_weights: Tensor  # (P, G, L) the same of a hit alone: P_H at each of the target's codes
    variances: Tensor  # (P, G) Var[r | chain]

    @property
    def trainable(self) -> Tensor:
        """Is there anything to learn from the group? (P,) bool"""
        return has_signal(self.rewards) | (self.variances > 0).any(dim=1)

    @property
    def spread(self) -> Tensor:
        """σ, 1 where nothing varies. (P, 1)"""
        among = self.rewards.double().var(dim=1, keepdim=True)
        total = (among + self.variances.mean(dim=1, keepdim=True)).sqrt()
        return torch.where(self.trainable.unsqueeze(1), total, 1.0)

    @property
    def relative(self) -> Tensor:
        """(E − mean) / σ; 0 for a group without signal. (P, G)"""
        rewards = self.rewards.double()
        found = (rewards - rewards.mean(dim=1, keepdim=True)) / self.spread
        return torch.where(has_signal(self.rewards).unsqueeze(1), found, 0.0).float()

    @property
    def of_target(self) -> Tensor:
        """a_j / σ. (P, G, L)"""
        return (self.weights / self.spread.unsqueeze(2)).float()

    def take(self, places: Sequence[int]) -> "ExpectedGroups":
        return self._of(super().take(places), *(part[places] for part in self._own))

    def exchanged(self, out: Sequence[int], others: "ExpectedGroups", into: Sequence[int]) -> "ExpectedGroups":
        order = list(range(len(self.rows)))
        for place, other in zip(out, into):
            order[place] = len(self.rows) + other
        both = (torch.cat(parts)[order] for parts in zip(self._own, others._own))
        return self._of(super().exchanged(out, others, into), *both)

    @property
    def _own(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights, self.hit_weights, self.variances

    @classmethod
    def _of(cls, groups: RolloutGroups, *own: Tensor) -> "ExpectedGroups":
        shared = (getattr(groups, field.name) for field in dataclasses.fields(RolloutGroups))
        return cls(*shared, *own)


# ---- rewards


def opened(groups: RolloutGroups) -> Tensor:
    """Did the answer come to an item? One of a direct prompt always does. (P, G) bool"""
    rollouts = groups.rollouts
    found = [start < len(ids) for start, ids in zip(rollouts.starts, rollouts.answers)]
    return torch.tensor(found).view(groups.rewards.shape)


def path_logps(
    groups: RolloutGroups, levels: Sequence[Tensor], score: Score, pad: int, at_a_time: int, device: torch.device
) -> Tensor:  # fmt: skip
    """log π of the target's codes after each chain, 0 where none was opened.   -> (P, G, L)

    A chain is part of the prompt here: the text's own probabilities are not asked for. `levels`: token ids of codes.
    """
    rollouts, counts = groups.rollouts, opened(groups).flatten().tolist()
    found = torch.zeros(len(counts), groups.targets.size(1))
    for first in range(0, len(counts), at_a_time):
        rows = range(first, min(first + at_a_time, len(counts)))
        prompts = [rollouts.prompts[row // rollouts.group] + rollouts.answers[row][: rollouts.starts[row]]
                   for row in rows]  # fmt: skip
        targets = [target_ids(groups.targets[row // rollouts.group], levels) if counts[row] else [] for row in rows]
        ids = padded(targets, pad, width=found.size(1)).long()
        parts = (
            padded(prompts, pad, left=True), padded([[1] * len(own) for own in prompts], 0, left=True), ids,
            padded([[1] * len(own) for own in targets], 0, width=found.size(1)), torch.zeros(len(rows)).long(),
        )  # fmt: skip
        asked = AnswerRows(*(part.to(device) for part in parts))
        found[rows.start : rows.stop] = score(asked).detach().float().cpu()
    return found.view(*groups.rewards.shape, -1)


def expectation_of(
    groups: RolloutGroups, each: Tensor, names: Sequence[str], weights: Sequence[float], formed: Tensor | None,
    logps: Tensor, beta: float,
) -> ExpectedGroups:  # fmt: skip
    """Groups as TRL scored them, with their expectations.   `each` (R, F) rewards; `logps` (P, G, L) of `path_logps`

    formed    (P, G) which answers have their form, where rewards are gated by it
    """
    counts = opened(groups) if formed is None else opened(groups) & formed
    others = [column for column, name in enumerate(names) if name not in EXPECTED]
    weighted = each.double().cpu() * torch.tensor(weights).double()
    measured = weighted[:, others].nansum(dim=1).view(groups.rewards.shape)
    own = {name: weight for name, weight in zip(names, weights) if name in EXPECTED}
    return expected_groups(groups, logps, counts, measured, own, beta)


def target_ids(target: Tensor, levels: Sequence[Tensor]) -> list[int]:
    """Token ids of an item's codes; it may end before the last level."""
    return [int(levels[level][code]) for level, code in enumerate(target.tolist()) if code >= 0]


def expected_groups(
    groups: RolloutGroups, logps: Tensor, counts: Tensor, measured: Tensor, weights: Mapping[str, float], beta: float
) -> ExpectedGroups:  # fmt: skip
    """Rewards w_hit P_H + w_prefix E[r] + `measured`, with their variances and gradients.   (P, G, L), (P, G) × 2

    counts    answers that are rewarded at all: those of opened chains, and of the right form where that is a condition
    weights   of the rewards of EXPECTED; one that is not named is not among them

    Var[w_p r + w_h 1] = w_p² Var[r] + w_h² P (1 − P) + 2 w_p w_h P (1 − E[r]), 1 standing for a hit: there r is 1.
    """
    size, w_hit, w_prefix = counts.shape, weights.get("hit", 0.0), weights.get("prefix", 0.0)
    paths = logps.double().flatten(0, 1)  # (R, L)
    lengths = code_count(groups.targets).repeat_interleave(size[1])
    own = torch.arange(paths.size(1)) < lengths.unsqueeze(1)
    whole = paths.masked_fill(~own, 0.0).sum(dim=1).clamp(max=0)
    hit, miss = whole.exp(), -whole.expm1()
    prefix, std = expected_prefix_reward(paths, beta, lengths), prefix_reward_std(paths, beta, lengths)
    of_hit = hit.unsqueeze(1) * own
    mean = w_hit * hit + w_prefix * prefix
    variance = (w_prefix * std) ** 2 + w_hit**2 * hit * miss + 2 * w_prefix * w_hit * hit * (1 - prefix)
    slopes = w_hit * of_hit + w_prefix * prefix_token_weights(paths, beta, lengths)
    counted = counts.flatten().double()
    return ExpectedGroups(
        groups.rollouts, groups.targets, ((counted * mean).view(size) + measured).float(), groups.rows, groups.keys,
        weights=(counted.unsqueeze(1) * slopes).view(*size, -1),
        hit_weights=(opened(groups).flatten().unsqueeze(1) * of_hit).view(*size, -1),
        variances=(counted * variance).view(size),
    )  # fmt: skip


# ---- signals


def bonus_gain(hits: Tensor, k: int) -> Tensor:
    """SRPO's bonus of an answer if it hits less that if it misses, the others of its group as drawn. (P, G) -> (P, G)

    So E over its item of bonus · ∇log π(item) = gain · P_H ∇log P_H, since Σ_a π(a) ∇log π(a) = 0.
    """
    groups, answers = hits.shape
    itself = torch.eye(answers, dtype=torch.bool, device=hits.device)
    each = hits.unsqueeze(1).expand(groups, answers, answers)  # (P, G, G): row i is the group with answer i changed
    if_hit, if_miss = (bonus_advantage(each.masked_fill(itself, value).flatten(0, 1), k) for value in (1, 0))
    gain = (if_hit - if_miss).view(groups, answers, answers)
    return gain.diagonal(dim1=1, dim2=2)


def boundary_of_expectations(groups: ExpectedGroups, weight: float) -> tuple[Tensor, Tensor]:
    """ReCast's: 1 for the largest expectation, −λ for the smallest of the others that opened an answer. (P, G), bool

    Both are active wherever there is something to learn, chains of equal worth too: their targets still teach.
    """
    rewards, places = groups.rewards.double(), torch.arange(groups.rewards.size(1))
    best = rewards.argmax(dim=1, keepdim=True)  # (P, 1)
    rank = rewards + (~opened(groups)) * (1 + rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True))
    worst = rank.masked_fill(places == best, torch.inf).argmin(dim=1, keepdim=True)
    differs = has_signal(groups.rewards).unsqueeze(1)
    advantages = (places == best).float() - weight * (places == worst).float()
    active = ((places == best) | (places == worst)) & groups.trainable.unsqueeze(1)
    return torch.where(differs, advantages, 0.0), active


def taught(
    groups: RolloutGroups, signal: Signal, of_target: Tensor, levels: Sequence[Tensor]
) -> tuple[RolloutGroups, Signal]:  # fmt: skip
    """The target in the place of the item that was drawn, and an advantage for every token.

    A chain's tokens keep what `signal` gives the answer, the target's get `of_target` (P, G, L). Only active answers
    are written; those without an answer stay as they are.
    """
    rollouts, (count, group) = groups.rollouts, groups.rewards.shape
    answers, codes = list(rollouts.answers), rollouts.codes.clone()
    logps = None if rollouts.logps is None else list(rollouts.logps)
    named = (signal.active & opened(groups)).flatten().tolist()
    by_token: list[list[float]] = []
    for row, whole in enumerate(signal.advantages.flatten().tolist()):
        place, start = row // group, rollouts.starts[row]
        if not named[row]:
            by_token.append([whole] * len(answers[row]))
            continue
        ids = target_ids(groups.targets[place], levels)
        answers[row], codes[row] = [*answers[row][:start], *ids], groups.targets[place]
        by_token.append([whole] * start + of_target[place, row % group, : len(ids)].tolist())
        if logps is not None:
            logps[row] = [*logps[row][:start], *[0.0] * len(ids)]  # drawn from nothing
    changed = dataclasses.replace(rollouts, answers=answers, codes=codes, logps=logps)
    advantages = padded(by_token, 0.0).view(count, group, -1)
    return dataclasses.replace(groups, rollouts=changed), dataclasses.replace(signal, advantages=advantages)
