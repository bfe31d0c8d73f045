"""predictions.jsonl: one line for each case, what was recommended and what was taken.

{"user": "u7", "position": 12, "target": "i9", "items": ["i3", "i9"], "scores": [-1.52, -2.1]}

A model that reasoned has a list of `samples` beside them, in the order they were drawn:
{"item": "i3", "score": -1.52, "logp": -31.4, "tokens": 117, "parsed": true}
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import polars as pl

from recllm.errors import UserError
from recllm.evaluation.ranking import Ranking, Sample
from recllm.files import read_lines

FILE = "predictions.jsonl"


class SampleLine(msgspec.Struct, omit_defaults=True):
    """One reasoned answer. `tokens`, `logp` and `parsed` are of its chain."""

    item: str | None  # null: it came to no answer
    score: float | None
    logp: float
    tokens: int
    parsed: bool
    chain: str | None = None  # its text, with --keep_chains


class Prediction(msgspec.Struct, omit_defaults=True):
    user: str
    position: int  # of the target, in the user's own order
    target: str
    items: list[str]  # best first
    scores: list[float]
    samples: list[SampleLine] = []


def to_lines(cases: pl.DataFrame, ranking: Ranking, item_ids: list[str]) -> Iterator[bytes]:
    """Scores have six significant digits, about what a float32 holds."""
    rows, scores = ranking.rows.tolist(), ranking.scores.tolist()
    for case, (user, position, target) in enumerate(cases.select("user", "position", "item").iter_rows()):
        found = [(item_ids[row], _six(score)) for row, score in zip(rows[case], scores[case]) if row >= 0]
        items, shown = [item for item, _ in found], [score for _, score in found]
        samples = [_line(sample, item_ids) for sample in ranking.samples[case]] if ranking.samples else []
        yield msgspec.json.encode(Prediction(user, position, target, items, shown, samples)) + b"\n"


def _line(sample: Sample, item_ids: list[str]) -> SampleLine:
    item, score = (item_ids[sample.row], _six(sample.score)) if sample.row >= 0 else (None, None)
    return SampleLine(item, score, _six(sample.logp), sample.tokens, sample.parsed, sample.text)


def _six(value: float) -> float:
    return float(f"{value:.6g}")


def read(path: str | Path) -> list[Prediction]:
    decoder = msgspec.json.Decoder(Prediction)
    found = []
    for number, line in read_lines(path):
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise UserError(f"not a prediction: {error}", file=path, line=number, fix="run evaluate.py again") from None
    return found
