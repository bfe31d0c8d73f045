"""Recall and NDCG of constrained beams on fixed validation users, in place of a loss: what chooses an epoch."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm import metrics
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.errors import UserError
from recllm.prompting import PromptStyle
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

    def ranks(self, model: PreTrainedModel, share: slice = slice(None)) -> Tensor:
        """Rank of the target for the users of `share`. (P,)"""
        found = Decoder(model, self.tokens, prefix=self.prefix).beams(self.prompts[share], self.beams)
        return metrics.ranks(found.rows, self.targets[share])

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        return figures(self.ranks(model))


def figures(ranks: Tensor) -> dict[str, float]:
    return {
        "recall@10": float(metrics.recall_at_k(ranks, 10).mean()),
        "ndcg@10": float(metrics.ndcg_at_k(ranks, 10).mean()),
    }


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
        ranks = self.validation.ranks(model, slice(index, None, count)).to(accelerator.device)
        ranks = accelerator.pad_across_processes(ranks, pad_index=-1)  # no rank is negative
        gathered = accelerator.gather(ranks).cpu()
        return figures(gathered[gathered >= 0])
