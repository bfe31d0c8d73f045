"""Generate, reflect, correct with the engine: whole trajectories drawn for RL, and the ranking that inference gives.

A prompt is computed once. Behind it, for each of B drafts at the same time (parallel layout, K attributes):

    draft       L − 1 passes of B positions     a beam search, or samples
    slots       one pass of B (K + 2)           the draft's last code, which the search never feeds, and all slots
    labels      one pass of B (K + 1)           only of the drafts that are not called right
    correction  L − 1 passes of at most B       one beam search over all pairs of a draft and an item

In the causal layout a slot waits for the label before it: K + 2 passes of two positions in place of the middle two.
Without labels (GC) these are one pass.   GRC, section 4.3
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recllm.decoding.branches import Block
from recllm.decoding.decoder import Answers, Behind, Decoder, Prompts, generator_of, without_dropout
from recllm.decoding.head import Head
from recllm.decoding.search import NONE, Walk, beams, draw, keep_top_p, samples
from recllm.errors import UserError
from recllm.objectives.grc import calibrated_scores, label_entropy
from recllm.reflection import ReflectionTokens, Template

Choose = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # slot, logits (P, B, C) -> labels and a figure of each (P, B)


@dataclass(frozen=True)
class Trajectories:
    """G of each prompt. `logps` stand at the template's places, 0 at the slots, which are given."""

    drafts: Tensor  # (P, G, L) codes
    labels: Tensor  # (P, G, K + 1) int64, counted from 0: loc l says that level l + 1 is the first that is wrong
    items: Tensor  # (P, G, L) codes of the correction
    logps: Tensor  # (P, G, F) log-probability of each draw, temperature and top-p included
    draft_rows: Tensor  # (P, G) int64, items of the table
    item_rows: Tensor  # (P, G)


@dataclass(frozen=True)
class Reflected:
    """The drafts, best first, what was said of them, and the ranking that came of it."""

    drafts: Answers
    labels: Tensor  # (P, B, K + 1) the most probable ones, counted from 0; of the first M with `reflect_on`
    entropies: Tensor  # (P, B, K + 1) of each slot, over its own labels
    kept: Tensor  # (P, B) bool: called right, and not generated again
    found: Answers  # distinct items, best first
    source: Tensor  # (P, B) the draft that each item of `found` came from; -1 where there is none
    filled: Tensor  # (P, B) bool: a draft that only fills the list up, behind what was corrected or kept


class Said(NamedTuple):
    """What was said of drafts."""

    labels: Tensor  # (P, B, K + 1)
    figures: Tensor  # (P, B, K + 1) as chosen: log-probabilities of draws, or entropies
    hidden: Tensor  # (P, B, D) what the correction's first code is predicted from; zero of those that were kept
    kept: Tensor  # (P, B) bool


class Ranked(NamedTuple):
    """What becomes `Reflected`, with leaves of the trie in place of items. M drafts are reflected on."""

    labels: Tensor  # (P, M, K + 1)
    entropies: Tensor  # (P, M, K + 1)
    kept: Tensor  # (P, M)
    drafts: Tensor  # (P, B) leaves
    draft_scores: Tensor  # (P, B)
    found: Tensor  # (P, B) leaves
    scores: Tensor  # (P, B)
    source: Tensor  # (P, B)
    filled: Tensor  # (P, B) bool

    @classmethod
    def empty(cls, prompts: int, beams: int, drafts: int, slots: int) -> "Ranked":
        said, none = torch.zeros(prompts, drafts, slots), torch.full((prompts, beams), -1)
        scores = torch.full((prompts, beams), NONE)
        kept = torch.zeros(prompts, drafts, dtype=torch.bool)
        return cls(
            said.long(), said, kept, none, scores, none.clone(), scores.clone(), none.clone(), none.clone().bool()
        )


class Pass(NamedTuple):
    """Places of the template that are computed together, since none waits for another."""

    places: tuple[int, ...]
    block: Block


