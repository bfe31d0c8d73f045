"""A run's log, read from its folder while it trains or when it is done."""

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recllm.checkpoint import REPORT
from recllm.errors import UserError
from recllm.files import read_object

STATE = "trainer_state.json"  # of transformers' Trainer, in each of its checkpoints
PARTS = 5  # start, middle and end are a fifth of the log each
NOT_METRICS = ("step", "epoch", "total_flos")
Point = tuple[int, float]  # step, value


@dataclass(frozen=True)
class RunLog:
    """Every metric over the steps at which it was logged."""

    name: str
    method: str  # "" while it trains: the folder says it at the end
    finished: bool
    curves: Mapping[str, Sequence[Point]]  # finite values alone
    broken: Mapping[str, int]  # the first step at which a metric was no finite number

    @property
    def last_step(self) -> int:
        return max(points[-1][0] for points in self.curves.values())

    def values(self, metric: str) -> list[float]:
        return [value for _, value in self.curves.get(metric, ())]

    def mean(self, metric: str) -> float | None:
        """Over the whole run; None if it was never logged."""
        values = self.values(metric)
        return math.fsum(values) / len(values) if values else None

    def fifths(self, metric: str) -> tuple[float, float, float] | None:
        """Means over the first, the middle and the last fifth of what was logged; None if nothing was."""
        values = self.values(metric)
        size = math.ceil(len(values) / PARTS)
        starts = (0, (len(values) - size) // 2, len(values) - size)
        means = [math.fsum(values[start : start + size]) / size for start in starts] if values else []
        return (means[0], means[1], means[2]) if means else None


def read_log(folder: str | Path, name: str | None = None) -> RunLog:
    """Of a finished checkpoint, of a run that still trains into `folder`, or of any folder of Trainer's steps."""
    folder = Path(folder)
    report, name = folder / REPORT, name or folder.absolute().name
    for state in _states(folder):
        if report.exists() and state.stat().st_mtime <= report.stat().st_mtime:
            break  # of another run than the finished one
        try:
            content = read_object(state)
        except UserError:
            continue  # cut off, or not whole yet: the step before is
        return _log_of(name, "", False, content.get("log_history"), state)
    if report.exists():
        found = read_object(report)
        method = str(found.get("method", ""))
        parts = [part for part in (found.get(kind) for kind in (method, "rl", "sft")) if isinstance(part, dict)]
        entries = next((part["log"] for part in parts if "log" in part), None)
        return _log_of(name, method, True, entries, report)
    raise UserError(
        f"holds no log of a training run: no {REPORT}, and no {STATE} of a step that was saved",
        file=folder,
        fix="give the --output_dir of recipes/*.py, after its first save",
    )


def _states(folder: Path) -> list[Path]:
    """Of steps that were saved, newest first: beside the output, where our runs keep them, or inside, as Trainer does.

    Nothing is removed, since the run may be writing at this moment.
    """
    folder = folder.absolute()  # "." has no name
    found = list(folder.parent.glob(f"{glob.escape(folder.name)}.work-*/steps/checkpoint-*/{STATE}"))
    for inside in ("", "checkpoint-*/", "steps/checkpoint-*/"):
        found += folder.glob(inside + STATE)
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path), reverse=True)


def _log_of(name: str, method: str, finished: bool, entries: object, file: Path) -> RunLog:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError("holds no log of a training run", file=file, fix="give a model trained by recipes/*.py")
    curves: dict[str, list[Point]] = {}
    broken: dict[str, int] = {}
    for entry in entries:
        step = entry.get("step")
        numbers = {metric: value for metric, value in entry.items() if metric not in NOT_METRICS}
        for metric, value in numbers.items() if isinstance(step, int) else ():
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                broken.setdefault(metric, step)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(metric, []).append((step, float(value)))
    if not curves:
        raise UserError("the run has logged nothing yet", file=file, fix="try again after its first --logging_steps")
    return RunLog(name, method, finished, curves, broken)
