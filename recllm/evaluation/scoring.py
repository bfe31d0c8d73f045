"""Predictions and a catalogue in, every figure of metrics.json out.

The figures are those of `recllm.metrics`; here is only which cases they are taken over. A case is one target of the
split; leave-one-out gives a user one, a split by time may give several, and then users, not cases, are drawn anew for
the intervals. Every target counts, or nothing is scored: a ranker that skips the hard users gets no figure at all.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import polars as pl
import torch
from rich.table import Table
from torch import Tensor

from recllm import metrics
from recllm.catalogue import Catalogue, Split
from recllm.errors import UserError
from recllm.evaluation import drafts, repeats, samples
from recllm.evaluation.matching import in_order, item_lists, list_length
from recllm.evaluation.predicting import some_users
from recllm.evaluation.predictions import Prediction
from recllm.evaluation.slices import Slices, item_rows, slices_of, to_tensor, training_counts

METRICS = {"recall": metrics.recall_at_k, "ndcg": metrics.ndcg_at_k, "mrr": metrics.mrr_at_k}


def score(
    predictions: Sequence[Prediction],
    catalogue: Catalogue,
    split: Split,
    ks: Sequence[int] = (5, 10),
    *,
    length: int | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    pass_ks: Sequence[int] = (),
    users: int | None = None,
    users_seed: int = 0,
    truth: drafts.Truth | None = None,
    target_behaviour: str | None = None,
) -> dict:
    """Plain JSON values: users, targets, metrics, intervals, lists, slices. The order of the predictions is no matter.
    With samples of a model that reasoned, `reasoning` too, with the truth about drafts `reflection`, and of conversions
    `conversion`: the metrics of repeats and of new items apart.

    length   how many items each list was to have; without it, as many as the longest has (at least the largest k)
    seed     of the bootstrap
    file     where the predictions come from, line by line, for the sentence that refuses them
    pass_ks  the k of pass@k, of samples
    users    every target of so many users is wanted, drawn by `users_seed`; None: of all
    truth    what a model that reflects should have said
    target_behaviour  of which the targets are conversions; None: they are targets like any other
    """
    every = catalogue.targets(split)["user"]
    measured = every.is_in(some_users(every, users, users_seed).implode())  # (all targets of the split,)
    cases = in_order(predictions, catalogue, split, file, measured)
    if not len(cases):
        raise UserError(f"the {split} split has no targets", file=catalogue.folder, fix="choose another split")
    length = list_length(predictions, ks, length, file)
    items = item_lists(predictions, catalogue, length, file)[to_tensor(cases["line"]) - 1]  # (P, K)
    targets = item_rows(catalogue, cases["target"])  # (P,)
    popularity = training_counts(catalogue)  # (N,)
    ranks = metrics.ranks(items, targets)  # (P,)
    k = max(ks)
    names = [f"{name}@{at}" for name in METRICS for at in ks] + ([f"recall@{length}"] if length > k else [])
    values = {name: case_values(name, ranks) for name in names}
    user = user_numbers(cases)  # (P,)
    order, more = to_tensor(cases["line"]) - 1, {}
    means = partial(_means, user=user, seed=seed)
    if any(prediction.samples for prediction in predictions):
        found = samples.answers(predictions, catalogue, file)[order]  # (P, n)
        of_samples = samples.values_of(found, items, targets, ks, pass_ks)
        figures = {name: figure(value) for name, value in samples.chain_figures(predictions, found).items()}
        more |= {"reasoning": {"samples": found.size(1), **means(of_samples), **figures}}
    if truth is not None:
        given = drafts.Drafts(*(part[order] for part in drafts.drafts_of(predictions, catalogue, truth, file)))
        of_drafts = drafts.measured(given, items, targets, ks, truth)
        more |= {"reflection": {"drafts": given.rows.size(1), **means(of_drafts.of_cases), **of_drafts.others}}
    divisions = slices_of(catalogue, split, popularity)
    if target_behaviour is not None:
        met = repeats.conversion_cases(catalogue, split, target_behaviour)["repeat"]
        divisions.append(repeats.slice_of(met))
        apart = repeats.figures(met.filter(measured), values, user, partial(_means, seed=seed), predictions)
        more |= {"conversion": apart}
    return {
        "users": int(user.max()) + 1,
        "targets": len(cases),
        **means(values),
        **more,
        "lists": list_figures(items, targets, popularity, k),
        "slices": {
            division.name: _parts(division, to_tensor(measured).bool(), values, user, k) for division in divisions
        },
    }


def _parts(division: Slices, measured: Tensor, values: dict[str, Tensor], user: Tensor, k: int) -> dict:
    """Recall and NDCG of each part of a division that somebody falls into."""
    member = division.member[measured]  # (P,)
    return {
        label: {
            "users": len(user[inside].unique()),
            "targets": int(inside.sum()),
            **{name: figure(values[name][inside].mean()) for name in (f"recall@{k}", f"ndcg@{k}")},
        }
        for number, label in enumerate(division.labels)
        if (inside := member == number).any()
    }


def _means(values: dict[str, Tensor], user: Tensor, seed: int) -> dict:
    """Metrics of cases (P,) each, with their intervals; a case whose value is nan is not one of that metric's."""
    known = {name: (value[~value.isnan()], user[~value.isnan()]) for name, value in values.items()}
    return {
        "metrics": {name: figure(value.mean()) for name, (value, _) in known.items()},
        "intervals": {
            name: [figure(end) for end in metrics.bootstrap_interval(per_user(value, _dense(some)), seed=seed)]
            for name, (value, some) in known.items()
        },
    }