class Reflector:
    """A decoder whose model was taught to reflect. Batches, filters, seeds and memory are the decoder's."""

    def __init__(self, decoder: Decoder, tokens: ReflectionTokens):
        template, trie = tokens.template, decoder.trie
        if template.levels != trie.levels:
            raise UserError(
                f"the model reflects on items of {template.levels} codes, the index has {trie.levels}",
                fix="use the semantic_ids.json inside the model's folder",
            )
        if any(len(padding) for padding in trie.pad):
            raise UserError(
                "some items have fewer codes than others, and a draft's place of error needs all of them",
                fix="build the index with items of the same number of codes",
            )
        self.decoder, self.template, device = decoder, template, decoder.model.device
        self.slots, self.labels = tokens.slots.to(device), [ids.to(device) for ids in tokens.labels]
        with without_dropout(decoder.model):
            self.head = Head(decoder.model, self.labels) if self.labels else None
        self.passes = passes_of(template, device)

    def samples(
        self, prompts: Prompts, answers: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
        keys: Sequence[object] | None = None,
    ) -> Trajectories:  # fmt: skip
        """`answers` trajectories after each prompt: codes from the allowed children of a prefix, labels from their
        slot's own, each from softmax(logits / temperature) cut at top_p.

        A prompt's draws depend on the seed and its key (without `keys`, its place among the prompts), not on batches.
        """
        if temperature <= 0 or not 0 < top_p <= 1:
            raise UserError(f"temperature {temperature} must be above 0, top_p {top_p} in (0, 1]")
        template, levels = self.template, self.template.levels
        at = {kind: torch.tensor(template.at(kind), dtype=torch.int64) for kind in ("draft", "label", "item")}
        leaves = torch.empty(2, len(prompts), answers, dtype=torch.int64)  # of the drafts, and of the corrections
        labels = torch.empty(len(prompts), answers, len(at["label"]), dtype=torch.int64)
        logps = torch.zeros(len(prompts), answers, len(template.places))

        def work(walk: Walk, places: Sequence[int]) -> None:
            numbers = [generator_of(seed, place if keys is None else keys[place], "reflection") for place in places]
            size = (answers, 2 * levels + len(at["label"]))
            uniform = torch.stack([torch.rand(size, generator=g) for g in numbers]).to(walk.trie.rows.device)

            def choose(slot: int, logits: Tensor) -> tuple[Tensor, Tensor]:
                own = keep_top_p((logits / temperature).log_softmax(dim=-1), top_p)
                chosen = draw(own, uniform[:, :, levels + slot])
                return chosen.squeeze(2), own.gather(2, chosen).squeeze(2)

            draft = samples(walk, uniform[:, :, :levels], temperature, top_p)
            said = self._reflect(walk, draft.leaves, draft.parents, choose)
            item = samples(walk, uniform[:, :, -levels:], temperature, top_p, walk.start_from(said.hidden))
            leaves[0, places], leaves[1, places] = draft.leaves.cpu(), item.leaves.cpu()
            labels[places] = said.labels.cpu()
            for kind, these in (("draft", draft.logps), ("label", said.figures), ("item", item.logps)):
                logps[torch.tensor(places)[:, None], :, at[kind]] = these.float().cpu().transpose(1, 2)

        self._walk(prompts, answers, work)
        draft, item = (self.decoder.named(some, torch.zeros_like(some)) for some in leaves)
        return Trajectories(draft.codes, labels, item.codes, logps, draft.rows, item.rows)

    def scheduled(
        self, prompts: Prompts, beams: int, *, entropy_weight: float = 0.2, skip: bool = True,
        reflect_on: int | None = None, allowed: Tensor | None = None, exclude: Sequence[Sequence[int]] | None = None,
    ) -> Reflected:  # fmt: skip
        """Entropy-guided scheduling: drafts by beam search, and one beam search for all their corrections, which begins
        with score_b + α_e H̄_b of each draft.   GRC, section 4.3

        A draft that is called right (`skip`) takes part as a trajectory that has ended, with the score that it began
        with. Duplicates of an item are merged, the best score kept; drafts that are not in the list fill it up, in
        their order and with no better score than what stands before them. Filters hold for drafts and corrections.

        reflect_on  how many of the drafts, the best ones, are looked at (M of B) and corrected with as many beams;
                    the others fill up the list. None: all
        """
        check_entropy_weight(entropy_weight)
        if beams > len(self.decoder.trie):
            raise UserError(f"{beams:,} beams and only {len(self.decoder.trie):,} items", fix="fewer beams")
        most = beams if reflect_on is None else reflect_on
        if reflect_on is not None and not 1 <= most <= beams:
            raise UserError(f"reflect_on {most} must be between 1 and the {beams} beams")
        ranked = Ranked.empty(len(prompts), beams, most, len(self.labels))

        def work(walk: Walk, places: Sequence[int]) -> None:
            for whole, some in zip(ranked, self._schedule(walk, beams, most, entropy_weight, skip)):
                whole[places] = some.to("cpu", whole.dtype)

        self._walk(prompts, beams, work, allowed, exclude)
        drafts = self.decoder.named(ranked.drafts, ranked.draft_scores)
        found = self.decoder.named(ranked.found, ranked.scores)
        return Reflected(drafts, *ranked[:3], found, ranked.source, ranked.filled)

    def _schedule(self, walk: Walk, width: int, most: int, weight: float, skip: bool) -> Ranked:
        def choose(_: int, logits: Tensor) -> tuple[Tensor, Tensor]:
            logps = logits.log_softmax(dim=-1)
            return logps.argmax(dim=-1), label_entropy(logps)

        draft = beams(walk, width)
        leaves = draft.leaves[:, :most]
        said = self._reflect(walk, leaves, draft.parents[:, :most], choose, skip)
        doubt = said.figures.sum(dim=-1) / max(1, len(self.labels))  # H̄   (P, M)
        start = calibrated_scores(draft.scores[:, :most], doubt, weight)
        finished = leaves.masked_fill(~said.kept, -1) if skip else None
        item = beams(walk, most, walk.start_from(said.hidden, start, finished))
        own = torch.arange(width, device=start.device).expand_as(draft.leaves)
        found = merged(
            torch.cat([item.leaves, draft.leaves], dim=1),
            torch.cat([item.scores, start, draft.scores[:, most:]], dim=1),
            torch.cat([item.origins, own], dim=1),
            width,
            item.leaves.size(1),
        )
        return Ranked(said.labels, said.figures, said.kept, draft.leaves, draft.scores, *found)

    def _reflect(self, walk: Walk, leaves: Tensor, parents: Tensor, choose: Choose, skip: bool = False) -> Said:
        """Go on from drafts (P, B), the last code of which their branches (P, B) have not been fed."""
        places = self.template.places
        there = leaves >= 0
        kept = torch.zeros_like(there)
        labels = leaves.new_zeros(*leaves.shape, len(self.labels))
        figures = torch.zeros(labels.shape, device=leaves.device)
        for number, (which, block) in enumerate(self.passes):
            tokens = torch.stack([self._tokens(walk, place, leaves, labels) for place in which], dim=-1)
            last = number + 1 == len(self.passes)
            needed = there & ~kept if skip and last and labels.size(2) else None
            hidden = walk.branches.advance_block(tokens, parents, block, needed)
            for place, state in zip(which, hidden.unbind(dim=2)):
                if places[place].kind == "slot":
                    slot = places[place].number
                    labels[..., slot], figures[..., slot] = choose(slot, self.head.logits(state, slot))
                    if slot == 0:
                        kept = there & (labels[..., 0] == self.template.levels) if skip else kept
            parents = torch.arange(leaves.size(1), device=leaves.device).expand_as(leaves)
        return Said(labels, figures, hidden[:, :, -1], kept)

    def _tokens(self, walk: Walk, place: int, leaves: Tensor, labels: Tensor) -> Tensor:
        """What each draft has at a place. (P, B)"""
        kind, number = self.template.places[place]
        if kind == "draft":
            return walk.head.ids[number][walk.trie.codes(number + 1, leaves.clamp(min=0))]
        if kind == "label":
            return self.labels[number][labels[..., number]]
        return self.slots[number].expand_as(leaves)

    def _walk(self, prompts: Prompts, branches: int, work: Callable[[Walk, Sequence[int]], None], *filters) -> None:
        if branches < 1:
            raise UserError(f"at least one draft a prompt is needed, got {branches}")
        if self.head is not None:
            self.head.gather()
        widest = max(len(which.places) for which in self.passes)
        tokens = int(self.template.form.offsets[-1]) + 1
        behind = Behind(tokens, branches * widest, branches * (len(self.template.places) - 1))
        self.decoder.walk(prompts, behind, work, *filters)


