"""The stage: embeddings.safetensors (or a published index) → semantic_ids.json and quantizer.safetensors.

The quantizer is written first, and semantic_ids.json holds its SHA-256 and what both were made from. A run that finds
both in order does nothing; one that finds anything else makes both again.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from recllm.catalogue import Catalogue
from recllm.embeddings import Embeddings
from recllm.errors import UserError
from recllm.files import require, sha256_file, sweep
from recllm.formats.lcrec import read_index, write_index
from recllm.launch import console
from recllm.semantic_ids import rqkmeans, rqvae
from recllm.semantic_ids.collisions import POLICIES, resolve
from recllm.semantic_ids.quantizer import BUILD, Quantizer
from recllm.semantic_ids.report import make_report
from recllm.semantic_ids.table import SemanticIdTable
from recllm.semantic_ids.tokens import DEFAULT_PATTERN, LETTERS, check_pattern

TABLE_FILE = "semantic_ids.json"
QUANTIZER_FILE = "quantizer.safetensors"
ALGORITHM = 1  # raised when the same settings come to give other codes


@dataclass
class BuildConfig:
    data: str = field(metadata={"help": "Prepared folder (items.parquet, …)."})
    embeddings: str | None = field(default=None, metadata={"help": "Default: embeddings.safetensors of the folder."})
    output: str | None = field(default=None, metadata={"help": "Folder to write to. Default: the prepared folder."})
    method: Literal["rqkmeans", "rqvae", "balanced"] = field(
        default="rqkmeans", metadata={"help": "balanced: k-means whose codes are used about equally often."}
    )
    levels: int = field(default=4, metadata={"help": "Codes of an item, before collisions (L)."})
    codes: int = field(default=256, metadata={"help": "Codes to choose from at each level (V)."})
    collisions: Literal["extra-level", "extra-level-all", "reassign", "refuse"] = field(
        default="extra-level",
        metadata={
            "help": "What happens to items of the same codes: one code more for these (extra-level) or for all "
            "(extra-level-all), a move to free last codes (reassign), or an error (refuse)."
        },
    )
    seed: int = field(default=0, metadata={"help": "The result is a function of embeddings, settings and this."})
    pattern: str = field(default=DEFAULT_PATTERN, metadata={"help": "The token of a code."})
    sample: int = field(default=65_536, metadata={"help": "Items that an iteration of k-means sees, each time others."})
    iterations: int = field(default=32, metadata={"help": "Iterations of k-means at each level."})
    epochs: int = field(default=100, metadata={"help": "RQ-VAE: passes over the items."})
    batch: int = field(default=1024, metadata={"help": "RQ-VAE: items a step."})
    lr: float = field(default=1e-3, metadata={"help": "RQ-VAE: learning rate at the start (cosine to 0)."})
    latent: int = field(default=64, metadata={"help": "RQ-VAE: width of what is quantised (Z)."})
    device: str = field(default="cpu", metadata={"help": "Where the quantizer is fitted: cpu, cuda, cuda:1, …"})
    import_index: str | None = field(
        default=None, metadata={"help": "Take the codes from an LC-Rec/LETTER *.index.json; no embeddings are read."}
    )
    export_index: str | None = field(default=None, metadata={"help": "Also write an LC-Rec/LETTER *.index.json."})
    overwrite: bool = field(default=False, metadata={"help": "Replace IDs that were made in another way."})

    def __post_init__(self):
        for name in ("levels", "codes", "sample", "iterations", "epochs", "batch", "lr", "latent"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        if self.levels >= len(LETTERS):
            raise UserError(f"at most {len(LETTERS) - 1} levels are possible, not {self.levels}")
        if self.sample < self.codes:
            raise UserError(f"a sample of {self.sample} items cannot hold {self.codes} codes", fix="raise --sample")
        if self.collisions not in POLICIES:
            raise UserError(f"{self.collisions!r} is no collision policy", fix=f"choose one of {', '.join(POLICIES)}")
        if self.import_index and self.collisions == "reassign":
            raise UserError("an imported index has no quantizer to reassign by", fix="choose --collisions extra-level")
        check_pattern(self.pattern)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError):
            raise UserError(f"this machine has no device {self.device!r}", fix="choose --device cpu") from None

    @property
    def folder(self) -> Path:
        return Path(self.output or self.data)

    @property
    def embeddings_path(self) -> Path:
        return Path(self.embeddings or Path(self.data) / "embeddings.safetensors")


def build(config: BuildConfig) -> SemanticIdTable:
    """The table, from the files if they are there and were made from the same things."""
    catalogue = Catalogue.load(config.data)
    made_from = _made_from(config, catalogue)
    table = _already_built(config, made_from)
    if table is None:
        table, quantizer = _import(config, catalogue) if config.import_index else _quantise(config, catalogue)
        table = dataclasses.replace(table, report=table.report | {"made_from": made_from})
        write(config.folder, table, quantizer)
    if config.export_index:
        write_index(config.export_index, table.to_index())
    return table


def write(folder: Path, table: SemanticIdTable, quantizer: Quantizer | None) -> None:
    """Both files; whatever a kill leaves of that, `load` and the next build notice."""
    path, sha = folder / QUANTIZER_FILE, None
    if quantizer is None:  # an imported index: what lies there belongs to another table
        sweep(path)
        path.unlink(missing_ok=True)
    else:
        quantizer.save(path)
        sha = sha256_file(path)
    dataclasses.replace(table, report=table.report | {"quantizer_sha256": sha}).save(folder / TABLE_FILE)


def load(folder: str | Path) -> tuple[SemanticIdTable, Quantizer]:
    """Table and quantizer of a folder, if they belong together."""
    table = SemanticIdTable.load(Path(folder) / TABLE_FILE)
    path = require(Path(folder) / QUANTIZER_FILE, "the quantizer", BUILD)
    if sha256_file(path) != table.report.get("quantizer_sha256"):
        raise UserError(f"{QUANTIZER_FILE} and {TABLE_FILE} are not of one run", file=folder, fix=BUILD + " again")
    return table, Quantizer.load(path)


def _made_from(config: BuildConfig, catalogue: Catalogue) -> dict:
    """Everything that the result is a function of."""
    names = ["collisions"]
    if config.import_index:
        source = {"import_index": sha256_file(require(config.import_index, "the index", "check --import_index"))}
    else:
        path = require(config.embeddings_path, "the embeddings file", "run data_prep/embed_items.py")
        source = {"embeddings": sha256_file(path)}
        names += ["method", "levels", "codes", "seed", "pattern", "device"]
        names += ["epochs", "batch", "lr", "latent"] if config.method == "rqvae" else ["sample", "iterations"]
    return {
        "algorithm": ALGORITHM,
        "catalogue": catalogue.fingerprint,
        **source,
        **{name: getattr(config, name) for name in names},
    }


def _already_built(config: BuildConfig, made_from: dict) -> SemanticIdTable | None:
    """The table that lies there, if it is what would be made; an error if it is another one."""
    path, quantizer = config.folder / TABLE_FILE, config.folder / QUANTIZER_FILE
    if config.overwrite or not path.exists():
        return None
    try:
        table = SemanticIdTable.load(path)
    except UserError as error:
        raise UserError(error.problem, file=path, fix="--overwrite, or another --output") from None
    if table.report.get("made_from") != made_from:
        raise UserError(
            "holds semantic IDs made from other embeddings or with other settings",
            file=path,
            fix="--overwrite, or another --output",
        )
    sha = table.report.get("quantizer_sha256")
    complete = not quantizer.exists() if sha is None else quantizer.exists() and sha256_file(quantizer) == sha
    return table if complete else None


def _quantise(config: BuildConfig, catalogue: Catalogue) -> tuple[SemanticIdTable, Quantizer]:
    embeddings = Embeddings.load(config.embeddings_path, catalogue.items_fingerprint, catalogue.fingerprint)
    sizes = (config.codes,) * config.levels
    if config.method == "rqvae":
        settings = rqvae.RQVAESettings(latent=config.latent, epochs=config.epochs, batch=config.batch, lr=config.lr)
        quantizer, history = rqvae.fit(embeddings.matrix, sizes, config.seed, settings, config.device)
    else:
        history = None
        balanced = config.method == "balanced"
        quantizer = rqkmeans.fit(
            embeddings.matrix, sizes, config.seed, config.sample, config.iterations, balanced, config.device
        ).to("cpu")
    if quantizer.sizes != sizes:
        console.print(
            f"note: the items fill only {quantizer.sizes} codes of {sizes}; fewer --codes or --levels would do",
            highlight=False,
            soft_wrap=True,
        )
    about = {"encoder": embeddings.encoder, "items_fingerprint": catalogue.items_fingerprint, "seed": config.seed}
    quantizer = dataclasses.replace(quantizer, metadata=about)
    before = quantizer.encode(embeddings.matrix)[0].numpy()
    after, all_sizes = resolve(before, quantizer.sizes, config.collisions, quantizer, embeddings.matrix)
    name, labels = _labels(catalogue)
    report = make_report(before, after, all_sizes, labels, quantizer, embeddings.matrix)
    report |= {"method": config.method, "collisions": config.collisions, "label": name}
    if history:
        report["training"] = history[-1]
    return _table(config, catalogue, after, all_sizes, config.pattern, report), quantizer


def _import(config: BuildConfig, catalogue: Catalogue) -> tuple[SemanticIdTable, None]:
    index = read_index(config.import_index)
    if missing := [item for item in catalogue.item_ids if item not in index]:
        raise UserError(
            f"item {missing[0]!r} of the catalogue is not in the index, nor are {len(missing) - 1} others",
            file=config.import_index,
            fix="prepare the data with the item ids that the index uses",
        )
    unused = len(index) - len(catalogue.item_ids)
    try:
        pattern, before, sizes = SemanticIdTable.read_index({item: index[item] for item in catalogue.item_ids})
        after, all_sizes = resolve(before, sizes, config.collisions)
        name, labels = _labels(catalogue)
        report = make_report(before, after, all_sizes, labels)
        report |= {"method": "imported", "collisions": config.collisions, "label": name, "index_items_unused": unused}
        return _table(config, catalogue, after, all_sizes, pattern, report), None
    except UserError as error:
        raise UserError(error.problem, file=config.import_index, fix=error.fix) from None


def _table(config, catalogue: Catalogue, codes: np.ndarray, sizes, pattern: str, report: dict) -> SemanticIdTable:
    return SemanticIdTable(tuple(catalogue.item_ids), codes, sizes, pattern, catalogue.items_fingerprint, report)


def _labels(catalogue: Catalogue) -> tuple[str, list[str | None]]:
    """What a shared prefix should mean: the most specific category, or the brand where the data has no category."""
    categories = catalogue.items["categories"].list.last().to_list()
    return ("category", categories) if any(categories) else ("brand", catalogue.items["brand"].to_list())
