"""Supervised fine-tuning on alignment and reasoning data.   GREAM, section 4.3.

Differences from TRL's SFTTrainer: 1. the order of the batches is a schedule's, all of one kind at a time; 2. evaluation
decodes: Recall and NDCG of constrained beams on validation users, so that `metric_for_best_model` is what is wanted.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from recllm.errors import UserError
from recllm.evaluation.validation import EvaluatesByDecoding, Validation
from recllm.mixtures.curriculum import Schedule, ScheduledSampler
from recllm.mixtures.encoding import Encoded
from recllm.training import BarOnStderr, made_for_bf16


@dataclass
class RecSFTConfig(SFTConfig):
    """TRL's settings, and those of the schedule, the validation and the new rows."""

    learning_rate: float = field(default=5e-5, metadata={"help": "Highest learning rate of AdamW."})
    schedule: Literal["curriculum", "uniform", "direct_then_reasoning"] = field(
        default="curriculum",
        metadata={"help": "curriculum: reasoning ever denser, the last epoch mixed; or one of the alternatives."},
    )
    gamma: float = field(default=1.5, metadata={"help": "γ of the curriculum: how fast reasoning comes in."})
    validation_users: int = field(
        default=1000, metadata={"help": "Users of the validation split that are decoded at every evaluation. 0: none."}
    )
    validation_beams: int = field(default=20, metadata={"help": "Width of that search."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better Recall@10. Implies load_best_model_at_end."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "On embeddings and on what each block adds: for small models from scratch."}
    )
    rows_first_steps: int = field(
        default=0, metadata={"help": "Steps before everything else in which only the new tokens' rows move."}
    )
    rows_first_learning_rate: float = field(default=1e-3, metadata={"help": "Of those steps."})
    overwrite: bool = field(default=False, metadata={"help": "Begin anew, and replace what is there."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Steps kept to go on from: they are large."})
    ddp_timeout: int = field(default=6 * 3600, metadata={"help": "Seconds: one process may tokenise for the others."})

    def __post_init__(self):
        if not torch.accelerator.is_available() and not self.deepspeed:  # which would be ignored in silence
            self.use_cpu = True  # or bf16 is refused
        if self.bf16 is None and not self.fp16:
            self.bf16 = made_for_bf16()
        if self.validation_users:
            self.eval_strategy = "epoch" if self.eval_strategy == "no" else self.eval_strategy
            self.metric_for_best_model = self.metric_for_best_model or "recall@10"
        elif self.early_stopping_patience or self.load_best_model_at_end:
            raise UserError("the best epoch is chosen on validation users", fix="validation_users above 0")
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise UserError(f"early_stopping_patience must be at least 1, got {self.early_stopping_patience}")
            self.load_best_model_at_end = True
            self.restore_callback_states_from_checkpoint = True  # or patience would start anew
        if self.load_best_model_at_end:
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.save_steps
        for name in ("rows_first_steps", "validation_users"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise UserError(f"{name} must be a whole number from 0, got {getattr(self, name)!r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.validation_beams < 10:
            raise UserError(f"validation_beams must be at least 10 for Recall@10, got {self.validation_beams}")
        self.refuse_what_does_nothing()
        if self.max_length is None:
            raise UserError("max_length must be a number: longer examples are left out whole", fix="max_length: 1024")
        if self.trust_remote_code:
            raise UserError("trust_remote_code runs a stranger's code", fix="a model that transformers knows")
        Schedule(self.schedule, self.gamma)
        # Rows come tokenised, with their labels; TRL is not to touch them again.
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        if self.device.type == "cpu":
            self.__dict__["_setup_devices"] = torch.device("cpu")  # torch cannot load again what was on "cpu:0"
        if self.n_gpu > 1:
            raise UserError(f"{self.n_gpu} GPUs and one process", fix="accelerate launch, or CUDA_VISIBLE_DEVICES=0")

    def refuse_what_does_nothing(self) -> None:
        """Settings of TRL's that this trainer's rows, schedule or evaluation would leave without effect, or wrong."""
        wrong = {
            "train_sampling_strategy": self.train_sampling_strategy not in ("random", "group_by_length"),
            "packing_strategy": self.packing and self.packing_strategy != "bfd",
            "chat_template_path": self.chat_template_path is not None,
            "eos_token": self.eos_token is not None,
            "auto_find_batch_size": self.auto_find_batch_size,
            "eval_on_start": self.eval_on_start and not self.validation_users,
            "completion_only_loss": self.completion_only_loss is False,
            "assistant_only_loss": self.assistant_only_loss,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise UserError(f"{name} = {getattr(self, name)!r} has no place in this training", fix="leave it out")

    @property
    def rows_a_step(self) -> int:
        """Of the data set, on all processes together, for one step of the optimizer."""
        return self.per_device_train_batch_size * max(1, self.world_size) * self.gradient_accumulation_steps


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
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.add_callback(TellsTheEpoch(self))
        self.pop_callback(PrinterCallback)  # standard output is for results
        if self.pop_callback(ProgressCallback):
            self.add_callback(BarOnStderr)

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


class TellsTheEpoch(TrainerCallback):
    """To the sampler. After a resume on several processes neither Trainer's nor accelerate's `set_epoch` reaches it."""

    def __init__(self, trainer: RecSFTTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.set_epoch(int((state.epoch or 0) + 1e-6))
