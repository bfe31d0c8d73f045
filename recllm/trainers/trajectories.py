"""Answers that are trajectories: a draft, what the model says of it, and the item it gives instead.

The whole trajectory is one answer of F tokens, in the template's order; slots are given and not chosen. What an answer
counts as (`codes`, hits, validity) is its correction.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.decoding.reflecting import Reflector
from recllm.objectives.grc import GRCReward, first_divergence, grc_reward
from recllm.reflection import Form, Reflection
from recllm.trainers.groups import Rollouts
from recllm.trainers.rollouts import Row


@dataclass(frozen=True, eq=False)
class Trajectories(Rollouts):
    """`codes` and `starts` are those of the corrections."""

    drafts: Tensor  # (R, L) int64
    labels: Tensor  # (R, K + 1) int64, counted from 0: as they were said

    def take(self, places: Sequence[int]) -> "Trajectories":
        rows = self.rows_at(places)
        return self._of(super().take(places), self.drafts[rows], self.labels[rows])

    @classmethod
    def joined(cls, parts: Sequence["Trajectories"]) -> "Trajectories":
        plain = Rollouts.joined(parts)
        return cls._of(plain, torch.cat([part.drafts for part in parts]), torch.cat([part.labels for part in parts]))

    @classmethod
    def _of(cls, plain: Rollouts, drafts: Tensor, labels: Tensor) -> "Trajectories":
        return cls(*(getattr(plain, field.name) for field in dataclasses.fields(Rollouts)), drafts, labels)

    def facts(self) -> dict[str, list]:
        """What rewards are told beside an answer's codes, one entry an answer."""
        return {"drafts": self.drafts.tolist(), "labels": self.labels.tolist()}


@dataclass(frozen=True, eq=False)
class TrajectorySource:
    """Sampled trajectories of the weights as they are when asked; in the place of a `RolloutSource`."""

    checkpoint: Checkpoint
    temperature: float = 1.0
    top_p: float = 1.0

    def check(self, modes: Collection[str], answers: int) -> None:
        """At the start: what would fail later."""
        _ = self.reflection  # refuses a model that was not taught to

    @property
    def reflection(self) -> Reflection:
        return self.checkpoint.reflection

    @property
    def form(self) -> Form:
        return self.reflection.template.form

    @property
    def labels(self) -> Sequence[Tensor]:
        """Token ids of each slot's labels."""
        return self.reflection.tokens.labels

    def __call__(self, rows: Sequence[Row], answers: int, seed: int, keys: Sequence[object]) -> Trajectories:
        """`answers` to each row, in the order of the rows; `keys`: what a row's draws depend on beside the seed."""
        prompts = [list(row["prompt_ids"]) for row in rows]
        found = self._reflector.samples(
            prompts, answers, temperature=self.temperature, top_p=self.top_p, seed=seed, keys=keys
        )
        drafts, labels, items = (part.flatten(0, 1) for part in (found.drafts, found.labels, found.items))
        assert bool((items >= 0).all()), "every draw ends in an item"
        ids = [self._ids(*parts) for parts in zip(drafts.tolist(), labels.tolist(), items.tolist())]
        logps = found.logps.flatten(0, 1).tolist()
        return Trajectories(prompts, ids, [self._start] * len(ids), items, logps, drafts, labels)

    def anchor(self, row: Row, answer: Sequence[int], start: int) -> tuple[list[int], int]:
        """What the model should have said of its own draft: the right labels, and the truth."""
        tokens, template = self.checkpoint.tokens, self.reflection.template
        ids = torch.tensor([answer[place] for place in template.at("draft")])
        draft = torch.stack([tokens.codes_of_ids(one, level) for level, one in enumerate(ids)])
        target = torch.tensor(row["target"])
        labels = [int(first_divergence(draft, target)) - 1]
        labels += self.reflection.attributes.same(*self.rows_of(draft, target)).long().tolist()
        return self._ids(draft.tolist(), labels[: len(template.slots)], target.tolist()), start

    def formed(self, rollouts: Rollouts, rows: Sequence[Row]) -> list[bool]:
        """Every trajectory has its form."""
        return [True] * len(rollouts.answers)

    def rows_of(self, *codes: Tensor) -> list[Tensor]:
        """Items of the table, -1 for none.   (…, L) -> (…)"""
        table = self.checkpoint.table
        flat = [torch.as_tensor(table.rows_of(some.reshape(-1, some.size(-1)).numpy())) for some in codes]
        return [rows.view(some.shape[:-1]) for rows, some in zip(flat, codes)]

    @functools.cached_property
    def _reflector(self) -> Reflector:
        """At the first call: by then nothing replaces the model's head any more."""
        start = self.checkpoint
        decoder = Decoder(start.model, start.tokens, normaliser="children", prefix=start.writer.prefix)
        return Reflector(decoder, self.reflection.tokens)

    @functools.cached_property
    def _start(self) -> int:
        return self.reflection.template.at("item")[0]

    def _ids(self, draft: Sequence[int], labels: Sequence[int], item: Sequence[int]) -> list[int]:
        levels = self.checkpoint.tokens.levels
        spoken = [[int(levels[level][code]) for level, code in enumerate(codes)] for codes in (draft, item)]
        return self.reflection.tokens.ids(spoken[0], labels, spoken[1])


@dataclass(frozen=True, eq=False)
class TrajectoryReward:
    """One part of GRC's reward, as TRL calls it; what the parts weigh is the trainer's `reward_weights`."""

    part: str  # a field of GRCReward
    source: TrajectorySource
    beta_last: float = 2.0

    @property
    def __name__(self) -> str:
        return self.part

    def __call__(self, prompts, completions, completion_ids, *, codes, drafts, labels, target, **_) -> list[float]:
        given = (torch.tensor(some).unsqueeze(1) for some in (drafts, labels, codes))  # a group of one each
        return getattr(rewards_of(self.source, *given, torch.tensor(target), self.beta_last), self.part)[:, 0].tolist()


def rewards_of(
    source: TrajectorySource, drafts: Tensor, labels: Tensor, items: Tensor, target: Tensor, beta_last: float = 2.0
) -> GRCReward:
    """GRC's reward, part by part.   (P, G, L), (P, G, K + 1) from 0, (P, G, L), (P, L)"""
    attributes = source.reflection.attributes
    ids = [attributes.ids_of(rows) for rows in source.rows_of(drafts, items, target)]  # (P, G, K) × 2, (P, K)
    return grc_reward(drafts, items, target, labels[..., 0] + 1, labels[..., 1:], *ids, beta_last=beta_last)
