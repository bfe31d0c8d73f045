"""What `recllm health` says of runs: tables in the form of ReCast's, curves, warnings, an SVG and a CSV."""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recllm.errors import UserError
from recllm.files import write_whole
from recllm.health.checks import warnings_of
from recllm.health.log import RunLog, read_log
from recllm.launch import console
from recllm.plots import Chart, Series, chart_grid

METRICS = {
    "reward": "reward",
    "eval_recall@10": "validation Recall@10",
    "eval_ndcg@10": "validation NDCG@10",
    "group/all_zero": "groups without a hit",
    "group/single_hit": "groups with one hit",
    "group/richer": "groups with more hits",
    "group/zero_reward": "answers without reward",
    "group/trainable": "groups with a signal of their own",
    "recast/repaired": "groups repaired",
    "group/rejected": "groups rejected",
    "group/refilled": "groups drawn anew",
    "srpo/bonus_abs_mean": "size of SRPO's bonus",
    "rollout/validity": "answers that name an item",
    "rollout/distinct": "different items of the answers",
    "rollout/length": "tokens an answer",
    "actor/width": "answers a prompt that train",
    "loss": "loss",
    "kl": "KL to the reference",
    "ppo_kl": "KL of an update",
    "clip_ratio/region_mean": "clipped tokens, share",
    "grad_norm": "gradient norm",
    "entropy": "entropy",
}
IN_PERCENT = {
    "group/all_zero", "group/single_hit", "group/richer", "group/zero_reward", "group/trainable", "group/rejected",
    "group/refilled", "recast/repaired", "rollout/validity", "rollout/distinct",
}  # fmt: skip
COST = {
    "step_time": "whole step, s",
    "time/rollout": "rollout, s",
    "time/score": "scoring, s",
    "time/old_logps": "old log-probabilities, s",
    "time/reference": "reference, s",
    "time/update": "update, s",
    "time/other": "rest of a generation, s",
    "actor/active": "answers that train",
    "actor/tokens": "tokens through the update",
    "actor/tokens_per_second": "tokens a second",
    "actor/mfu": "MFU",
    "memory/peak_gb": "peak memory, GB",
}
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # blocks of a curve in the terminal
DRAWN = 150  # points of a line in the SVG: more cannot be told apart


def health(runs: Sequence[str], output: str | None = None, table: str | None = None) -> None:
    """Print what the logs of these folders say; draw the curves to `output`, write every metric to `table`."""
    if not runs:
        raise UserError("no run is named", fix="recllm health FOLDER")
    for path, ending in ((output, ".svg"), (table, ".csv")):
        if path is not None and Path(path).suffix != ending:
            raise UserError(f"is to end in {ending}", file=path, fix=f"{Path(path).stem}{ending}")
    logs = [read_log(folder, name) for folder, name in zip(runs, names_of(runs), strict=True)]
    wide = Console(soft_wrap=True, width=1000)  # cells that are cut or folded cannot be compared
    for log in logs:
        state = "finished" if log.finished else "not finished: as of its last save"
        words = ", ".join(part for part in (log.method, f"{log.last_step:,} steps", state) if part)
        wide.print(Text(f"{log.name}: {words}"))
    for made in (change_table(logs), cost_table(logs), curves_table(logs)):
        if made.row_count:
            wide.print()
            wide.print(made)
    for log in logs:
        for warning in warnings_of(log):
            wide.print(Text(f"warning: {log.name}: {warning}"))
    if output is not None:
        with write_whole(output) as partial:
            partial.write_text(charts(logs), encoding="utf-8")
        console.print(f"wrote {output}", highlight=False)
    if table is not None:
        with write_whole(table) as partial:
            write_csv(logs, partial)
        console.print(f"wrote {table}", highlight=False)


