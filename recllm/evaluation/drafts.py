"""The figures of reflection: were the drafts what the model said they were, and what did correcting them do?

acc_loc@k           share of a user's k best drafts whose first wrong level is the one that was said; mean over users.
                    Drafts of which nothing was said (`reflect_on`) do not count
acc_<attribute>@k   the same of an attribute, over users whose target has a value of it
majority            the same figure of a model that always says the label most frequent among these very drafts
draft_recall@k, …   of the drafts as they were, beside `recall@k` of the corrected lists
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from recllm import metrics
from recllm.attributes import ItemAttributes
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.evaluation.predictions import DraftLine, Prediction
from recllm.evaluation.ranking import Drafts
from recllm.objectives.grc import first_divergence

NONE = float("-inf")


@dataclass(frozen=True, eq=False)
class Truth:
    """What should be said of drafts. Items are rows of the catalogue."""

    codes: Tensor  # (N, L)
    attributes: ItemAttributes  # K

    @classmethod
    def of(cls, checkpoint: Checkpoint, catalogue: Catalogue) -> "Truth":
        """Every item of the catalogue has to be one of the checkpoint's."""
        own = torch.tensor([checkpoint.table.row_of[item] for item in catalogue.item_ids])
        attributes = checkpoint.reflection.attributes
        codes = torch.tensor(checkpoint.table.codes).long()
        return cls(codes[own], replace(attributes, ids=attributes.ids[own]))

    @property
    def right(self) -> int:
        """L + 1, the label of a draft that goes wrong nowhere."""
        return self.codes.size(1) + 1

    def labels(self, rows: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Of loc and each attribute the true label of each draft (P, B), and of which users one is known (P,)."""
        loc = first_divergence(self.codes[rows.clamp(min=0)], self.codes[targets])
        same = self.attributes.same(rows, targets.unsqueeze(1)).long()  # (P, B, K)
        known = self.attributes.ids_of(targets) >= 0  # (P, K)
        return {"loc": (loc, torch.ones_like(targets).bool())} | {
            name: (same[..., place], known[:, place]) for place, name in enumerate(self.attributes.names)
        }


@dataclass(frozen=True, eq=False)
class DraftFigures:
    of_cases: dict[str, Tensor]  # (P,) each; nan where a user has no such figure
    others: dict[str, object]  # plain values


def measured(drafts: Drafts, listed: Tensor, targets: Tensor, ks: Sequence[int], truth: Truth) -> DraftFigures:
    """`listed` (P, K) are the corrected lists, targets (P,)."""
    k, ranks = max(ks), metrics.ranks(drafts.rows, targets)
    of_cases, majority, labels = {}, {}, {}
    spoken = drafts.loc > 0  # (P, B)
    true = truth.labels(drafts.rows, targets)
    said = dict(zip(true, (drafts.loc, *drafts.same.long().unbind(-1))))
    for at in ks:
        for name, (label, known) in true.items():
            counted = (spoken & known.unsqueeze(1))[:, :at]  # (P, k)
            if not counted.any():
                continue
            label = label[:, :at]
            of_cases[f"acc_{name}@{at}"] = share(said[name][:, :at] == label, counted)
            most = int(torch.bincount(label[counted]).argmax())
            always = share(label == most, counted)
            majority[f"acc_{name}@{at}"] = round(float(always.nanmean()), 9)
            labels[f"acc_{name}@{at}"] = str(most) if name == "loc" else ("other", "same")[most]
    for at in ks:
        of_cases[f"draft_recall@{at}"] = metrics.recall_at_k(ranks, at)
        of_cases[f"draft_ndcg@{at}"] = metrics.ndcg_at_k(ranks, at)
    if drafts.rows.size(1) > k:
        of_cases[f"draft_recall@{drafts.rows.size(1)}"] = metrics.recall_at_k(ranks, drafts.rows.size(1))
    changed = _first(drafts.rows, k) != _first(listed, k)
    of_cases[f"changed@{k}"] = changed.any(dim=1).double()
    return DraftFigures(of_cases, {"majority": majority, "majority_label": labels} | _shares(drafts, targets, truth))


def share(right: Tensor, counted: Tensor) -> Tensor:
    """Of those that count, which share is right? nan where none counts.   (P, k) bool, (P, k) bool -> (P,)"""
    return (right & counted).sum(1).double() / counted.sum(1)


def _shares(drafts: Drafts, targets: Tensor, truth: Truth) -> dict[str, float | None]:
    """Over the drafts of all users of which something is said; over all where nothing is of any (GC)."""
    spoken = drafts.loc > 0
    there = spoken if spoken.any() else drafts.rows >= 0
    right, called = (drafts.rows == targets.unsqueeze(1)) & there, drafts.loc == truth.right
    count = max(int(there.sum()), 1)

    def of(part: Tensor, whole: int) -> float | None:
        return round(int(part.sum()) / whole, 9) if whole else None

    return {
        "drafts_right": of(right, count),
        "called_right": of(called, count),
        "called_right_precision": of(called & right, int(called.sum())),
        "kept": of(drafts.kept, count),
        "entropy_mean": round(float(drafts.entropies[there].double().sum()) / count, 6),
    }


def _first(rows: Tensor, k: int) -> Tensor:
    """The first k, filled up with -1.   (P, B) -> (P, k)"""
    return torch.nn.functional.pad(rows[:, :k], (0, max(0, k - rows.size(1))), value=-1)


# ---- from a file


def drafts_of(
    predictions: Sequence[Prediction], catalogue: Catalogue, truth: Truth, file: str | Path | None = None
) -> Drafts:
    sizes = torch.tensor([len(prediction.drafts) for prediction in predictions])
    there = torch.arange(max(1, int(sizes.max()))) < sizes.unsqueeze(1)  # (P, B)
    lines = list(chain.from_iterable(prediction.drafts for prediction in predictions))
    attributes = max((len(line.same) for line in lines), default=0)
    for number, prediction in enumerate(predictions, 1):
        if problem := next(filter(None, (_problem(line, catalogue, truth) for line in prediction.drafts)), None):
            fix = "give the prepared data and the model that were predicted with"
            raise UserError(problem, file=file, line=number if file else None, fix=fix)

    def spread(values: list, fill: object, *more: int) -> Tensor:
        flat = torch.tensor(values).reshape(len(lines), *more)
        whole = torch.full((*there.shape, *more), fill, dtype=flat.dtype if lines else torch.tensor(fill).dtype)
        whole[there] = flat.to(whole.dtype)
        return whole

    return Drafts(
        spread([catalogue.row_of[line.item] for line in lines], -1), spread([line.score for line in lines], NONE),
        spread([line.loc for line in lines], 0),
        spread([line.same or [False] * attributes for line in lines], False, attributes).bool(),
        spread([line.entropy for line in lines], 0.0), spread([line.kept for line in lines], False),
    )  # fmt: skip


def _problem(line: DraftLine, catalogue: Catalogue, truth: Truth) -> str | None:
    if line.item not in catalogue.row_of:
        return f"a draft is {line.item!r}, which {catalogue.name} does not have"
    if not 0 <= line.loc <= truth.right:
        return f"a draft goes wrong at level {line.loc}, and the model's items have {truth.right - 1}"
    if line.loc and len(line.same) != len(truth.attributes.names):
        return f"a draft has {len(line.same)} labels of attributes, and the model has {len(truth.attributes.names)}"
    return None


# ---- to read


def reflection_table(scores: dict) -> Table:
    """The part `reflection` of metrics.json."""
    title = f"reflection, at most {scores['drafts']} drafts a target"
    table = Table("reflection", "value", "95 % interval", "always the same label", title=title, title_justify="left")
    for name, value in scores["metrics"].items():
        low, high = scores["intervals"][name]
        always = scores["majority"].get(name)
        same = "" if always is None else f"{always:.4f} ({scores['majority_label'][name]})"
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{low:.4f} to {high:.4f}", same)
    for name, value in scores.items():
        if value is None or isinstance(value, float):
            table.add_row(name.replace("_", " "), "–" if value is None else f"{value:.4f}", "", "")
    return table
