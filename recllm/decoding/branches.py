"""The prompt computed once, its continuations as query positions over its cache.

B continuations of one prompt are B query positions of one row. A position sees the prompt and its own ancestors, by the
mask; its rotary position restarts at the prompt's length. Nothing is copied or reordered when beams change: a mask row
is. Where a model does not take such a mask (checked once a model), its cache is expanded to a row for each branch.
A branch may say several tokens in one pass, a block, whose tokens see of each other what the block says. Prompts may
be made longer before anything branches.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recllm.decoding.attention import attending_in_groups
from recllm.decoding.body import attention_of, backbone, plain_attention, takes_masks
from recllm.decoding.cache import cache_on, growing_cache, shelves_for
from recllm.decoding.last_layer import states_at
from recllm.decoding.memory import prompts_in_a_pass
from recllm.decoding.prompts import PromptBatch
from recllm.errors import UserError


def prefill(model: PreTrainedModel, batch: PromptBatch, room: int = 0) -> tuple[DynamicCache, Tensor, Tensor]:
    """Cache, which of its positions are tokens (P, T), and the last hidden states where the batch is read, then at the
    end of each prompt (P, J + 1, D). `room`: tokens that will follow in each row."""
    shared, (prompts, width) = _shared(model, batch), batch.ids.shape
    seen = torch.cat([batch.mask.new_ones(prompts, len(batch.prefix)), batch.mask], dim=1)
    shelves = shelves_for(model, prompts, seen.size(1) + room)
    if shelves is None:
        cache = growing_cache(model)
        return cache, seen, _prefill(model, batch, cache, shared)
    size = prompts_in_a_pass(model, prompts, width)
    states = [
        _prefill(model, some, growing_cache(model, shelves, place * size), shared)
        for place, some in enumerate(batch.split(size))
    ]
    return cache_on(model, shelves, seen.size(1)), seen, torch.cat(states)


def _shared(model: PreTrainedModel, batch: PromptBatch) -> DynamicCache | None:
    """What all prompts begin with, computed once."""
    if not batch.prefix:
        return None
    cache = growing_cache(model)
    prefix = torch.tensor(batch.prefix, device=batch.ids.device).unsqueeze(0)
    places = torch.arange(len(batch.prefix), device=prefix.device).unsqueeze(0)
    backbone(model)(input_ids=prefix, position_ids=places, past_key_values=cache, use_cache=True)
    return cache


def _prefill(
    model: PreTrainedModel, batch: PromptBatch, cache: DynamicCache, shared: DynamicCache | None
) -> Tensor:  # fmt: skip
    """Into the cache; states where the batch is read and at the end. (P, J + 1, D)"""
    prompts, before = len(batch.ids), len(batch.prefix)
    if shared is not None:
        for layer, own in zip(cache.layers, shared.layers):
            layer.update(*(there.expand(prompts, -1, -1, -1) for there in (own.keys, own.values)))
    mask = None  # Without padding none is needed, and attention may take its fast causal path.
    if not bool(batch.mask.all()):
        mask = torch.nn.functional.pad(batch.mask.long(), (before, 0), value=1)  # (P, T)
    end = batch.read.new_full((prompts, 1), batch.ids.size(1) - 1)
    return states_at(
        model, torch.cat([batch.read, end], dim=1), batch.ids, cache,
        attention_mask=mask,
        position_ids=(before + batch.mask.long().cumsum(dim=1) - 1).clamp(min=0),  # (P, own T)
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Block:
    """How M tokens that a branch says in one pass hang together. All of them see what the branch said before."""

    sees: Tensor  # (M, M) bool: [i, j], does token i attend to token j? Itself always, none after it
    offsets: Tensor  # (M,) int64: positions, counted from the prompt's end
    keep: Tensor  # (M,) bool: which of them later tokens see
    next_offset: int  # where the token after them stands

    @classmethod
    def one(cls, offset: int, device: torch.device | str) -> "Block":
        """A token like any other."""
        alone = torch.ones(1, 1, dtype=torch.bool, device=device)
        return cls(alone, torch.full((1,), offset, device=device), alone[0], offset + 1)

    @property
    def causal(self) -> bool:
        """One token after another?"""
        lower = torch.ones_like(self.sees).tril()
        steps = self.offsets.diff(append=self.offsets.new_tensor([self.next_offset]))
        return bool((self.sees == lower).all() and self.keep.all() and (steps == 1).all())


class Branches:
    """Prompts and what has been said after them. Every step gives tokens to each branch, or to some of them."""

    def __init__(self, model: PreTrainedModel, batch: PromptBatch, room: int = 0):
        self.model, self.body, self.dtype = model, backbone(model), model.dtype
        self.cache, self.seen, hidden = prefill(model, batch, room)
        self.states = hidden[:, :-1]  # (P, J, D) of the tokens where the batch is read
        self.last = hidden[:, -1]  # (P, D) of each prompt's last token
        self.lengths = batch.lengths  # (P,)
        self.depth = 0  # where the next token stands, counted from the prompt's end
        self.slots: Tensor | None = None  # where each branch of the last step is kept, if not all took part in it

    def extend(self, tokens: Tensor, mask: Tensor) -> None:
        """Make tokens the end of the prompts, before anything branches. They stand at the right.   (P, M), (P, M) bool

        A row may have fewer than M tokens, and has one at least.
        """
        self.seen = torch.cat([self.seen, mask], dim=1)
        end = self.lengths.new_full((len(tokens), 1), tokens.size(1) - 1)
        hidden = states_at(
            self.model, end, tokens, self.cache,
            attention_mask=None if bool(self.seen.all()) else self.seen.long(),
            position_ids=self.lengths.unsqueeze(1) + mask.long().cumsum(dim=1) - 1,
        )  # fmt: skip
        self.last = hidden[:, -1]
        self.lengths = self.lengths + mask.sum(dim=1)

    def advance(self, tokens: Tensor, parents: Tensor, needed: Tensor | None = None) -> Tensor:
        """One token for each branch; `parents` are branches of the step before. (P, B), (P, B) -> hidden (P, B, D)"""
        block = Block.one(self.depth, tokens.device)
        return self.advance_block(tokens.unsqueeze(2), parents, block, needed).squeeze(2)

    def advance_block(self, tokens: Tensor, parents: Tensor, block: Block, needed: Tensor | None = None) -> Tensor:
        """M tokens for each branch, in one pass. (P, B, M), (P, B) -> hidden (P, B, M, D)

        Only the branches `needed` (P, B) are asked about ever again: the others' states say nothing, and as many as
        every prompt can spare are not computed. None: all are.
        """
        most = tokens.size(1) if needed is None else int(needed.sum(dim=1).max())
        if most == tokens.size(1):
            if self.slots is not None:
                parents, self.slots = self.slots.gather(1, parents), None
            return self._advance(tokens, parents, block)
        order = needed.long().argsort(dim=1, descending=True, stable=True)[:, :most]  # the needed ones first
        hidden = self.last.new_zeros(*tokens.shape, self.last.size(-1))
        if most:
            wide = order.unsqueeze(2).expand(-1, -1, tokens.size(2))
            some = self.advance_block(tokens.gather(1, wide), parents.gather(1, order), block)
            hidden.scatter_(1, wide.unsqueeze(3).expand_as(some), some)
        self.slots = torch.zeros_like(parents).scatter_(
            1, order, torch.arange(most, device=order.device).expand_as(order)
        )
        return hidden

    def _advance(self, tokens: Tensor, parents: Tensor, block: Block) -> Tensor:
        raise NotImplementedError


class TreeBranches(Branches):
    """Branches as query positions over the prompt's cache."""

    def __init__(self, model: PreTrainedModel, batch: PromptBatch, room: int = 0):
        super().__init__(model, batch, room)
        self.ancestors = self.seen.new_zeros(len(self.seen), 1, 0)  # (P, B, positions after the prompt)

    def _advance(self, tokens: Tensor, parents: Tensor, block: Block) -> Tensor:
        prompts, branches, size = tokens.shape
        inherited = self.ancestors.gather(1, parents.unsqueeze(2).expand(-1, -1, self.ancestors.size(2)))
        same = torch.eye(branches, dtype=torch.bool, device=tokens.device)
        own = (same[:, None, :, None] & block.sees[:, None]).view(branches, size, -1).expand(prompts, -1, -1, -1)
        before = torch.cat([self.seen.unsqueeze(1).expand(-1, branches, -1), inherited], dim=2)
        sees = torch.cat([before.unsqueeze(2).expand(-1, -1, size, -1), own], dim=3)  # (P, B, M, T + positions)
        # Added to the scores: what every kind of attention takes, and made once a step rather than in every layer.
        mask = torch.zeros_like(sees, dtype=self.dtype).masked_fill(~sees, torch.finfo(self.dtype).min)
        kept = (same.unsqueeze(2) & block.keep).view(branches, -1).expand(prompts, -1, -1)  # (P, B, B·M)
        self.ancestors = torch.cat([inherited, kept], dim=2)
        positions = (self.lengths.unsqueeze(1) + block.offsets).unsqueeze(1).expand(-1, branches, -1)
        self.depth = block.next_offset
        with attending_in_groups(self.model):
            hidden = self.body(
                input_ids=tokens.flatten(1),  # branch by branch
                attention_mask=mask.flatten(1, 2).unsqueeze(1),
                position_ids=positions.flatten(1),
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        return hidden.view(prompts, branches, size, -1)


class ExpandedBranches(Branches):
    """The same through a cache of P·B rows that is reordered at every step: for models that take no mask of ours."""

    branches = 1

    def __init__(self, model: PreTrainedModel, batch: PromptBatch, room: int = 0):
        super().__init__(model, batch)  # room is lost with the first reordering

    def _advance(self, tokens: Tensor, parents: Tensor, block: Block) -> Tensor:
        prompts, branches, size = tokens.shape
        if not block.causal or int(block.offsets[0]) != self.depth:
            raise UserError(
                "this model's attention takes no mask of ours, which slots beside each other need",
                fix="a model trained with reflection_layout: causal",
            )
        rows = torch.arange(prompts, device=parents.device).unsqueeze(1) * self.branches + parents
        self.cache.reorder_cache(rows.flatten())
        self.branches = branches
        seen = torch.nn.functional.pad(self.seen, (0, block.next_offset), value=True)
        positions = self.lengths.unsqueeze(1) + block.offsets
        self.depth = block.next_offset
        hidden = self.body(
            input_ids=tokens.flatten(0, 1),
            attention_mask=seen.repeat_interleave(branches, dim=0).long(),
            position_ids=positions.repeat_interleave(branches, dim=0),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden.view(prompts, branches, size, -1)


_takes_tree_mask: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def branches_of(model: PreTrainedModel, batch: PromptBatch, room: int = 0) -> Branches:
    """The prompts computed, ready to branch, in the fastest way that is right for this model.

    `room`: how many tokens will follow each prompt, over all branches.
    """
    return (TreeBranches if takes_tree_mask(model) else ExpandedBranches)(model, batch, room)


def takes_tree_mask(model: PreTrainedModel) -> bool:
    """Does the model heed a (P, 1, B, T) mask and our positions? Tried on eight tokens, once a model and attention."""
    tried, which = _takes_tree_mask.setdefault(model, {}), attention_of(model)
    if which not in tried:
        tried[which] = plain_attention(model) and takes_masks(model) and _agrees(model)
    return tried[which]


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Two steps of two branches that swap parents give the same states in both ways."""
    batch = PromptBatch.of([[3, 4, 5], [6]], device=model.device)
    first = torch.tensor([[1, 2], [2, 1]], device=model.device)
    swap = torch.tensor([[1, 0], [1, 1]], device=model.device)
    states = []
    try:
        for kind in (TreeBranches, ExpandedBranches):
            branches = kind(model, batch)
            branches.advance(first, torch.zeros_like(first))
            states.append(branches.advance(first, swap).float())
    except Exception:  # whatever a strange architecture raises: it does not take the mask
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((states[0] - states[1]).norm() <= tolerance * states[1].norm())
