"""Several evaluations side by side: mean ± standard deviation over seeds, and how sure a difference to the baseline is.

Differences from reading the metrics.json of each folder:

1. Runs of one name and several seeds are one row.
2. A row is tested against the baseline on the same users, from the predictions: each case's value is averaged over the
   row's seeds, then the signs of the users' differences are flipped (two-sided; a user's cases stay together).
3. Each metric has as many tests as rows beside the baseline: Holm's correction holds their joint error at the level.
4. What was not measured alike (data, split, k, what a model may see of the past) is refused, not laid side by side.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import msgspec
import polars as pl
import torch
from torch import Tensor

from recllm import metrics
from recllm.errors import UserError
from recllm.evaluation import predictions
from recllm.evaluation.matching import KEY
from recllm.evaluation.predictions import AGAIN
from recllm.evaluation.repeats import Kind, apart
from recllm.evaluation.scoring import case_values, is_of_cases, user_numbers, user_sums
from recllm.evaluation.slices import to_tensor
from recllm.files import read_object, require

FILE = "metrics.json"
ALIKE = (
    "k",
    "max_history",
    "exclude_history",
    "users",
    "users_seed",
    "target_behaviour",
)  # of the protocol; the rest may differ and is shown where it does
PASS = "pass@"
CASE = [*KEY, "target"]
OF_ONE_SEED = ("seed", "checkpoint", "weights")  # of a ranker: what differs between runs of one row


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    runs: list[str] = field(default_factory=list, metadata={"help": "Folders written by evaluate.py, in their order."})
    baseline: str | None = field(default=None, metadata={"help": "The name all others are tested against: the first."})
    metrics: list[str] = field(
        default_factory=lambda: ["recall@5", "recall@10", "ndcg@5", "ndcg@10"],
        metadata={"help": "The columns: recall@K, ndcg@K, mrr@K, or pass@K of samples, as in metrics.json."},
    )
    format: Literal["text", "markdown", "latex"] = field(default="text", metadata={"help": "How the table is written."})
    cases: Kind = field(
        default="all",
        metadata={"help": "Of conversions: items that the user had met before, those that were new, or all."},
    )
    output: str | None = field(default=None, metadata={"help": "The file to write; standard output without it."})

    def __post_init__(self):
        if not self.runs:
            raise UserError("there is nothing to compare", fix="name the folders first: compare.py runs/a runs/b")
        if not self.metrics:
            raise UserError("`metrics` is empty", fix="--metrics recall@10 ndcg@10")


# ---- one evaluation


class Data(msgspec.Struct):
    name: str
    fingerprint: str


class Described(msgspec.Struct):
    name: str
    catalogue: Data
    split: str
    protocol: dict[str, Any]
    ranker: dict[str, Any] = {}
    seed: int | None = None


class Evaluation(msgspec.Struct):
    """What compare.py reads of metrics.json."""

    run: Described
    users: int
    targets: int
    metrics: dict[str, float]
    reasoning: dict[str, Any] = {}

    @property
    def of_cases(self) -> dict[str, float]:
        """The figures that follow from each case of the predictions."""
        of_samples = self.reasoning.get("metrics", {})
        passed = {name: value for name, value in of_samples.items() if name.startswith(PASS)}
        return {name: value for name, value in self.metrics.items() if is_of_cases(name)} | passed


@dataclasses.dataclass(frozen=True)
class Run:
    folder: Path
    evaluation: Evaluation
    cases: pl.DataFrame  # user, position, target, rank, samples, right, repeat; sorted by user and position

    @property
    def about(self) -> Described:
        return self.evaluation.run

    def values(self, metric: str) -> Tensor:
        """-> (P,)"""
        if metric.startswith(PASS):
            samples, right = to_tensor(self.cases["samples"]), to_tensor(self.cases["right"])
            return metrics.pass_at_k(samples, right, int(metric.removeprefix(PASS)))
        return case_values(metric, to_tensor(self.cases["rank"]))


def load(folder: str | Path) -> Run:
    """An evaluation folder, or one sentence: incomplete, damaged, or its two files are not of one run."""
    folder = require(folder, "the evaluation", "check the path, or run evaluate.py")
    path = require(folder / FILE, "the evaluation's result", "run evaluate.py with --output to this folder")
    try:
        evaluation = msgspec.convert(read_object(path), Evaluation)
    except msgspec.ValidationError as error:
        raise UserError(f"is damaged: {error}", file=path, fix=AGAIN) from None
    require(folder / predictions.FILE, "the file of predictions", AGAIN)
    rows = [
        (
            *(p.user, p.position, p.target, p.items.index(p.target) if p.target in p.items else metrics.NOT_FOUND),
            *(len(p.samples), sum(sample.item == p.target for sample in p.samples)),
            None if p.repeat is None else bool(p.repeat),
        )
        for p in predictions.read(folder / predictions.FILE)
    ]
    numbers = dict.fromkeys(("position", "rank", "samples", "right"), pl.Int64)
    schema = dict.fromkeys(CASE, pl.String) | numbers | {"repeat": pl.Boolean}
    cases = pl.DataFrame(rows, schema=schema, orient="row")
    run = Run(folder, evaluation, cases.sort(KEY))
    same = len(cases) == evaluation.targets and all(
        abs(float(run.values(name).mean()) - value) < 1e-6 for name, value in evaluation.of_cases.items()
    )
    if not same or cases.select(KEY).is_duplicated().any():
        raise UserError(f"{predictions.FILE} does not give the figures of {FILE}", file=folder, fix=AGAIN)
    return run


def refuse_unlike(runs: Sequence[Run]) -> None:
    """All are of the same data, split, protocol and cases, and none is there twice."""
    first, seen = runs[0], {}
    for run in runs:
        for what, value, other in _measured(run.about, first.about):
            if value != other:
                raise UserError(
                    f"has {what} {value!r}, and {first.folder} has {other!r}",
                    file=run.folder,
                    fix="compare evaluations of the same data, split and protocol",
                )
        _refuse_other_cases(run, first)
        twin = seen.setdefault((run.about.name, run.about.seed), run)
        if twin is not run:
            raise UserError(
                f"is a second run {run.about.name!r} with seed {run.about.seed}; the first is {twin.folder}",
                file=run.folder,
                fix="give every seed once, or evaluate under another name",
            )


def _measured(about: Described, first: Described) -> list[tuple[str, Any, Any]]:
    return [
        ("catalogue fingerprint", about.catalogue.fingerprint, first.catalogue.fingerprint),
        ("split", about.split, first.split),
        *((name, about.protocol.get(name), first.protocol.get(name)) for name in ALIKE),
    ]


def _refuse_other_cases(run: Run, first: Run) -> None:
    if run.cases.select(CASE).equals(first.cases.select(CASE)):
        return
    for here, there in ((run, first), (first, run)):
        alone = here.cases.join(there.cases, on=CASE, how="anti", maintain_order="left")
        if len(alone):
            raise UserError(
                f"has no prediction of {alone['target'][0]!r} for user {alone['user'][0]!r} at position "
                f"{alone['position'][0]}, and {here.folder} has",
                file=there.folder,
                fix=f"{AGAIN}, with the same data and split",
            )


# ---- the table


@dataclasses.dataclass(frozen=True)
class Cell:
    mean: float
    deviation: float | None  # over seeds; None for one
    p: float | None  # of its difference to the baseline, Holm-corrected; None in the baseline's own row

    @property
    def stars(self) -> str:
        return "" if self.p is None or self.p >= 0.05 else "*" if self.p >= 0.01 else "**"


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    seeds: tuple[int | None, ...]
    settings: dict[str, Any]  # of the protocol, where the rows differ in them
    cells: tuple[Cell, ...]  # one a metric


@dataclasses.dataclass(frozen=True)
class Comparison:
    metrics: tuple[str, ...]
    baseline: str
    rows: tuple[Row, ...]
    users: int
    targets: int
    data: str
    split: str
    part: bool  # are these not all users of the split?
    cases: Kind = "all"


def compare(config: CompareConfig) -> Comparison:
    runs = [load(folder) for folder in config.runs]
    refuse_unlike(runs)
    runs = [dataclasses.replace(run, cases=apart(run.cases, config.cases, run.folder)) for run in runs]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.about.name, []).append(run)
    for group in groups.values():
        _refuse_mixed(group)
    baseline = config.baseline or runs[0].about.name
    _refuse_unknown(baseline, list(groups), "baseline", "none of the runs")
    known = [name for name in runs[0].evaluation.of_cases if all(name in run.evaluation.of_cases for run in runs)]
    for metric in config.metrics:
        _refuse_unknown(metric, known, "metrics", "not a metric of all these runs")
    columns = {metric: _column(groups, metric, baseline) for metric in config.metrics}
    # How a list came about is no part of the protocol, and yet nothing to lay side by side without a word.
    modes = {name: {"mode": group[0].about.ranker.get("mode", "direct")} for name, group in groups.items()}
    settings = _differing({name: group[0].about.protocol | modes[name] for name, group in groups.items()})
    return Comparison(
        metrics=tuple(config.metrics),
        baseline=baseline,
        rows=tuple(
            Row(
                name,
                tuple(run.about.seed for run in group),
                settings[name],
                tuple(columns[metric][name] for metric in config.metrics),
            )
            for name, group in groups.items()
        ),
        users=runs[0].cases["user"].n_unique(),
        targets=len(runs[0].cases),
        data=runs[0].about.catalogue.name,
        split=runs[0].about.split,
        part="users" in runs[0].about.protocol,
        cases=config.cases,
    )


def _column(groups: dict[str, list[Run]], metric: str, baseline: str) -> dict[str, Cell]:
    """The metric's cell of each row."""
    values = {name: torch.stack([run.values(metric) for run in group]) for name, group in groups.items()}  # (S, P) each
    user = user_numbers(groups[baseline][0].cases)  # (P,)
    sums = {name: user_sums(seeds.mean(dim=0), user) for name, seeds in values.items()}  # (U,) each
    others = [name for name in groups if name != baseline]
    p_values = [metrics.paired_p_value(sums[name], sums[baseline]) for name in others]
    corrected = dict(zip(others, holm(p_values)))
    cells = {}
    for name, seeds in values.items():
        mean, deviation = metrics.mean_and_deviation(seeds.mean(dim=1).tolist())
        cells[name] = Cell(mean, deviation if len(seeds) > 1 else None, corrected.get(name))
    return cells


