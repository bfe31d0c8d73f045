"""Constrained decoding against HF generate, in one process, alternating: medians (in brackets each side's fastest run).

    python benchmarks/decoding.py --output decoding.json         # CPU: a 4-layer Qwen3 of width 256; CUDA: 0.6B-shaped
    python benchmarks/decoding.py --rounds 1     # quick

Two ways that others decode: `generate` with an exact `prefix_allowed_tokens_fn`, and with a logits processor that loops
over the beams and looks each prefix up in a dictionary. All get the same prompts (no padding, HF's best case), model
and items. `prefill` is one bare forward pass over the prompts. Times are per user, each side with as many prompts at a
time as it was fastest with on two cores: ours `--users`, the bare prefill `--prefill_users`, HF `--hf_users` (16: 1.14
times as long, 64: 1.4 times). With the normaliser `full` ours must return HF's items in HF's order, or the script
fails. Memory is the peak above what lay there before, with as many users on both sides, each side in its own process.
On cores that others use too, a median tells what they did; the fastest runs are those that were disturbed least.
"""

import dataclasses
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
from transformers import LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from recllm import launch
from recllm.decoding import Decoder
from recllm.decoding.body import backbone
from recllm.files import write_json
from recllm.trie import SemanticIdTrie

LEVELS, CODES = 4, 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = {"9k": 8_192, "152k": 151_936 - LEVELS * CODES + 1_024}  # text tokens before the item tokens


@dataclass
class BenchmarkConfig:
    users: int = field(default=64, metadata={"help": "Prompts in a batch (P)."})
    hf_users: int = field(default=8, metadata={"help": "Prompts in a batch of HF's, the first of the same."})
    prefill_users: int | None = field(default=None, metadata={"help": "Of the bare prefill; default 16, CUDA: ours."})
    items: int = field(default=12_000, metadata={"help": "N."})
    rounds: int = field(default=3, metadata={"help": "Times HF runs, ours four times as often; medians."})
    seed: int = field(default=0, metadata={"help": "Of weights, prompts and items."})
    measure: str | None = field(default=None, metadata={"help": "Internal: the memory of one side of one case."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})

    def users_of(self, side: str) -> int:
        """Prompts that a side has at a time."""
        bare = self.prefill_users or (self.users if DEVICE == "cuda" else 16)
        return min(self.users, {"ours": self.users, "prefill": bare}.get(side, self.hf_users))


@dataclass(frozen=True)
class Case:
    beams: int
    tokens: int
    vocabulary: str
    normaliser: str
    demanded: float  # times faster than HF, by the project's own claim

    @property
    def name(self) -> str:
        return f"{self.beams} beams, {self.tokens} tokens, V={self.vocabulary}, {self.normaliser}"


CASES = [
    Case(20, 160, "9k", "level", 25),
    Case(50, 200, "9k", "level", 40),
    Case(20, 160, "152k", "level", 40),
    Case(20, 160, "152k", "full", 10),
]


