"""RQ-KMeans of recllm against faiss' residual k-means on all points, then collision handling, in one run.

    python benchmarks/semantic_ids.py --output semantic_ids_benchmark.json                        # 10^6 x 256: minutes
    python benchmarks/semantic_ids.py --items 100000 --rounds 1

The embeddings are drawn from a seeded tree of clusters (64 departments, 1,024 categories, 32,768 product lines, items)
in a subspace of rank 64, plus a little noise in all dimensions. Both sides get the same matrix and threads, and their
own default number of iterations: faiss 25 on all items, ours 32 on 65,536 items each and one on all. The error is
‖e − ê‖² / ‖e − mean‖² over all items. Peak memory is the process's with one copy of the matrix in it, before faiss.
"""

import resource
import time
from dataclasses import dataclass, field

import faiss
import numpy as np
import torch
from rich.table import Table

from recllm import launch
from recllm.files import write_json
from recllm.semantic_ids import SemanticIdTable, rqkmeans
from recllm.semantic_ids.collisions import resolve
from recllm.semantic_ids.prefixes import tuple_keys
from recllm.semantic_ids.report import squared_spread


@dataclass
class BenchmarkConfig:
    items: int = field(default=1_000_000, metadata={"help": "N."})
    dim: int = field(default=256, metadata={"help": "D."})
    levels: int = field(default=4, metadata={"help": "L."})
    codes: int = field(default=256, metadata={"help": "V."})
    rounds: int = field(default=1, metadata={"help": "Runs of each side; the fastest counts."})
    iterations: int = field(default=25, metadata={"help": "faiss' iterations (25 is its default)."})
    collisions: str = field(default="reassign", metadata={"help": "Collision policy."})
    skip_faiss: bool = field(default=False, metadata={"help": "Ours alone."})
    seed: int = field(default=0, metadata={"help": "Of data and fit."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def clustered(items: int, dim: int, seed: int, rank: int = 64) -> torch.Tensor:
    """A tree of Gaussian clusters of scale 1, 0.7, 0.5, and 0.8 for the items of a line. (N, D)"""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    centres = normal(64, rank)
    for nodes, scale in ((1_024, 0.7), (32_768, 0.5)):
        parent = torch.randint(len(centres), (nodes,), generator=generator)
        centres = centres[parent] + scale * normal(nodes, rank)
    weight = torch.arange(10, len(centres) + 10).double() ** -0.5
    line = torch.multinomial(weight, items, replacement=True, generator=generator)
    basis = normal(rank, dim) / rank**0.5
    matrix = torch.empty(items, dim)
    for start in range(0, items, 65_536):
        chunk = line[start : start + 65_536]
        inner = centres[chunk] + 0.8 * normal(len(chunk), rank)
        matrix[start : start + 65_536] = inner @ basis + 0.02 * normal(len(chunk), dim)
    return matrix


def ours(matrix: torch.Tensor, config: BenchmarkConfig) -> dict:
    start = time.perf_counter()
    sizes = (config.codes,) * config.levels
    quantizer = rqkmeans.fit(matrix, sizes, config.seed)
    fitted = time.perf_counter()
    before = rqkmeans.assign(quantizer, matrix).numpy()
    assigned = time.perf_counter()
    after, sizes = resolve(before, quantizer.sizes, config.collisions, quantizer, matrix)
    resolved = time.perf_counter()
    spread = squared_spread(matrix)
    error, error_after = (
        quantizer.squared_error(matrix, torch.from_numpy(codes)) / spread for codes in (before, after)
    )
    table = SemanticIdTable(tuple(map(str, range(len(matrix)))), after, sizes)  # would refuse what is not distinct
    return {
        "seconds": assigned - start,
        "seconds_fit": fitted - start,
        "seconds_assign": assigned - fitted,
        "error": error,
        "distinct_before": len(np.unique(tuple_keys(before, quantizer.sizes))) / len(matrix),
        "distinct_after": len(np.unique(tuple_keys(table.codes, table.sizes))) / len(matrix),
        "collision_seconds": resolved - assigned,
        "collision_share_of_time": (resolved - assigned) / (assigned - start),
        "collision_added_error": error_after / error - 1,
        "items_moved": int((before != after[:, : config.levels]).any(axis=1).sum()),
        "levels_after": len(sizes),
    }


def faiss_all_points(matrix: torch.Tensor, config: BenchmarkConfig) -> dict:
    spread = squared_spread(matrix)
    residual = matrix.numpy().copy()
    start = time.perf_counter()
    for level in range(config.levels):
        kmeans = faiss.Kmeans(
            config.dim,
            config.codes,
            niter=config.iterations,
            seed=config.seed + level,
            max_points_per_centroid=len(residual),  # nothing is subsampled
        )
        kmeans.train(residual)
        _, nearest = kmeans.index.search(residual, 1)
        residual -= kmeans.centroids[nearest[:, 0]]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "error": float(np.square(residual, dtype=np.float64).sum()) / spread}


def main(config: BenchmarkConfig) -> None:
    faiss.omp_set_num_threads(torch.get_num_threads())
    matrix = clustered(config.items, config.dim, config.seed)
    rqkmeans.fit(matrix[:10_000], (16,), config.seed)  # threads and libraries are up before the clock runs
    runs = [ours(matrix, config) for _ in range(config.rounds)]
    result = min(runs, key=lambda run: run["seconds"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"items": config.items, "dim": config.dim, "threads": torch.get_num_threads(), "ours": result}
    figures |= {"peak_bytes": peak, "matrix_bytes": matrix.numel() * 4}
    table = Table(
        "", "recllm", "faiss", title=f"{config.levels} x {config.codes} codes, {config.items:,} x {config.dim}"
    )
    if config.skip_faiss:
        theirs, ratio = {}, "–"
    else:
        theirs = min((faiss_all_points(matrix, config) for _ in range(config.rounds)), key=lambda run: run["seconds"])
        figures |= {"faiss": theirs, "times_faster": theirs["seconds"] / result["seconds"]}
        ratio = f"{figures['times_faster']:.1f}x"
    for name, form in (("seconds", ".1f"), ("error", ".5f")):
        table.add_row(name, f"{result[name]:{form}}", f"{theirs[name]:{form}}" if theirs else "–")
    table.add_row("times faster", ratio, "1")
    table.add_row("peak memory (matrix)", f"{peak / 1e9:.2f} GB ({matrix.numel() * 4 / 1e9:.2f} GB)", "")
    table.add_row("distinct before", f"{result['distinct_before']:.3%}", "")
    table.add_row(f"distinct after {config.collisions}", f"{result['distinct_after']:.3%}", "")
    table.add_row("its added error", f"{result['collision_added_error']:.3%}", "")
    table.add_row("its share of the time", f"{result['collision_share_of_time']:.1%}", "")
    launch.results.print(table)
    if config.output:
        write_json(config.output, figures)


if __name__ == "__main__":
    launch.run(main, BenchmarkConfig, description=__doc__)
