"""The update alone (log-probabilities of a group's answers, loss, backward): each prompt once against once an answer.

    python benchmarks/actor.py --output actor.json     # CPU: a 4-layer Qwen3 of width 256; CUDA: 0.6B-shaped, bf16
    python benchmarks/actor.py --only "C=5" --rounds 1    # quick

Four sides of one model, in one process, alternating; medians. `TRL`: its fused head on the padded batch of all answers.
`padded`: that batch with our head, which looks at answer positions alone. `shared`: our layout for all answers.
`recast`: for the two of each group that a signal is left for. All have the loss Σ advantage · log-probability, with
advantages that are zero but for those two where `recast` is compared. On a CPU the time is that of the processor, in
one thread, so that a busy machine does not count; `old` is the same without gradient. Exactness is that of `shared` and
`recast` against TRL, normalised over the whole vocabulary as TRL does. Memory is the peak above what lay there before
one update, each side in its own process.
"""

import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from recllm import launch
from recllm.actor import AnswerRows, AnswerScorer
from recllm.files import write_json
from recllm.trie import SemanticIdTrie

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = (256, 256, 256, 256, 32)  # four levels and a suffix
TEXT = 151_936 if DEVICE == "cuda" else 8_192  # text tokens before the item tokens
ACTIVE = 2
SIDES = ("TRL", "padded", "shared", "recast")


@dataclass
class BenchmarkConfig:
    prompt: int = field(default=200, metadata={"help": "Tokens of a prompt."})
    prompts: int = field(default=1, metadata={"help": "Prompts in an update."})
    items: int = field(default=12_000, metadata={"help": "N."})
    rounds: int = field(default=3, metadata={"help": "Times that each side runs; the median counts."})
    normaliser: str = field(default="children", metadata={"help": "Of our sides: children, level or full."})
    seed: int = field(default=0, metadata={"help": "Of weights, prompts and items."})
    only: str = field(default="", metadata={"help": 'Cases whose names contain this, such as "C=5" or "G=16".'})
    measure: str | None = field(default=None, metadata={"help": "Internal: the memory of one side of one case."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


@dataclass(frozen=True)
class Case:
    answer: int
    group: int
    demanded: tuple[float, float]  # times faster than the padded batch: shared, recast

    @property
    def name(self) -> str:
        return f"C={self.answer}, G={self.group}"


CASES = [
    Case(5, 16, (9, 13.4)),
    Case(5, 32, (13, 25)),
    Case(300, 8, (1, 5)),
    Case(300, 16, (1, 10)),
]


def model_of(seed: int) -> Qwen3ForCausalLM:
    shape = (
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128}
        if DEVICE == "cuda"
        else {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 32}
    )  # fmt: skip
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=-(-(TEXT + sum(SIZES)) // 64) * 64, tie_word_embeddings=True, max_position_embeddings=4096, **shape
    )
    return Qwen3ForCausalLM(config).to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def batch(config: BenchmarkConfig, case: Case) -> tuple[AnswerRows, Tensor, np.ndarray]:
    """The answers of every group, which of them are active (R,), and the items' codes."""
    random = np.random.default_rng(config.seed)
    codes = np.unique(random.integers(0, SIZES, (config.items, len(SIZES))), axis=0)
    count, said = config.prompts * case.group, case.answer - len(SIZES)
    prompts = random.integers(3, TEXT, (config.prompts, config.prompt)).repeat(case.group, axis=0)
    items = codes[random.integers(len(codes), size=count)] + TEXT + np.cumsum([0, *SIZES[:-1]])
    answers = np.concatenate([random.integers(3, TEXT, (count, said)), items], axis=1)
    prompts, answers = torch.from_numpy(prompts).to(DEVICE), torch.from_numpy(answers).to(DEVICE)
    starts = torch.full((count,), said, device=DEVICE)
    active = (torch.arange(count, device=DEVICE) % case.group) < ACTIVE
    rows = AnswerRows(prompts, torch.ones_like(prompts), answers, torch.ones_like(answers), starts)
    return rows, active, codes


def some_of(rows: AnswerRows, which: Tensor) -> AnswerRows:
    """A new object: nothing that was found out about the batch before is used again."""
    names = ("prompt_ids", "prompt_mask", "answer_ids", "answer_mask", "starts")
    return AnswerRows(*(getattr(rows, name)[which] for name in names))


def trl_scores(model: Qwen3ForCausalLM, rows: AnswerRows) -> Tensor:
    ids = torch.cat([rows.prompt_ids, rows.answer_ids], dim=1)
    labels = ids.clone()
    labels[:, : rows.prompt_ids.size(1)] = -100
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
    return found.log_probs[:, -rows.answer_ids.size(1) :]


def sides(config: BenchmarkConfig, case: Case, normaliser: str) -> tuple[Qwen3ForCausalLM, dict[str, Callable]]:
    """name → log-probabilities times advantages, summed. `TRL active` is the loss that `recast` has to have."""
    model = model_of(config.seed)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # what GRPOTrainer asks for
    rows, active, codes = batch(config, case)
    levels = [TEXT + first + torch.arange(size) for first, size in zip(np.cumsum([0, *SIZES]), SIZES)]
    scorer = AnswerScorer(model, levels, SemanticIdTrie.from_codes(codes, SIZES), normaliser=normaliser)
    scorer.install(model)
    everything = torch.ones_like(active)
    advantages = torch.randn(len(active), generator=torch.Generator().manual_seed(config.seed)).to(DEVICE)

    def trl(which: Tensor) -> Tensor:
        return (trl_scores(model, rows).float().sum(dim=1) * advantages * which).sum()

    def ours(which: Tensor, layout: str) -> Tensor:
        scorer.layout = layout
        logps, _ = model(answer_rows=some_of(rows, which))
        return (logps.sum(dim=1) * advantages[which]).sum()

    return model, {
        "TRL": lambda: trl(everything),
        "TRL active": lambda: trl(active),
        "padded": lambda: ours(everything, "padded"),
        "shared": lambda: ours(everything, "auto"),
        "recast": lambda: ours(active, "auto"),
        "layout": lambda: scorer.layout_run,
    }


def update(model: Qwen3ForCausalLM, work: Callable) -> None:
    work().backward()
    model.zero_grad(set_to_none=True)


def seconds(work: Callable) -> float:
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    start = clock()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def exactness(config: BenchmarkConfig, case: Case) -> dict[str, dict[str, float]]:
    """Relative differences of loss and gradient from TRL's."""
    model, work = sides(config, case, "full")

    def of(side: str) -> tuple[float, Tensor]:
        model.zero_grad()
        loss = work[side]()
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])

    found = {}
    for side, reference in (("shared", "TRL"), ("recast", "TRL active")):
        (loss, gradient), (wanted, slope) = of(side), of(reference)
        difference = float((gradient - slope).norm() / slope.norm())
        found[side] = {"loss": abs(loss - wanted) / abs(wanted), "gradient": difference}
        if DEVICE == "cpu" and max(found[side].values()) > 1e-5:
            raise SystemExit(f"{case.name}: {side} differs from TRL by {found[side]}")
    return found


