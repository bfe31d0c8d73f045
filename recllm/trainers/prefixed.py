"""Conversions behind a selected prefix: a batch of them, and the log-probabilities of what follows, with gradient.

    prompt | <|pay|> · codes of K items of the history, least relevant first · codes of the target

The prompt goes through the model once. Its states select the prefix, and its keys and values are what prefix and target
attend to. What a prefix token contributes is multiplied by its item's gate, whose value is 1 and whose gradient is that
of softmax(s / τ): so the loss reaches the query and the states that it compares.   RCLRec, section 2
"""

import functools
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from recllm.actor.head import output_matrix, text_scores
from recllm.decoding.body import backbone
from recllm.decoding.decoder import without_dropout
from recllm.decoding.head import finish_of
from recllm.models.prefix_module import PrefixModule
from recllm.objectives.rclrec import ABSENT, ascending_top_k, average_nll, straight_through
from recllm.tokenization import ItemTokens
from recllm.trainers.batches import Batch, padded

NAME = "prefix_module"  # of the model's part that selects
COLUMNS = ("prompt_ids", "ends", "rows", "target", "user")
NLL_BASE = "nll_base"  # ℓ_base, a column where it is needed


def module_of(model: PreTrainedModel) -> PrefixModule | None:
    """The one that trains, under an adapter its own copy; None if the model has none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = getattr(base, NAME, None)
    return next(iter(module.modules_to_save.values())) if hasattr(module, "modules_to_save") else module


class ConversionCollator:
    """Rows of COLUMNS → a batch. `module` says who a user is, and chooses where no query does."""

    def __init__(self, tokens: ItemTokens, opening: int, pad: int, module: PrefixModule):
        self.levels, self.opening, self.pad, self.module = tokens.levels, opening, pad, module
        # The token ids of every item's codes, -1 where it has fewer; the last row is no item's. (N + 1, L)
        codes = torch.tensor(tokens.table.codes).long()
        ids = [self._ids_of(codes[:, level], level) for level in range(codes.size(1))]
        self.items = torch.cat([torch.stack(ids, dim=1), torch.full((1, codes.size(1)), ABSENT)])

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        prompts = [row["prompt_ids"] for row in rows]
        width = max(map(len, prompts))
        # From the left of the padded row. Left-padded as prompts are: the last column is the latest item.
        ends = [[width - len(row["prompt_ids"]) + end for end in row["ends"]] for row in rows]
        items = padded([row["rows"] for row in rows], ABSENT, left=True).long()  # (P, J)
        target = torch.tensor([row["target"] for row in rows])  # (P, L)
        users = self.module.user_rows([row["user"] for row in rows])
        batch = {
            "prompt_ids": padded(prompts, self.pad, left=True),
            "prompt_mask": padded([[1] * len(ids) for ids in prompts], 0, left=True),
            "ends": padded(ends, 0, left=True).long(),
            "there": items >= 0,
            "items": self.items[items],  # (P, J, L) token ids
            "target": torch.stack([self._ids_of(target[:, level], level) for level in range(target.size(1))], dim=1),
            "opening": torch.full((len(rows), 1), self.opening),
            "users": users,
        }
        if not self.module.learned:
            keys = [tuple(row["rows"]) for row in rows]
            batch["chosen"] = self.module.without_query(batch["there"], users, keys)
        if NLL_BASE in rows[0]:
            batch[NLL_BASE] = torch.tensor([row[NLL_BASE] for row in rows])
        return batch

    def _ids_of(self, codes: Tensor, level: int) -> Tensor:
        return self.levels[level][codes.clamp(min=0)].masked_fill(codes < 0, ABSENT)


class Answer(NamedTuple):
    """What follows a prompt, right-padded. All (P, S)."""

    ids: Tensor  # the opening token, the prefix, the target
    present: Tensor  # bool
    target: Tensor  # bool: the target's own codes
    source: Tensor  # of a prefix token the place of its item in the history, else -1


def answer_of(opening: Tensor, items: Tensor, chosen: Tensor, target: Tensor) -> Answer:
    """(P, 1), (P, J, L), (P, K), (P, L); token ids that are not there are -1"""
    k, levels = chosen.size(1), target.size(1)
    places = chosen.clamp(min=0).unsqueeze(2).expand(-1, -1, levels)  # (P, K, L)
    prefix = items.gather(1, places) if items.size(1) else places.clone()
    prefix = prefix.masked_fill((chosen < 0).unsqueeze(2), ABSENT).flatten(1)
    ids = torch.cat([opening, prefix, target], dim=1)
    source = chosen.repeat_interleave(levels, dim=1)
    source = torch.nn.functional.pad(source, (1, levels), value=ABSENT)
    own = torch.arange(ids.size(1), device=ids.device).expand_as(ids) > k * levels
    order = (ids < 0).long().argsort(dim=1, stable=True)  # gaps go to the end
    ids, source, own = (part.gather(1, order) for part in (ids, source, own))
    present = ids >= 0
    used = int(present.sum(dim=1).max())
    return Answer(*(part[:, :used] for part in (ids.clamp(min=0), present, own & present, source)))


class PrefixScores(NamedTuple):
    """Of the tokens behind the opening one; 0 where nothing is."""

    logps: Tensor  # (P, S − 1) log-probability over the whole vocabulary
    present: Tensor  # (P, S − 1) bool
    target: Tensor  # (P, S − 1) bool
    chosen: Tensor  # (P, K)


class PrefixScorer:
    """`model(conversions=batch)` answers with PrefixScores, once installed. `tokens_run`: in the last call."""

    def __init__(self):
        self.tokens_run = 0
        self.finish: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()

    def install(self, model: PreTrainedModel) -> None:
        """Before the model is wrapped: through `forward`, since the hooks of DDP, PEFT and autocast sit on it."""
        underneath = model.forward

        @functools.wraps(type(model).forward)
        def forward(own, *args, conversions: Batch | None = None, **settings):
            return underneath(*args, **settings) if conversions is None else self.score(own, conversions)

        model.forward = types.MethodType(forward, model)

    def score(self, model: PreTrainedModel, batch: Batch) -> PrefixScores:
        if model not in self.finish:
            with without_dropout(model):
                self.finish[model] = finish_of(model)
        cache, hidden = encoded(model, batch)
        chosen, gates = batch.get("chosen"), None
        if chosen is None:
            chosen, gates = selected(module_of(model), hidden, batch, embedded(model, batch["opening"][0])[0])
        answer = answer_of(batch["opening"], batch["items"], chosen, batch["target"])
        after = behind(model, batch["prompt_mask"], cache, answer, gates)
        ids, present, target = (part[:, 1:] for part in answer[:3])
        with output_matrix(model) as matrix:
            found, _ = text_scores(after[present], matrix, ids[present], 1.0, self.finish[model], False)
        logps = found.new_zeros(present.shape).masked_scatter(present, found)
        self.tokens_run = batch["prompt_ids"].numel() + ids.numel()
        return PrefixScores(logps, present, target, chosen)


def embedded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)


def encoded(model: PreTrainedModel, batch: Batch) -> tuple[DynamicCache, Tensor]:
    """The prompts, once: keys and values of every layer, and the last layer's states (P, T, D), all with gradient."""
    cache, mask = DynamicCache(config=model.config), batch["prompt_mask"]
    hidden = backbone(model)(
        input_ids=batch["prompt_ids"], attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), past_key_values=cache, use_cache=True,
    ).last_hidden_state  # fmt: skip
    return cache, hidden


