"""What the settings of every training have in common: validation that decodes, where to begin anew, one device each.

A mixin before a config of TRL's: `class RecSFTConfig(RecConfig, SFTConfig)`.
"""

from dataclasses import dataclass, field

import torch

from recllm.errors import UserError
from recllm.training import made_for_bf16


@dataclass
class RecConfig:
    """Fails at construction, with one sentence."""

    validation_users: int = field(
        default=1000, metadata={"help": "Users of the validation split that are decoded at every evaluation. 0: none."}
    )
    validation_beams: int = field(default=20, metadata={"help": "Width of that search."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better Recall@10. Implies load_best_model_at_end."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Begin anew, and replace what is there."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Steps kept to go on from: they are large."})
    ddp_timeout: int = field(default=6 * 3600, metadata={"help": "Seconds: one process may tokenise for the others."})

    EVALUATE = "epoch"  # how often, where eval_strategy does not say

    def __post_init__(self):
        if not torch.accelerator.is_available() and not self.deepspeed:  # which would be ignored in silence
            self.use_cpu = True  # or bf16 is refused
        if self.bf16 is None and not self.fp16:
            self.bf16 = made_for_bf16()
        self.check_counts("validation_users")
        if self.validation_users:
            self.eval_strategy = self.EVALUATE if self.eval_strategy == "no" else self.eval_strategy
            self.metric_for_best_model = self.metric_for_best_model or "recall@10"
        elif self.early_stopping_patience or self.load_best_model_at_end:
            raise UserError("the best evaluation is chosen on validation users", fix="validation_users above 0")
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise UserError(f"early_stopping_patience must be at least 1, got {self.early_stopping_patience}")
            self.load_best_model_at_end = True
            self.restore_callback_states_from_checkpoint = True  # or patience would start anew
        if self.load_best_model_at_end:  # a best step that was not saved could not be loaded
            if self.eval_strategy == "steps":
                self.eval_steps = self.eval_steps or self.logging_steps  # as Trainer would, only later
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.save_steps
        if self.validation_beams < 10:
            raise UserError(f"validation_beams must be at least 10 for Recall@10, got {self.validation_beams}")
        if self.trust_remote_code:
            raise UserError("trust_remote_code runs a stranger's code", fix="a model that transformers knows")
        self.check()
        super().__post_init__()
        if self.device.type == "cpu":
            self.__dict__["_setup_devices"] = torch.device("cpu")  # torch cannot load again what was on "cpu:0"
        if self.n_gpu > 1:
            raise UserError(f"{self.n_gpu} GPUs and one process", fix="accelerate launch, or CUDA_VISIBLE_DEVICES=0")

    def check(self) -> None:
        """What a training's own settings refuse, before TRL looks at them."""

    def check_counts(self, *names: str) -> None:
        """TRL's parser lets 5.5 into an int field."""
        for name in names:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise UserError(f"{name} must be a whole number from 0, got {getattr(self, name)!r}")

    def refuse(self, wrong: dict[str, bool]) -> None:
        """Settings of TRL's that would be left without effect, or do wrong."""
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise UserError(f"{name} = {getattr(self, name)!r} has no place in this training", fix="leave it out")

    @property
    def rows_a_step(self) -> int:
        """Of the data set, on all processes together, for one step of the optimizer."""
        return self.per_device_train_batch_size * max(1, self.world_size) * self.gradient_accumulation_steps