def names_of(folders: Sequence[str]) -> list[str]:
    """The folder's name; as much of the path before it as tells it from the others'."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(folders)


def _table(title: str, logs: Sequence[RunLog], justify: str = "right") -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    for log in logs:
        table.add_column(Text(log.name), justify=justify, no_wrap=True)
    return table


def change_table(logs: Sequence[RunLog]) -> Table:
    """Means over the first, middle and last fifth of each run.   ReCast, Tables 2 and 3"""
    table = _table("start → middle → end (means over a fifth of the logged steps each)", logs)
    for metric, words in METRICS.items():
        found = [log.fifths(metric) for log in logs]
        if any(found):
            table.add_row(words, *[_change(fifths, metric in IN_PERCENT) for fifths in found])
    return table


def _change(fifths: tuple[float, float, float] | None, share: bool) -> str:
    if fifths is None:
        return "–"
    if share:
        return " → ".join(f"{100 * value:.1f}" for value in fifths) + " %"
    return " → ".join(f"{value:.4g}" for value in fifths)


def cost_table(logs: Sequence[RunLog]) -> Table:
    """Means over all logged steps; after the first run, how many times more or less.   ReCast, Table 4"""
    table = _table("a step costs (means over the run)", logs)
    for metric, words in COST.items():
        found = [log.mean(metric) for log in logs]
        if any(value is not None for value in found):
            table.add_row(words, _amount(found[0]), *[_amount(value, found[0]) for value in found[1:]])
    return table


def _amount(value: float | None, first: float | None = None) -> str:
    if value is None:
        return "–"
    said = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if not value or not first or value * first < 0:
        return said
    ratio = value / first
    return f"{said} ({ratio:.2f}× more)" if ratio >= 1 else f"{said} ({1 / ratio:.2f}× less)"


def curves_table(logs: Sequence[RunLog]) -> Table:
    """A metric's curves share their scale: the lowest and the highest block are the first and the last column."""
    table = _table("over the steps", logs, justify="left")
    table.add_column("lowest", justify="right", no_wrap=True)
    table.add_column("highest", justify="right", no_wrap=True)
    for metric, words in METRICS.items():
        drawn = [[value for _, value in thinned(log.curves.get(metric, ()), WIDTH)] for log in logs]
        values = [value for line in drawn for value in line]
        if len(values) > len(logs):  # a single point each is no curve
            low, high = min(values), max(values)
            table.add_row(words, *[blocks(line, low, high) for line in drawn], f"{low:.4g}", f"{high:.4g}")
    return table


def blocks(values: Sequence[float], low: float, high: float) -> str:
    """A line of block characters between these bounds; a constant one lies in the middle."""
    span = high - low
    heights = [(value - low) / span if span else 0.5 for value in values]
    return "".join(BLOCKS[min(int(height * len(BLOCKS)), len(BLOCKS) - 1)] for height in heights)


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points, each the mean of neighbours."""
    size = math.ceil(len(points) / most)
    parts = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(math.fsum(x for x, _ in part) / len(part), math.fsum(y for _, y in part) / len(part)) for part in parts]


def charts(logs: Sequence[RunLog]) -> str:
    """A chart for each metric that any run logged, a line for each run.   ReCast, Figure 4 and the curves of Table 3"""
    drawn = []
    for metric, words in (METRICS | COST).items():
        series = [
            Series(log.name, thinned(log.curves[metric], DRAWN), colour=number)
            for number, log in enumerate(logs)
            if metric in log.curves
        ]
        if series:
            drawn.append(Chart(words[:1].upper() + words[1:], "step", metric, series))
    if not drawn:
        raise UserError(f"{logs[0].name} logged nothing that is drawn", fix="--csv FILE.csv writes every metric")
    return chart_grid(drawn)


def write_csv(logs: Sequence[RunLog], path: Path) -> None:
    """A row for each run and step, a column for each metric; empty where a step did not log it."""
    metrics = sorted({metric for log in logs for metric in log.curves})
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["run", "step", *metrics])
        for log in logs:
            writer.writerows([log.name, step, *(at.get(metric, "") for metric in metrics)] for step, at in _steps(log))


def _steps(log: RunLog) -> Iterator[tuple[int, dict[str, float]]]:
    steps: dict[int, dict[str, float]] = {}
    for metric, points in log.curves.items():
        for step, value in points:
            steps.setdefault(step, {})[metric] = value
    yield from sorted(steps.items())