def some_codes(items: int, seed: int) -> np.ndarray:
    """Distinct random tuples; the first codes of a real index are as even as these. (N, 4)"""
    keys = np.random.default_rng(seed).integers(0, CODES**LEVELS, int(items * 1.01) + 10)
    keys = np.unique(keys)
    keys = np.random.default_rng(seed).permutation(keys)[:items]
    return np.stack([keys // CODES ** (LEVELS - 1 - level) % CODES for level in range(LEVELS)], axis=1).astype(np.int32)


def model_of(vocabulary: str, seed: int) -> Qwen3ForCausalLM:
    """On CUDA the shape of Qwen3-0.6B in bf16; on a CPU a small one in fp32."""
    shape = (
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 128}
        if DEVICE == "cuda"
        else {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 32}
    )  # fmt: skip
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=TEXT[vocabulary] + LEVELS * CODES, tie_word_embeddings=True, max_position_embeddings=4096, **shape
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 5  # logits of a random model are nearly equal otherwise
    return model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def level_ids(vocabulary: str) -> list[torch.Tensor]:
    return [torch.arange(CODES) + TEXT[vocabulary] + level * CODES for level in range(LEVELS)]


def some_prompts(config: BenchmarkConfig, case: Case) -> list[list[int]]:
    generator = torch.Generator().manual_seed(config.seed)
    size = (config.users, case.tokens)
    return torch.randint(0, TEXT[case.vocabulary] + LEVELS * CODES, size, generator=generator).tolist()


class PerBeam(LogitsProcessor):
    """A dictionary of prefixes, and a loop over the beams."""

    def __init__(self, allowed: dict[tuple, list[int]], start: int):
        self.allowed, self.start = allowed, start

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = torch.full_like(scores, float("-inf"))
        for row in range(len(ids)):
            mask[row, self.allowed[tuple(ids[row, self.start :].tolist())]] = 0
        return scores + mask


def dictionary(codes: np.ndarray, ids: list[torch.Tensor]) -> dict[tuple, list[int]]:
    tokens = np.stack([ids[level].numpy()[codes[:, level]] for level in range(LEVELS)], axis=1)
    following: dict[tuple, set] = {}
    for item in tokens.tolist():
        for level in range(LEVELS):
            following.setdefault(tuple(item[:level]), set()).add(item[level])
    return {prefix: sorted(next_ids) for prefix, next_ids in following.items()}


def sides(config: BenchmarkConfig, case: Case) -> dict[str, Callable]:
    """name → what it does once, returning token ids of the items (P, B, L) where it finds items."""
    model, ids = model_of(case.vocabulary, config.seed), level_ids(case.vocabulary)
    codes = some_codes(config.items, config.seed)
    decoder = Decoder(
        model, ids, SemanticIdTrie.from_codes(codes, (CODES,) * LEVELS), normaliser=case.normaliser,
        batch_size=config.users,
    )  # fmt: skip
    prompts = some_prompts(config, case)
    tensor = torch.tensor(prompts, device=DEVICE)
    fewer, bare = tensor[: config.users_of("prefix function")], tensor[: config.users_of("prefill")]
    allowed = dictionary(codes, ids)

    def ours():
        found = decoder.beams(prompts, case.beams)
        return torch.stack([ids[level][found.codes[..., level]] for level in range(LEVELS)], dim=-1)

    def generate(**constraint):
        found = model.generate(
            fewer, attention_mask=torch.ones_like(fewer), num_beams=case.beams, num_return_sequences=case.beams,
            do_sample=False, max_new_tokens=LEVELS, eos_token_id=None, pad_token_id=0, **constraint,
        )  # fmt: skip
        return found[:, case.tokens :].view(len(fewer), case.beams, LEVELS).cpu()

    def prefill():
        with torch.no_grad():
            backbone(model)(input_ids=bare, use_cache=True)

    return {
        "ours": ours,
        "prefix function": lambda: generate(
            prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[case.tokens :].tolist())]
        ),
        "per-beam processor": lambda: generate(logits_processor=LogitsProcessorList([PerBeam(allowed, case.tokens)])),
        "prefill": prefill,
    }


def seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(config: BenchmarkConfig, case: Case) -> dict:
    contestants = sides(config, case)
    found = {name: work() for name, work in contestants.items()}  # threads and kernels are up before the clock runs
    theirs = found["prefix function"]
    same = float((found["ours"][: len(theirs)] == theirs).all(dim=-1).double().mean())
    if case.normaliser == "full" and DEVICE == "cpu" and same < 1:
        raise SystemExit(f"{case.name}: {1 - same:.1%} of the items differ from HF generate's")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    # Light work after each heavy one, twice: a median of few runs of milliseconds is noise, and what a machine gives
    # now is not what it gave a minute ago.
    light = ["ours", "prefill"] * 2
    for _ in range(config.rounds):
        for name in ("prefix function", *light, "per-beam processor", *light):
            times[name].append(seconds(contestants[name]))
    times = {name: [one / config.users_of(name) for one in own] for name, own in times.items()}
    return {
        "case": case.name,
        **ratios({name: statistics.median(own) for name, own in times.items()}),
        "fastest": ratios({name: min(own) for name, own in times.items()}),
        "times": times,
        "same_items_as_hf": same,
        "demanded": case.demanded,
    }


