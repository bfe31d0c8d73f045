"""Every target of a split through a ranker, by any number of processes, killed and resumed: the same file every time.

Cases are cut into blocks in the order of the catalogue. A block is one file, written whole, and depends on nothing but
its cases: not on the process that did it, nor on what was there before. Process r of n does blocks r, r + n, …; the
first one puts them together.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from recllm.catalogue import Catalogue, Split
from recllm.errors import UserError
from recllm.evaluation.predictions import FILE, to_lines
from recllm.evaluation.ranking import Ranker
from recllm.evaluation.repeats import conversion_cases
from recllm.files import digest, write_whole
from recllm.processes import ALONE, Processes
from recllm.progress import progress

BLOCK = 512  # cases: what a kill can lose, times the processes


def predict(
    ranker: Ranker,
    catalogue: Catalogue,
    cases: pl.DataFrame,
    k: int,
    folder: Path,
    group: Processes = ALONE,
    block: int = BLOCK,
) -> Path | None:
    """Write folder/predictions.jsonl; its path on process 0, None on the others. `folder/parts` holds what is done."""
    parts = folder / "parts"
    starts = list(range(0, len(cases), block))
    mine = range(group.index, len(starts), group.count)
    missing = [number for number in mine if not _part(parts, number).exists()]
    total = sum(min(block, len(cases) - starts[number]) for number in mine)
    todo = sum(min(block, len(cases) - starts[number]) for number in missing)
    what = "users" if group.count == 1 else f"users, process {group.index} of {group.count}"
    with progress(what, total, total - todo) as advance:
        for number in missing:
            some = cases.slice(starts[number], block)
            ranking = ranker.rank(some, k)
            with write_whole(_part(parts, number)) as partial:
                partial.write_bytes(b"".join(to_lines(some, ranking, catalogue.item_ids)))
            advance(len(some))
    group.wait()
    return _join(parts, len(starts), folder / FILE) if group.first else None


def cases_of(
    catalogue: Catalogue, split: Split, max_history: int | None = None, users: int | None = None, users_seed: int = 0,
    target_behaviour: str | None = None,
) -> pl.DataFrame:  # fmt: skip
    """The split's targets; of `users` users alone where the protocol says so. Conversions of a target behaviour come
    with what `conversion_cases` knows of them."""
    if target_behaviour is None:
        cases = catalogue.targets(split, max_history)
    else:
        cases = conversion_cases(catalogue, split, target_behaviour, max_history)
    if cases.is_empty():
        raise UserError(f"the split {split!r} has no target", file=catalogue.folder, fix="another --split")
    return cases.filter(pl.col("user").is_in(some_users(cases["user"], users, users_seed).implode()))


def some_users(every: pl.Series, users: int | None, seed: int = 0) -> pl.Series:
    """Those whose hash comes first, all where `users` is None: the same for every run, and 100 are among 200."""
    every = every.unique().sort()
    if users is None:
        return every
    if users > len(every):
        raise UserError(f"there are {len(every):,} users to measure, not {users:,}", fix="fewer --users, or none")
    ranks = sorted((digest(str(seed), user), user) for user in every)
    return pl.Series("user", [user for _, user in ranks[:users]], dtype=pl.String)


def clear_parts(folder: Path) -> None:
    shutil.rmtree(folder / "parts", ignore_errors=True)


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.jsonl"


def _join(parts: Path, count: int, path: Path) -> Path:
    missing: Sequence[int] = [number for number in range(count) if not _part(parts, number).exists()]
    if missing:
        raise UserError("a block of predictions is missing", file=_part(parts, missing[0]), fix="run it again")
    with write_whole(path) as partial, open(partial, "wb") as stream:
        for number in range(count):
            stream.write(_part(parts, number).read_bytes())
    return path
