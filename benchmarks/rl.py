"""A step of reinforcement learning: trl.GRPOTrainer against ours, in one process, in turns; medians of the rounds.

    python benchmarks/rl.py --output rl.json                  # CPU: a 4-layer Qwen3 of width 256, fp32, one thread
    python benchmarks/rl.py --size 0.6b                       # one GPU: the shape of Qwen3-0.6B in bf16
    python benchmarks/rl.py --only "C=5, G=16" --rounds 1     # quick

Three trainers with the same random model, prompts and loss (grpo, beta 0.04, two uses of a generation, so that old and
reference log-probabilities are computed). `TRL`: GRPOTrainer as it is. `GRPO`: ours, all G answers kept. `ReCast`:
ours, two answers of each group. A prompt is a history of items; an answer is C tokens: an item's five codes (four
levels and a suffix), after text where C is more.

step     rollout, score, signal, old and reference log-probabilities, loss and gradient, AdamW. TRL's answers come from
         HF generate (C tokens at most), ours from the engine
update   old and reference log-probabilities, loss and gradient, all on the same given answers

On a CPU the time is that of the processor, in one thread, so that a busy machine does not count; on a GPU the clock's.
Memory is the peak of an update above what lay there before, on a CPU each side in a process of its own. A padded batch
of TRL's above `--tokens` goes in parts, as one would have to run it; its memory is then that of a part. Exactness: loss
and gradient of `GRPO` beside TRL's at the second use of the answers, the policy having moved; a relative difference
above 1e-5 in fp32 fails the script. Last, on a CPU, `benchmarks/exact.py`.
"""

import dataclasses
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import exact
import torch
from actor import DEVICE, SIZES, resident
from rl_sides import SIDES, Side, Spent, Work, side_of, write_checkpoint
from rl_tables import GOALS, HEADER, Row, lines, machine, phases
from transformers.utils import logging as transformers_logging

from recllm import launch
from recllm.errors import UserError
from recllm.files import write_json

EXACT = 1e-5
EXPECTATION = "exact expectation"
AT_MOST = 1.3  # times an SFT step


@dataclass
class BenchmarkConfig:
    size: Literal["small", "0.6b"] = field(
        default="small", metadata={"help": "small: width 256, 4 layers, for a CPU; 0.6b: Qwen3-0.6B's, for a GPU."}
    )
    rounds: int = field(default=3, metadata={"help": "Times that each side runs; the median counts."})
    only: str = field(default="", metadata={"help": f'Cases whose names contain this: "C=5", "G=16", "{EXPECTATION}".'})
    prompt: int = field(default=200, metadata={"help": "Tokens of a prompt."})
    prompts: int | None = field(default=None, metadata={"help": "P. Default: 1; on a GPU 16, and 2 where C is 300."})
    tokens: int = field(default=16_384, metadata={"help": "Of TRL's padded batch at most: more goes in parts."})
    items: int = field(default=10_000, metadata={"help": "N."})
    normaliser: Literal["full", "level", "children"] = field(
        default="full", metadata={"help": "Of our log-probabilities; full is TRL's, and gives its loss."}
    )
    memory: bool = field(default=True, metadata={"help": "Measure it: on a CPU a process for each side of each case."})
    seed: int = field(default=0, metadata={"help": "Of weights, prompts and items."})
    measure: str | None = field(default=None, metadata={"help": "Internal: the memory of one side of one case."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})

    def __post_init__(self):
        if (self.size == "0.6b") != (DEVICE == "cuda"):
            fix = "--size 0.6b, or CUDA_VISIBLE_DEVICES= for the CPU" if DEVICE == "cuda" else "--size small"
            raise UserError(f"size {self.size} is not for this machine: it runs on {DEVICE}", fix=fix)
        if min(self.rounds, self.items, self.tokens, 1 if self.prompts is None else self.prompts) < 1:
            raise UserError("rounds, prompts, items and tokens are at least 1")
        if self.prompt < 3 * len(SIZES):
            raise UserError(f"a prompt of {self.prompt} tokens has no room for a history", fix="--prompt 200")


