"""Recall and NDCG of constrained beams on fixed validation users, in place of a loss: what chooses an epoch.

A model that reflects is judged by what it makes of its beams.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm import metrics
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.decoding.reflecting import Reflector
from recllm.errors import UserError
from recllm.objectives.grc import first_divergence
from recllm.prompting import PromptStyle
from recllm.reflection import Reflection
from recllm.tokenization import ItemTokens


@dataclass(frozen=True, eq=False)
class Validation:
    """Figures of a model on fixed validation users."""

    tokens: ItemTokens
    prompts: list[list[int]]
    targets: Tensor  # (P,) rows of the table
    prefix: tuple[int, ...]
    beams: int

    @classmethod
    def of(
        cls, catalogue: Catalogue, checkpoint: Checkpoint, style: PromptStyle, users: int, beams: int
    ) -> "Validation":
        cases = catalogue.targets("valid", style.max_history)
        if cases.is_empty():
            raise UserError("there is no validation target to choose an epoch by", file=catalogue.folder)
        cases = cases.sample(min(users, len(cases)), seed=0)  # the same users whatever the run's seed
        table, writer = checkpoint.table, checkpoint.writer_of(style)
        targets = torch.tensor([table.row_of[item] for item in cases["item"].to_list()])
        prompts = writer.ids(cases["history"].to_list())
        return cls(checkpoint.tokens, prompts, targets, writer.prefix, min(beams, len(table)))

    def values(self, model: PreTrainedModel, share: slice = slice(None)) -> dict[str, Tensor]:
        """Each figure of the users of `share`. (P,) each, at least 0"""
        found = Decoder(model, self.tokens, prefix=self.prefix).beams(self.prompts[share], self.beams)
        return of_lists(found.rows, self.targets[share])

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        return means(self.values(model))


@dataclass(frozen=True, eq=False)
class ReflectingValidation(Validation):
    """The same figures of the corrected lists, and how often the place of the first error is said right."""

    reflection: Reflection
    entropy_weight: float = 0.2
    skip: bool = True

    @classmethod
    def of(
        cls, catalogue: Catalogue, checkpoint: Checkpoint, style: PromptStyle, users: int, beams: int,
        reflection: Reflection | None = None, entropy_weight: float = 0.2, skip: bool = True,
    ) -> "ReflectingValidation":  # fmt: skip
        """`reflection`: of a model that is yet to be taught; None: the checkpoint's own."""
        direct = Validation.of(catalogue, checkpoint, style, users, beams)
        return cls(
            **vars(direct), reflection=reflection or checkpoint.reflection, entropy_weight=entropy_weight, skip=skip
        )

    def values(self, model: PreTrainedModel, share: slice = slice(None)) -> dict[str, Tensor]:
        decoder = Decoder(model, self.tokens, prefix=self.prefix)
        found = Reflector(decoder, self.reflection.tokens).scheduled(
            self.prompts[share], self.beams, entropy_weight=self.entropy_weight, skip=self.skip
        )
        targets = self.targets[share]
        values = of_lists(found.found.rows, targets)
        if not self.reflection.template.labels:
            return values
        codes = torch.tensor(self.tokens.table.codes).long()[targets]  # (P, L)
        said = found.labels[:, :10, 0] + 1 == first_divergence(found.drafts.codes[:, :10], codes)
        there = found.drafts.rows[:, :10] >= 0
        return values | {"acc_loc@10": (said & there).sum(1).double() / there.sum(1).clamp(min=1)}


def of_lists(rows: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """(P, B), (P,) -> (P,) each"""
    ranks = metrics.ranks(rows, targets)
    return {"recall@10": metrics.recall_at_k(ranks, 10), "ndcg@10": metrics.ndcg_at_k(ranks, 10)}


def means(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.mean()) for name, value in values.items()}


class EvaluatesByDecoding:
    """For a Trainer, before it in the bases: `evaluate` decodes. `validation` is set before training."""

    validation: Validation

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        found = {f"{metric_key_prefix}_{name}": value for name, value in self._decoded().items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _decoded(self) -> dict[str, float]:
        accelerator = self.accelerator
        model = accelerator.unwrap_model(self.model)
        count, index = accelerator.num_processes, accelerator.process_index
        if count == 1:
            return self.validation(model)
        found = {}
        for name, value in self.validation.values(model, slice(index, None, count)).items():
            padded = accelerator.pad_across_processes(value.to(accelerator.device), pad_index=-1)  # none is negative
            gathered = accelerator.gather(padded).cpu()
            found[name] = gathered[gathered >= 0]
        return means(found)
