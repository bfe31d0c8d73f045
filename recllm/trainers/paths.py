"""Targets after their prompts: a batch of them, and log-probabilities of their codes with all codes' beside them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.actor import AnswerRows, AnswerScorer
from recllm.actor.head import scaled_logits
from recllm.tokenization import ItemTokens
from recllm.trainers.batches import Batch, padded


class PathCollator:
    """Prompts and targets → the names that the scorer wants."""

    def __init__(self, tokens: ItemTokens, pad: int):
        self.levels, self.pad = [ids.tolist() for ids in tokens.levels], pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        prompts = [row["prompt_ids"] for row in rows]
        answers = [[self.levels[depth][code] for depth, code in enumerate(row["target"]) if code >= 0] for row in rows]
        return {
            "prompt_ids": padded(prompts, self.pad, left=True),
            "prompt_mask": padded([[1] * len(ids) for ids in prompts], 0, left=True),
            "completion_ids": padded(answers, self.pad),
            "completion_mask": padded([[1] * len(ids) for ids in answers], 0),
            "starts": torch.zeros(len(rows), dtype=torch.int64),
        }


class LevelLogps(NamedTuple):
    """Distributions over the codes of one level."""

    rows: Tensor  # (n,) of the batch
    logps: Tensor  # (n, V), −∞ where the trie allows no code


class PathScores(NamedTuple):
    logps: Tensor  # (P, L), 0 beyond an item's last code
    entropies: Tensor  # (P, L)
    levels: list[LevelLogps] | None  # where they are asked for


class PathScorer(AnswerScorer):
    """Of answers that are codes alone, and with `distributions` of all codes beside each of them."""

    def __init__(self, *args, distributions: bool = False, **settings):
        super().__init__(*args, **settings)
        self.distributions = distributions
        self._found: list[LevelLogps] | None = None

    def score(self, model: PreTrainedModel, rows: AnswerRows, entropy: bool = False) -> PathScores:
        self._found = None
        logps, entropies = super().score(model, rows, entropy=True)
        found, self._found = self._found, None
        return PathScores(logps, entropies, found)

    def _scores(self, finish, hidden, targets, matrix, entropy):
        yield from super()._scores(finish, hidden, targets, matrix, entropy)
        if not self.distributions:
            return
        rows, level = targets.places  # an answer of codes alone: the place of each is its level
        self._found = []
        for depth, ids in enumerate(self.levels):
            here = (level == depth).nonzero().flatten()
            logits = scaled_logits(hidden[here], matrix.rows(ids), finish, self.temperature)
            if targets.allowed[depth] is not None:
                logits = logits.masked_fill(~targets.allowed[depth], float("-inf"))
            self._found.append(LevelLogps(rows[here], logits.log_softmax(dim=-1)))


def kl_divergence(logps: Tensor, reference: Tensor) -> Tensor:
    """Σ_c p_c (log p_c − log q_c), over the codes that p can give.   (n, V), (n, V) -> (n,)"""
    impossible = logps.isneginf()
    return (logps.exp() * (logps - reference).masked_fill(impossible, 0.0)).sum(dim=-1)


def path_kl(own: Sequence[LevelLogps], reference: Sequence[LevelLogps], count: int) -> Tensor:
    """Σ over levels, along each path.   -> (P,)"""
    total = own[0].logps.new_zeros(count)
    for ours, theirs in zip(own, reference, strict=True):
        total = total.index_add(0, ours.rows, kl_divergence(ours.logps, theirs.logps))
    return total
