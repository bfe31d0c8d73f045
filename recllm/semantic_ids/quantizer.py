"""Quantizer: the codebooks that turn an embedding into codes and back, whichever method fitted them.

    z   = encoder(e − centre)                               RQ-KMeans: the projection onto a subspace
    r_1 = z
    c_h = argmin_v ‖r_h − C_h[v]‖² + offset_h[v]            offsets are 0 unless the codes were balanced
    r_{h+1} = r_h − C_h[c_h]
    ê   = decoder(Σ_h C_h[c_h]) + centre

Differences are taken after centring: embeddings of language models have a mean far longer than their spread, in which
float32 would lose it.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recllm.errors import UserError
from recllm.files import require, write_whole

CHUNK = 8192  # rows at a time: their residuals and distances stay near the cache, and memory near the embeddings'
FORMAT = "recllm quantizer 1"
BUILD = "run data_prep/build_semantic_ids.py"

Layers = tuple[tuple[Tensor, Tensor], ...]  # weight (out, in) and bias (out,) of each linear layer, ReLU in between


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    method: str
    codebooks: tuple[Tensor, ...]  # L of (V_h, Z)
    centre: Tensor  # (D,)
    offsets: tuple[Tensor, ...] = ()  # L of (V_h,); default: zeros
    encoder: Layers = ()
    decoder: Layers = ()
    metadata: dict = dataclasses.field(default_factory=dict)  # settings and inputs of the fit

    def __post_init__(self):
        offsets = self.offsets or tuple(codebook.new_zeros(len(codebook)) for codebook in self.codebooks)
        object.__setattr__(self, "offsets", offsets)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def width(self) -> int:
        return len(self.centre)

    def latent(self, embeddings: Tensor) -> Tensor:
        """Where the codebooks live. (N, D) -> (N, Z)"""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            shape = tuple(embeddings.shape)
            raise UserError(f"embeddings of shape {shape} do not fit a quantizer of width {self.width}", fix=BUILD)
        return _layers(self.encoder, embeddings.to(self.centre) - self.centre)

    def encode(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (N, L) int32 and what is left of the latent, ‖r_{L+1}‖² (N,). One pass, all levels of a chunk."""
        codes = torch.empty(len(embeddings), len(self.codebooks), dtype=torch.int32)
        left = torch.empty(len(embeddings))
        for start in range(0, len(embeddings), CHUNK):
            rows = slice(start, start + CHUNK)
            residual = self.latent(embeddings[rows])
            for level in range(len(self.codebooks)):
                code = self.costs(residual, level).min(dim=1).indices
                codes[rows, level] = code.to(codes)
                residual -= self.codebooks[level][code]
            left[rows] = residual.square().sum(dim=1).to(left)
        return codes, left

    def costs(self, residual: Tensor, level: int) -> Tensor:
        """‖r − C[v]‖² + offset[v], less ‖r‖², which is the same for every v. (N, Z) -> (N, V)"""
        codebook = self.codebooks[level]
        return torch.addmm(codebook.square().sum(dim=1) + self.offsets[level], residual, codebook.T, alpha=-2)

    def residual(self, embeddings: Tensor, codes: Tensor, level: int) -> Tensor:
        """What the levels before `level` leave of the latent, r_{level+1}. (N, D), (N, ≥level) -> (N, Z)"""
        return self.latent(embeddings) - self.partial_sum(codes[:, :level])

    def decode(self, codes: Tensor) -> Tensor:
        """ê of codes; levels beyond the quantizer's (a collision level) say nothing about it. (N, ≥L) -> (N, D)"""
        return _layers(self.decoder, self.partial_sum(codes[:, : len(self.codebooks)])) + self.centre

    def squared_error(self, embeddings: Tensor, codes: Tensor) -> float:
        """Σ ‖e − ê‖² over all rows."""
        total = 0.0
        for start in range(0, len(embeddings), CHUNK):
            rows = slice(start, start + CHUNK)
            error = embeddings[rows].to(self.centre) - self.decode(codes[rows])
            total += float(error.square().sum(dtype=torch.float64))
        return total

    def to(self, device: str | torch.device) -> "Quantizer":
        def moved(value):
            return value.to(device) if isinstance(value, Tensor) else tuple(moved(part) for part in value)

        fields = ("codebooks", "centre", "offsets", "encoder", "decoder")
        return dataclasses.replace(self, **{name: moved(getattr(self, name)) for name in fields})

    def save(self, path: str | Path) -> None:
        tensors = {"centre": self.centre}
        for level, (codebook, offset) in enumerate(zip(self.codebooks, self.offsets)):
            tensors |= {f"codebook.{level}": codebook, f"offset.{level}": offset}
        for name in ("encoder", "decoder"):
            for depth, (weight, bias) in enumerate(getattr(self, name)):
                tensors |= {f"{name}.{depth}.weight": weight, f"{name}.{depth}.bias": bias}
        # One key of metadata: safetensors writes several in an order that changes from run to run.
        head = json.dumps({"format": FORMAT, "method": self.method, **self.metadata}, sort_keys=True)
        with write_whole(path) as partial:
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, {"recllm": head})

    @classmethod
    def load(cls, path: str | Path) -> "Quantizer":
        path = require(path, "the quantizer", BUILD)
        try:
            with safe_open(path, "pt") as stream:
                head = json.loads((stream.metadata() or {}).get("recllm", "{}"))
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, json.JSONDecodeError):
            raise UserError("not a readable safetensors file", file=path, fix=BUILD + " again") from None
        if head.pop("format", None) != FORMAT:
            raise UserError("not a quantizer of recllm", file=path, fix=BUILD)
        levels = sum(name.startswith("codebook.") for name in tensors)

        def layers(name: str) -> Layers:
            depth = sum(key.startswith(f"{name}.") for key in tensors) // 2
            return tuple((tensors[f"{name}.{i}.weight"], tensors[f"{name}.{i}.bias"]) for i in range(depth))

        return cls(
            method=head.pop("method"),
            codebooks=tuple(tensors[f"codebook.{level}"] for level in range(levels)),
            centre=tensors["centre"],
            offsets=tuple(tensors[f"offset.{level}"] for level in range(levels)),
            encoder=layers("encoder"),
            decoder=layers("decoder"),
            metadata=head,
        )

    def partial_sum(self, codes: Tensor) -> Tensor:
        """Σ_h C_h[c_h] over the levels given. (N, ≤L) -> (N, Z)"""
        total = self.codebooks[0].new_zeros(len(codes), self.codebooks[0].shape[1])
        for level in range(codes.shape[1]):
            total += self.codebooks[level][codes[:, level].long().to(total.device)]
        return total


def _layers(layers: Layers, values: Tensor) -> Tensor:
    for depth, (weight, bias) in enumerate(layers):
        values = torch.nn.functional.linear(values if depth == 0 else values.relu(), weight, bias)
    return values
