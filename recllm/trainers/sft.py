"""Supervised fine-tuning on alignment and reasoning data.   GREAM, section 4.3.

Differences from TRL's SFTTrainer: 1. the order of the batches is a schedule's, all of one kind at a time; 2. evaluation
decodes: Recall and NDCG of constrained beams on validation users, so that `metric_for_best_model` is what is wanted.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from recllm.errors import UserError
from recllm.evaluation.validation import EvaluatesByDecoding, Validation
from recllm.mixtures.curriculum import Schedule, ScheduledSampler
from recllm.mixtures.encoding import Encoded
from recllm.trainers.callbacks import add_callbacks
from recllm.trainers.config import RecConfig


@dataclass
class RecSFTConfig(RecConfig, SFTConfig):
    """TRL's settings, and those of the schedule, the validation and the new rows."""

    learning_rate: float = field(default=5e-5, metadata={"help": "Highest learning rate of AdamW."})
    schedule: Literal["curriculum", "uniform", "direct_then_reasoning"] = field(
        default="curriculum",
        metadata={"help": "curriculum: reasoning ever denser, the last epoch mixed; or one of the alternatives."},
    )
    gamma: float = field(default=1.5, metadata={"help": "γ of the curriculum: how fast reasoning comes in."})
    dropout: float = field(
        default=0.0, metadata={"help": "On embeddings and on what each block adds: for small models from scratch."}
    )
    rows_first_steps: int = field(
        default=0, metadata={"help": "Steps before everything else in which only the new tokens' rows move."}
    )
    rows_first_learning_rate: float = field(default=1e-3, metadata={"help": "Of those steps."})

    def check(self) -> None:
        self.check_counts("rows_first_steps")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")
        self.refuse(
            {
                "train_sampling_strategy": self.train_sampling_strategy not in ("random", "group_by_length"),
                "packing_strategy": self.packing and self.packing_strategy != "bfd",
                "chat_template_path": self.chat_template_path is not None,
                "eos_token": self.eos_token is not None,
                "auto_find_batch_size": self.auto_find_batch_size,
                "eval_on_start": self.eval_on_start and not self.validation_users,
                "completion_only_loss": self.completion_only_loss is False,
                "assistant_only_loss": self.assistant_only_loss,
            }
        )
        if self.max_length is None:
            raise UserError("max_length must be a number: longer examples are left out whole", fix="max_length: 1024")
        Schedule(self.schedule, self.gamma)
        # Rows come tokenised, with their labels; TRL is not to touch them again.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}


class RecSFTTrainer(EvaluatesByDecoding, SFTTrainer):
    """Only the order of the batches and the evaluation differ from SFTTrainer."""

    _tag_names: ClassVar = ["trl", "sft", "recllm", "gream"]
    _name = "SFT"

    def __init__(self, model, args: RecSFTConfig, rows: Encoded, processing_class, validation: Validation | None,
                 peft_config=None, callbacks=None):  # fmt: skip
        self.encoded, self.validation = rows, validation
        super().__init__(
            model=model, args=args, processing_class=processing_class, peft_config=peft_config, callbacks=callbacks,
            train_dataset=rows.rows,
            eval_dataset=rows.rows.select(range(0)) if validation else None,  # Trainer insists on one
        )  # fmt: skip
        add_callbacks(self)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ScheduledSampler:
        grouped = self.args.train_sampling_strategy == "group_by_length"
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = ScheduledSampler(
            self.encoded.align, len(self.encoded.rows), self.args.rows_a_step, self.epochs(),
            Schedule(self.args.schedule, self.args.gamma, seed), self.encoded.lengths if grouped else None,
        )  # fmt: skip
        return self.sampler

    def epochs(self) -> int:
        """That the schedule is laid out for: `max_steps` decides where it is given, as everywhere in Trainer."""
        if self.args.max_steps <= 0:
            return math.ceil(self.args.num_train_epochs)
        parts = self.encoded.align, len(self.encoded.rows) - self.encoded.align
        return math.ceil(self.args.max_steps / sum(math.ceil(part / self.args.rows_a_step) for part in parts))
