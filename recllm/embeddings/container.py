"""Embeddings: one vector an item, with the ids and a record of what made them, in one safetensors file."""

import dataclasses
import itertools
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recllm.catalogue import fingerprint_items
from recllm.errors import UserError
from recllm.files import require, write_whole

FILE_NAME = "embeddings.safetensors"
FORMAT = "recllm embeddings 1"
EMBED = "run data_prep/embed_items.py"


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
    """items (N,) and matrix (N, D) float32, row by row; finite, each item once.

    encoder    what made the vectors, settings included, to be read by people and compared by programs
    text_hash  of the texts it read, in the items' order
    catalogue_fingerprint  of all the data they were made from: items, texts, events and split
    """

    items: tuple[str, ...]
    matrix: torch.Tensor
    encoder: str
    text_hash: str
    catalogue_fingerprint: str = ""

    def __post_init__(self):
        if self.matrix.dim() != 2 or len(self.matrix) != len(self.items):
            raise UserError(f"{len(self.items)} items and a matrix of shape {tuple(self.matrix.shape)} do not fit")
        if self.matrix.dtype != torch.float32:
            raise UserError(f"embeddings are float32, not {self.matrix.dtype}")
        if len(set(self.items)) != len(self.items):
            raise UserError("an item has two embeddings")
        if not (finite := torch.isfinite(self.matrix).all(dim=1)).all():
            bad = (~finite).nonzero().flatten()
            item = self.items[int(bad[0])]
            raise UserError(f"the embedding of {item!r} is not finite, nor are {len(bad) - 1:,} others")

    @property
    def items_fingerprint(self) -> str:
        return fingerprint_items(list(self.items))

    def save(self, path: str | Path) -> None:
        ids = [item.encode() for item in self.items]
        tensors = {
            "matrix": self.matrix.contiguous(),
            "item_bytes": torch.frombuffer(bytearray(b"".join(ids)) or bytearray(1), dtype=torch.uint8),
            "item_ends": torch.tensor([len(item) for item in ids], dtype=torch.int64).cumsum(0),
        }
        about = {
            "format": FORMAT,
            "encoder": self.encoder,
            "text_hash": self.text_hash,
            "items_fingerprint": self.items_fingerprint,
            "catalogue_fingerprint": self.catalogue_fingerprint,
        }
        write_tensors(path, tensors, about)

    @classmethod
    def load(
        cls,
        path: str | Path,
        expect_items_fingerprint: str | None = None,
        expect_catalogue_fingerprint: str | None = None,
    ) -> "Embeddings":
        """Refuses a file that is not ours, is damaged, or belongs to another catalogue or another state of it."""
        about = read_about(path)
        if expect_items_fingerprint not in (None, about["items_fingerprint"]):
            raise UserError("the embeddings are of another catalogue's items", file=path, fix=f"{EMBED} on this one")
        made_from = about.get("catalogue_fingerprint", "")
        if expect_catalogue_fingerprint not in (None, made_from):
            raise UserError(
                "the embeddings were made from other data: the catalogue's text, events or split have changed",
                file=path,
                fix=f"{EMBED} with --overwrite",
            )
        with safe_open(path, framework="pt") as stored:
            matrix, flat, ends = (stored.get_tensor(name) for name in ("matrix", "item_bytes", "item_ends"))
        flat, ends = flat.numpy().tobytes(), [0, *ends.tolist()]
        items = tuple(flat[start:end].decode() for start, end in itertools.pairwise(ends))
        embeddings = cls(items, matrix, about["encoder"], about["text_hash"], made_from)
        if embeddings.items_fingerprint != about["items_fingerprint"]:
            raise UserError("the item ids are damaged", file=path, fix=f"{EMBED} with --overwrite")
        return embeddings


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], about: dict | None = None) -> None:
    """A safetensors file, whole or not at all. `about` is one key: several come in an order that changes by run."""
    try:
        with write_whole(path) as partial:
            save_file(tensors, partial, metadata={"recllm": json.dumps(about, sort_keys=True)} if about else None)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot be written ({error})", file=path, fix="check the disk, or another --output") from None


def read_about(path: str | Path) -> dict:
    """What a file says of itself, without reading the vectors: format, encoder, text_hash, and the two fingerprints."""
    path = require(path, "the embeddings file", EMBED)
    try:
        with safe_open(path, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("recllm", "{}"))
    except (SafetensorError, OSError):
        raise UserError("not a readable safetensors file", file=path, fix=f"{EMBED} with --overwrite") from None
    if about.get("format") != FORMAT:
        raise UserError(f"not a file of format {FORMAT!r}", file=path, fix=f"{EMBED} with --overwrite")
    return about
