"""GRC: draft, reflection and correction rewarded as one episode.   GRC, section 4.2

Differences from GRPO: 1. an answer is a trajectory (`recllm.trainers.trajectories`), sampled as it is decoded: draft
and correction down the trie, labels in parallel over their slots' own; 2. the reward has four parts
(`recllm.objectives.grc`), which TRL logs one by one and sums with the weights below; 3. advantages are those of the
returns' ranks, or, with `contrast: boundary`, ReCast's. Only signal, rollouts and rewards differ from GRPO.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from recllm.errors import UserError
from recllm.objectives.grc import first_divergence
from recllm.objectives.group import is_hit, rank_normalised
from recllm.objectives.recast import boundary_signal, structural_score
from recllm.trainers.base import RecGRPOTrainer
from recllm.trainers.groups import RolloutGroups, Signal
from recllm.trainers.grpo import whole_groups
from recllm.trainers.rl_config import RecGRPOConfig
from recllm.trainers.trajectories import Trajectories

PARTS = ("task", "loc", "sem", "delta")


@dataclass
class GRCSettings(RecGRPOConfig):
    """R = w_task (ℓ0 + β_last ℓ1) + β_cor (β_loc R_loc + β_sem R_sem + β_Δ R_Δ); a weight of 0 leaves a term out."""

    epsilon: float = field(default=0.15, metadata={"help": "ε of the clipped ratio."})
    beta: float = field(default=0.03, metadata={"help": "Of the KL term."})
    task_weight: float = field(default=1.0, metadata={"help": "Of R_task, hits of draft and correction (ours)."})
    beta_last: float = field(default=2.0, metadata={"help": "β_last, of the correction's hits within R_task."})
    beta_cor: float = field(default=2.2, metadata={"help": "β_cor, of all that rewards reflecting and correcting."})
    beta_loc: float = field(default=1.0, metadata={"help": "β_loc, of finding and putting right the first error."})
    beta_sem: float = field(default=0.8, metadata={"help": "β_sem, of judging and putting right the attributes."})
    beta_delta: float = field(default=1.0, metadata={"help": "Of R_Δ, hits gained by the correction (ours)."})
    contrast: Literal["rank", "boundary"] = field(
        default="rank", metadata={"help": "rank: of the returns in a group; boundary: ReCast's two answers of it."}
    )
    boundary_weight: float = field(default=1.0, metadata={"help": "λ of ReCast's hardest miss."})
    repair: bool = field(
        default=True, metadata={"help": "boundary: a group without a hit is given one, behind a draft of its own."}
    )

    def check(self) -> None:
        for name in ("task_weight", "beta_last", "beta_cor", "beta_loc", "beta_sem", "beta_delta", "boundary_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.contrast not in ("rank", "boundary"):
            raise UserError(f"contrast {self.contrast!r} is not one of rank, boundary")
        weights = ("task_weight", "beta_last", "beta_cor", "beta_loc", "beta_sem", "beta_delta")
        changed = [name for name in weights if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if changed and self.contrast == "boundary":
            raise UserError(
                f"{changed[0]} weighs a reward, and the boundary goes by hits and structural scores",
                fix="contrast: rank",
            )
        if self.boundary_weight != 1 and self.contrast != "boundary":
            raise UserError("boundary_weight is of the boundary alone", fix="contrast: boundary, or leave it out")
        if not any(self.weights_of_parts()):
            raise UserError("every part of the reward weighs 0: there is nothing to learn", fix="task_weight: 1")
        self.refuse(
            {
                "rewards": self.rewards != ["hit"],
                "reward_weights": self.reward_weights not in (None, self.weights_of_parts()),
                "reward_gate": self.reward_gate,
                "expected": self.expected,
                "use_vllm": self.use_vllm,
                "sampling": self.sampling != "samples",
                "reward_beta": self.reward_beta != 0.5,
                "reward_sasrec": self.reward_sasrec is not None,
                "repair": not self.repair and self.contrast == "rank",
                "refill_tries": bool(self.refill_tries) and self.contrast == "boundary",
            }
        )
        self.reward_weights = None
        super().check()
        self.reward_weights = self.weights_of_parts()

    def weights_of_parts(self) -> list[float]:
        """In the order of PARTS."""
        of_correcting = (self.beta_loc, self.beta_sem, self.beta_delta)
        return [float(self.task_weight), *(float(self.beta_cor * weight) for weight in of_correcting)]


class GRC(RecGRPOTrainer):
    """A = the rank of the return in its group, normalised; every token of a trajectory has it."""

    _tag_names: ClassVar = ["trl", "grpo", "grc", "recllm"]
    _name = "GRC"

    def build_signal(self, groups: RolloutGroups) -> Signal:
        self._log_reflection(groups)
        if self.args.contrast == "rank":
            return Signal(rank_normalised(groups.rewards), whole_groups(groups.trainable, groups))
        trajectories: Trajectories = groups.rollouts
        both = torch.stack([trajectories.drafts.view(groups.codes.shape), groups.codes], dim=2)  # (P, G, 2, L)
        scores = structural_score(both, groups.targets)
        found = boundary_signal(groups.hits.float(), scores, self.args.boundary_weight, self.args.repair)
        return Signal(found.advantages, found.active, found.replaced)

    def _log_reflection(self, groups: RolloutGroups) -> None:
        """How often the model is right about its draft, calls it right, and makes it better or worse."""
        trajectories: Trajectories = groups.rollouts
        drafts = trajectories.drafts.view(groups.codes.shape)
        labels = trajectories.labels.view(*groups.rewards.shape, -1)  # (P, G, K + 1)
        loc, right, said = first_divergence(drafts, groups.targets), is_hit(drafts, groups.targets), labels[..., 0]
        attributes = self.source.reflection.attributes
        rows, targets = self.source.rows_of(drafts, groups.targets)
        same = attributes.same(rows, targets.unsqueeze(1)).long()
        shares = {
            "acc_loc": said + 1 == loc, "kept": said == drafts.size(-1), "draft_hit": right,
            "put_right": ~right & groups.hits, "put_wrong": right & ~groups.hits,
        }  # fmt: skip
        shares |= {f"acc_{name}": labels[..., 1 + k] == same[..., k] for k, name in enumerate(attributes.names)}
        for name, share in shares.items():
            self.health.share(f"grc/{name}", share.sum(), share.numel())