@dataclass(frozen=True)
class Case:
    answer: int  # C
    group: int  # G
    goals: dict[tuple[str, str], float]  # (what, side) → times faster than TRL

    @property
    def name(self) -> str:
        return f"C={self.answer}, G={self.group}"

    @property
    def direct(self) -> bool:
        return self.answer == len(SIZES)

    def work(self, config: BenchmarkConfig) -> Work:
        prompts = config.prompts or (1 if DEVICE == "cpu" else 16 if self.direct else 2)
        rows, most = prompts * self.group, max(1, config.tokens // (config.prompt + self.answer))
        parts = next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most)
        return Work(
            prompts, config.prompt, self.answer, self.group, parts, config.items, config.normaliser, config.seed
        )  # fmt: skip


def goals(step: float, grpo: float, recast: float) -> dict[tuple[str, str], float]:
    return {("step", "GRPO"): step, ("update", "GRPO"): grpo, ("update", "ReCast"): recast}


REASONING = [
    Case(300, 8, {("update", "GRPO"): 1, ("update", "ReCast"): 5}),
    Case(300, 16, {("update", "GRPO"): 1, ("update", "ReCast"): 10}),
]
PUBLISHED = {("step", "ReCast"): 4.8, ("update", "ReCast"): 16.6}  # ReCast's own, on GPUs
CASES = {
    "cpu": [Case(5, 16, goals(10, 20, 13)), Case(5, 32, goals(10, 20, 25)), *REASONING],
    "cuda": [Case(5, 16, PUBLISHED), Case(5, 32, PUBLISHED), *REASONING],
}[DEVICE]


# ---- one case


def race(config: BenchmarkConfig, place: int, folder: Path) -> dict:
    """Seconds of each side's phases in every round, exactness, peak memory."""
    case = CASES[place]
    work = case.work(config)
    sides = {name: side_of(name, work, folder) for name in SIDES}
    kinds = ("given", "drawn") if case.direct else ("given",)
    found: dict[str, dict[str, list[Spent]]] = {kind: {name: [] for name in SIDES} for kind in kinds}
    differs = differences(sides["TRL"], sides["GRPO"], config.seed) if config.normaliser == "full" else None
    for turn in range(config.rounds + 1):  # the first is not counted: threads and kernels come up
        for kind, (name, side) in product(kinds, sides.items()):
            if turn:
                found[kind][name].append(side.step(kind == "given"))
            elif differs is None or kind == "drawn" or name == "ReCast":
                side.step(kind == "given")
    memory = {}
    if config.memory and DEVICE == "cuda":
        memory = {name: peak_here(side) for name, side in sides.items()}
    elif config.memory:
        with ThreadPoolExecutor(max_workers=2) as pool:
            memory = dict(zip(SIDES, pool.map(functools.partial(peak, config, place), SIDES)))
    return {
        "case": case.name, "work": dataclasses.asdict(work), "seconds": found, "differs_from_trl": differs,
        "peak_bytes": memory, "rows": [dataclasses.asdict(row) for row in rows_of(case, found)],
    }  # fmt: skip


def differences(stock: Side, ours: Side, seed: int) -> dict[str, float]:
    """Relative, of the loss and of all gradients as one vector."""
    (wanted, slope), (loss, gradient) = stock.moved(seed), ours.moved(seed)
    return {"loss": abs(loss - wanted) / abs(wanted), "gradient": float((gradient - slope).norm() / slope.norm())}


def rows_of(case: Case, found: dict[str, dict[str, list[Spent]]]) -> list[Row]:
    rows = []
    for (what, side), goal in case.goals.items():
        some = found["drawn" if what == "step" else "given"]
        wall = times_faster(some, side, "wall") if what == "step" else None
        rows.append(Row(f"{case.name}: {side}, {what}", goal, times_faster(some, side, what), wall=wall))
    return rows


def times_faster(some: dict[str, list[Spent]], side: str, what: str) -> float:
    """Median over the rounds: what runs in one turn is compared."""
    return statistics.median(stock[what] / own[what] for stock, own in zip(some["TRL"], some[side]))


