"""Hours of encoding in pieces that are kept: killed anywhere and run again, the same bytes as if never killed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

from recllm.embeddings.container import write_tensors
from recllm.errors import UserError
from recllm.files import digest
from recllm.processes import ALONE, Processes
from recllm.progress import progress

SHARD = 1024  # items; what a kill can lose, times the processes


class TextEncoder(Protocol):
    """One vector a text, each a function of its text alone (up to the rounding that batch-mates cause)."""

    @property
    def settings(self) -> str:
        """Everything that a vector's bytes depend on besides its text."""
        ...

    def encode(self, texts: list[str], advance: Callable[[int], None] = ...) -> torch.Tensor:
        """texts (n,) -> (n, D) float32; says `advance(items)` as it goes."""
        ...


def shard_folder(output: Path, encoder: TextEncoder, texts: list[str]) -> Path:
    """Beside the output, named by what is encoded and how: other settings never meet these pieces."""
    return output.with_name(f"{output.name}.shards-{digest(encoder.settings, *texts)[:16]}")


def encode_in_shards(
    encoder: TextEncoder, texts: list[str], folder: Path, group: Processes = ALONE, shard: int = SHARD
) -> torch.Tensor | None:
    """texts (N,) -> (N, D) on process 0, None on the others. Each process writes every `count`-th shard.

    Items are sorted by length, so that a batch wastes little; the longest come first, so that a lack of memory shows
    at once. Which items share a shard depends on the texts alone, not on the processes nor on what was there already.
    An empty text is a zero row.
    """
    rows = sorted((row for row, text in enumerate(texts) if text), key=lambda row: (-len(texts[row]), row))
    shards = [rows[start : start + shard] for start in range(0, len(rows), shard)]
    mine = range(group.index, len(shards), group.count)
    missing = [number for number in mine if not _path(folder, number).exists()]
    total = sum(len(shards[number]) for number in mine)
    if missing:
        done = total - sum(len(shards[number]) for number in missing)
        what = "encoding items" if group.count == 1 else f"encoding items, process {group.index} of {group.count}"
        with progress(what, total, done) as advance:
            for number in missing:
                vectors = encoder.encode([texts[row] for row in shards[number]], advance)
                piece = {"rows": torch.tensor(shards[number]), "vectors": vectors.float().cpu().contiguous()}
                write_tensors(_path(folder, number), piece)
    group.wait()
    return _merge(folder, len(shards), len(texts)) if group.first else None


def remove_shards(folder: Path) -> None:
    """When the merged file is written, and not before."""
    shutil.rmtree(folder, ignore_errors=True)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _merge(folder: Path, shards: int, n_items: int) -> torch.Tensor:
    matrix = None
    for number in range(shards):
        path = _path(folder, number)
        try:
            piece = load_file(path)
        except Exception:  # safetensors has no class of its own for a short file
            raise UserError("the shard is damaged or missing", file=path, fix="delete it and run again") from None
        if matrix is None:
            matrix = torch.zeros(n_items, piece["vectors"].size(1))
        matrix[piece["rows"]] = piece["vectors"]
    return matrix
