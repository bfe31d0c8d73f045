"""GRPO with rollouts that stay inside the catalogue: the baseline of the other methods.

Only the signal differs from `RecGRPOTrainer`; the maths is in `recllm.objectives.group`.
"""

from dataclasses import dataclass
from typing import ClassVar

from recllm.trainers.base import RecGRPOTrainer
from recllm.trainers.groups import RolloutGroups, Signal
from recllm.trainers.rl_config import RecGRPOConfig


@dataclass
class GRPOSettings(RecGRPOConfig):
    """`rewards: [hit]` is what OpenOneRec's RL trains with."""


class RecGRPO(RecGRPOTrainer):
    """A = (r − mean) / std within each group; a group of equal rewards contributes nothing."""

    _tag_names: ClassVar = ["trl", "grpo", "recllm"]
    _name = "GRPO"

    def build_signal(self, groups: RolloutGroups) -> Signal:
        return Signal(groups.relative, whole_groups(groups.trainable, groups), of_target=groups.of_target)


def whole_groups(which, groups: RolloutGroups):
    """(P,) bool -> (P, G)"""
    return which.unsqueeze(1).expand(groups.rewards.shape).contiguous()
