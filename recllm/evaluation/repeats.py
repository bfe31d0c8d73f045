"""Conversions of items that the user had met before and of items that are new, apart: other tasks, other figures.

Whoever puts the last clicked items first finds most repeats and nothing new, so one figure over both hides which.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from rich.table import Table
from torch import Tensor

from recllm.catalogue import Catalogue, Split
from recllm.errors import UserError
from recllm.evaluation.predictions import Prediction
from recllm.evaluation.slices import Slices
from recllm.mixtures.conversion_cases import ConversionEvents

Kind = Literal["all", "repeat", "new"]
Means = Callable[[dict[str, Tensor], Tensor], dict]  # values of cases (P,) each, users (P,) -> metrics, intervals


def conversion_cases(
    catalogue: Catalogue, split: Split, target_behaviour: str, max_history: int | None = None
) -> pl.DataFrame:
    """`ConversionEvents.cases`, of data that hold out conversions of this behaviour."""
    return checked(catalogue, target_behaviour).cases(split, max_history)


def checked(catalogue: Catalogue, target_behaviour: str | None) -> ConversionEvents:
    """None: whichever behaviour the data hold out."""
    events = ConversionEvents(catalogue)
    if target_behaviour not in (None, events.target_behaviour):
        raise UserError(
            f"the data hold out conversions of {events.target_behaviour!r}, not of {target_behaviour!r}",
            file=catalogue.folder,
            fix=f"--target_behaviour {events.target_behaviour}, or prepare them with --split conversion anew",
        )
    return events


def slice_of(repeat: pl.Series) -> Slices:
    """By which behaviours the item was met: the combinations that occur, the frequent ones first.   lists (P,)"""
    names = [" + ".join(kinds) or "nothing: a new item" for kinds in repeat.to_list()]
    labels = [name for name, _ in sorted(Counter(names).items(), key=lambda pair: (-pair[1], pair[0]))]
    number = {label: place for place, label in enumerate(labels)}
    return Slices("target met by", tuple(labels), torch.tensor([number[name] for name in names], dtype=torch.int64))


def figures(
    repeat: pl.Series, values: dict[str, Tensor], user: Tensor, means: Means, predictions: Sequence[Prediction]
) -> dict:
    """The part `conversion` of metrics.json: every metric over repeats, and over new items; (P,) each.

    evidence   events in a prefix, mean; and in how many of the repeats the target's own item was among them
    """
    met = torch.tensor((repeat.list.len() > 0).to_list(), dtype=torch.bool)
    found: dict = {}
    for kind, inside in (("repeat", met), ("new", ~met)):
        found[kind] = {"users": len(user[inside].unique()), "targets": int(inside.sum())}
        if inside.any():
            found[kind] |= means({name: value[inside] for name, value in values.items()}, user[inside])
    if any(prediction.evidence for prediction in predictions):
        own = [any(one.item == p.target for one in p.evidence) for p in predictions if p.repeat]
        count = sum(len(prediction.evidence) for prediction in predictions)
        found["evidence"] = {
            "events": round(count / len(predictions), 6),
            "repeats_with_target": round(sum(own) / len(own), 9) if own else None,
        }
    return found


def apart(cases: pl.DataFrame, kind: Kind, folder: Path) -> pl.DataFrame:
    """Those of one kind, by the column `repeat`: true, false, or null where the target is no conversion."""
    if kind == "all":
        return cases
    if cases["repeat"].null_count():
        raise UserError("was not evaluated on conversions", file=folder, fix="--cases all")
    some = cases.filter(pl.col("repeat") == (kind == "repeat"))
    if some.is_empty():
        raise UserError(f"no target is {'a repeat' if kind == 'repeat' else 'new'}", file=folder, fix="--cases all")
    return some


def kinds_of(metrics: dict) -> list[Kind]:
    """The kinds of conversions that an evaluation's metrics.json has targets of; none if it is of other targets."""
    parts = metrics.get("conversion", {})
    return [kind for kind in ("repeat", "new") if parts.get(kind, {}).get("targets")]


def conversion_table(scores: dict) -> Table:
    """The part `conversion` of metrics.json."""
    parts = {kind: scores[kind] for kind in kinds_of({"conversion": scores})}
    heads = [f"{kind} ({part['targets']:,})" for kind, part in parts.items()]
    table = Table("conversions", title="targets that the user had met before, and new ones", title_justify="left")
    for head in heads:
        table.add_column(head)
        table.add_column("95 % interval")
    for name in next(iter(parts.values()))["metrics"]:
        cells = []
        for part in parts.values():
            low, high = part["intervals"][name]
            cells += [f"{part['metrics'][name]:.4f}", f"{low:.4f} to {high:.4f}"]
        table.add_row(name, *cells)
    return table
