"""How good semantic IDs are: one dict of figures (kept in semantic_ids.json) and one table to read."""

from collections.abc import Sequence

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from recllm.semantic_ids.prefixes import PADDING, number_prefixes, tuple_keys
from recllm.semantic_ids.quantizer import CHUNK, Quantizer
from recllm.semantic_ids.tokens import LETTERS


def make_report(
    before: np.ndarray,  # (N, L) as the quantizer gave them
    after: np.ndarray,  # (N, ≥L) as the collision policy left them
    sizes: Sequence[int],  # of `after`
    labels: Sequence[str | None] | None = None,  # (N,) what a shared prefix should mean
    quantizer: Quantizer | None = None,
    embeddings: Tensor | None = None,
) -> dict:
    levels, deepest = before.shape[1], after.shape[1]
    counts = np.unique(tuple_keys(before, sizes[:levels]), return_counts=True)[1]
    report = {
        "items": len(after),
        "distinct_share_before": len(counts) / len(after),
        "distinct_share_after": len(np.unique(tuple_keys(after, sizes))) / len(after),
        "largest_bucket": int(counts.max()),
        "items_in_collisions": int(counts[counts > 1].sum()),
        "items_moved": int((before != after[:, :levels]).any(axis=1).sum()),
        "items_with_extra_level": int((after[:, levels:] != PADDING).any(axis=1).sum()),
        "levels": [level_usage(after[:, level], sizes[level], LETTERS[level]) for level in range(deepest)],
    }
    if quantizer is not None and embeddings is not None:
        spread = squared_spread(embeddings)
        for name, codes in (("relative_error_before", before), ("relative_error", after)):
            error = quantizer.squared_error(embeddings, torch.from_numpy(codes[:, :levels]))
            # Beyond nine places stands the order in which threads added.
            report[name] = round(error / spread, 9) if spread else 0.0
    if labels is not None and any(labels):
        report["purity"] = prefix_purity(after[:, :levels], sizes[:levels], labels)
    return report


def squared_spread(embeddings: Tensor) -> float:
    """Σ ‖e − mean‖² over all rows. (N, D) -> number"""
    parts = embeddings.split(CHUNK)  # a sum in float64 over the whole would copy it
    mean = (sum(part.sum(dim=0, dtype=torch.float64) for part in parts) / len(embeddings)).float()
    return sum(float((part - mean).square().sum(dtype=torch.float64)) for part in parts)


def level_usage(codes: np.ndarray, size: int, letter: str) -> dict:
    """H = −Σ p log₂ p over the level's codes; the perplexity 2^H is how many codes it is worth. (N,) -> figures"""
    count = np.bincount(codes[codes != PADDING], minlength=size)
    share = count[count > 0] / count.sum()
    entropy = float(-(share * np.log2(share)).sum()) + 0.0  # no −0.0
    return {
        "level": letter,
        "codes": size,
        "used": len(share),
        "entropy_bits": entropy,
        "perplexity": 2.0**entropy,
        "largest_share": float(share.max()),
    }


def prefix_purity(codes: np.ndarray, sizes: Sequence[int], labels: Sequence[str | None]) -> list[dict]:
    """Does a shared prefix mean a shared label? For every depth, over items with a label and company:

        purity    mean over items of the share of the others with the same prefix that have the item's label
        shuffled  what it would be on average if the labels were dealt out at random: Σ_c n_c (n_c − 1) / (N (N − 1))

    Unlike the share of the most frequent label, neither depends on how small the groups are.
    """
    rows = np.flatnonzero([bool(label) for label in labels])
    label = np.unique(np.array([labels[row] for row in rows], dtype=object), return_inverse=True)[1]
    total = np.bincount(label).astype(float)
    shuffled = float((total * (total - 1)).sum() / max(len(rows) * (len(rows) - 1), 1))
    figures = []
    for depth, prefix in enumerate(number_prefixes(codes[rows], tuple(sizes))[1], start=1):
        group = np.bincount(prefix)[prefix]
        pair = np.unique(prefix * len(total) + label, return_inverse=True)[1]
        same = np.bincount(pair)[pair]
        company = group > 1
        purity = float(((same - 1) / np.maximum(group - 1, 1))[company].mean()) if company.any() else None
        figures.append(
            {
                "depth": depth,
                "prefixes": int(prefix.max()) + 1,
                "items_with_company": int(company.sum()),
                "purity": purity,
                "shuffled": shuffled,
            }
        )
    return figures


def report_tables(report: dict) -> list[Table]:
    """The figures to look at, one number a line, then one line a level."""
    summary = Table("figure", "value", title="Semantic IDs")
    summary.columns[1].justify = "right"
    for name, text in (
        ("items", "{:,}"),
        ("distinct_share_before", "{:.2%}"),
        ("distinct_share_after", "{:.2%}"),
        ("largest_bucket", "{:,}"),
        ("items_in_collisions", "{:,}"),
        ("items_moved", "{:,}"),
        ("items_with_extra_level", "{:,}"),
        ("relative_error_before", "{:.4f}"),
        ("relative_error", "{:.4f}"),
    ):
        if name in report:
            summary.add_row(name.replace("_", " "), text.format(report[name]))
    levels = Table("level", "codes", "used", "entropy (bits)", "perplexity", "largest share", title="Levels")
    for column in levels.columns[1:]:
        column.justify = "right"
    for level in report["levels"]:
        entropy, perplexity, largest = (level[name] for name in ("entropy_bits", "perplexity", "largest_share"))
        numbers = (f"{level['codes']:,}", f"{level['used']:,}", f"{entropy:.2f}", f"{perplexity:.1f}", f"{largest:.1%}")
        levels.add_row(level["level"], *numbers)
    tables = [summary, levels]
    if "purity" in report:
        label = report.get("label", "label")
        purity = Table("prefix length", "prefixes", "items in company", "purity", "shuffled", title=f"Same {label}?")
        for column in purity.columns:
            column.justify = "right"
        for row in report["purity"]:
            share = "–" if row["purity"] is None else f"{row['purity']:.1%}"
            counts = (f"{row['prefixes']:,}", f"{row['items_with_company']:,}")
            purity.add_row(str(row["depth"]), *counts, share, f"{row['shuffled']:.1%}")
        tables.append(purity)
    return tables
