"""The figures of reasoned answers: n samples a case, of which any or the best-scored may be right."""

import statistics
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from recllm import metrics
from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.evaluation.predictions import AGAIN, Prediction


def answers(predictions: Sequence[Prediction], catalogue: Catalogue, file: str | Path | None = None) -> Tensor:
    """The samples' items as rows of the catalogue, -1 where there was no answer.   -> (P, n)"""
    n = len(predictions[0].samples)
    rows = torch.full((len(predictions), n), -1)
    for case, prediction in enumerate(predictions):
        if len(prediction.samples) != n:
            problem = f"{len(prediction.samples)} samples, and {n} in the first line"
            raise UserError(problem, file=file, line=case + 1, fix=AGAIN)
        for place, sample in enumerate(prediction.samples):
            if sample.item is None:
                continue
            if sample.item not in catalogue.row_of:
                problem = f"a sample is {sample.item!r}, which {catalogue.name} does not have"
                raise UserError(problem, file=file, line=case + 1, fix="give the prepared data that were predicted")
            rows[case, place] = catalogue.row_of[sample.item]
    return rows


def values_of(
    found: Tensor, listed: Tensor, targets: Tensor, ks: Sequence[int], pass_ks: Sequence[int]
) -> dict[str, Tensor]:
    """Of each case: pass@k over the samples, ranked_hit@k over the different items in the order of their score.

    Samples (P, n), lists (P, K), (P,) -> (P,) each; none without `pass_ks`, where one chain leads to a whole list.
    """
    if not pass_ks:
        return {}
    right = right_of(found, targets)
    hits = listed == targets.unsqueeze(1)
    order = -torch.arange(listed.size(1)).expand_as(listed).double()  # the list stands in the order of its scores
    return {f"pass@{k}": metrics.pass_at_k(found.size(1), right, k) for k in pass_ks} | {
        f"ranked_hit@{k}": metrics.ranked_hit_at_k(hits, order, k) for k in ks
    }


def right_of(found: Tensor, targets: Tensor) -> Tensor:
    """How many samples are the target.   (P, n), (P,) -> (P,)"""
    return (found == targets.unsqueeze(1)).sum(dim=1)


def chain_figures(predictions: Sequence[Prediction], found: Tensor) -> dict[str, float]:
    """Of the chains, whatever the target; `found` (P, n) are their answers."""
    samples = list(chain.from_iterable(prediction.samples for prediction in predictions))
    tokens = [sample.tokens for sample in samples]
    several = {"distinct_share": float(metrics.distinct_share(found).mean())} if found.size(1) > 1 else {}
    return {
        "format_validity": sum(sample.parsed for sample in samples) / len(samples),
        "answered": float(metrics.validity_rate(found)),
        "tokens_mean": statistics.fmean(tokens),
        "tokens_median": float(statistics.median(tokens)),
        **several,
    }
