"""Trainings without groups: a row is a prompt with what is to be learnt of it, and the loss a mean over rows.

`ExactTrainer`, `GRCSFTTrainer` and `RCLRecTrainer` differ in their collator and in `compute_loss`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import EvaluatesByDecoding, Validation
from recllm.trainers.callbacks import add_callbacks
from recllm.trainers.config import RecConfig
from recllm.trainers.health_log import HealthLog, LogsHealth
from recllm.trainers.prompt_sampler import PromptSampler


@dataclass
class PromptConfig(RecConfig, TrainingArguments):
    """The Trainer's settings, without those that would do nothing here."""

    shuffle_dataset: bool = field(default=True, metadata={"help": "Another order in every epoch."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the health log."})
    bf16: bool | None = field(default=None, metadata={"help": "Default: where the device is made for it."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Refused."})

    def check(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name} must be a whole number from 1, got {getattr(self, name)!r}")
        self.refuse(
            {
                "auto_find_batch_size": self.auto_find_batch_size,
                "label_smoothing_factor": bool(self.label_smoothing_factor),
                "train_sampling_strategy": self.train_sampling_strategy != "random",
                "eval_on_start": self.eval_on_start and not self.validation_users,
            }
        )
        self.remove_unused_columns = False  # the collator makes the model's inputs of a row


class PromptTrainer(LogsHealth, EvaluatesByDecoding, Trainer):
    """The order of the batches and the evaluation differ from Trainer; `compute_loss` is the method's."""

    def __init__(
        self, checkpoint: Checkpoint, args: PromptConfig, rows: Dataset, columns: Sequence[str], collator,
        validation: Validation | None = None, peft_config: LoraConfig | None = None, callbacks=None,
    ):  # fmt: skip
        model, self.validation = checkpoint.model, validation
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
            if args.gradient_checkpointing:
                model.enable_input_require_grads()
        super().__init__(
            model=model, args=args, train_dataset=rows.select_columns(list(columns)),
            eval_dataset=rows.select(range(0)) if validation else None,  # Trainer insists on one
            data_collator=collator, processing_class=checkpoint.tokenizer, callbacks=callbacks,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch's rows: accumulation averages
        self.health = HealthLog.of(self.accelerator, model)
        add_callbacks(self)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> PromptSampler:
        args, data = self.args, self.train_dataset if dataset is None else dataset
        self.sampler = PromptSampler(len(data), args.rows_a_step, 1, 1, args.seed, args.shuffle_dataset)
        return self.sampler
