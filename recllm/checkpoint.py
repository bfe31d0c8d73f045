"""A checkpoint folder, whole: model, tokenizer, the items it can name and their titles, the style of its prompts.

model.safetensors, config.json, tokenizer.json …   what transformers loads
semantic_ids.json                                  item ↔ codes
items.parquet                                      titles and facts: for people and for filters
recllm.json                                        what it was made of, fingerprints, the prompt's style
prefix_module.safetensors                          of a model trained for conversions: what chooses an answer's prefix
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import polars as pl
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recllm.catalogue import ITEM_COLUMNS, read_table
from recllm.errors import UserError
from recllm.files import read_object, write_whole
from recllm.models.prefix_module import PrefixModule, PrefixSettings
from recllm.pretrained import DTYPES, load_causal_lm, reason, which_model
from recllm.prompting import PromptStyle, PromptWriter
from recllm.reflection import Reflection
from recllm.semantic_ids import SemanticIdTable
from recllm.tokenization import ItemTokens

REPORT = "recllm.json"
REASONING = "reasoning_prompt"  # in recllm.json, of a model that was taught to reason
REFLECTION = "reflection"  # and of one that was taught to reflect on its drafts
CONVERSION = "conversion"  # and of one that was trained for conversions
TABLE = "semantic_ids.json"
ITEMS = "items.parquet"
LONG_TEXT = ("description", "reviews")  # not needed to name an item or to filter
BUILD = "make one with data_prep/build_model.py"


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """How a model that was trained for conversions is asked for them."""

    style: PromptStyle  # of an `EventWriter`
    settings: PrefixSettings
    module: PrefixModule | None  # what chooses the prefix; None: nothing stands before the answer

    @property
    def target_behaviour(self) -> str:
        return self.settings.target_behaviour


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """`load` refuses a folder whose parts do not belong together."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    table: SemanticIdTable
    style: PromptStyle
    report: dict
    items: pl.DataFrame  # one row for each item of the table, in its order
    weights: str  # which weights: a hash of the folder's content
    folder: Path

    @classmethod
    def load(
        cls, name: str | Path, device: str | None = None, dtype: str | None = None, revision: str | None = None
    ) -> "Checkpoint":
        """A folder, or a repository on the Hub."""
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise UserError(f"{device!r} is no device", fix="cpu, cuda, cuda:1 …") from None
        folder = Path(name) if Path(name).is_dir() else _download(str(name), revision)
        if not (folder / TABLE).exists():
            raise UserError(f"holds no {TABLE}, so no item can be named", file=folder, fix=BUILD)
        if not (folder / "config.json").exists():
            raise UserError("holds items and no model: it is prepared data, not a checkpoint", file=folder, fix=BUILD)
        report = read_object(folder / REPORT) if (folder / REPORT).exists() else {}
        table = SemanticIdTable.load(folder / TABLE)
        if report.get("semantic_ids", table.fingerprint) != table.fingerprint:
            raise UserError(
                f"{TABLE} is not the index that the model was made with",
                file=folder / TABLE,
                fix="put back the one that was in the folder: its codes mean nothing to this model otherwise",
            )
        style = PromptStyle.read(report.get("prompt"))
        model, tokenizer = load_causal_lm(str(folder), dtype or "auto")
        which = which_model(str(folder))
        loaded = cls(
            Path(name).name, model.to(device).eval(), tokenizer, table, style, report, _items(folder, table), which,
            folder,
        )  # fmt: skip
        _ = loaded.tokens  # a tokenizer without the index's tokens is refused here and not at the first question
        return loaded

    @functools.cached_property
    def tokens(self) -> ItemTokens:
        return ItemTokens.of(self.tokenizer, self.table)

    @property
    def writer(self) -> PromptWriter:
        return self.writer_of(self.style)

    @property
    def reasoning(self) -> PromptStyle:
        """How it is asked to reason; a model that was not taught to is refused."""
        if REASONING not in self.report:
            raise UserError(
                "the model was not taught to reason", file=self.name, fix="mode direct, or train it on reasoning data"
            )
        return PromptStyle.read(self.report[REASONING])

    @functools.cached_property
    def reflection(self) -> Reflection:
        """What it reflects on; a model that was not taught to is refused."""
        if REFLECTION not in self.report:
            raise UserError(
                "the model was not taught to reflect on its drafts", file=self.name,
                fix="mode direct, or train it with recipes/grc_sft.py",
            )  # fmt: skip
        return Reflection.read(self.report[REFLECTION], self.tokenizer, self.items)

    @functools.cached_property
    def conversion(self) -> Conversion:
        """How it is asked for conversions; a model that was not trained for them is refused."""
        if CONVERSION not in self.report:
            raise UserError(
                "the model was not trained for conversions", file=self.name, fix="train it with recipes/rclrec.py"
            )
        said = self.report[CONVERSION]
        if not isinstance(said, dict) or not {"settings", "prompt"} <= said.keys():
            problem = f"{CONVERSION!r} says not how the model is asked"
            raise UserError(problem, file=self.folder / REPORT, fix="train it with recipes/rclrec.py again")
        settings = PrefixSettings.read(said["settings"])
        return Conversion(PromptStyle.read(said["prompt"]), settings, self._prefix_module(settings))

    def _prefix_module(self, settings: PrefixSettings) -> PrefixModule | None:
        if settings.selection == "none":
            return None
        width = self.model.config.get_text_config().hidden_size
        if settings.selection != "learned":
            return PrefixModule(settings, width)
        module = PrefixModule.load(self.folder)
        if module.settings != settings or module.width != width:
            raise UserError(
                "the prefix module is not the one that the model was trained with",
                file=self.folder,
                fix="put back the file that was in the folder, or train with recipes/rclrec.py again",
            )
        return module.to(self.model.device).eval()

    def writer_of(self, style: PromptStyle) -> PromptWriter:
        return PromptWriter(style, self.table, self.tokenizer)


def save_items(items: pl.DataFrame, folder: Path) -> None:
    """The part of items.parquet that a checkpoint carries."""
    with write_whole(folder / ITEMS) as partial:
        items.drop(LONG_TEXT, strict=False).write_parquet(partial)


def _items(folder: Path, table: SemanticIdTable) -> pl.DataFrame:
    """Facts of the table's items in its order; titles are empty where nothing is known."""
    ours = pl.DataFrame({"item": list(table.items)})
    if not (folder / ITEMS).exists():
        return ours.with_columns(title=pl.lit(""))
    items = read_table(folder / ITEMS, {"item": ITEM_COLUMNS["item"], "title": ITEM_COLUMNS["title"]})
    return ours.join(items, on="item", how="left", maintain_order="left").with_columns(pl.col("title").fill_null(""))


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted: Any = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", ITEMS]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except HFValidationError:
        raise UserError("no such folder", file=repository, fix="give a checkpoint folder or a Hub repository") from None
    except Exception as error:  # no network, no such repository, no right to read it
        raise UserError(
            f"{repository!r} is no folder and cannot be loaded from the Hub: {reason(error)}",
            fix="give a checkpoint folder or a Hub repository (user/name)",
        ) from None
