"""One evaluation: a ranker, a split and a protocol → a folder with predictions.jsonl and metrics.json."""

import dataclasses
from importlib.metadata import version
from pathlib import Path

from recllm.catalogue import Catalogue, Split
from recllm.errors import UserError
from recllm.evaluation import predictions
from recllm.evaluation.predicting import BLOCK, cases_of, clear_parts, predict
from recllm.evaluation.ranking import Ranker
from recllm.evaluation.scoring import score
from recllm.files import digest, make_folder, read_object, write_json
from recllm.launch import console
from recllm.processes import ALONE, Processes

METRICS = "metrics.json"
SETTINGS = "parts/settings.json"
LIBRARIES = ("recllm", "torch", "transformers", "trl", "polars", "numpy")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What has to be equal for two runs to be laid side by side."""

    split: Split = "test"
    k: tuple[int, ...] = (5, 10)
    length: int = 20  # items of a list
    max_history: int | None = None  # as the data were prepared
    exclude_history: bool = False

    def __post_init__(self):
        if self.split == "train":
            raise UserError(
                "training targets are what models learn from, not what they are measured on", fix="valid, test"
            )
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            raise UserError(f"k: {list(self.k)} is no list of different numbers from 1", fix="--k 5 10")
        if self.length < max(self.k):
            raise UserError(f"lists of {self.length} items are too short for @{max(self.k)}", fix="more --beams")


def evaluate_ranker(
    name: str, ranker: Ranker, catalogue: Catalogue, protocol: Protocol, folder: str | Path, *,
    seed: int = 0, overwrite: bool = False, group: Processes = ALONE, block: int = BLOCK,
) -> dict | None:  # fmt: skip
    """The content of metrics.json on process 0, None on the others. Resumes; the same run again returns at once."""
    folder = Path(folder)
    if protocol.length > len(catalogue.item_ids):
        raise UserError(f"lists of {protocol.length} items from {len(catalogue.item_ids)}", fix="fewer --beams")
    run = {
        "name": name,
        "ranker": ranker.describe(),
        "catalogue": {"name": catalogue.name, "fingerprint": catalogue.fingerprint},
        "split": protocol.split,
        "protocol": {**dataclasses.asdict(protocol), "k": list(protocol.k)},
        "seed": seed,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    begun = {
        "run": _identity(run),
        "block": block,
        "device": group.device.partition(":")[0],
    }  # what the finished parts are parts of
    # Every process looks, so that all stop at the same sentence; then the first one changes the folder.
    if not overwrite and (done := _finished(folder, run)) is not None:
        console.print(f"{folder} is evaluated already, the same run.")
        return done if group.first else None
    if not overwrite:
        _refuse_another(folder, begun)
    cases = cases_of(catalogue, protocol.split, protocol.max_history)
    group.wait()
    if group.first:
        _begin(folder, begun, overwrite)
    group.wait()
    path = predict(ranker, catalogue, cases, protocol.length, folder, group, block)
    if path is None:
        return None
    figures = score(predictions.read(path), catalogue, protocol.split, protocol.k, length=protocol.length, file=path)
    result = {"run": run, **figures}
    write_json(folder / METRICS, result)
    clear_parts(folder)
    return result


def _refuse_another(folder: Path, begun: dict) -> None:
    if (folder / METRICS).exists():
        raise UserError("the folder holds another evaluation", file=folder, fix="another --output, or --overwrite")
    if (folder / SETTINGS).exists() and read_object(folder / SETTINGS) != begun:
        raise UserError(
            "an evaluation with other settings was begun in this folder",
            file=folder,
            fix="another --output, or --overwrite to begin anew",
        )


def _begin(folder: Path, begun: dict, overwrite: bool) -> None:
    make_folder(folder)
    if overwrite or not (folder / SETTINGS).exists():
        clear_parts(folder)
        for name in (METRICS, predictions.FILE):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / SETTINGS, begun)


def _finished(folder: Path, run: dict) -> dict | None:
    if not ((folder / METRICS).exists() and (folder / predictions.FILE).exists()):
        return None
    result = read_object(folder / METRICS)
    return result if _identity(result.get("run", {})) == _identity(run) else None


def _identity(run: dict) -> str:
    return digest(repr(sorted(run.items())))