def ratios(seconds_a_user: dict[str, float]) -> dict:
    ours = seconds_a_user["ours"]
    return {
        "seconds_a_user": seconds_a_user,
        "faster_than_prefix_function": seconds_a_user["prefix function"] / ours,
        "faster_than_per_beam_processor": seconds_a_user["per-beam processor"] / ours,
        "of_a_prefill": ours / seconds_a_user["prefill"],
        "users_per_second": 1 / ours,
    }


# ---- memory


def measure(config: BenchmarkConfig) -> None:
    """Child process: the peak of one side of one case, in bytes above what lay there, as JSON."""
    place, _, side = config.measure.partition(":")
    work = sides(config, CASES[int(place)])
    small = sides(
        dataclasses.replace(config, users=1, hf_users=1), dataclasses.replace(CASES[int(place)], beams=2, tokens=8)
    )
    small[side]()  # libraries' own buffers
    del small
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work[side]()
        print(json.dumps(torch.cuda.max_memory_allocated() - before))
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: making the model had a higher one
    before = resident("VmRSS")
    work[side]()
    print(json.dumps(resident("VmHWM") - before))


def resident(field: str) -> int:
    """Bytes of the process's memory now (VmRSS) or at most since the last reset (VmHWM); Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak(config: BenchmarkConfig, place: int, side: str) -> int:
    config = dataclasses.replace(config, users=config.hf_users)  # as many as HF has
    settings = [
        part for name in ("users", "hf_users", "items", "seed") for part in (f"--{name}", str(getattr(config, name)))
    ]
    command = [sys.executable, __file__, "--measure", f"{place}:{side}", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(config: BenchmarkConfig) -> None:
    if config.measure:
        return measure(config)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    races = []
    table = Table(
        "", "ours, ms a user", "prefix function", "per-beam processor", "of a prefill", "users/s", "peak memory"
    )
    for place, case in enumerate(CASES):
        result = race(config, case)
        result["peak_bytes"] = {side: peak(config, place, side) for side in ("ours", "prefix function")}
        result["times_less_memory"] = result["peak_bytes"]["prefix function"] / max(1, result["peak_bytes"]["ours"])
        races.append(result)
        best = result["fastest"]
        table.add_row(
            case.name,
            f"{1000 * result['seconds_a_user']['ours']:.1f} ({1000 * best['seconds_a_user']['ours']:.1f})",
            f"{result['faster_than_prefix_function']:.1f}x ({best['faster_than_prefix_function']:.1f}x)",
            f"{result['faster_than_per_beam_processor']:.1f}x ({best['faster_than_per_beam_processor']:.1f}x)",
            f"{result['of_a_prefill']:.2f} ({best['of_a_prefill']:.2f})",
            f"{result['users_per_second']:.0f}",
            f"{result['peak_bytes']['ours'] / 2**20:.0f} MB, {result['times_less_memory']:.0f}x less",
        )
    users = (
        f"{config.users} users at a time (bare prefill {config.users_of('prefill')}, HF {config.hf_users}; memory: "
        f"{config.hf_users} both)"
    )
    launch.results.print(f"{users}, {config.items:,} items, {where}; times faster than HF:")
    launch.results.print(table)
    if config.output:
        users = {name: config.users_of(name) for name in ("ours", "prefix function", "prefill")}
        write_json(config.output, {"machine": where, "users": users, "races": races})


if __name__ == "__main__":
    launch.run(main, BenchmarkConfig, description=__doc__)