def states_of(hidden: Tensor, ends: Tensor) -> Tensor:
    """h_j, the state at each item's last token. (P, T, D), (P, J) -> (P, J, D)"""
    return hidden.gather(1, ends.unsqueeze(2).expand(-1, -1, hidden.size(2)))


def selected(module: PrefixModule, hidden: Tensor, batch: Batch, behaviour: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the chosen items (P, K), and the gate of every item (P, J)."""
    there, settings = batch["there"], module.settings
    states = states_of(hidden, batch["ends"])
    scores = module.relevance(states, there, hidden[:, -1], behaviour, batch["users"])
    chosen = ascending_top_k(scores, settings.k, there)
    return chosen, gates_of(scores, there, chosen, settings.temperature)


def gates_of(scores: Tensor, there: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """m + p − stop_gradient(p), p = softmax(s / τ) over the items that are there. (P, J), (P, J), (P, K) -> (P, J)"""
    p = (scores / temperature).masked_fill(~there, torch.finfo(scores.dtype).min).softmax(dim=1)  # no NaN where none is
    mask = (chosen.unsqueeze(2) == torch.arange(scores.size(1), device=scores.device)).any(dim=1)
    return straight_through(mask, p)


def behind(
    model: PreTrainedModel, prompt_mask: Tensor, cache: DynamicCache, answer: Answer, gates: Tensor | None
) -> Tensor:  # fmt: skip
    """The states that predict each token of an answer but its first. -> (P, S − 1, D)"""
    ids, source = answer.ids[:, :-1], answer.source[:, :-1]
    steps = torch.arange(ids.size(1), device=ids.device)
    # Padding behind an answer needs no mask: nothing that counts comes after it.
    mask = torch.cat([prompt_mask, torch.ones_like(ids)], dim=1)
    if gates is not None and gates.size(1):
        mask = gated(prompt_mask, source, gates, model.dtype)
    return backbone(model)(
        input_ids=ids, attention_mask=mask, position_ids=prompt_mask.sum(dim=1, keepdim=True) + steps,
        past_key_values=cache, use_cache=True,
    ).last_hidden_state  # fmt: skip


def gated(prompt_mask: Tensor, source: Tensor, gates: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of attention: log gate where a later token looks at a prefix token. (P, 1, S, T + S)

    exp(s + log g) = g · exp(s): the gate multiplies what the item's tokens contribute to whatever comes behind the
    item. On their embeddings it would hardly be felt, since every layer norms its inputs first. (P, T), (P, S), (P, J)
    """
    own = source.size(1)
    later = torch.ones(own, own, dtype=torch.bool, device=source.device).tril()
    sees = torch.cat([prompt_mask.bool().unsqueeze(1).expand(-1, own, -1), later.expand(len(source), -1, -1)], dim=2)
    gate = gates.gather(1, source.clamp(min=0)).masked_fill(source < 0, 1.0).log()  # (P, S)
    of_others = source.unsqueeze(2) != source.unsqueeze(1)  # an item's own tokens see it whole
    added = torch.nn.functional.pad(gate.unsqueeze(1) * (of_others & later), (prompt_mask.size(1), 0))
    return added.to(dtype).masked_fill(~sees, torch.finfo(dtype).min).unsqueeze(1)


@torch.no_grad()
def base_nll(model: PreTrainedModel, batch: Batch, scorer: PrefixScorer) -> Tensor:
    """ℓ_base: of a target's tokens behind the opening token alone. -> (P,)"""
    nothing = torch.full((len(batch["target"]), 1), ABSENT, device=batch["target"].device)
    scores = scorer.score(model, batch | {"chosen": nothing})
    return average_nll(scores.logps, scores.target)