def _dense(numbers: Tensor) -> Tensor:
    """The same order as 0, 1, …, none left out.   (P,) -> (P,)"""
    return numbers.unique(return_inverse=True)[1]


def case_values(metric: str, ranks: Tensor) -> Tensor:
    """The metric of that name ("ndcg@10") of each case.   (P,) -> (P,)"""
    name, _, k = metric.partition("@")
    return METRICS[name](ranks, int(k))


def is_of_cases(metric: str) -> bool:
    """Is it one of `case_values`, rather than a figure of the lists?"""
    name, _, k = metric.partition("@")
    return name in METRICS and k.isdecimal()


def per_user(values: Tensor, user: Tensor) -> Tensor:
    """v_u = (s_u − (n_u − n̄) m) / n̄, s_u the sum of user u's n_u values, n̄ and m the means.   (P,), (P,) -> (U,)

    Their mean is m; where every user has one case they are its values. Drawing users, not cases, to see how sure m is
    leaves a user's cases together (the linearised bootstrap of the ratio Σ s_u / Σ n_u).
    """
    cases = torch.bincount(user).double()  # (U,)
    mean = cases.mean()
    return (user_sums(values, user) - (cases - mean) * values.mean()) / mean


def user_sums(values: Tensor, user: Tensor) -> Tensor:
    """s_u = Σ of user u's values.   (P,), (P,) -> (U,)"""
    return torch.zeros(int(user.max()) + 1, dtype=torch.double).index_add(0, user, values)


def user_numbers(cases: pl.DataFrame) -> Tensor:
    """0, 1, … in the order of the user ids.   -> (P,)"""
    return to_tensor(cases["user"].rank("dense")) - 1


def list_figures(items: Tensor, targets: Tensor, popularity: Tensor, k: int) -> dict[str, float | None]:
    """Of the lists, whatever the target.   (P, K), (P,), (N,)"""
    first = items[:, :k]  # (P, k)
    bias = metrics.popularity_bias(first, popularity, targets)
    return {
        f"coverage@{k}": figure(metrics.coverage(first, len(popularity))),
        f"gini@{k}": figure(metrics.gini(metrics.exposure(first, len(popularity)))),
        f"popularity_bias@{k}": None if bias.isnan() else figure(bias),  # nothing recommended has no popularity
        f"distinct_share@{k}": figure(metrics.distinct_share(first).mean()),
        "validity": figure(metrics.validity_rate(items)),
    }


def figure(value: Tensor | float) -> float:
    """Beyond nine places stands the order in which threads added."""
    return round(float(value), 9)


# ---- to read


def score_tables(scores: dict) -> list[Table]:
    """The figures with their intervals, those of the lists, and the slices."""
    title = f"{scores['users']:,} users, {scores['targets']:,} targets"
    if "users" in scores.get("run", {}).get("protocol", {}):
        title += ", a part of the split"
    main = Table("metric", "value", "95 % interval", title=title, title_justify="left")
    for name, value in scores["metrics"].items():
        low, high = scores["intervals"][name]
        main.add_row(name, f"{value:.4f}", f"{low:.4f} to {high:.4f}")
    lists = Table("lists", "value", title_justify="left")
    for name, value in scores["lists"].items():
        lists.add_row(name.replace("_", " "), "–" if value is None else f"{value:.4f}")
    shown = [name for name in next(iter(scores["slices"]["history length"].values())) if "@" in name]
    slices = Table("slice", "", "targets", *shown)
    for division, parts in scores["slices"].items():
        for number, (label, part) in enumerate(parts.items()):
            figures = [f"{part[name]:.4f}" for name in shown]
            slices.add_row("" if number else division, label, f"{part['targets']:,}", *figures)
        slices.add_section()
    more = [reasoning_table(scores["reasoning"])] if "reasoning" in scores else []
    more += [drafts.reflection_table(scores["reflection"])] if "reflection" in scores else []
    more += [repeats.conversion_table(scores["conversion"])] if "conversion" in scores else []
    for table, labels in ((main, 1), *((table, 1) for table in more), (lists, 1), (slices, 2)):
        for column in table.columns[labels:]:
            column.justify = "right"
    return [main, *more, lists, slices]


def reasoning_table(scores: dict) -> Table:
    title = f"reasoning, {scores['samples']} sample{'s' if scores['samples'] > 1 else ''} a target"
    table = Table("reasoning", "value", "95 % interval", title=title, title_justify="left")
    for name, value in scores["metrics"].items():
        low, high = scores["intervals"][name]
        table.add_row(name.replace("_", " "), f"{value:.4f}", f"{low:.4f} to {high:.4f}")
    for name, value in scores.items():
        if name.startswith("tokens"):
            table.add_row(f"{name.removeprefix('tokens_')} tokens of a chain", f"{value:,.1f}", "")
        elif name not in ("samples", "metrics", "intervals"):
            table.add_row(name.replace("_", " "), f"{value:.4f}", "")
    return table
