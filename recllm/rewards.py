"""Reward functions, as TRL calls them: one number for every answer, from ids that the rollout parsed once.

    f(prompts, completions, completion_ids, *, codes, target, …) -> list[float]

Each takes of these what it needs, one entry an answer, R in all; texts are never read.

    codes    codes of the item answered with, -1 where absent
    target   codes of the truth
    rank     place of the answer among its prompt's, 0-based: of beams, the best first
    formed   has the answer its form? direct: it names an item; reasoning: the chain parses and an item follows
    history  the user's items as the prompt shows them, oldest first

`REWARDS` holds the names that a command line may give. A function's `__name__` is what TRL logs it under.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recllm.errors import UserError
from recllm.metrics import NOT_FOUND, ndcg_at_k
from recllm.objectives.group import is_hit
from recllm.objectives.srpo import prefix_reward

Reward = Callable[..., list[float]]
Ids = Sequence[Sequence[int]]


# ---- from the codes


def hit(prompts: Any, completions: Any, completion_ids: Any, *, codes: Ids, target: Ids, **_: Any) -> list[float]:
    """1 for the target, 0 for anything else: ReCast's task reward with one target and one answer."""
    return hits(codes, target).double().tolist()


def dcg(
    prompts: Any, completions: Any, completion_ids: Any, *, codes: Ids, target: Ids, rank: Sequence[int], **_: Any
) -> list[float]:
    """1 / log2(rank + 2) for the target, 0 for anything else: what the beam that holds it adds to the group's NDCG."""
    ranks = torch.where(hits(codes, target), torch.as_tensor(rank, dtype=torch.int64), NOT_FOUND)
    return ndcg_at_k(ranks, NOT_FOUND).tolist()


def rank_penalty(
    prompts: Any, completions: Any, completion_ids: Any, *, codes: Ids, target: Ids, rank: Sequence[int], **_: Any
) -> list[float]:
    """−d_j / Σ d for a miss at rank j of a group of beams that holds the target, d_j = 1 / log2(j + 2); else 0.

    The misses that stand highest are punished most: MiniOneRec's ranking reward, to be added to `hit`. Alone, `dcg` is
    no more than `hit` once a group is normalised, since beams are distinct and one at most is the target.
    """
    found = hits(codes, target)
    discount = (1 / (torch.as_tensor(rank, dtype=torch.double) + 2).log2()).masked_fill(found, 0)
    group = (torch.as_tensor(rank) == 0).long().cumsum(0) - 1  # rank 0 begins a group
    total = torch.zeros(int(group.max()) + 1, dtype=torch.double).index_add_(0, group, discount)
    holds = torch.zeros(len(total), dtype=torch.double).index_add_(0, group, found.double()) > 0
    return torch.where(holds[group], -discount / total[group].clamp(min=1e-12), 0.0).tolist()


rank_penalty.__name__ = "rank"


@dataclasses.dataclass(frozen=True)
class PrefixReward:
    """(ℓ/H)^β for ℓ right levels of H: GREAM's reward, `objectives.srpo.prefix_reward`."""

    beta: float = 0.5
    __name__ = "prefix"

    def __post_init__(self):
        if not self.beta > 0:
            raise UserError(f"the prefix reward's beta is {self.beta}", fix="above 0; the paper has 0.5")

    def __call__(
        self, prompts: Any, completions: Any, completion_ids: Any, *, codes: Ids, target: Ids, **_: Any
    ) -> list[float]:
        answers, targets = _padded(codes, target)
        return prefix_reward(answers.unsqueeze(1), targets, self.beta).squeeze(1).tolist()


def hits(codes: Ids, target: Ids) -> Tensor:
    """(R,) bool"""
    answers, targets = _padded(codes, target)
    return is_hit(answers.unsqueeze(1), targets).squeeze(1)


def _padded(codes: Ids, target: Ids) -> tuple[Tensor, Tensor]:
    """(R, L), (R, L) of one width, filled up with -1."""
    width = max((len(one) for one in (*codes, *target)), default=0)
    both = ([[*one, *[-1] * (width - len(one))] for one in some] for some in (codes, target))
    answers, targets = (torch.tensor(some, dtype=torch.int64).view(len(some), width) for some in both)
    return answers, targets


# ---- from the form


def format_reward(
    prompts: Any, completions: Any, completion_ids: Any, *, formed: Sequence[bool], **_: Any
) -> list[float]:
    """1 for an answer that has its form."""
    return [float(one) for one in formed]


format_reward.__name__ = "format"  # in logs; as a name in Python it would hide a built-in


@dataclasses.dataclass(frozen=True)
class Gated:
    """Another reward, but 0 for an answer without its form. It keeps that one's name."""

    reward: Reward

    @property
    def __name__(self) -> str:
        return self.reward.__name__

    def __call__(self, *args: Any, formed: Sequence[bool], **kwargs: Any) -> list[float]:
        rewards = self.reward(*args, formed=formed, **kwargs)
        return [reward if one else 0.0 for reward, one in zip(rewards, formed, strict=True)]


def gated(reward: Reward) -> Reward:
    return Gated(reward)


# ---- from what others took


