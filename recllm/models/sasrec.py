"""SASRec (Kang & McAuley 2018): a small causal Transformer over a user's items, that scores every item as the next one.

Differences from the paper, all from the literature that found it under-trained (Klenitskiy & Vasilev 2023, "Turning
Dross Into Gold Loss"):
1. the loss is cross-entropy over the full catalogue at every position, not one sampled negative;
2. blocks are pre-norm, the optimiser is AdamW, and the epoch is chosen on the validation split.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from recllm.baselines import best_items, case_numbers, history_rows, steps_ago
from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.evaluation.ranking import Ranking
from recllm.files import read_object, require

WEIGHTS, REPORT = "sasrec.safetensors", "sasrec.json"
TRAIN = "train SASRec on this catalogue"
LOGITS = 2**20  # held at a time in training: 4 MB stay in a CPU's cache
BLOCK = 64  # cases scored at a time


@dataclasses.dataclass(frozen=True)
class SASRecConfig:
    """The model and how it is trained; the defaults were chosen on Amazon Beauty's validation split."""

    width: int = field(default=64, metadata={"help": "Of the item embeddings and of every layer."})
    layers: int = field(default=2, metadata={"help": "Transformer blocks."})
    heads: int = field(default=2, metadata={"help": "Attention heads; they divide the width."})
    max_length: int = field(default=50, metadata={"help": "Events of a history that are read, the last ones."})
    dropout: float = field(default=0.4, metadata={"help": "Of the embeddings and of each block's two outputs."})
    lr: float = field(default=3e-3, metadata={"help": "AdamW's first learning rate; it falls as a cosine to 0."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    batch: int = field(default=512, metadata={"help": "Events predicted in a step."})
    epochs: int = field(default=10, metadata={"help": "Over which the learning rate falls; more for less data."})
    patience: int = field(default=3, metadata={"help": "Epochs without a better validation NDCG@10 before the end."})
    validation_users: int = field(default=5000, metadata={"help": "Drawn by the seed; they choose the epoch."})
    seed: int = field(default=0, metadata={"help": "Of weights, batches, dropout and the validation sample."})

    def __post_init__(self):
        for name in ("width", "layers", "heads", "max_length", "batch", "epochs", "patience", "validation_users"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", fix="1 or more")
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide a width of {self.width}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}", fix="from 0 to less than 1")
        if self.lr <= 0 or self.weight_decay < 0:
            raise UserError(f"lr is {self.lr} and weight_decay {self.weight_decay}", fix="above 0, and 0 or more")


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); each event sees itself and what came before."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(P, T, D) -> (P, T, D)"""
        parts = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))  # (P, T, 3, H, D/H)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (P, H, T, D/H)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.attention_output(seen.transpose(1, 2).flatten(-2)))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class SASRec(nn.Module):
    """The score of an item is its embedding times the last event's state: input and output share one table."""

    def __init__(self, n_items: int, config: SASRecConfig):
        super().__init__()
        self.config = config
        self.items = nn.Embedding(n_items, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def states(self, rows: Tensor) -> Tensor:
        """What each event and those before it say of the next.   (P, T) -> (P, T, D)

        Rows are filled up on the right, with anything: attention is causal, so no event sees what comes after it.
        """
        x = self.items(rows) * self.items.embedding_dim**0.5 + self.positions.weight[: rows.size(1)]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last_states(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """(P, T), (P,) of 1 … T -> (P, D)"""
        return self.states(rows)[torch.arange(len(rows), device=rows.device), lengths - 1]

    def scores(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """log p(item | history) up to a constant of the history.   (P, T) filled up on the right, (P,) -> (P, N)"""
        return self.last_states(rows, lengths) @ self.items.weight.T

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Mean of log Σ_j exp(h·e_j) − h·e_target: cross-entropy over the full catalogue.   (M, D), (M,) -> ()"""
        target = (states * self.items(targets)).sum(dim=-1)  # (M,)
        return MeanLogPartition.apply(states, self.items.weight) - target.mean()


class MeanLogPartition(torch.autograd.Function):
    """mean_m log Σ_j exp(h_m·e_j), of states (M, D) and a table (N, D), without the (M, N) logits.   -> ()

    d/dh_m = Σ_j p_mj e_j / M and d/de_j = Σ_m p_mj h_m / M with p = softmax(h·e). Both are taken while a chunk's logits
    are at hand, so nothing is computed twice, and memory is a chunk's, not the batch's.
    """

    @staticmethod
    def forward(ctx, states: Tensor, table: Tensor) -> Tensor:
        total, n_states = states.new_zeros(()), len(states)
        of_states, of_table = torch.empty_like(states), torch.zeros_like(table)
        rows = max(1, LOGITS // len(table))
        buffer = states.new_empty(min(rows, n_states), len(table))  # used again: fresh memory costs more than the sum
        for start in range(0, n_states, rows):
            chunk = states[start : start + rows]
            exps = torch.mm(chunk, table.T, out=buffer[: len(chunk)])  # (m, N)
            top = exps.amax(dim=1, keepdim=True)  # (m, 1)
            sums = exps.sub_(top).exp_().sum(dim=1, keepdim=True)  # (m, 1)
            total += (sums.log() + top).sum()
            share = 1 / (sums * n_states)  # (m, 1)
            torch.mm(exps, table, out=of_states[start : start + rows]).mul_(share)
            of_table.addmm_(exps.T, chunk * share)
        ctx.save_for_backward(of_states, of_table)
        return total / n_states

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor]:
        of_states, of_table = ctx.saved_tensors
        return upstream * of_states, upstream * of_table


@dataclasses.dataclass(frozen=True, eq=False)
class SASRecRanker:
    """A trained SASRec as the evaluation sees it; an empty history gets no recommendation."""

    model: SASRec
    item_ids: list[str]
    exclude_history: bool = False

    def describe(self) -> dict:
        return {
            "ranker": "sasrec",
            **dataclasses.asdict(self.model.config),
            "exclude_history": self.exclude_history,
        }

    @torch.no_grad()
    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        """Cases are scored in blocks of one fixed shape, so that no answer depends on who else is in the block."""
        found, lengths = history_rows(cases, self.item_ids)
        rows, read = padded(found, lengths, self.model.config.max_length)  # (P, T), (P,)
        seen = padded(found, lengths, int(lengths.max(initial=0))) if self.exclude_history else None
        ranking = Ranking(torch.full((len(cases), k), -1), torch.full((len(cases), k), -torch.inf))
        was_training = self.model.training
        self.model.eval()
        for width, block in blocks(read, rows.size(1)):
            scores = self._scores(rows[block, :width], read[block])  # (p, N)
            best = best_items(scores, k, pairs(seen[0][block], seen[1][block], scores.device) if seen else None)
            ranking.rows[block], ranking.scores[block] = best.rows.cpu(), best.scores.cpu()
        self.model.train(was_training)
        return ranking

    def _scores(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """Filled up to BLOCK cases and cut again.   (p, T), (p,) -> (p, N)"""
        missing, device = BLOCK - len(rows), self.model.items.weight.device
        rows, filled = F.pad(rows, (0, 0, 0, missing)), F.pad(lengths, (0, missing), value=1)
        return self.model.scores(rows.to(device), filled.to(device))[: len(lengths)]


def pairs(rows: Tensor, lengths: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which case holds which row.   (p, T) filled up on the right, (p,) -> (E,), (E,)"""
    there = torch.arange(rows.size(1)) < lengths.unsqueeze(1)  # (p, T)
    return there.nonzero()[:, 0].to(device), rows[there].to(device)


def padded(found: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[Tensor, Tensor]:
    """Histories one after the other, (E,) and (P,) -> the last `longest` events of each, filled up on the right.

    -> (P, longest), (P,)
    """
    cases, ago = case_numbers(lengths), steps_ago(lengths)
    cut = np.minimum(lengths, longest)
    kept = ago < longest
    rows = np.zeros((len(lengths), longest), dtype=np.int64)
    rows[cases[kept], (cut[cases] - 1 - ago)[kept]] = found[kept]
    return torch.from_numpy(rows), torch.from_numpy(cut)


def blocks(lengths: Tensor, longest: int) -> Iterator[tuple[int, Tensor]]:
    """Cases of like length, at most BLOCK at a time, with the width they need: 8, 16, 32, … up to `longest`.

    A case's width is a function of its own length. Cases of length 0 are in no block.
    """
    shorter = 0
    while shorter < longest:
        width = min(longest, max(8, 2 * shorter))
        for block in ((lengths > shorter) & (lengths <= width)).nonzero().flatten().split(BLOCK):
            yield width, block
        shorter = width


def load_sasrec(folder: str | Path, catalogue: Catalogue) -> SASRec:
    """The model of `train_sasrec`'s folder, ready to score. Refuses one that was trained on another catalogue."""
    report = read_object(require(Path(folder) / REPORT, "the SASRec model", TRAIN))
    if report.get("catalogue_fingerprint") != catalogue.fingerprint:
        raise UserError("the model was trained on other data or another split", file=folder, fix=TRAIN)
    path = require(Path(folder) / WEIGHTS, "the weights of SASRec", TRAIN)
    try:
        model = SASRec(len(catalogue.items), SASRecConfig(**report["config"]))
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError):
        raise UserError("the model is damaged", file=folder, fix=f"delete it, and {TRAIN} again") from None
    return model.eval()
