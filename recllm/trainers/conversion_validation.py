"""Recall and NDCG of held-out conversions, each behind the prefix that the model selects for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Answers, Decoder, common_prefix
from recllm.decoding.prefixed import Choice, History, PrefixedDecoder, Shown
from recllm.errors import UserError
from recllm.evaluation.validation import Validation, of_lists
from recllm.event_prompts import EventWriter
from recllm.mixtures.conversion_cases import ConversionEvents, cases, histories_of
from recllm.models.prefix_module import PrefixModule, PrefixSettings
from recllm.prompting import PromptStyle
from recllm.trainers.prefixed import embedded, module_of

NO_MODULE = PrefixModule(PrefixSettings(selection="none"), 1)  # of stage 1


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
        prefix = common_prefix([*writer.ids([[]]), *prompts])  # behind it, a prompt without events too has a token
        return cls(checkpoint.tokens, prompts, targets, prefix, min(beams, len(table)), rows, opening)

    def values(self, model: PreTrainedModel, share: slice = slice(None)) -> dict[str, Tensor]:
        found = self.beams_of(model, self.rows[share])
        return of_lists(found.rows, self.targets[share])

    def beams_of(self, model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> Answers:
        """As they will be served, by the module as it is now."""
        module = module_of(model) or NO_MODULE

        def choose(history: History) -> Choice:
            own, device = [rows[place] for place in history.places], history.last.device
            users = module.user_rows([row["user"] for row in own]).to(device)
            behaviour = embedded(model, torch.tensor([self.opening], device=device))[0]
            keys = [tuple(row["rows"]) for row in own]
            return Choice(module.choose(history.states, history.mask, history.last, behaviour, users, keys))

        decoder = Decoder(model, self.tokens, prefix=self.prefix)
        prefixed = PrefixedDecoder(
            decoder, self.opening, None if module.settings.selection == "none" else choose, module.settings.k
        )
        shown = [Shown(row["ends"], row["rows"]) for row in rows]
        with torch.no_grad():
            return prefixed.beams([row["prompt_ids"] for row in rows], shown, self.beams).found
