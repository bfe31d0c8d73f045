"""The slow and plain way: every item scored by its own forward pass, over the logits of the whole vocabulary."""

import numpy as np
import torch
from torch import Tensor

from recllm.models.tiny import tiny_model

SIZES = (8, 6, 6, 6)
FIRST = np.cumsum([10, *SIZES])
LEVELS = [torch.arange(FIRST[level], FIRST[level + 1]) for level in range(4)]  # code -> token id


def some_codes(seed: int = 0, items: int = 60, shallow: bool = True) -> np.ndarray:
    """Distinct codes, a few of items that end early."""
    random = np.random.default_rng(seed)
    codes = np.unique(random.integers(0, 6, (items, 4)), axis=0)
    if shallow:
        codes = np.concatenate([codes, [[6, 1, -1, -1], [6, 2, -1, -1], [6, 3, 0, -1], [7, -1, -1, -1]]])
    random.shuffle(codes)
    return codes


def some_prompts(seed: int, lengths: tuple[int, ...] = (1, 5, 9)) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 100, length).tolist() for length in lengths]


def some_model(seed: int = 0, **settings):
    """Random weights large enough that the items' probabilities differ."""
    model = tiny_model(128, width=64, layers=2, seed=seed, **settings).eval()
    return shaken(model, seed)


def shaken(model, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


@torch.no_grad()
def item_scores(model, prompt: list[int], codes: np.ndarray, normaliser: str, allowed: Tensor | None = None) -> Tensor:
    """log-probability of every item after the prompt, -inf where it is not allowed. (N,)"""
    ids = torch.tensor([[int(LEVELS[h][max(c, 0)]) for h, c in enumerate(item)] for item in codes])
    whole = torch.cat([torch.tensor(prompt).expand(len(codes), -1), ids], dim=1)
    logits = model(input_ids=whole).logits[:, len(prompt) - 1 : -1].double()  # (N, L, vocabulary)
    scores = torch.zeros(len(codes), dtype=torch.double)
    keep = torch.ones(len(codes), dtype=torch.bool) if allowed is None else allowed
    for row, item in enumerate(codes):
        for level, code in enumerate(item):
            if code < 0:
                break
            own = logits[row, level]
            over = own if normaliser == "full" else own[LEVELS[level]]
            if normaliser == "children":
                same = (codes[:, :level] == item[:level]).all(axis=1) & keep.numpy()
                over = over[np.unique(codes[same, level])]
            scores[row] += own[LEVELS[level][code]] - over.logsumexp(0)
    return scores.masked_fill(~keep, float("-inf"))
