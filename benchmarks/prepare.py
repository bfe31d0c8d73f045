"""How long prepare.py takes and how much memory it needs, on synthetic reviews of any number.

    python benchmarks/prepare.py --events 10000000 --output runs/bench/prepare.json

Writes a log (a few items take most events, a review text on every twentieth line), prepares it in a process of its
own, and compares that process's peak memory with what the same events take as a list of Python tuples.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recllm import launch
from recllm.files import write_json
from recllm.summary import pairs_table

PREPARE = Path(__file__).parent.parent / "data_prep" / "prepare.py"


@dataclass
class BenchConfig:
    events: int = field(default=10_000_000, metadata={"help": "Lines of the log."})
    events_per_user: int = field(default=10, metadata={"help": "Mean length of a user's sequence."})
    items: int = field(default=300_000, metadata={"help": "Items that exist."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})
    seed: int = field(default=0, metadata={"help": "Of the synthetic log."})


def write_log(path: Path, config: BenchConfig) -> None:
    generator = np.random.default_rng(config.seed)
    users = config.events // config.events_per_user
    with open(path, "w") as stream:
        for start in range(0, config.events, 1_000_000):
            count = min(1_000_000, config.events - start)
            user = generator.integers(users, size=count)
            item = (config.items * generator.random(count) ** 3).astype(int)  # a few items take most events
            when = 1_000_000_000 + generator.integers(500_000_000, size=count) // 86_400 * 86_400  # whole days
            for n, (u, i, t) in enumerate(zip(user.tolist(), item.tolist(), when.tolist())):
                review = ', "review": "solid, does what it says and has lasted two winters"' if n % 20 == 0 else ""
                stream.write(f'{{"user": "A{u:012d}", "item": "B{i:09d}", "timestamp": {t}{review}}}\n')


def as_python_objects(path: Path, events: int, sample: int = 200_000) -> float:
    """Bytes of (user, item, timestamp) tuples in a list, measured on the first lines."""
    tracemalloc.start()
    held = []
    with open(path) as stream:
        for _, line in zip(range(min(sample, events)), stream):
            record = json.loads(line)
            held.append((record["user"], record["item"], record["timestamp"]))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / len(held) * events


def main(config: BenchConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder) / "log.jsonl", Path(folder) / "prepared"
        write_log(log, config)
        start = time.perf_counter()
        command = [sys.executable, PREPARE, "--interactions", log, "--output", output]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        objects = as_python_objects(log, config.events)
        report = json.loads((output / "catalogue.json").read_text())
        figures = {
            "events": config.events,
            "log_bytes": log.stat().st_size,
            "seconds": round(seconds, 1),
            "events_per_second": round(config.events / seconds),
            "peak_bytes": peak,
            "python_objects_bytes": round(objects),
            "peak_over_python_objects": round(peak / objects, 3),
            "kept": {name: report[name] for name in ("users", "items", "interactions")},
            "k_core_rounds": len(report["dropped"]["k_core_rounds"]),
        }
    rows = {
        "log": f"{config.events:,} events, {figures['log_bytes'] / 1e6:,.0f} MB",
        "time": f"{seconds:.1f} s, {figures['events_per_second']:,} events/s",
        "peak memory": f"{peak / 1e6:,.0f} MB, the interpreter and its libraries included",
        "as Python tuples": f"{objects / 1e6:,.0f} MB: ours is {figures['peak_over_python_objects']:.2f} of it",
        "kept": f"{figures['kept']} after {figures['k_core_rounds']} rounds of the 5-core",
    }
    launch.results.print(pairs_table("prepare.py", rows))
    if config.output:
        write_json(config.output, figures)


if __name__ == "__main__":
    launch.run(main, BenchConfig, description=__doc__)
