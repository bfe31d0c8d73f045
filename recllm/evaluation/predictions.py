"""predictions.jsonl: one line for each case, what was recommended and what was taken.

{"user": "u7", "position": 12, "target": "i9", "items": ["i3", "i9"], "scores": [-1.52, -2.1]}
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import polars as pl

from recllm.errors import UserError
from recllm.evaluation.ranking import Ranking
from recllm.files import read_lines

FILE = "predictions.jsonl"


class Prediction(msgspec.Struct):
    user: str
    position: int  # of the target, in the user's own order
    target: str
    items: list[str]  # best first
    scores: list[float]


def to_lines(cases: pl.DataFrame, ranking: Ranking, item_ids: list[str]) -> Iterator[bytes]:
    """Scores have six significant digits, about what a float32 holds."""
    rows, scores = ranking.rows.tolist(), ranking.scores.tolist()
    for case, (user, position, target) in enumerate(cases.select("user", "position", "item").iter_rows()):
        found = [(item_ids[row], float(f"{score:.6g}")) for row, score in zip(rows[case], scores[case]) if row >= 0]
        items, shown = [item for item, _ in found], [score for _, score in found]
        yield msgspec.json.encode(Prediction(user, position, target, items, shown)) + b"\n"


def read(path: str | Path) -> list[Prediction]:
    decoder = msgspec.json.Decoder(Prediction)
    found = []
    for number, line in read_lines(path):
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise UserError(f"not a prediction: {error}", file=path, line=number, fix="run evaluate.py again") from None
    return found
