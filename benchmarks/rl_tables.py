"""What `rl.py` prints: Markdown, to be pasted into docs/performance.md."""

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from actor import DEVICE
from rl_sides import SIDES, Spent

PHASES = ("rollout", "score", "old", "reference", "loss", "other", "optimizer")
COLUMNS = ["", *PHASES, "step", "update", "memory"]
HEADER = [COLUMNS, ["---"] * len(COLUMNS)]
GOALS = ["", "goal", "found", "by the clock", ""]


@dataclass(frozen=True)
class Row:
    """A goal and what was found: `at_least` so many times faster, or `at most` a figure."""

    what: str
    goal: float
    found: float
    at_least: bool = True
    wall: float | None = None  # the same by the clock

    @property
    def held(self) -> bool:
        return self.found >= self.goal if self.at_least else self.found <= self.goal

    def cells(self) -> list[str]:
        def show(value: float) -> str:
            return f"{value:.1f}x" if self.at_least else f"{value:.2g}"

        goal = f"{'≥' if self.at_least else '≤'} {self.goal:g}{'x' if self.at_least else ''}"
        return [self.what, goal, show(self.found), "" if self.wall is None else show(self.wall),
                "held" if self.held else "not held"]  # fmt: skip


def lines(*rows: Sequence[str]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def phases(result: dict) -> list[list[str]]:
    """Milliseconds of a step's phases, on answers drawn where they are, and of an update on given ones."""
    found, rows = result["seconds"], []
    drawn = found.get("drawn", found["given"])

    def middle(some: Sequence[Spent], what: str) -> str:
        return f"{1e3 * statistics.median(spent[what] for spent in some):,.0f}"

    for name in SIDES:
        memory = result["peak_bytes"].get(name)
        shown = {what: middle(drawn[name], what) for what in (*PHASES, "step")}
        if "drawn" not in found:
            shown |= {"rollout": "", "score": "", "step": ""}
        update = middle(found["given"][name], "update")
        rows.append([f"{result['case']}: {name}", *shown.values(), update, f"{memory / 2**20:,.0f}" if memory else ""])
    return rows


def machine() -> dict[str, str]:
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"one CPU thread ({platform.machine()})"
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {"machine": where, "system": platform.platform(), "python": platform.python_version()} | versions