@dataclasses.dataclass(frozen=True, eq=False)
class CollaborativeReward:
    """How well a trained SASRec likes the answered item after the history: sigmoid((s − mean s) / std s), all items' s.

    Standardised, because scores are known up to a constant and their scale is the training's; a sigmoid, because it
    still tells good items apart: at one and at three deviations it is .73 and .95, where the share of items that score
    lower is .84 and .999. An answer that names no item gets 0. So does every answer to an empty history, of which
    SASRec says nothing: its group has no signal.
    """

    model: Any  # recllm.models.sasrec.SASRec
    table: Any  # SemanticIdTable, of the checkpoint that answers
    item_ids: Sequence[str]  # in the order of SASRec's rows
    __name__ = "collaborative"

    def __post_init__(self):
        if -1 in self.columns:
            item = self.table.items[self.columns.index(-1)]
            raise UserError(f"{item!r} has a semantic ID, but SASRec does not know it", fix="train SASRec anew")

    @functools.cached_property
    def columns(self) -> list[int]:
        """SASRec's row of each item of the table, -1 where it has none."""
        row_of = {item: row for row, item in enumerate(self.item_ids)}
        return [row_of.get(item, -1) for item in self.table.items]

    @classmethod
    def load(cls, folder: str | Path, data: str | Path, table: Any) -> "CollaborativeReward":
        """`folder` as `train_sasrec` wrote it for the prepared folder `data`."""
        from recllm.catalogue import Catalogue
        from recllm.models.sasrec import load_sasrec

        catalogue = Catalogue.load(data)
        return cls(load_sasrec(folder, catalogue), table, catalogue.item_ids)

    def __call__(
        self, prompts: Any, completions: Any, completion_ids: Any, *,
        codes: Ids, history: Sequence[Sequence[str]], **_: Any,
    ) -> list[float]:  # fmt: skip
        cases = {items: case for case, items in enumerate(dict.fromkeys(map(tuple, history)))}  # a group shares its own
        liking = self._liking(list(cases))  # (cases, N)
        rows = self.table.rows_of([list(one) for one in codes])  # (R,)
        return [
            float(liking[cases[tuple(items)], self.columns[row]]) if row >= 0 else 0.0
            for items, row in zip(history, rows, strict=True)
        ]

    @torch.no_grad()
    def _liking(self, histories: list[tuple[str, ...]]) -> Tensor:
        """In [0, 1] for every item.   -> (cases, N)"""
        import polars as pl

        from recllm.baselines import history_rows
        from recllm.models.sasrec import blocks, padded

        found = history_rows(
            pl.DataFrame({"history": histories}, schema={"history": pl.List(pl.String)}), self.item_ids
        )
        rows, lengths = padded(*found, self.model.config.max_length)  # (cases, T), (cases,)
        liking = torch.zeros(len(histories), len(self.item_ids))
        for width, block in blocks(lengths, rows.size(1)):
            scores = self.model.scores(rows[block, :width], lengths[block])  # (p, N)
            spread = scores.std(dim=1, keepdim=True, correction=0).clamp(min=1e-12)
            liking[block] = torch.sigmoid((scores - scores.mean(dim=1, keepdim=True)) / spread)
        return liking


# ---- by name


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """What the rewards of a command line may need to know."""

    beta: float = 0.5
    sasrec: str | None = None  # folder of a trained SASRec
    data: str | None = None  # the prepared folder that it was trained on
    table: Any = None  # SemanticIdTable of the checkpoint


def _collaborative(settings: RewardSettings) -> Reward:
    if not settings.sasrec or not settings.data:
        missing = "the prepared data of its SASRec" if settings.sasrec else "a trained SASRec"
        raise UserError(
            f"the reward 'collaborative' needs {missing}",
            fix="train one by eval/baselines.py --data … --baselines sasrec, and name its folder, models/sasrec-seed0, "
            "and the same data",
        )
    return CollaborativeReward.load(settings.sasrec, settings.data, settings.table)


REWARDS: dict[str, Callable[[RewardSettings], Reward]] = {
    "hit": lambda settings: hit,
    "prefix": lambda settings: PrefixReward(settings.beta),
    "dcg": lambda settings: dcg,
    "rank": lambda settings: rank_penalty,
    "format": lambda settings: format_reward,
    "collaborative": _collaborative,
}


def reward_functions(
    names: Sequence[str], beta: float = 0.5, sasrec: str | None = None, data: str | None = None, table: Any = None,
    gate: bool = False,
) -> list[Reward]:  # fmt: skip
    """Those named, in their order. With `gate` an answer without its form gets 0 from each of them."""
    for name in names:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1)
            known = f"choose from {', '.join(REWARDS)}"
            raise UserError(f"{name!r} is no reward", fix=f"did you mean {near[0]!r}?" if near else known)
    if not names or len(set(names)) < len(names):
        what = f"{', '.join(names)} names a reward twice" if names else "no reward is named"
        raise UserError(what, fix="name each once, and weigh them by reward_weights" if names else "hit, say")
    settings = RewardSettings(beta, sasrec, data, table)
    made = [REWARDS[name](settings) for name in names]
    return [gated(reward) for reward in made] if gate else made
