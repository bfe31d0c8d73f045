"""Settings of reinforcement learning: TRL's GRPOConfig, and those of rollouts, rewards and log-probabilities."""

import os
from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig

from recllm.decoding import Normaliser
from recllm.errors import UserError
from recllm.rewards import REWARDS
from recllm.trainers.config import RecConfig
from recllm.trainers.expected import EXPECTED

LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")


@dataclass
class RecGRPOConfig(RecConfig, GRPOConfig):
    """TRL's settings; what differs from its defaults stands here."""

    EVALUATE = "steps"

    loss_type: str = field(default="grpo", metadata={"help": "TRL's losses; the papers use grpo, a mean over answers."})
    temperature: float = field(default=1.0, metadata={"help": "Of rollouts and of the log-probabilities in the loss."})
    max_completion_length: int = field(default=512, metadata={"help": "Tokens of a chain of thought at most."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "LoRA's too: with dropout an unmoved policy differs from itself."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the health log."})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations. A prompt computed once saves more where it applies."},
    )
    rewards: list[str] = field(
        default_factory=lambda: ["hit"],
        metadata={"help": f"Some of {', '.join(REWARDS)}; their weights are reward_weights."},
    )
    reward_beta: float = field(default=0.5, metadata={"help": "β of the prefix reward (ℓ / L)^β."})
    reward_gate: bool = field(
        default=False, metadata={"help": "An answer without its form (a chain that does not parse) gets 0 from each."}
    )
    expected: bool = field(
        default=False,
        metadata={"help": "After a chain, hit and prefix are their expectations over all items (mode: reason, joint)."},
    )
    reward_sasrec: str | None = field(default=None, metadata={"help": "Checkpoint of the collaborative reward."})
    sampling: Literal["samples", "distinct", "beams"] = field(
        default="samples",
        metadata={"help": "Direct answers: drawn with replacement, without, or the best by beam search."},
    )
    normaliser: Normaliser = field(
        default="children",
        metadata={"help": "What a code's probability is normalised over in the loss: children is what was drawn from."},
    )
    layout: Literal["auto", "row", "cache", "padded"] = field(
        default="auto", metadata={"help": "How answers share their prompt's computation; auto goes by cost."}
    )
    refill_tries: int = field(
        default=0, metadata={"help": "How often groups without a signal are replaced by other prompts' in a step."}
    )
    keep_zero_signal: bool = field(
        default=False, metadata={"help": "Groups without a signal stay in the update, for their KL term."}
    )

    def check(self) -> None:
        names = ["num_generations", "per_device_train_batch_size", "num_iterations", "gradient_accumulation_steps"]
        names += [name for name in ("steps_per_generation", "generation_batch_size") if getattr(self, name) is not None]
        for name in names:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name} must be a whole number from 1, got {getattr(self, name)!r}")
        self.check_counts("refill_tries")
        if self.num_generations < 2:
            raise UserError("num_generations must be at least 2: a group is compared with itself", fix="8 or 16")
        self.check_batch()
        self.per_device_eval_batch_size = self.num_generations  # TRL wants a group; our evaluation decodes instead
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature {self.temperature} must be above 0, top_p {self.top_p} in (0, 1]")
        if not self.beta >= 0:
            raise UserError(f"beta, the weight of the KL term, must be at least 0, got {self.beta}")
        for name, known in (("loss_type", LOSSES), ("importance_sampling_level", LEVELS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.reward_beta <= 0:
            raise UserError(f"reward_beta must be above 0, got {self.reward_beta}")
        if {"dcg", "rank"} & set(self.rewards) and self.sampling != "beams":
            raise UserError("dcg and rank look at the places of beams", fix="sampling: beams, or rewards: [hit]")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise UserError(
                f"{len(self.reward_weights)} reward_weights for {len(self.rewards)} rewards", fix="one weight a reward"
            )
        if self.expected and not set(self.rewards) & set(EXPECTED):
            raise UserError(
                f"expected needs one of the rewards {', '.join(EXPECTED)}, whose expectation is known",
                fix="rewards: [hit], or expected: false",
            )
        if self.scale_rewards not in ("group", True):
            raise UserError(
                f"scale_rewards = {self.scale_rewards!r}: the signal is the method's own here", fix="leave it out"
            )
        self.refuse(
            {
                "multi_objective_aggregation": self.multi_objective_aggregation != "sum_then_normalize",
                "mask_truncated_completions": self.mask_truncated_completions,  # an answer has no end token here
                "vllm_structured_outputs_regex": self.vllm_structured_outputs_regex is not None,
                "generation_kwargs": bool(self.generation_kwargs),
                "sync_ref_model": self.sync_ref_model,  # a reference that moves is not saved with the steps
                "remove_unused_columns": bool(self.remove_unused_columns),  # rewards need them
                "top_k": self.top_k not in (0, None),
                "min_p": self.min_p is not None,
                "repetition_penalty": self.repetition_penalty != 1.0,
                "cache_implementation": self.cache_implementation is not None,
                "use_transformers_continuous_batching": self.use_transformers_continuous_batching,
                "num_generations_eval": self.num_generations_eval is not None,
                "cast_lm_head_to_fp32": self.cast_lm_head_to_fp32,
                "router_aux_loss_coef": bool(self.router_aux_loss_coef),
                "eval_on_start": self.eval_on_start and not self.validation_users,
            }
        )

    def check_batch(self) -> None:
        """A group lies whole on one process, so its answers must fit into a process' share of a generation."""
        each, answers = self.per_device_train_batch_size, self.num_generations
        if self.generation_batch_size is not None:
            share = self.generation_batch_size // int(os.environ.get("WORLD_SIZE", "1"))  # self.world_size comes later
        else:
            share = each * (self.steps_per_generation or self.gradient_accumulation_steps)
        if share % answers:
            raise UserError(
                f"num_generations {answers} does not divide the {share} answers that a process generates at a time",
                fix=f"per_device_train_batch_size x steps_per_generation a multiple of {answers}",
            )
