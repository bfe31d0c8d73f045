"""GRC's supervised stage: recommend as before, judge a draft, correct it.   GRC, section 4.1

    L = L_MLE(the next item) + λ_rc · L_rc(labels and correction, behind drafts of the pre-trained model)

One sequence carries both: behind a prompt stand the true item, as in pre-training, and the prompt's trajectories
(`recllm.reflection`), none of which sees another. A draft is what a trajectory is about, never a target: its codes are
read and not learnt. Differences from supervised training: 1. a prompt is computed once for its item and its
trajectories; 2. the order, mask and positions behind it are the template's. Each L is a mean over tokens, then over a
prompt's trajectories, then over prompts, so that a prompt with few drafts counts as much as one with many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from recllm.actor import AnswerRows, AnswerScorer
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import Validation
from recllm.reflection import Reflection
from recllm.tokenization import ItemTokens
from recllm.trainers.batches import Batch, padded
from recllm.trainers.prompt_trainer import PromptConfig, PromptTrainer
from recllm.trie import SemanticIdTrie

COLUMNS = ("prompt_ids", "target", "drafts", "loc", "same")
INITIAL, LABELS, ITEMS = "initial", "reflection", "correction"


@dataclass
class GRCSFTConfig(PromptConfig):
    """The Trainer's settings, and those of the template."""

    EVALUATE = "epoch"

    reflection_weight: float = field(default=1.2, metadata={"help": "λ_rc, of labels and correction."})
    reflection: bool = field(
        default=True, metadata={"help": "false: the ablation GC, a second item without labels between the two."}
    )
    reflection_layout: Literal["parallel", "causal"] = field(
        default="parallel",
        metadata={"help": "parallel: labels blind to one another, by a mask; causal: for engines without masks."},
    )

    def check(self) -> None:
        if not 0 < self.reflection_weight < float("inf"):
            raise UserError(f"reflection_weight, λ_rc, must be above 0 and finite, got {self.reflection_weight}")
        if self.reflection_layout not in ("parallel", "causal"):
            raise UserError(f"reflection_layout {self.reflection_layout!r} is not one of parallel, causal")
        super().check()


class TrajectoryCollator:
    """Prompts, targets, drafts and their labels → rows behind prompts, and what each token weighs in the loss."""

    def __init__(self, tokens: ItemTokens, reflection: Reflection, pad: int, weight: float):
        self.levels, self.reflection, self.pad, self.weight = tokens.levels, reflection, pad, weight
        template = reflection.template
        self.drafts, self.labels, self.items = (template.at(kind) for kind in ("draft", "label", "item"))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        prompts, answers, present, weights = [], [], [], []
        for row in rows:
            for ids, here, weight in (self._truth(row), *self._trajectories(row)):
                prompts.append(row["prompt_ids"])
                answers.append(ids)
                present.append(here)
                weights.append(weight / len(rows))
        return {
            "prompt_ids": padded(prompts, self.pad, left=True),
            "prompt_mask": padded([[1] * len(ids) for ids in prompts], 0, left=True),
            "completion_ids": torch.tensor(answers),
            "completion_mask": torch.stack(present),
            "weights": torch.stack(weights),
        }

    def _truth(self, row: Mapping[str, Any]) -> tuple[list[int], Tensor, Tensor]:
        """The next item where a draft would stand: a plain answer."""
        item = self._ids_of(row["target"])
        ids = self.reflection.tokens.ids(item, [0] * len(self.labels), item)
        present, weights = torch.zeros(len(ids), dtype=torch.int64), torch.zeros(len(ids))
        present[self.drafts], weights[self.drafts] = 1, 1 / len(self.drafts)
        return ids, present, weights

    def _trajectories(self, row: Mapping[str, Any]):
        item = self._ids_of(row["target"])
        for draft, loc, same in zip(row["drafts"], row["loc"], row["same"]):
            labels = [loc - 1, *(max(0, one) for one in same)] if self.labels else []
            ids = self.reflection.tokens.ids(self._ids_of(draft), labels, item)
            weights = torch.zeros(len(ids))
            weights[self.items] = 1.0
            if self.labels:
                weights[self.labels] = torch.tensor([1.0, *(float(one >= 0) for one in same)])
            yield ids, torch.ones(len(ids), dtype=torch.int64), self.weight * weights / weights.sum() / len(row["loc"])

    def _ids_of(self, codes: Sequence[int]) -> list[int]:
        return [int(self.levels[level][code]) for level, code in enumerate(codes)]


class GRCSFTTrainer(PromptTrainer):
    """Only the loss differs from its base."""

    _tag_names: ClassVar = ["trl", "sft", "grc", "recllm"]
    _name = "GRC-SFT"

    def __init__(
        self, checkpoint: Checkpoint, args: GRCSFTConfig, prompts: Dataset, validation: Validation | None = None,
        peft_config: LoraConfig | None = None, callbacks=None,
    ):  # fmt: skip
        model, reflection = checkpoint.model, checkpoint.reflection
        self.form, self.template = reflection.template.form, reflection.template
        self.scorer = AnswerScorer(
            model, checkpoint.tokens, SemanticIdTrie.from_codes(checkpoint.table.codes, checkpoint.table.sizes),
            normaliser="full", labels=reflection.tokens.labels,  # as in pre-training
        )  # fmt: skip
        self.scorer.install(model)
        collator = TrajectoryCollator(
            checkpoint.tokens, reflection, checkpoint.tokenizer.pad_token_id, args.reflection_weight
        )
        super().__init__(checkpoint, args, prompts, COLUMNS, collator, validation, peft_config, callbacks)

    def compute_loss(self, model, inputs: Batch, return_outputs=False, num_items_in_batch=None) -> Tensor:
        weights = inputs["weights"]
        starts = torch.full((len(weights),), weights.size(1))
        rows = AnswerRows(
            *(inputs[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), starts,
            form=self.form, scored=(weights > 0).long(),
        )  # fmt: skip
        logps, _ = model(answer_rows=rows)
        self.health.amount("actor/tokens", self.scorer.tokens_run)
        self._log_parts(-logps.detach(), weights > 0, inputs["completion_mask"])
        return -(weights * logps).sum()

    def _log_parts(self, nll: Tensor, learnt: Tensor, present: Tensor) -> None:
        """Negative log-likelihood a token: of the next item, of labels, of corrections."""
        whole = present.bool().all(dim=1, keepdim=True)  # (R, 1): a trajectory
        for name, kind, of in ((INITIAL, "draft", ~whole), (LABELS, "label", whole), (ITEMS, "item", whole)):
            mask = torch.zeros_like(learnt)
            mask[:, self.template.at(kind)] = True
            mask &= learnt & of
            self.health.share(f"grc/{name}_nll", nll[mask].sum(), mask.sum())