def check_entropy_weight(weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise UserError(f"entropy_weight must be a number from 0, got {weight}", fix="0.2, or 0: doubt changes nothing")


def passes_of(template: Template, device: torch.device | str = "cpu") -> tuple[Pass, ...]:
    """From the draft's last code to what stands before the item, in as few passes as what predicts what allows."""
    form, first, end = template.form, template.at("draft")[-1], template.at("item")[0]
    passes = [[first]]
    for place in range(first + 1, end):
        if int(form.before[place]) in passes[-1]:  # it is not known before that state is
            passes.append([])
        passes[-1].append(place)
    blocks = [
        Block(
            form.sees[some][:, some].to(device), form.offsets[some].to(device),
            form.sees[some[-1] + 1 :, some].any(dim=0).to(device), int(form.offsets[some[-1] + 1]),
        )
        for some in passes
    ]  # fmt: skip
    return tuple(Pass(tuple(some), block) for some, block in zip(passes, blocks))


def merged(
    leaves: Tensor, scores: Tensor, sources: Tensor, width: int, corrected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `width` that are there (not -1), each leaf once; none scores better than what stands before it.

    (P, M) each -> (P, width) each; leaf -1, score -inf, source -1 where fewer are left; and which of them are not among
    the first `corrected`
    """
    again = (leaves.unsqueeze(2) == leaves.unsqueeze(1)).tril(-1).any(dim=2)
    counts = ~again & (leaves >= 0)
    order = counts.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    nothing = ~counts.gather(1, order)
    scores = scores.gather(1, order).masked_fill(nothing, NONE).cummin(dim=1).values
    leaves, sources = (part.gather(1, order).masked_fill(nothing, -1) for part in (leaves, sources))
    return leaves, scores, sources, (order >= corrected) & ~nothing
