"""What `recipes/rclrec.py` does: a run as of the other methods (`rl_run`), on conversions alone."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import ModelConfig

from recllm.catalogue import Catalogue
from recllm.checkpoint import CONVERSION, Checkpoint
from recllm.decoding.decoder import without_dropout
from recllm.errors import UserError
from recllm.event_prompts import EventWriter
from recllm.files import make_folder, read_object, require, write_whole
from recllm.mixtures.conversions import COMMAND, Conversions
from recllm.mixtures.store import REPORT
from recllm.models.prefix_module import PrefixModule, PrefixSettings
from recllm.progress import progress
from recllm.prompting import PromptStyle, rendered
from recllm.trainers.adapters import lora_of
from recllm.trainers.conversion_validation import ConversionValidation
from recllm.trainers.prefixed import COLUMNS, NLL_BASE, ConversionCollator, PrefixScorer, base_nll
from recllm.trainers.rclrec import RCLRecConfig, RCLRecTrainer
from recllm.trainers.rl_run import Method, run_rl
from recllm.trainers.run import Run
from recllm.training import add_dropout

STAGE_1 = "begin with a checkpoint of recipes/sft.py on data_prep/build_conversions.py --stage all"


@dataclass(kw_only=True)
class RCLRecData:
    """What is trained on. The start is `model_name_or_path`: a model of events of every behaviour, the paper's θ₀."""

    data: str = field(metadata={"help": "Prepared folder (prepare.py --split conversion), with semantic_ids.json."})
    conversions: str | None = field(
        default=None,
        metadata={"help": "Folder of data_prep/build_conversions.py --stage target. Default: the one in data."},
    )

    @property
    def folder(self) -> Path:
        return Path(self.conversions) if self.conversions else Path(self.data) / "conversions_target"


@dataclass(frozen=True)
class RCLRec(Method):
    """A row is a prompt, the items in it and where each ends, a target and its user."""

    kind: ClassVar[str] = "rclrec"

    def check(self, data: RCLRecData, training: RCLRecConfig) -> None:
        require(data.folder / REPORT, "the conversions", f"run {COMMAND} --data {data.data} --stage target")

    def content(self, data: RCLRecData, catalogue: Catalogue) -> list[str]:
        return [catalogue.fingerprint, str(read_object(data.folder / REPORT).get("made_of", ""))]

    def start_of(self, run: Run, data: RCLRecData) -> Checkpoint:
        start = run.start()
        if CONVERSION in start.report:
            raise UserError(
                "was trained for conversions already, and is no start of its own", file=start.name, fix=STAGE_1
            )
        conversions = conversions_of(data, start)
        about = {
            "settings": run.training.prefix(conversions.target_behaviour).as_json(),
            "prompt": dataclasses.asdict(conversions.style),
        }
        return dataclasses.replace(start, report=start.report | {CONVERSION: about})

    def prompts_of(self, run: Run, data: RCLRecData, start: Checkpoint, catalogue: Catalogue) -> Dataset:
        conversions = conversions_of(data, start)
        rows = rows_of(conversions, start, run.training.k)
        if not run.training.needs_base:
            return rows
        collator = collator_of(start, conversions, PrefixModule(PrefixSettings(selection="none"), 1))
        return rows.add_column(NLL_BASE, base_nlls(run, start, rows, collator).tolist())

    def validation_of(self, run: Run, start: Checkpoint, catalogue: Catalogue) -> ConversionValidation:
        about = start.report[CONVERSION]
        writer = EventWriter(PromptStyle.read(about["prompt"]), start.table, start.tokenizer)
        opening = writer.opening(about["settings"]["target_behaviour"])
        users, beams = run.training.validation_users, run.training.validation_beams
        return ConversionValidation.of_conversions(catalogue, start, writer, opening, users, beams)

    def rows_at_a_time(self, training: RCLRecConfig) -> int:
        return training.rows_a_step

    def trainer_of(
        self, run: Run, data: RCLRecData, start: Checkpoint, training: RCLRecConfig, prompts: Dataset,
        validation: ConversionValidation | None,
    ) -> RCLRecTrainer:  # fmt: skip
        settings = PrefixSettings.read(start.report[CONVERSION]["settings"])
        width = start.model.config.get_text_config().hidden_size
        module = PrefixModule(settings, width, sorted(set(prompts["user"])))
        opening = writer_of(conversions_of(data, start), start).opening(settings.target_behaviour)
        if training.dropout:
            add_dropout(start.model, training.dropout)
        return RCLRecTrainer(
            start, training, prompts, opening, module, validation, peft_config=lora_of(start.model, run.model)
        )

    def parts_of(self, trainer: RCLRecTrainer) -> Callable[[Path], None] | None:
        module = trainer.take_module()
        return None if module.settings.selection == "none" else module.save