# ---- memory


def measure(config: BenchmarkConfig, folder: Path) -> None:
    """Child process: bytes at the peak of one update of one side above what lay there, as JSON."""
    place, _, name = config.measure.partition(":")
    small = Work(1, 3 * len(SIZES), len(SIZES), 2, 1, 50, config.normaliser, config.seed)
    (folder / "small").mkdir(), (folder / "model").mkdir()
    write_checkpoint(small, folder / "small")
    side_of(name, small, folder / "small").update()  # libraries' own buffers
    work = CASES[int(place)].work(config)
    write_checkpoint(work, folder / "model")
    side = side_of(name, work, folder / "model")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: making the model had a higher one
    before = resident("VmRSS")
    side.update()
    print(json.dumps(resident("VmHWM") - before))


def peak(config: BenchmarkConfig, place: int, name: str) -> int:
    names = ("prompt", "prompts", "tokens", "items", "normaliser", "seed", "size")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    settings = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--measure", f"{place}:{name}", *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_here(side: Side) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side.update()
    return torch.cuda.max_memory_allocated() - before


# ---- the exact expectation beside supervised training


def expectation(config: BenchmarkConfig, folder: Path) -> dict:
    data, model = exact.make(exact.ExactBenchConfig(seed=config.seed), folder)
    found = exact.step_seconds(data, model, batch=32, steps=2 * config.rounds, seed=config.seed)
    row = Row(f"{EXPECTATION}: its step beside SFT's", AT_MOST, exact.over(found, "exact"), at_least=False)
    return {"case": EXPECTATION, "seconds": found, "rows": [dataclasses.asdict(row)]}


def main(config: BenchmarkConfig) -> None:
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # TRL's and transformers', of what is experimental
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if config.measure:
            return measure(config, Path(folder))
        where, results = machine(), []
        facts = ", ".join(f"{name} {value}" for name, value in where.items())
        launch.results.print(f"{facts}; {config.rounds} rounds; ms, MB at the peak of an update\n\n{lines(*HEADER)}")
        for result in run(config, Path(folder)):  # whatever stops it later leaves what there is
            results.append(result)
            if "work" in result:
                launch.results.print(lines(*phases(result)))
            if config.output:
                figures = {"machine": where, "settings": dataclasses.asdict(config), "results": results}
                write_json(config.output, figures)
    rows = [Row(**row) for result in results for row in result["rows"]]
    launch.results.print("\n" + lines(GOALS, ["---"] * len(GOALS), *(row.cells() for row in rows)) + "\n")
    check_exactness({result["case"]: result["differs_from_trl"] for result in results if "work" in result})


def check_exactness(found: dict[str, dict[str, float] | None]) -> None:
    for name, differs in found.items():
        if differs:
            launch.results.print(
                f"{name}: loss differs by {differs['loss']:.0e}, gradient by {differs['gradient']:.0e}"
            )
    worst = max((max(differs.values()) for differs in found.values() if differs), default=0.0)
    if DEVICE == "cpu" and not worst <= EXACT:
        raise SystemExit(f"{worst:.0e} is above {EXACT:.0e}: the update is not TRL's")


def run(config: BenchmarkConfig, folder: Path) -> Iterator[dict]:
    places = [place for place, case in enumerate(CASES) if config.only in case.name]
    with_exact = DEVICE == "cpu" and config.only in EXPECTATION
    if not places and not with_exact:
        raise UserError(f"no case has {config.only!r} in its name", fix="--only G=16")
    model = folder / "model"
    if places:
        model.mkdir()
        write_checkpoint(CASES[0].work(config), model)  # what all cases have in common
    for place in places:
        launch.console.print(f"{CASES[place].name} …")
        yield race(config, place, model)
        gc.collect()  # trainers hold themselves
    if with_exact:
        launch.console.print(f"{EXPECTATION} …")
        yield expectation(config, folder / "exact")  # the other model lies in the folder


if __name__ == "__main__":
    launch.run(main, BenchmarkConfig, description=__doc__)
