"""A checkpoint that reasons as a ranker, in two ways that measure different things.

ReasoningRanker       n chains, each with an item of its own: what sampling finds. The list are the different items.
ReasonThenBeamRanker  one chain, then constrained beams: a whole list that follows from one thought.

In both, an answer's score is the log-probability of its codes after its chain; the chain's own is not part of it. A
chain that ends or reaches its limit without an answer recommends nothing.
"""

import dataclasses
import functools

import polars as pl
import torch
from torch import Tensor

from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Answers, Normaliser
from recllm.decoding.chains import Sampling
from recllm.errors import UserError
from recllm.evaluation.direct import catalogue_rows, in_catalogue, rows_of
from recllm.evaluation.ranking import Ranking, Sample
from recllm.reasoner import Chains, Reasoner
from recllm.vllm_chains import VLLMChains

NONE = float("-inf")


@dataclasses.dataclass(frozen=True, eq=False)
class _Reasoning:
    """What both have. A case's draws depend on the seed, its user and its position."""

    checkpoint: Checkpoint
    catalogue: Catalogue
    sampling: Sampling
    normaliser: Normaliser = "level"
    exclude_history: bool = False
    keep_chains: bool = False
    seed: int = 0
    batch_size: int | None = None
    vllm: VLLMChains | None = None

    def __post_init__(self):
        _ = self.reasoner, self.rows_and_known  # refused here and not at the first case

    @functools.cached_property
    def reasoner(self) -> Reasoner:
        return Reasoner.of(self.checkpoint, self.sampling, self.normaliser, self.batch_size, self.vllm)

    @functools.cached_property
    def rows_and_known(self) -> tuple[Tensor, Tensor | None]:
        return catalogue_rows(self.checkpoint, self.catalogue)

    def _describe(self, mode: str, **more) -> dict:
        return {
            "ranker": mode,
            "mode": mode,
            "checkpoint": self.checkpoint.name,
            "weights": self.checkpoint.weights,
            "semantic_ids": self.checkpoint.table.fingerprint,
            **more,
            **dataclasses.asdict(self.sampling),
            "normaliser": self.normaliser,
            "dtype": str(self.checkpoint.model.dtype).removeprefix("torch."),
            "prompt": dataclasses.asdict(self.reasoner.writer.style),
            "exclude_history": self.exclude_history,
            **({"keep_chains": True} if self.keep_chains else {}),
            **({"engine": "vllm"} if self.vllm else {}),
            **({} if self.batch_size is None else {"batch_size": self.batch_size}),
        }

    def _asked(self, cases: pl.DataFrame) -> tuple[list[list[int]], list[str], dict]:
        """Prompts, the keys of their draws, and what may be answered."""
        histories = cases["history"].to_list()
        keys = [f"{position} {user}" for user, position in cases.select("user", "position").iter_rows()]
        own = rows_of(self.checkpoint, histories) if self.exclude_history else None
        return self.reasoner.writer.ids(histories), keys, {"allowed": self.rows_and_known[1], "exclude": own}

    def _samples(self, chains: Chains, found: Answers) -> list[list[Sample]]:
        """A record of each chain with its answer, of beams the best."""
        items = self.checkpoint.table.items
        rows = in_catalogue(found.rows, self.rows_and_known[0]).tolist()
        return [
            [
                Sample(
                    row=row,
                    score=score,
                    logp=chain.logp,
                    tokens=len(chain.ids),
                    parsed=self.reasoner.parsed(chain, items[own] if own >= 0 else None) is not None,
                    text=self.reasoner.text(chain) if self.keep_chains else None,
                )
                for chain, row, own, score in zip(some, *case)
            ]
            for some, *case in zip(chains, rows, found.rows.tolist(), found.scores.tolist())
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class ReasoningRanker(_Reasoning):
    samples: int = 10

    def __post_init__(self):
        super().__post_init__()
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def describe(self) -> dict:
        return self._describe("reasoning", samples=self.samples)

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        prompts, keys, may = self._asked(cases)
        chains = self.reasoner.chains(prompts, self.samples, self.seed, keys)
        found = self.reasoner.one_answer_each(prompts, chains, self.seed, keys, **may)
        samples = self._samples(chains, found)
        return Ranking(*different(samples, k), samples)


@dataclasses.dataclass(frozen=True, eq=False)
class ReasonThenBeamRanker(_Reasoning):
    beams: int = 20

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.beams <= len(self.checkpoint.table):
            raise UserError(f"{self.beams} beams over {len(self.checkpoint.table):,} items", fix="fewer beams")

    def describe(self) -> dict:
        return self._describe("reason_then_beam", beams=self.beams)

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        prompts, keys, may = self._asked(cases)
        chains = self.reasoner.chains(prompts, 1, self.seed, keys)
        found = self.reasoner.beams(prompts, chains, max(k, self.beams), **may)
        rows = in_catalogue(found.rows[:, :k], self.rows_and_known[0])
        return Ranking(rows, found.scores[:, :k], self._samples(chains, found))


def different(samples: list[list[Sample]], k: int) -> tuple[Tensor, Tensor]:
    """The different items of each case by their best score, best first; equal scores by row.   -> (P, k), (P, k)"""
    rows, scores = torch.full((len(samples), k), -1), torch.full((len(samples), k), NONE)
    for case, some in enumerate(samples):
        best: dict[int, float] = {}
        for sample in some:
            if sample.row >= 0:
                best[sample.row] = max(best.get(sample.row, NONE), sample.score)
        ranked = sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
        for place, (row, score) in enumerate(ranked):
            rows[case, place], scores[case, place] = row, score
    return rows, scores
