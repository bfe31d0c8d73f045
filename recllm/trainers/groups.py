"""What the seam of reinforcement learning hands from step to step: rollout → score → signal → log-probs → loss.

P prompts, G answers to each, R = P·G answers in all, those to one prompt side by side; L levels, T tokens of an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recllm.objectives.group import group_normalised, has_signal, is_hit


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Answers to prompts, parsed once. An answer is what the policy chose: no end token, no closing tag.

    Where the trainer's `form` says so, tokens that were given to the policy stand among them.
    """

    prompts: list[list[int]]  # P, token ids
    answers: list[list[int]]  # R, token ids; the codes of an item stand at the end
    starts: list[int]  # R, where in the answer its codes begin; its length if it names no item
    codes: Tensor  # (R, L) int64 of the item answered with, -1 where it names none or the item has no such level
    logps: list[list[float]] | None  # R, of each token, under the distribution drawn from; None: nothing was drawn

    def __post_init__(self):
        assert len(self.answers) == len(self.starts) == len(self.codes)
        assert len(self.answers) % len(self.prompts) == 0
        assert self.logps is None or list(map(len, self.logps)) == list(map(len, self.answers))

    @property
    def group(self) -> int:
        """G"""
        return len(self.answers) // len(self.prompts)

    @property
    def named(self) -> Tensor:
        """Does the answer name an item? (R,) bool"""
        return self.codes[:, 0] >= 0

    def rows_at(self, places: Sequence[int]) -> list[int]:
        """The answers of these groups."""
        return [place * self.group + row for place in places for row in range(self.group)]

    def take(self, places: Sequence[int]) -> "Rollouts":
        """The groups at these places."""
        rows = self.rows_at(places)
        logps = None if self.logps is None else [self.logps[row] for row in rows]
        return Rollouts(
            [self.prompts[place] for place in places], [self.answers[row] for row in rows],
            [self.starts[row] for row in rows], self.codes[rows], logps,
        )  # fmt: skip

    def with_answer(self, row: int, ids: list[int], start: int, codes: Tensor) -> "Rollouts":
        """Another answer in place of one. Its log-probabilities were drawn from nothing: 0."""
        answers, starts, new = list(self.answers), list(self.starts), self.codes.clone()
        answers[row], starts[row], new[row] = ids, start, codes
        logps = None if self.logps is None else list(self.logps)
        if logps is not None:
            logps[row] = [0.0] * len(ids)
        return replace(self, answers=answers, starts=starts, codes=new, logps=logps)

    def facts(self) -> dict[str, list]:
        """What rewards are told of an answer beside its codes, one entry an answer."""
        return {}

    @classmethod
    def joined(cls, parts: Sequence["Rollouts"]) -> "Rollouts":
        """Groups of several calls, in order."""
        drawn = all(part.logps is not None for part in parts)
        return Rollouts(
            [ids for part in parts for ids in part.prompts], [ids for part in parts for ids in part.answers],
            [start for part in parts for start in part.starts], torch.cat([part.codes for part in parts]),
            [logps for part in parts for logps in part.logps] if drawn else None,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class RolloutGroups:
    """Scored answers, group by group: all that a signal may look at."""

    rollouts: Rollouts
    targets: Tensor  # (P, L) int64 codes of the truth
    rewards: Tensor  # (P, G) float, the weighted sum of the reward functions
    rows: tuple[Mapping, ...]  # of the data set, one a prompt
    keys: tuple[str, ...]  # of each prompt: what its random draws depend on, beside the seed

    def take(self, places: Sequence[int]) -> "RolloutGroups":
        """The groups at these places."""
        return RolloutGroups(
            self.rollouts.take(places), self.targets[places], self.rewards[places],
            tuple(self.rows[place] for place in places), tuple(self.keys[place] for place in places),
        )  # fmt: skip

    def exchanged(self, out: Sequence[int], others: "RolloutGroups", into: Sequence[int]) -> "RolloutGroups":
        """With the groups `into` of `others` in place of the first of the groups `out`."""
        both = RolloutGroups(
            type(self.rollouts).joined([self.rollouts, others.rollouts]), torch.cat([self.targets, others.targets]),
            torch.cat([self.rewards, others.rewards]), self.rows + others.rows, self.keys + others.keys,
        )  # fmt: skip
        order = list(range(len(self.rows)))
        for place, other in zip(out, into):
            order[place] = len(self.rows) + other
        return both.take(order)

    @property
    def codes(self) -> Tensor:
        """(P, G, L)"""
        return self.rollouts.codes.view(*self.rewards.shape, -1)

    @property
    def hits(self) -> Tensor:
        """Is the answer the target? (P, G) bool"""
        return is_hit(self.codes, self.targets)

    @property
    def trainable(self) -> Tensor:
        """Is there anything to learn from the group? (P,) bool"""
        return has_signal(self.rewards)

    @property
    def relative(self) -> Tensor:
        """Rewards within their group: (r − mean) / std. (P, G)"""
        return group_normalised(self.rewards)

    of_target = None  # what the target's tokens weigh, where they stand in for the answer's: `trainers.expected`

    @property
    def named(self) -> Tensor:
        """(P, G) bool"""
        return self.rollouts.named.view(self.rewards.shape)


@dataclass(frozen=True, eq=False)
class Signal:
    """What a method makes of groups. Inactive answers are dropped before any log-probability is computed."""

    advantages: Tensor  # (P, G), or (P, G, T) where tokens differ
    active: Tensor  # (P, G) bool
    replaced: Tensor | None = None  # (P,) the answer that the truth stands in for, or -1
    of_target: Tensor | None = None  # (P, G, L) of the target's tokens, taught in place of the drawn item's

    def __post_init__(self):
        assert self.advantages.shape[:2] == self.active.shape
        assert self.active.dtype == torch.bool
        assert bool(self.advantages.isfinite().all()), "a signal is finite"