def race(config: BenchmarkConfig, case: Case) -> dict:
    model, work = sides(config, case, config.normaliser)
    layouts = {}
    for side in SIDES:  # threads and kernels are up before the clock runs
        update(model, work[side])
        layouts[side] = work["layout"]() if side != "TRL" else "padded"
    times = {kind: {side: [] for side in SIDES} for kind in ("update", "old")}
    for _ in range(config.rounds):
        for side in SIDES:
            times["update"][side].append(seconds(lambda side=side: update(model, work[side])))
            with torch.no_grad():
                times["old"][side].append(seconds(work[side]))
    medians = {kind: {side: statistics.median(values) for side, values in some.items()} for kind, some in times.items()}
    return {
        "case": case.name,
        "seconds": medians,
        "faster_than": {
            kind: {base: {side: some[base] / some[side] for side in SIDES} for base in ("TRL", "padded")}
            for kind, some in medians.items()
        },
        "layout": layouts,
        "demanded_of_update": dict(zip(("shared", "recast"), case.demanded)),
        "differs_from_trl": exactness(config, case),
    }


# ---- memory


def measure(config: BenchmarkConfig) -> None:
    """Child process: the peak of one update of one side, in bytes above what lay there, as JSON."""
    place, _, side = config.measure.partition(":")
    small, work = sides(dataclasses.replace(config, prompt=8), Case(5, 2, (1, 1)), config.normaliser)
    update(small, work[side])  # libraries' own buffers
    del small, work
    gc.collect()
    model, work = sides(config, CASES[int(place)], config.normaliser)
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        update(model, work[side])
        print(json.dumps(torch.cuda.max_memory_allocated() - before))
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: making the model had a higher one
    before = resident("VmRSS")
    update(model, work[side])
    print(json.dumps(resident("VmHWM") - before))


def resident(field: str) -> int:
    """Bytes of the process's memory now (VmRSS) or at most since the last reset (VmHWM); Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak(config: BenchmarkConfig, place: int, side: str) -> int:
    names = ("prompt", "prompts", "items", "normaliser", "seed")
    settings = [part for name in names for part in (f"--{name}", str(getattr(config, name)))]
    command = [sys.executable, __file__, "--measure", f"{place}:{side}", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(config: BenchmarkConfig) -> None:
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    if config.measure:
        return measure(config)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "one CPU thread"
    table = Table("", "ms", "faster: TRL", "padded", "goal", "old: TRL", "MB", "differs")
    races = []
    for place, case in enumerate(CASES):
        if config.only not in case.name:
            continue
        result = race(config, case)
        result["peak_bytes"] = {side: peak(config, place, side) for side in SIDES}
        races.append(result)
        for side in SIDES:
            faster, differs = result["faster_than"], result["differs_from_trl"].get(side)
            demanded = result["demanded_of_update"].get(side)
            table.add_row(
                f"{case.name}: {side} ({result['layout'][side]})",
                f"{1000 * result['seconds']['update'][side]:.0f}",
                f"{faster['update']['TRL'][side]:.1f}x",
                f"{faster['update']['padded'][side]:.1f}x",
                f"{demanded:g}x" if demanded else "",
                f"{faster['old']['TRL'][side]:.1f}x",
                f"{result['peak_bytes'][side] / 2**20:.0f}",
                f"{max(differs.values()):.0e}" if differs else "",
            )
    launch.results.print(
        f"{config.prompts} prompts of {config.prompt} tokens, {where}, {config.normaliser}; an update, and `old`:"
    )
    launch.results.print(table)
    if config.output:
        write_json(config.output, {"machine": where, "settings": dataclasses.asdict(config), "races": races})


if __name__ == "__main__":
    launch.run(main, BenchmarkConfig, description=__doc__)
