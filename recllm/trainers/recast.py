"""ReCast: a group without a hit is given one, then its best answer is contrasted with its hardest miss.

Differences from GRPO: 1. the anchor of a repaired group, the truth in the prompt's own answer format, has old and
reference log-probabilities of its own; 2. two answers of G are active, so that the actor's work no longer grows with G;
3. `repair: adaptive` (ours) repairs less as the policy learns to make trainable groups by itself. Only the signal
differs from GRPO; the maths is in `recllm.objectives.recast`.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from recllm.decoding.decoder import generator_of
from recllm.errors import UserError
from recllm.objectives.group import group_normalised, has_signal
from recllm.objectives.recast import (
    adaptive_repair_probability,
    boundary_signal,
    repair_groups,
    structural_score,
)
from recllm.objectives.srpo import srpo_advantage
from recllm.trainers.base import RecGRPOTrainer
from recllm.trainers.expected import ExpectedGroups, boundary_of_expectations
from recllm.trainers.groups import RolloutGroups, Signal
from recllm.trainers.grpo import whole_groups
from recllm.trainers.rl_config import RecGRPOConfig

SLOWLY = 0.9  # of the running share, what is kept at each generation


@dataclass
class ReCastSettings(RecGRPOConfig):
    """Full ReCast by default; `repair: never` or `contrast: group` leave a half of it out."""

    repair: Literal["always", "never", "adaptive"] = field(
        default="always", metadata={"help": "adaptive: as likely as groups are not trainable by themselves (ours)."}
    )
    contrast: Literal["boundary", "group"] = field(
        default="boundary", metadata={"help": "boundary: best answer against hardest miss; group: GRPO's on all of G."}
    )
    boundary_weight: float = field(default=1.0, metadata={"help": "λ of the hardest miss."})
    boundary_advantages: Literal["unit", "srpo"] = field(
        default="unit", metadata={"help": "unit: 1 and -λ; srpo: what SRPO gives the two answers in their group."}
    )
    pass_k: int = field(default=4, metadata={"help": "k of SRPO's bonus, where boundary_advantages is srpo."})

    def check(self) -> None:
        super().check()
        if not 0 < self.boundary_weight < float("inf"):
            raise UserError(f"boundary_weight must be above 0 and finite, got {self.boundary_weight}")
        if self.boundary_advantages == "srpo" and not 1 <= self.pass_k <= self.num_generations:
            raise UserError(f"pass_k {self.pass_k} is not among 1 … {self.num_generations}, the answers of a group")
        if self.repair == "never" and self.contrast == "group":
            raise UserError("neither repair nor boundary is left of ReCast", fix="recipes/grpo.py")
        if self.expected and (self.contrast == "group" or self.boundary_advantages == "srpo"):
            raise UserError(
                "expected leaves nothing to repair, and contrasts chains by 1 and -λ",
                fix="contrast: boundary and boundary_advantages: unit, or recipes/grpo.py and recipes/srpo.py",
            )
        if not self.expected and (self.rewards != ["hit"] or self.reward_weights):
            raise UserError(
                f"rewards {', '.join(self.rewards)}: ReCast's is the hit, and a structural score orders the misses",
                fix="leave rewards and reward_weights out; boundary_advantages: srpo weighs by the prefix",
            )
        if self.boundary_weight != 1 and (self.contrast == "group" or self.boundary_advantages == "srpo"):
            raise UserError("boundary_weight is of the unit boundary alone", fix="leave it out")
        if self.refill_tries:
            raise UserError("refill_tries replaces the groups that ReCast repairs", fix="refill_tries: 0")


class ReCast(RecGRPOTrainer):
    """Advantages 1 and −λ for two answers, or GRPO's over the repaired group."""

    _tag_names: ClassVar = ["trl", "recast", "recllm"]
    _name = "ReCast"

    def build_signal(self, groups: RolloutGroups) -> Signal:
        if isinstance(groups, ExpectedGroups):  # nothing is to be repaired
            advantages, active = boundary_of_expectations(groups, self.args.boundary_weight)
            return Signal(advantages, active, of_target=groups.weights.float())
        hits = self.right(groups).float()
        scores = structural_score(groups.codes.unsqueeze(2), groups.targets)
        repair = self.to_repair(groups)
        if self.args.contrast == "group":
            repaired = repair_groups(hits, scores, repair)
            found = Signal(
                group_normalised(repaired.rewards), whole_groups(has_signal(repaired.rewards), groups),
                repaired.replaced,
            )  # fmt: skip
        else:
            signal = boundary_signal(hits, scores, self.args.boundary_weight, repair)
            advantages = signal.advantages
            if self.args.boundary_advantages == "srpo":
                advantages = self.srpo(groups, signal.replaced) * signal.active
            found = Signal(advantages, signal.active, signal.replaced)
        self.health.share("recast/repaired", (found.replaced >= 0).sum(), len(hits))
        return found

    def right(self, groups: RolloutGroups) -> Tensor:
        """Hits, but for those that the gate took their reward from. (P, G) bool"""
        return groups.hits & (groups.rewards > 0)

    def to_repair(self, groups: RolloutGroups) -> Tensor:
        """Of the groups without a hit, which are given one. (P,) bool"""
        right = self.right(groups)
        natural = right.any(dim=1) & ~right.all(dim=1)
        if self.args.repair != "adaptive":
            return torch.full_like(natural, self.args.repair == "always")
        chance = adaptive_repair_probability(self.running.get("trainable_share", 0.0))
        share = self.accelerator.reduce(natural.float().mean().to(self.accelerator.device), "mean").item()
        before = self.running.get("trainable_share", share)
        self.running["trainable_share"] = SLOWLY * before + (1 - SLOWLY) * share
        draws = [torch.rand((), generator=generator_of(self.args.seed, key, "repair")).item() for key in groups.keys]
        return torch.tensor(draws) < chance

    def srpo(self, groups: RolloutGroups, replaced: Tensor) -> Tensor:
        """SRPO's advantages with the anchors in their places. (P, G)"""
        anchor = torch.arange(groups.codes.size(1)) == replaced.unsqueeze(1)  # (P, G)
        codes = torch.where(anchor.unsqueeze(-1), groups.targets.unsqueeze(1), groups.codes)
        return srpo_advantage(codes, groups.targets, self.args.pass_k, self.args.reward_beta)
