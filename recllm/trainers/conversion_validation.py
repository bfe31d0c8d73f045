"""Recall and NDCG of held-out conversions, each behind the prefix that the model selects for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Answers, Decoder
from recllm.decoding.decoder import without_dropout
from recllm.errors import UserError
from recllm.evaluation.validation import Validation, of_lists
from recllm.event_prompts import EventWriter
from recllm.mixtures.conversion_cases import ConversionEvents, cases, histories_of
from recllm.models.prefix_module import PrefixModule, PrefixSettings
from recllm.prompting import PromptStyle
from recllm.trainers.prefixed import ConversionCollator, answer_of, embedded, encoded, module_of, selected

NO_MODULE = PrefixModule(PrefixSettings(selection="none"), 1)  # of stage 1
AT_ONCE = 64  # prompts whose prefixes are selected together


@dataclass(frozen=True, eq=False)
class ConversionValidation(Validation):
    """`rows`: of `prefixed.COLUMNS`, one for each prompt; `opening`: the target behaviour's token."""

    rows: Sequence[Mapping[str, Any]]
    opening: int

    @classmethod
    def of_events(
        cls, catalogue: Catalogue, checkpoint: Checkpoint, style: PromptStyle, users: int, beams: int
    ) -> "ConversionValidation":  # fmt: skip
        """Of a model that reads events of every behaviour: its conversions, without a prefix."""
        writer = EventWriter(style, checkpoint.table, checkpoint.tokenizer)
        opening = writer.opening(ConversionEvents(catalogue).target_behaviour)
        return cls.of_conversions(catalogue, checkpoint, writer, opening, users, beams)

    @classmethod
    def of_conversions(
        cls, catalogue: Catalogue, checkpoint: Checkpoint, writer: EventWriter, opening: int, users: int, beams: int
    ) -> "ConversionValidation":  # fmt: skip
        found = cases(catalogue, "valid", writer.style.max_history)
        if found.is_empty():
            raise UserError("there is no validation conversion to choose an epoch by", file=catalogue.folder)
        found = found.sample(min(users, len(found)), seed=0)  # the same users whatever the run's seed
        table, histories = checkpoint.table, histories_of(found)
        targets = torch.tensor([table.row_of[item] for item in found["item"].to_list()])
        rows = [
            {"prompt_ids": ids, "ends": ends, "rows": [table.row_of[item] for item, _ in history],
             "target": table.codes[target].tolist(), "user": user}
            for ids, ends, history, target, user in zip(
                writer.ids(histories), writer.ends(histories), histories, targets.tolist(), found["user"].to_list()
            )
        ]  # fmt: skip
        prompts = [row["prompt_ids"] for row in rows]
        return cls(checkpoint.tokens, prompts, targets, writer.prefix, min(beams, len(table)), rows, opening)

    def values(self, model: PreTrainedModel, share: slice = slice(None)) -> dict[str, Tensor]:
        found = self.beams_of(model, self.rows[share])
        return of_lists(found.rows, self.targets[share])

    def beams_of(self, model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> Answers:
        """Prompts extended by opening and prefix, and then beams as ever: each prompt is computed twice."""
        collator = ConversionCollator(self.tokens, self.opening, 0, module_of(model) or NO_MODULE)
        starts = starts_of(model, collator, rows)
        prompts = [[*row["prompt_ids"], *start] for row, start in zip(rows, starts)]
        return Decoder(model, self.tokens, prefix=self.prefix).beams(prompts, self.beams)


@torch.no_grad()
def starts_of(
    model: PreTrainedModel, collator: ConversionCollator, rows: Sequence[Mapping[str, Any]]
) -> list[list[int]]:  # fmt: skip
    """What an answer begins with, and is given: the opening token and the prefix selected."""
    model, starts = model.get_base_model() if hasattr(model, "get_base_model") else model, []
    with without_dropout(model):
        for first in range(0, len(rows), AT_ONCE):
            batch = {name: part.to(model.device) for name, part in collator(rows[first : first + AT_ONCE]).items()}
            chosen = batch.get("chosen")
            if chosen is None:
                _, hidden = encoded(model, batch)
                behaviour = embedded(model, batch["opening"][0])[0]
                chosen, _ = selected(module_of(model), hidden, batch, behaviour)
            answer = answer_of(batch["opening"], batch["items"], chosen, batch["target"])
            given = answer.present & ~answer.target
            starts += [ids[own].tolist() for ids, own in zip(answer.ids, given)]
    return starts