def holm(p_values: Sequence[float]) -> list[float]:
    """p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)), p_(1) ≤ … ≤ p_(m): as sure of all m together as of one alone."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for before, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - before) * p_values[i]))
        corrected[i] = highest
    return corrected


def _differing(protocols: dict[str, dict]) -> dict[str, dict]:
    """Of each row, the settings in which rows differ (beams, list length …)."""
    names = dict.fromkeys(name for protocol in protocols.values() for name in protocol)
    shown = [name for name in names if len({repr(protocol.get(name)) for protocol in protocols.values()}) > 1]
    return {row: {name: protocol.get(name) for name in shown} for row, protocol in protocols.items()}


def _refuse_mixed(group: Sequence[Run]) -> None:
    """One name is one recommender under one protocol, trained with several seeds."""
    first = group[0]
    for run in group[1:]:
        here_all, there_all = (
            {**about.protocol, **{name: value for name, value in about.ranker.items() if name not in OF_ONE_SEED}}
            for about in (run.about, first.about)
        )
        for name in there_all | here_all:
            here, there = here_all.get(name), there_all.get(name)
            if here != there:
                raise UserError(
                    f"is named {run.about.name!r} as {first.folder} is, with {name} {here!r} and not {there!r}",
                    file=run.folder,
                    fix="evaluate it under another name: one name is one row of seeds",
                )


def _refuse_unknown(name: str, known: Sequence[str], setting: str, what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{setting}: {name!r} is {what}", fix=fix)
