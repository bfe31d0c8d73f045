"""predictions.jsonl: one line for each case, what was recommended and what was taken.

{"user": "u7", "position": 12, "target": "i9", "items": ["i3", "i9"], "scores": [-1.52, -2.1]}

A model that reasoned has a list of `samples` beside them, in the order they were drawn:
{"item": "i3", "score": -1.52, "logp": -31.4, "tokens": 117, "parsed": true}

A model that reflected has a list of `drafts`, best first: what it found before it corrected, and what it said of it.
{"item": "i3", "score": -1.52, "loc": 2, "same": [true, false], "entropy": 0.61}

Of conversions, `repeat` says by which behaviours the user had met the target; a model that chose events of the history
as a prefix has them as `evidence`, least relevant first: {"item": "i3", "behaviour": "click", "relevance": 0.83}
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import polars as pl

from recllm.errors import UserError
from recllm.evaluation.ranking import Drafts, Evidence, Ranking, Sample
from recllm.files import read_lines

FILE = "predictions.jsonl"
AGAIN = "run evaluate.py again"


class SampleLine(msgspec.Struct, omit_defaults=True):
    """One reasoned answer. `tokens`, `logp` and `parsed` are of its chain."""

    item: str | None  # null: it came to no answer
    score: float | None
    logp: float
    tokens: int
    parsed: bool
    chain: str | None = None  # its text, with --keep_chains


class DraftLine(msgspec.Struct, omit_defaults=True):
    """One draft. Labels are those that the model found most probable."""

    item: str
    score: float
    loc: int = 0  # level from 1 at which it goes wrong, L + 1: nowhere; 0: nothing was said of it
    same: list[bool] = []  # has it the target's value, for each attribute of the model's template
    entropy: float = 0.0  # mean over the labels
    kept: bool = False  # it was called right, and not corrected


class EvidenceLine(msgspec.Struct, omit_defaults=True):
    item: str
    behaviour: str
    relevance: float | None = None


class Prediction(msgspec.Struct, omit_defaults=True):
    user: str
    position: int  # of the target, in the user's own order
    target: str
    items: list[str]  # best first
    scores: list[float]
    samples: list[SampleLine] = []
    drafts: list[DraftLine] = []
    repeat: list[str] | None = None  # null: the targets are not conversions
    evidence: list[EvidenceLine] = []


def to_lines(cases: pl.DataFrame, ranking: Ranking, item_ids: list[str]) -> Iterator[bytes]:
    """Scores have six significant digits, about what a float32 holds."""
    rows, scores = ranking.rows.tolist(), ranking.scores.tolist()
    repeat = cases["repeat"].to_list() if "repeat" in cases.columns else [None] * len(cases)
    for case, (user, position, target) in enumerate(cases.select("user", "position", "item").iter_rows()):
        found = [(item_ids[row], _six(score)) for row, score in zip(rows[case], scores[case]) if row >= 0]
        items, shown = [item for item, _ in found], [score for _, score in found]
        samples = [_line(sample, item_ids) for sample in ranking.samples[case]] if ranking.samples else []
        drafts = _drafts(ranking.drafts, case, item_ids) if ranking.drafts else []
        evidence = [_evidence(one) for one in ranking.evidence[case]] if ranking.evidence else []
        said = Prediction(user, position, target, items, shown, samples, drafts, repeat[case], evidence)
        yield msgspec.json.encode(said) + b"\n"


def _line(sample: Sample, item_ids: list[str]) -> SampleLine:
    item, score = (item_ids[sample.row], _six(sample.score)) if sample.row >= 0 else (None, None)
    return SampleLine(item, score, _six(sample.logp), sample.tokens, sample.parsed, sample.text)


def _drafts(drafts: Drafts, case: int, item_ids: list[str]) -> list[DraftLine]:
    rows, scores, loc, same, entropies, kept = (part[case].tolist() for part in drafts)
    return [
        DraftLine(item_ids[row], _six(score), place, alike if place else [], _six(entropy), keeps)
        for row, score, place, alike, entropy, keeps in zip(rows, scores, loc, same, entropies, kept)
        if row >= 0
    ]


def _evidence(one: Evidence) -> EvidenceLine:
    return EvidenceLine(one.item, one.behaviour, None if one.relevance is None else _six(one.relevance))


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
