"""The exact expectation: what a group of answers estimates, maximised in closed form from one pass over the target.

    loss = −( prefix_weight · E[r] + hit_weight · P_H + success_weight · success@k + log_weight · log P_H )
           + kl_weight · KL

means over the targets. With `normalise: std` the gradient of each expectation is divided by its std, which is what
normalising by a group's std does as G → ∞; the value of the loss stays that of the line above. Ours; the maths is in
`recllm.objectives.exact`. Differences from supervised training:

1. The target's log-probability is weighted, by what the model gives it: hit over std by sqrt(P / (1 − P)), success@k by
   k (1 − P)^(k−1) P, where supervised training's weight is 1 whatever P (`recllm.objectives.curves`).
2. Only the target's codes are predicted, normalised as rollouts are (`normaliser`), and no end token.
3. The KL term holds the model to the checkpoint that training begins with. It is the sum over levels of the KL between
   the two distributions over the level's codes, after the target's own codes before it: exact at level 1, along the
   target's path below. With normaliser `full` it is between the codes of the level alone.

The defaults are what held Recall@10 on the shop's validation users: expected hits over their std with a KL of 0.1.
The expected prefix reward alone lowers it while it rises itself.

Differences from GRPO: no answer is drawn, so that the gradient has no variance of its own.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl.trainer.utils import disable_dropout_in_model, use_adapter

from recllm.actor import AnswerRows
from recllm.checkpoint import Checkpoint
from recllm.decoding import Normaliser
from recllm.errors import UserError
from recllm.evaluation.validation import Validation
from recllm.objectives.exact import (
    expected_prefix_reward,
    expected_success,
    prefix_reward_std,
    prefix_token_weights,
)
from recllm.trainers.batches import Batch, rows_of
from recllm.trainers.paths import LevelLogps, PathCollator, PathScorer, PathScores, path_kl
from recllm.trainers.prompt_trainer import PromptConfig, PromptTrainer
from recllm.trie import SemanticIdTrie

WEIGHTS = ("prefix_weight", "hit_weight", "success_weight", "log_weight", "kl_weight")


@dataclass
class ExactConfig(PromptConfig):
    """The Trainer's settings, and what is maximised."""

    EVALUATE = "steps"

    prefix_weight: float = field(default=0.0, metadata={"help": "Of E[r], the expected prefix reward (ℓ / L)^β."})
    hit_weight: float = field(default=1.0, metadata={"help": "Of P_H, the probability of the target."})
    success_weight: float = field(default=0.0, metadata={"help": "Of success@k, that one of k answers is the target."})
    log_weight: float = field(
        default=0.0, metadata={"help": "Of log P_H: supervised training's own objective, to compare with."}
    )
    kl_weight: float = field(
        default=0.1, metadata={"help": "Of the KL to the checkpoint that training begins with. 0 needs no copy of it."}
    )
    normalise: Literal["std", "none"] = field(
        default="std", metadata={"help": "std: each expectation over its standard deviation, as groups do as G → ∞."}
    )
    pass_k: int = field(default=64, metadata={"help": "k of success@k."})
    reward_beta: float = field(default=0.5, metadata={"help": "β of the prefix reward (ℓ / L)^β."})
    temperature: float = field(default=1.0, metadata={"help": "Of the distribution whose expectation is taken."})
    normaliser: Normaliser = field(
        default="children", metadata={"help": "What a code's probability is normalised over: as in decoding."}
    )

    def check(self) -> None:
        for name in (*WEIGHTS, "reward_beta", "temperature"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be below 0, got {getattr(self, name)}")
        if not any(getattr(self, name) for name in WEIGHTS[:-1]):
            raise UserError(
                "the weights of prefix, hit, success and log are all 0: there is nothing to learn",
                fix="hit_weight: 1",
            )
        for name, known in (("normalise", ("std", "none")), ("normaliser", get_args(Normaliser))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not self.reward_beta or not self.temperature:
            raise UserError(f"reward_beta {self.reward_beta} and temperature {self.temperature} must be above 0")
        if not isinstance(self.pass_k, int) or self.pass_k < 1:
            raise UserError(f"pass_k must be a whole number from 1, got {self.pass_k!r}")
        super().check()


# ---- the maths of a batch


class Expectation(NamedTuple):
    """Of one reward. Held fixed: the gradient is written with its `weights`, ∇mean = Σ_j weights_j ∇log p_j."""

    mean: Tensor  # (P,)
    std: Tensor  # (P,)
    weights: Tensor  # (P, L)

    def over_std(self) -> Tensor:
        """weights / std; 0 where nothing varies, as for a certain target. (P, L)"""
        varies = (self.std > 0).unsqueeze(1)
        return torch.where(varies, self.weights / torch.where(varies, self.std.unsqueeze(1), 1.0), 0.0)


@torch.no_grad()
def expectations(path_logps: Tensor, lengths: Tensor, k: int, beta: float) -> dict[str, Expectation]:
    """Of the prefix reward, of a hit, and of a hit among k answers, in float64.   (P, L), (P,)

    With P = P_H and S = 1 − (1 − P)^k: Var[hit] = P (1 − P) and ∇P = P ∇log P; Var[success] = S (1 − P)^k and
    ∇S = k (1 − P)^(k−1) P ∇log P. Written out, as differentiating a sum of powers leaves rounding, and over a std of
    (1 − P)^(k/2) that would be all there is.
    """
    logps = path_logps.double()
    own = torch.arange(logps.size(1), device=logps.device) < lengths.unsqueeze(1)  # (P, L)
    whole = logps.masked_fill(~own, 0.0).sum(dim=1).clamp(max=0)
    hit, miss, success = whole.exp(), -whole.expm1(), expected_success(logps, k, lengths)

    def at_each_code(slope: Tensor) -> Tensor:
        return slope.unsqueeze(1) * own

    return {
        "prefix": Expectation(
            expected_prefix_reward(logps, beta, lengths), prefix_reward_std(logps, beta, lengths),
            prefix_token_weights(logps, beta, lengths),
        ),
        "hit": Expectation(hit, (hit * miss).sqrt(), at_each_code(hit)),
        "success": Expectation(
            success, (success * miss**k).sqrt(), at_each_code(k * miss ** (k - 1) * hit)
        ),
        "log": Expectation(whole, torch.ones_like(whole), at_each_code(torch.ones_like(whole))),
    }  # fmt: skip


def with_gradient(value: Tensor, weights: Tensor, path_logps: Tensor) -> Tensor:
    """The mean of `value`, whose gradient is that of mean Σ_j weights_j log p_j.   (P,), (P, L), (P, L) -> ()"""
    pull = (weights.to(path_logps.dtype) * path_logps).sum(dim=1).mean()
    return value.to(path_logps.dtype).mean() + (pull - pull.detach())


# ---- the trainer


class ExactTrainer(PromptTrainer):
    """Only the loss differs from its base."""

    _tag_names: ClassVar = ["trl", "exact", "recllm"]
    _name = "Exact"

    def __init__(
        self, checkpoint: Checkpoint, args: ExactConfig, prompts: Dataset, validation: Validation | None = None,
        peft_config: LoraConfig | None = None, callbacks=None,
    ):  # fmt: skip
        model = checkpoint.model
        self.scorer = PathScorer(
            model, checkpoint.tokens, SemanticIdTrie.from_codes(checkpoint.table.codes, checkpoint.table.sizes),
            normaliser=args.normaliser, temperature=args.temperature, distributions=bool(args.kl_weight),
        )  # fmt: skip
        self.reference = None
        if args.kl_weight and peft_config is None:
            self.reference = copy.deepcopy(model).requires_grad_(False).eval().to(args.device)
            self.scorer.install(self.reference)
        self.scorer.install(model)
        collator = PathCollator(checkpoint.tokens, checkpoint.tokenizer.pad_token_id)
        super().__init__(
            checkpoint, args, prompts, ("prompt_ids", "target"), collator, validation, peft_config, callbacks
        )  # fmt: skip
        if peft_config is not None:
            disable_dropout_in_model(self.model)  # LoRA's would give the exact gradient a variance

    def compute_loss(self, model, inputs: Batch, return_outputs=False, num_items_in_batch=None) -> Tensor:
        args, rows = self.args, rows_of(inputs)
        scores: PathScores = model(answer_rows=rows)
        self.health.amount("actor/tokens", self.scorer.tokens_run)
        lengths = inputs["completion_mask"].sum(dim=1)
        found = expectations(scores.logps, lengths, args.pass_k, args.reward_beta)
        reward, pull = torch.zeros_like(found["hit"].mean), torch.zeros_like(found["hit"].weights)
        for name, one in found.items():
            weight = getattr(args, f"{name}_weight")
            reward += weight * one.mean
            pull += weight * (one.over_std() if args.normalise == "std" else one.weights)
        loss = -with_gradient(reward, pull, scores.logps)
        if args.kl_weight:
            kl = path_kl(scores.levels, self._reference_levels(rows), len(lengths))
            loss = loss + args.kl_weight * kl.mean()
            self.health.share("kl", kl.detach().sum(), len(kl))
        self._log_figures(found, reward, scores.entropies.detach(), lengths)
        return loss

    @torch.no_grad()
    def _reference_levels(self, rows: AnswerRows) -> list[LevelLogps]:
        """Of the checkpoint that training began with: a copy, or the model without its adapter."""
        with self.health.phase("reference"), self.accelerator.autocast():
            if self.reference is not None:
                return self.reference(answer_rows=rows).levels
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name=None):
                return model(answer_rows=rows).levels

    def _log_figures(
        self, found: Mapping[str, Expectation], reward: Tensor, entropies: Tensor, lengths: Tensor
    ) -> None:  # fmt: skip
        """In the names that other methods log the same under."""
        means = {"reward": reward, "success": found["success"].mean}
        means |= {f"rewards/{name}/mean": found[name].mean for name in ("prefix", "hit")}
        for name, values in means.items():
            self.health.share(name, values.sum(), len(lengths))
        self.health.share("entropy", entropies.sum(), lengths.sum())
