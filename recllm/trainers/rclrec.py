"""RCLRec: conversions behind a prefix of the history items that matter to them.   RCLRec, sections 2 and 3

    L = L_SFT + λ L_q        L_SFT  the mean NLL of prefix and target tokens
                             L_q    max(0, ℓ_cur − ℓ_base + m)

ℓ_cur is the target's average NLL with the prefix, ℓ_base that without it of the checkpoint that training begins with,
which is a column of the data: it stays what it was. Differences from supervised training: 1. the answer begins with a
prefix that the model selects, and its gates carry the gradient to the selection (`recllm.trainers.prefixed`); 2. the
hinge; 3. no end token is predicted. The first L is a mean over tokens, then over a batch's conversions.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import Validation
from recllm.models.prefix_module import PrefixModule, PrefixSettings, QueryStart, Selection
from recllm.objectives.rclrec import average_nll, quality_loss
from recllm.trainers.batches import Batch
from recllm.trainers.prefixed import (
    COLUMNS,
    NAME,
    NLL_BASE,
    ConversionCollator,
    PrefixScorer,
    PrefixScores,
    module_of,
)
from recllm.trainers.prompt_trainer import PromptConfig, PromptTrainer


@dataclass
class RCLRecConfig(PromptConfig):
    """The Trainer's settings, and those of the prefix."""

    EVALUATE = "epoch"

    k: int = field(default=3, metadata={"help": "K, history items in the prefix."})
    temperature: float = field(default=1.0, metadata={"help": "τ of the selection's softmax."})
    margin: float = field(default=0.1, metadata={"help": "m: how much better a token of the target has to get."})
    quality_weight: float = field(
        default=0.5, metadata={"help": "λ of the quality-aware loss. 0: without it, as where there is no prefix."}
    )
    selection: Selection = field(
        default="learned", metadata={"help": "recent, random: K items without a query; none: no prefix."}
    )
    query_start: QueryStart = field(
        default="context",
        metadata={"help": "The query at first. context: the prompt's last state; random: of random weights."},
    )
    user_width: int = field(default=32, metadata={"help": "Of a user's embedding. 0: users have none."})
    user_dropout: float = field(
        default=0.1,
        metadata={"help": "Share of users taken for unknown in a step, as those of whom training has none."},
    )
    module_learning_rate: float = field(default=1e-3, metadata={"help": "Of the prefix module's own weights."})
    dropout: float = field(
        default=0.0, metadata={"help": "On embeddings and on what each block adds: for small models from scratch."}
    )

    def check(self) -> None:
        _ = self.prefix("pay")
        for name, what in (("quality_weight", "λ"), ("margin", "m"), ("module_learning_rate", "a learning rate")):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name}, {what}, must not be below 0 and be finite, got {getattr(self, name)}")
        for name in ("dropout", "user_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.gradient_checkpointing:
            raise UserError(
                "gradient_checkpointing keeps no prompt for what follows it",
                fix="leave it out; a smaller per_device_train_batch_size where memory is short",
            )
        super().check()

    @property
    def needs_base(self) -> bool:
        """Is there a quality loss? Without a prefix there is nothing that could be worth its place."""
        return bool(self.quality_weight) and self.selection != "none"

    def prefix(self, target_behaviour: str) -> PrefixSettings:
        return PrefixSettings(
            self.k, self.temperature, self.selection, target_behaviour, self.user_width, self.seed, self.query_start
        )


class RCLRecTrainer(PromptTrainer):
    """Only the loss and the module's learning rate differ from its base."""

    _tag_names: ClassVar = ["trl", "sft", "rclrec", "recllm"]
    _name = "RCLRec"

    def __init__(
        self, checkpoint: Checkpoint, args: RCLRecConfig, conversions: Dataset, opening: int, module: PrefixModule,
        validation: Validation | None = None, peft_config: LoraConfig | None = None, callbacks=None,
    ):  # fmt: skip
        """`conversions`: COLUMNS, and with a quality loss NLL_BASE; `opening`: the target behaviour's token."""
        model, self.scorer = checkpoint.model, PrefixScorer()
        self.scorer.install(model)
        module.user_dropout = args.user_dropout
        model.add_module(NAME, module)  # so that it trains, and is saved and loaded with every step
        if peft_config is not None and module.learned:
            peft_config = with_module(peft_config)
        columns = [*COLUMNS, *([NLL_BASE] if args.needs_base else [])]
        collator = ConversionCollator(checkpoint.tokens, opening, checkpoint.tokenizer.pad_token_id, module)
        super().__init__(checkpoint, args, conversions, columns, collator, validation, peft_config, callbacks)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Trainer's, with groups of their own for the module's weights."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not made:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        own = {id(each) for name, each in named if f"{NAME}." in name}
        for group in list(optimizer.param_groups):
            if some := [each for each in group["params"] if id(each) in own]:
                group["params"] = [each for each in group["params"] if id(each) not in own]
                optimizer.add_param_group(group | {"params": some, "lr": self.args.module_learning_rate})
        return optimizer

    def compute_loss(self, model, inputs: Batch, return_outputs=False, num_items_in_batch=None) -> Tensor:
        args = self.args
        scores: PrefixScores = model(conversions=inputs)
        self.health.amount("actor/tokens", self.scorer.tokens_run)
        nll, current = average_nll(scores.logps, scores.present), average_nll(scores.logps, scores.target)
        figures, loss = {"nll": nll, "target_nll": current}, nll
        if args.needs_base:
            quality = quality_loss(current, inputs[NLL_BASE], args.margin)
            loss = loss + args.quality_weight * quality
            # `helped`: how often the prefix does what the hinge asks of it
            figures |= {"base_nll": inputs[NLL_BASE], "quality": quality, "helped": (quality == 0).float()}
        for name, values in figures.items():
            self.health.share(f"rclrec/{name}", values.detach().sum(), len(values))
        self._log_selection(scores.chosen, inputs["there"])
        return loss.mean()

    def _log_selection(self, chosen: Tensor, there: Tensor) -> None:
        """How far back the chosen items lie, in events: 1 is the latest."""
        ages = (there.size(1) - chosen)[chosen >= 0]
        self.health.share("rclrec/age", ages.sum(), len(ages))

    def take_module(self) -> PrefixModule:
        """The trained module, out of the model, which is a plain one from now on."""
        model = self.accelerator.unwrap_model(self.model)
        module = module_of(model)
        delattr(model.get_base_model() if hasattr(model, "get_base_model") else model, NAME)
        return module


def with_module(config: LoraConfig) -> LoraConfig:
    """Trained whole and saved with the adapter."""
    config.modules_to_save = [*(config.modules_to_save or ()), NAME]
    config.exclude_modules = rf".*{NAME}.*"  # no LoRA inside, whatever target_modules says
    return config
