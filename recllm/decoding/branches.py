"""The prompt computed once, its continuations as query positions over its cache.

B continuations of one prompt are B query positions of one row. A position sees the prompt and its own ancestors, by the
mask; its rotary position restarts at the prompt's length. Nothing is copied or reordered when beams change: a mask row
is. Where a model does not take such a mask (checked once a model), its cache is expanded to a row for each branch.
"""

import weakref

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recllm.decoding.attention import attending_in_groups
from recllm.decoding.prompts import PromptBatch


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head: what gives hidden states."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    return model.get_decoder() or model.base_model


def prefill(model: PreTrainedModel, batch: PromptBatch) -> tuple[DynamicCache, Tensor, Tensor]:
    """Cache, which of its positions are tokens (P, T), and the hidden state of each prompt's last token (P, D)."""
    body, device = backbone(model), batch.ids.device
    prompts, shared = len(batch.ids), len(batch.prefix)
    cache = DynamicCache(config=model.config)
    if shared:
        prefix = torch.tensor(batch.prefix, device=device).unsqueeze(0)
        body(input_ids=prefix, past_key_values=cache, use_cache=True)
        if prompts > 1:
            cache.batch_repeat_interleave(prompts)
    seen = torch.cat([batch.mask.new_ones(prompts, shared), batch.mask], dim=1)  # (P, T)
    padded = not bool(batch.mask.all())
    positions = (shared + batch.mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (P, own T)
    hidden = body(
        input_ids=batch.ids,
        # Without padding no mask is needed, and attention may take its fast causal path.
        attention_mask=seen.long() if padded else None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return cache, seen, hidden[:, -1]


class Branches:
    """Prompts and what has been said after them. Every step gives a token to each branch, or to some of them."""

    def __init__(self, model: PreTrainedModel, batch: PromptBatch):
        self.body, self.dtype = backbone(model), model.dtype
        self.cache, self.seen, self.last = prefill(model, batch)
        self.lengths = batch.lengths  # (P,)
        self.depth = 0
        self.slots: Tensor | None = None  # where each branch of the last step is kept, if not all took part in it

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """One token for each branch; `parents` are branches of the step before. (P, B), (P, B) -> hidden (P, B, D)"""
        if self.slots is not None:
            parents, self.slots = self.slots.gather(1, parents), None
        return self._advance(tokens, parents)

    def advance_some(self, tokens: Tensor, parents: Tensor, needed: Tensor) -> Tensor:
        """The same where only the branches `needed` (P, B) are asked about ever again; the others' states are zero."""
        most = int(needed.sum(dim=1).max())
        if most == needed.size(1):
            return self.advance(tokens, parents)
        order = needed.long().argsort(dim=1, descending=True, stable=True)[:, :most]  # the needed ones first
        hidden = self.last.new_zeros(*needed.shape, self.last.size(-1))
        if most:
            some = self.advance(tokens.gather(1, order), parents.gather(1, order))
            hidden.scatter_(1, order.unsqueeze(-1).expand_as(some), some)
        self.slots = torch.zeros_like(tokens).scatter_(
            1, order, torch.arange(most, device=order.device).expand_as(order)
        )
        return hidden

    def _advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        raise NotImplementedError


class TreeBranches(Branches):
    """Branches as query positions over the prompt's cache."""

    def __init__(self, model: PreTrainedModel, batch: PromptBatch):
        super().__init__(model, batch)
        self.model = model
        self.ancestors = self.seen.new_zeros(len(self.seen), 1, 0)  # (P, B, positions after the prompt)

    def _advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        prompts, branches = tokens.shape
        inherited = self.ancestors.gather(1, parents.unsqueeze(2).expand(-1, -1, self.ancestors.size(2)))
        own = torch.eye(branches, dtype=torch.bool, device=tokens.device).expand(prompts, -1, -1)
        self.ancestors = torch.cat([inherited, own], dim=2)
        prompt = self.seen.unsqueeze(1).expand(-1, branches, -1)
        sees = torch.cat([prompt, self.ancestors], dim=2).unsqueeze(1)  # (P, 1, B, T + positions)
        # Added to the scores: what every kind of attention takes, and made once a step rather than in every layer.
        mask = torch.zeros_like(sees, dtype=self.dtype).masked_fill(~sees, torch.finfo(self.dtype).min)
        positions = (self.lengths + self.depth).unsqueeze(1).expand(-1, branches)
        self.depth += 1
        with attending_in_groups(self.model):
            return self.body(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state


class ExpandedBranches(Branches):
    """The same through a cache of P·B rows that is reordered at every step: for models that take no mask of ours."""

    branches = 1

    def _advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        prompts, branches = tokens.shape
        rows = torch.arange(prompts, device=parents.device).unsqueeze(1) * self.branches + parents
        self.cache.reorder_cache(rows.flatten())
        self.branches = branches
        self.depth += 1
        seen = torch.nn.functional.pad(self.seen, (0, self.depth), value=True).repeat_interleave(branches, dim=0)
        positions = (self.lengths + self.depth - 1).repeat_interleave(branches).unsqueeze(1)
        hidden = self.body(
            input_ids=tokens.reshape(-1, 1),
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden.view(prompts, branches, -1)


_takes_tree_mask: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def branches_of(model: PreTrainedModel, batch: PromptBatch) -> Branches:
    """The prompts computed, ready to branch, in the fastest way that is right for this model."""
    return (TreeBranches if takes_tree_mask(model) else ExpandedBranches)(model, batch)


def takes_tree_mask(model: PreTrainedModel) -> bool:
    """Does the model heed a (P, 1, B, T) mask and our positions? Tried on eight tokens, once a model."""
    if model not in _takes_tree_mask:
        _takes_tree_mask[model] = plain_attention(model) and _agrees(model)
    return _takes_tree_mask[model]


def plain_attention(model: PreTrainedModel) -> bool:
    """Every layer attends to everything: a window would take branches, and padding inside a prompt, for distance."""
    config = model.config.get_text_config()
    if layers := getattr(config, "layer_types", None):
        return all(kind == "full_attention" for kind in layers)
    return not getattr(config, "sliding_window", None) and not getattr(config, "attention_chunk_size", None)


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
