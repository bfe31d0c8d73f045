"""One evaluation: a ranker, a split and a protocol → a folder with predictions.jsonl and metrics.json."""

import dataclasses
from importlib.metadata import version
from pathlib import Path

from recllm.catalogue import Catalogue, Split
from recllm.errors import UserError
from recllm.evaluation import predictions
from recllm.evaluation.drafts import Truth
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
    pass_k: tuple[int, ...] = ()  # of a ranker that samples: pass@k
    users: int | None = None  # as many of the split's users, drawn by `users_seed`; None: all, as it should be
    users_seed: int = 0
    target_behaviour: str | None = None  # the targets are conversions of it; None: whatever the split's targets are

    def __post_init__(self):
        if self.split == "train":
            raise UserError(
                "training targets are what models learn from, not what they are measured on", fix="valid, test"
            )
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            raise UserError(f"k: {list(self.k)} is no list of different numbers from 1", fix="--k 5 10")
        if self.length < max(self.k):
            raise UserError(f"lists of {self.length} items are too short for @{max(self.k)}", fix="more --beams")
        if len(set(self.pass_k)) < len(self.pass_k) or min(self.pass_k, default=1) < 1:
            raise UserError(f"pass_k: {list(self.pass_k)} is no list of different numbers from 1", fix="--pass_k 1 5")
        if self.users is not None and self.users < 1:
            raise UserError(f"users must be at least 1, got {self.users}")

    def describe(self) -> dict:
        """For metrics.json. What says nothing, such as all users, is left out."""
        given = {**dataclasses.asdict(self), "k": list(self.k), "pass_k": list(self.pass_k)}
        silent = [] if self.pass_k else ["pass_k"]
        silent += [] if self.users is not None else ["users", "users_seed"]
        silent += [] if self.target_behaviour is not None else ["target_behaviour"]
        return {name: value for name, value in given.items() if name not in silent}


def evaluate_ranker(
    name: str, ranker: Ranker, catalogue: Catalogue, protocol: Protocol, folder: str | Path, *,
    seed: int = 0, overwrite: bool = False, group: Processes = ALONE, block: int = BLOCK, truth: Truth | None = None,
) -> dict | None:  # fmt: skip
    """The content of metrics.json on process 0, None on the others. Resumes; the same run again returns at once.

    truth   of a ranker that reflects: what it should have said
    """
    folder = Path(folder)
    if protocol.length > len(catalogue.item_ids):
        raise UserError(
            f"lists of {protocol.length} items from {len(catalogue.item_ids)}", fix="fewer --beams, or --samples"
        )
    run = {
        "name": name,
        "ranker": ranker.describe(),
        "catalogue": {"name": catalogue.name, "fingerprint": catalogue.fingerprint},
        "split": protocol.split,
        "protocol": protocol.describe(),
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
    cases = cases_of(
        catalogue, protocol.split, protocol.max_history, protocol.users, protocol.users_seed, protocol.target_behaviour
    )
    group.wait()
    if group.first:
        _begin(folder, begun, overwrite)
    group.wait()
    path = predict(ranker, catalogue, cases, protocol.length, folder, group, block)
    if path is None:
        return None
    figures = score(
        predictions.read(path), catalogue, protocol.split, protocol.k, length=protocol.length, file=path,
        pass_ks=protocol.pass_k, users=protocol.users, users_seed=protocol.users_seed, truth=truth,
        target_behaviour=protocol.target_behaviour,
    )  # fmt: skip
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
