"""SRPO: a reward for every right level, and an advantage calibrated by pass@k.   GREAM, section 4.4.

Differences from GRPO: 1. `rewards: [prefix]`, (ℓ / L)^β; 2. hits and misses get a second advantage, that of their share
in the group's pass@k; 3. groups of equal rewards are replaced by other prompts' (`refill_tries`); 4. the paper's
constants. Only the signal differs from GRPO; the maths is in `recllm.objectives.srpo`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from recllm.errors import UserError
from recllm.objectives.srpo import bonus_advantage
from recllm.trainers.base import RecGRPOTrainer
from recllm.trainers.expected import bonus_gain
from recllm.trainers.groups import RolloutGroups, Signal
from recllm.trainers.rl_config import RecGRPOConfig


@dataclass
class SRPOSettings(RecGRPOConfig):
    """The paper's constants, but for `pass_k`, which it leaves open."""

    learning_rate: float = field(default=4e-6, metadata={"help": "Of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    beta: float = field(default=0.001, metadata={"help": "Of the KL term to the checkpoint that training begins with."})
    num_generations: int = field(default=10, metadata={"help": "G, answers to a prompt."})
    per_device_train_batch_size: int = field(default=10, metadata={"help": "Answers in a batch of one process."})
    temperature: float = field(default=0.5, metadata={"help": "Of rollouts and of the log-probabilities in the loss."})
    rewards: list[str] = field(
        default_factory=lambda: ["prefix"], metadata={"help": "prefix is the paper's, (ℓ / L)^β."}
    )
    refill_tries: int = field(
        default=3, metadata={"help": "How often groups of equal rewards are replaced by other prompts' in a step."}
    )
    pass_k: int = field(default=4, metadata={"help": "k of the pass@k whose gain the bonus is; at most G."})

    def check(self) -> None:
        super().check()
        if not isinstance(self.pass_k, int) or not 1 <= self.pass_k <= self.num_generations:
            raise UserError(
                f"pass_k {self.pass_k} is not among 1 … {self.num_generations}, the answers of a group",
                fix="a smaller pass_k, or more num_generations",
            )


class SRPO(RecGRPOTrainer):
    """A = group_normalised(r) + bonus."""

    _tag_names: ClassVar = ["trl", "srpo", "gream", "recllm"]
    _name = "SRPO"

    def build_signal(self, groups: RolloutGroups) -> Signal:
        bonus = bonus_advantage(groups.hits.float(), self.args.pass_k)
        self.health.share("srpo/bonus_abs_mean", bonus.abs().sum(), bonus.numel())
        advantages = groups.relative + bonus
        # The bonus is zero where all hit or all miss, and rewards differ wherever some do: a group without a signal
        # has no bonus either.
        active = ((advantages != 0).any(dim=1) | groups.trainable).unsqueeze(1).expand_as(advantages)
        of_target = groups.of_target
        if of_target is not None:
            gain = bonus_gain(groups.hits.float(), self.args.pass_k).unsqueeze(2)  # (P, G, 1)
            of_target = of_target + (gain * groups.hit_weights).float()
        return Signal(advantages, active.contiguous(), of_target=of_target)
