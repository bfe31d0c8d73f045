"""What the trie of a catalogue takes: time to build, memory, and the cost of a search over tries of different sizes.

    python benchmarks/trie.py --output trie.json
    python benchmarks/trie.py --items 10000 100000     # quick

A search is a whole one of 20 beams over 160-token prompts, the model of benchmarks/decoding.py included.
"""

import statistics
import time
from dataclasses import dataclass, field

from decoding import CASES, CODES, LEVELS, level_ids, model_of, seconds, some_codes, some_prompts
from decoding import BenchmarkConfig as DecodingConfig
from rich.table import Table

from recllm import launch
from recllm.decoding import Decoder
from recllm.files import write_json
from recllm.trie import SemanticIdTrie


@dataclass
class BenchmarkConfig:
    items: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000, 10_000_000], metadata={"help": "N of each trie."}
    )
    users: int = field(default=32, metadata={"help": "Prompts in a batch (P)."})
    rounds: int = field(default=24, metadata={"help": "Searches over each trie, in turn; the median counts."})
    seed: int = field(default=0, metadata={"help": "Of weights, prompts and items."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def figures_of(config: BenchmarkConfig) -> list[dict]:
    """One entry for each size."""
    model, ids = model_of("9k", config.seed), level_ids("9k")
    decoders, figures = [], []
    for items in config.items:
        codes = some_codes(items, config.seed)
        start = time.perf_counter()
        trie = SemanticIdTrie.from_codes(codes, (CODES,) * LEVELS)
        built = time.perf_counter() - start
        sizes = {"bytes": trie.bytes, "item_map_bytes": trie.rows.nbytes}
        figures.append({"items": items, "build_seconds": built, **sizes})
        decoders.append(Decoder(model, ids, trie, batch_size=config.users))
    prompts = some_prompts(DecodingConfig(users=config.users, seed=config.seed), CASES[0])
    times: list[list[float]] = [[] for _ in decoders]
    for _ in range(config.rounds):
        for decoder, own in zip(decoders, times):
            own.append(seconds(lambda decoder=decoder: decoder.beams(prompts, 20)))
    for entry, own in zip(figures, times):
        entry["search_seconds"] = statistics.median(own)
    return figures


def main(config: BenchmarkConfig) -> None:
    figures = figures_of(config)
    table = Table("items", "build, s", "MB", "item map, MB", "20 beams, ms", "of the smallest")
    for entry in figures:
        ratio = entry["search_seconds"] / figures[0]["search_seconds"]
        table.add_row(
            f"{entry['items']:,}", f"{entry['build_seconds']:.2f}", f"{entry['bytes'] / 1e6:.1f}",
            f"{entry['item_map_bytes'] / 1e6:.1f}", f"{1000 * entry['search_seconds']:.0f}", f"{ratio:.2f}",
        )  # fmt: skip
    launch.results.print(table)
    if config.output:
        write_json(config.output, {"users": config.users, "tries": figures})


if __name__ == "__main__":
    launch.run(main, BenchmarkConfig, description=__doc__)