# ---- the rows


def conversions_of(data: RCLRecData, start: Checkpoint) -> Conversions:
    """Refuses what is no conversions, and those that the model cannot be asked about."""
    conversions = Conversions.load(data.folder, start.table, COMMAND)
    if conversions.report.get("stage") != "target":
        fix = f"the folder of {COMMAND} --stage target"
        raise UserError("holds no conversions alone, which stage 2 is trained on", file=data.folder, fix=fix)
    asked, known = ({**vars(style), "max_history": 0} for style in (conversions.style, start.style))
    if asked != known:
        problem = f"the conversions' prompts are {asked['template']!r} and the model was taught {known['template']!r}"
        raise UserError(problem, file=start.name, fix=STAGE_1)
    writer = writer_of(conversions, start)
    for behaviour in conversions.behaviours:
        writer.opening(behaviour)
    return conversions


def writer_of(conversions: Conversions, start: Checkpoint) -> EventWriter:
    return EventWriter(conversions.style, start.table, start.tokenizer)


def collator_of(start: Checkpoint, conversions: Conversions, module: PrefixModule) -> ConversionCollator:
    opening = writer_of(conversions, start).opening(conversions.target_behaviour)
    return ConversionCollator(start.tokens, opening, start.tokenizer.pad_token_id, module)


def rows_of(conversions: Conversions, start: Checkpoint, k: int) -> Dataset:
    """COLUMNS, where each item ends counted from the prompt's first token. Refuses what the context cannot hold."""
    first, chat, tokenizer = len(writer_of(conversions, start).prefix), conversions.style.chat, start.tokenizer

    def work(batch: dict) -> dict:
        prompts = [rendered(text, tokenizer, chat) for text in batch["prompt"]]
        return {
            "prompt_ids": tokenizer(prompts, add_special_tokens=False)["input_ids"],
            "ends": [[first + end for end in ends] for ends in batch["ends"]],
            "rows": batch["history_rows"],
            "target": batch["target"],
            "user": batch["user"],
        }

    rows = conversions.examples.map(
        work, batched=True, remove_columns=conversions.examples.column_names, desc="tokenising", keep_in_memory=True
    ).select_columns(list(COLUMNS))
    longest = max(map(len, rows["prompt_ids"]), default=0) + 1 + (k + 1) * start.table.levels
    context = getattr(start.model.config.get_text_config(), "max_position_embeddings", None)
    if context and longest > context:
        raise UserError(
            f"a prompt with a prefix of {k} items and its target are {longest:,} tokens, and the model's context is "
            f"{context:,}",
            fix=f"{COMMAND} with a smaller --max_history, or a smaller k",
        )
    return rows


# ---- ℓ_base


def base_nlls(run: Run, start: Checkpoint, rows: Dataset, collator: ConversionCollator) -> Tensor:
    """ℓ_base of every row under the checkpoint that training begins with, kept beside the steps. (n,)

    Each process computes its share; all read all of them. A run that goes on computes nothing.
    """
    group = run.group
    paths = [run.work / f"{NLL_BASE}-{index}-of-{group.count}.safetensors" for index in range(group.count)]
    own = paths[group.index]
    if not own.exists():
        make_folder(run.work)
        found = nlls_of(start, rows.select(range(group.index, len(rows), group.count)), collator, run.training)
        with write_whole(own) as partial:
            save_file({NLL_BASE: found}, partial)
    group.wait()
    everything = torch.zeros(len(rows))
    for index, path in enumerate(paths):
        everything[index :: group.count] = load_file(path)[NLL_BASE]
    return everything


def nlls_of(start: Checkpoint, rows: Dataset, collator: ConversionCollator, training: RCLRecConfig) -> Tensor:
    """Prompts of like lengths side by side, in the precision that training has. (n,)"""
    model, scorer, device = start.model.to(training.device), PrefixScorer(), training.device
    lengths = [len(ids) for ids in rows["prompt_ids"]]
    order = sorted(range(len(rows)), key=lambda place: (-lengths[place], place))
    found, size = torch.zeros(len(rows)), training.per_device_train_batch_size
    lower = torch.autocast(device.type, torch.bfloat16) if training.bf16 else contextlib.nullcontext()
    with without_dropout(model), lower, progress("conversions without a prefix", len(rows)) as advance:
        for first in range(0, len(order), size):
            places = order[first : first + size]
            batch = {name: part.to(device) for name, part in collator([rows[place] for place in places]).items()}
            found[places] = base_nll(model, batch, scorer).float().cpu()
            advance(len(places))
    return found


RCLREC = RCLRec("rclrec", RCLRecTrainer, papers=("rclrec",))


def run_rclrec(data: RCLRecData, training: RCLRecConfig, model: ModelConfig) -> Path | None:
    return run_rl(RCLREC, data, training, model)
