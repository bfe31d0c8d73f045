"""What `recipes/grc_sft.py` does: a run as of the other methods (`rl_run`), on drafts and their labels."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from trl import ModelConfig

from recllm.attributes import Attribute, ItemAttributes
from recllm.catalogue import Catalogue
from recllm.checkpoint import REFLECTION, Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import ReflectingValidation, Validation
from recllm.files import read_object, require, restore_folder
from recllm.launch import console
from recllm.mixtures.reflection import COMMAND, ReflectionData, check_index, written_with
from recllm.mixtures.store import REPORT
from recllm.reflection import Reflection, ReflectionTokens, Template
from recllm.tokenization import add_tokens, initialise, resize
from recllm.trainers.adapters import lora_of
from recllm.trainers.grc_sft import GRCSFTConfig, GRCSFTTrainer
from recllm.trainers.rl_run import Method, run_rl
from recllm.trainers.run import Run


@dataclass(kw_only=True)
class GRCData:
    """What is trained on. The start is `model_name_or_path`: the checkpoint that the drafts are of."""

    data: str = field(metadata={"help": "Prepared folder (data_prep/prepare.py), with semantic_ids.json."})
    drafts: str = field(metadata={"help": "Folder of data_prep/build_reflection.py."})


@dataclass(frozen=True)
class GRCSFT(Method):
    """A row is a prompt, its target and its drafts."""

    kind: ClassVar[str] = "grc_sft"

    def check(self, data: GRCData, training: GRCSFTConfig) -> None:
        """`rl_run.check` has said what is wrong with the start."""

    def content(self, data: GRCData, catalogue: Catalogue) -> list[str]:
        restore_folder(Path(data.drafts))  # which may have been killed while it was replaced
        made = require(Path(data.drafts) / REPORT, "the drafts", f"run {COMMAND}")
        return [catalogue.fingerprint, str(read_object(made).get("made_of", ""))]

    def start_of(self, run: Run, data: GRCData) -> Checkpoint:
        """With rows for the slots and labels that it does not know yet."""
        start, training = run.start(), run.training
        attributes = ReflectionData.load(data.drafts, start.table).attributes
        names = tuple(attribute.name for attribute in attributes) if training.reflection else ()
        template = Template(start.table.levels, names, training.reflection_layout, training.reflection)
        return taught(start, template, attributes, training.seed)

    def prompts_of(self, run: Run, data: GRCData, start: Checkpoint, catalogue: Catalogue) -> Dataset:
        found = ReflectionData.load(data.drafts, start.table)
        if found.style != start.style or found.report.get("tokens") != written_with(start):
            raise UserError(
                "the drafts' prompts are written in other tokens than the model's", file=data.drafts,
                fix="build them with the checkpoint that training begins with",
            )  # fmt: skip
        if found.report["start"]["weights"] != start.weights and run.group.first:
            console.print("the drafts are of another model than training begins with: they are read all the same")
        return found.examples

    def validation_of(self, run: Run, start: Checkpoint, catalogue: Catalogue) -> Validation:
        users, beams = run.training.validation_users, run.training.validation_beams
        return ReflectingValidation.of(catalogue, start, start.style, users, beams)

    def rows_at_a_time(self, training: GRCSFTConfig) -> int:
        return training.rows_a_step

    def trainer_of(
        self, run: Run, data: GRCData, start: Checkpoint, training: GRCSFTConfig, prompts: Dataset,
        validation: Validation | None,
    ) -> GRCSFTTrainer:  # fmt: skip
        return GRCSFTTrainer(start, training, prompts, validation, peft_config=lora_of(start.model, run.model))


def taught(start: Checkpoint, template: Template, attributes: Sequence[Attribute], seed: int) -> Checkpoint:
    """The checkpoint with a row for each token of the template; one that knows another template is refused."""
    if known := start.report.get(REFLECTION):
        # GC asks about no attribute; of the others a name does not say which classes of a number are meant.
        asked = [attribute.as_json() for attribute in attributes] if template.labels else known["attributes"]
        if Template.read(known["template"]) == template and known["attributes"] == asked:
            return start
        raise UserError(
            "the model was taught to reflect in another way", file=start.name,
            fix="begin with the checkpoint of recipes/sft.py, or keep its attributes and reflection_layout",
        )  # fmt: skip
    check_index(start.table)
    ids = add_tokens(start.tokenizer, template.new_tokens)
    resize(start.model, start.tokenizer)
    initialise(start.model, start.tokenizer, ids, "random", seed=seed)
    tokens = ReflectionTokens.of(start.tokenizer, template)
    reflection = Reflection(template, tokens, ItemAttributes.of(attributes, start.items))
    return dataclasses.replace(start, report=start.report | {REFLECTION: reflection.as_json()})


GRC_SFT = GRCSFT("grc_sft", GRCSFTTrainer, papers=("grc",))


def run_grc_sft(data: GRCData, training: GRCSFTConfig, model: ModelConfig) -> Path | None:
    return run_rl(GRC_SFT, data, training, model)
