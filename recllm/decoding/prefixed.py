"""Beams behind a prefix that the model chooses from the history itself: select, prefix, search.   RCLRec, section 2

    A user's events: <|click|><|a_3|><|b_7|> … <|cart|><|a_9|><|b_0|>   <|pay|><|a_3|><|b_7|>  <|a_…|><|b_…|>
                     the prompt                                         opening, prefix        the answer

The prompt is computed once: its states decide which K of its events are put before the answer, and opening and prefix
are then fed in one pass as the end of the prompt, behind which all is plain beam search. Beside plain beams after
prompt and opening, that is a pass of at most 1 + K·L tokens a prompt in place of one of 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recllm.decoding.body import plain_attention
from recllm.decoding.branches import Branches
from recllm.decoding.decoder import Answers, Behind, Decoder, Prompts
from recllm.decoding.search import NONE, Walk, beams
from recllm.errors import UserError
from recllm.objectives.rclrec import ABSENT


class History(NamedTuple):
    """The events of a batch of prompts as the model has read them."""

    states: Tensor  # (P, J, D) at the last code of each event, oldest first
    mask: Tensor  # (P, J) bool, which events there are; they stand at the left
    last: Tensor  # (P, D) at the prompt's last token
    places: Sequence[int]  # of these prompts among those that were asked about


class Choice(NamedTuple):
    """K events of each prompt, least relevant first; rows of fewer begin with -1."""

    events: Tensor  # (P, K) int64
    relevance: Tensor | None = None  # (P, J) of every event, where it was that which chose


Choose = Callable[[History], Choice]


@dataclass(frozen=True)
class Shown:
    """The events that a prompt shows, oldest first."""

    ends: Sequence[int]  # the place in the prompt of each event's last code
    rows: Sequence[int]  # of its item in the table


@dataclass(frozen=True)
class Prefixed:
    """`found` is scored after the prefix: log-probabilities of the answers' codes alone."""

    found: Answers
    events: Tensor  # (P, K) which events stand before the answer, least relevant first; -1 before fewer
    relevance: Tensor  # (P, K) of each of them; nan where nothing was measured


@dataclass(frozen=True, eq=False)
class PrefixedDecoder:
    """Without `choose` the opening alone stands between a prompt and its answer."""

    decoder: Decoder
    opening: int  # the token that opens an answer
    choose: Choose | None = None
    k: int = 0  # how many events it chooses

    def beams(
        self, prompts: Prompts, shown: Sequence[Shown], width: int, allowed: Tensor | None = None,
        exclude: Sequence[Sequence[int]] | None = None,
    ) -> Prefixed:  # fmt: skip
        """The `width` best items of each prompt. Filters, batches and memory are the decoder's."""
        if width < 1:
            raise UserError(f"at least one answer a prompt is needed, got {width}")
        self._check(shown)
        k = self.k if self.choose else 0
        events, relevance = torch.full((len(prompts), k), ABSENT), torch.full((len(prompts), k), torch.nan)
        leaves, scores = torch.full((len(prompts), width), -1), torch.full((len(prompts), width), NONE)
        at_once = plain_attention(self.decoder.model)

        def work(walk: Walk, places: Sequence[int]) -> None:
            some = [shown[place] for place in places]
            if k:
                chosen = self._chosen(walk.branches, some, places)
                events[places], relevance[places] = chosen[0].cpu(), chosen[1].cpu()
            if at_once:
                walk.branches.extend(*self._block(some, events[places]))
                found = beams(walk, width)
                count = found.leaves.size(1)
                leaves[places, :count], scores[places, :count] = found.leaves.cpu(), found.scores.float().cpu()

        if at_once or k:
            ends = [some.ends for some in shown] if k else None
            self.decoder.walk(prompts, self._behind(width), work, allowed, exclude, ends)
        if at_once:
            return Prefixed(self.decoder.named(leaves, scores), events, relevance)
        # Shorter prefixes are filled up, and an attention window would count that: whole prompts, computed again.
        blocks = zip(*self._block(shown, events)) if prompts else ()
        longer = [[*prompt, *tokens[mask].tolist()] for prompt, (tokens, mask) in zip(prompts, blocks)]
        return Prefixed(self.decoder.beams(longer, width, allowed, exclude), events, relevance)

    def _check(self, shown: Sequence[Shown]) -> None:
        """States are kept of what stands behind the decoder's prefix."""
        for place, some in enumerate(shown):
            if len(some.ends) != len(some.rows) or any(end < len(self.decoder.prefix) for end in some.ends):
                raise ValueError(f"prompt {place}: each event has a place behind the decoder's prefix, and a row")

    def _behind(self, width: int) -> Behind:
        levels = self.decoder.trie.levels
        prefix = 1 + (self.k if self.choose else 0) * levels
        return Behind(prefix + levels, max(width, prefix), prefix + self.decoder.positions(width))

    def _chosen(self, branches: Branches, shown: Sequence[Shown], places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Events and their relevance. (P, K), (P, K)"""
        device = branches.last.device
        lengths = torch.tensor([len(some.ends) for some in shown])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)  # (P, J)
        chosen, relevance = self.choose(History(branches.states, mask.to(device), branches.last, places))
        of_chosen = torch.full(chosen.shape, torch.nan, device=device)
        if relevance is not None and mask.size(1):
            of_chosen = relevance.float().gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, torch.nan)
        return chosen, of_chosen

    def _block(self, shown: Sequence[Shown], events: Tensor) -> tuple[Tensor, Tensor]:
        """Opening, then the codes of the chosen items, at the right of a row; where they are. (P, M), (P, M) bool"""
        rows = [[own.rows[event] if event >= 0 else -1 for event in some] for own, some in zip(shown, events.tolist())]
        rows = torch.tensor(rows, dtype=torch.int64).view(events.shape)
        trie, ids = self.decoder.items, [level.cpu() for level in self.decoder.head.ids]
        codes = trie.codes_of_leaves(trie.leaf_of_row[rows.clamp(min=0)])  # (P, K, L), -1 where an item has ended
        mask = ((codes >= 0) & (rows >= 0).unsqueeze(2)).flatten(1)
        tokens = torch.stack([level[own.clamp(min=0)] for level, own in zip(ids, codes.unbind(2))], dim=2).flatten(1)
        mask = torch.nn.functional.pad(mask, (1, 0), value=True)
        tokens = torch.nn.functional.pad(tokens, (1, 0), value=self.opening)
        order = mask.long().argsort(dim=1, stable=True)[:, -int(mask.sum(dim=1).max()) :]  # what is absent first
        device = self.decoder.model.device
        return tokens.gather(1, order).to(device), mask.gather(1, order).to(device)
