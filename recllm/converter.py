"""A checkpoint that is asked what a user buys: histories of events in, items out, and the events that led to them.

A model of recipes/rclrec.py chooses some of the history's events, whose items stand between the opening and the answer.
One that was trained on events alone is asked with the opening alone, of any behaviour that it knows.
"""

import dataclasses
from collections.abc import Sequence
from math import isnan

import torch
from torch import Tensor

from recllm.checkpoint import CONVERSION, Checkpoint
from recllm.decoding import Decoder, Normaliser, common_prefix
from recllm.decoding.prefixed import Choice, Choose, History, Prefixed, PrefixedDecoder, Shown
from recllm.errors import UserError
from recllm.event_prompts import Event, EventWriter
from recllm.models.prefix_module import PrefixModule, PrefixSettings


@dataclasses.dataclass(frozen=True, eq=False)
class Converter:
    checkpoint: Checkpoint
    writer: EventWriter
    decoder: Decoder
    settings: PrefixSettings
    module: PrefixModule | None

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, target_behaviour: str | None = None, normaliser: Normaliser = "level",
        batch_size: int | None = None,
    ) -> "Converter":  # fmt: skip
        """Refuses a model that knows no behaviours, or was trained for another. None: the one it was trained for."""
        if CONVERSION in checkpoint.report:
            found = checkpoint.conversion
            style, settings, module = found.style, found.settings, found.module
            if target_behaviour not in (None, settings.target_behaviour):
                raise UserError(
                    f"the model was trained for {settings.target_behaviour!r}, not {target_behaviour!r}",
                    file=checkpoint.name, fix=f"--target_behaviour {settings.target_behaviour}",
                )  # fmt: skip
        else:
            style, module = checkpoint.style, None
            if style.events and target_behaviour is None:
                problem = "the model was trained on every behaviour, and which is asked for is not said"
                raise UserError(problem, file=checkpoint.name, fix="--target_behaviour pay, say")
            settings = PrefixSettings(selection="none", target_behaviour=target_behaviour or "pay")
        writer = EventWriter(style, checkpoint.table, checkpoint.tokenizer)
        writer.opening(settings.target_behaviour)
        some = checkpoint.table.items[0], settings.target_behaviour
        decoder = Decoder(
            checkpoint.model, checkpoint.tokens, normaliser=normaliser, batch_size=batch_size,
            prefix=common_prefix(writer.ids([[], [some]])),  # behind it, a prompt without events too has a token
        )  # fmt: skip
        return cls(checkpoint, writer, decoder, settings, module)

    def beams(
        self, histories: Sequence[Sequence[Event]], width: int, users: Sequence[str | None] | None = None,
        allowed: Tensor | None = None, exclude: Sequence[Sequence[int]] | None = None,
    ) -> Prefixed:  # fmt: skip
        """The `width` best items after each history, and which events of `shown(history)` stood before them.

        `users`: their names, for what the module knows of them; None: of nobody.
        """
        prompts = self.writer.ids(histories)
        ends, row_of = self.writer.ends(histories), self.checkpoint.table.row_of
        events = [self.shown(history) for history in histories]
        shown = [Shown(places, [row_of[item] for item, _ in some]) for places, some in zip(ends, events)]
        opening = self.writer.opening(self.settings.target_behaviour)
        choose = self._choose(events, users or [None] * len(prompts), opening) if self.module else None
        decoder = PrefixedDecoder(self.decoder, opening, choose, self.settings.k)
        return decoder.beams(prompts, shown, width, allowed, exclude)

    def shown(self, history: Sequence[Event]) -> list[Event]:
        """The events that a prompt has room for, oldest first."""
        return [(item, behaviour) for item, behaviour in history[-self.writer.style.max_history :]]

    def evidence(self, history: Sequence[Event], found: Prefixed, case: int) -> list[tuple[Event, float | None]]:
        """The events that stood before the answers of one of the histories, least relevant first; their relevance."""
        shown, relevance = self.shown(history), found.relevance[case].tolist()
        return [
            (shown[event], None if isnan(score) else score)
            for event, score in zip(found.events[case].tolist(), relevance)
            if event >= 0
        ]

    def _choose(self, events: Sequence[Sequence[Event]], users: Sequence[str | None], opening: int) -> Choose:
        model = self.checkpoint.model
        behaviour = model.get_input_embeddings()(torch.tensor([opening], device=model.device))[0].detach()
        rows, row_of = self.module.user_rows(users), self.checkpoint.table.row_of

        def choose(history: History) -> Choice:
            own = rows[list(history.places)].to(history.last.device)
            asked = history.states, history.mask, history.last, behaviour, own
            keys = [tuple(row_of[item] for item, _ in events[place]) for place in history.places]  # as in training
            relevance = self.module.relevance(*asked) if self.settings.selection == "learned" else None
            return Choice(self.module.choose(*asked, keys), relevance)

        return choose
