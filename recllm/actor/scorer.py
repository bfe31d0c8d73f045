"""Log-probabilities of answers under the current weights, with gradient, each prompt computed once for its answers.

    scorer = AnswerScorer(model, tokens, trie)
    scorer.install(model)
    logps, entropies = model(answer_rows=rows, entropy=True)        # (R, C), (R, C)

What a token is normalised over:
    text    the whole vocabulary
    codes   by the normaliser: `children`, the codes that an item has after those before it, which is what constrained
            sampling draws from; `level`, every code of the level; `full`, the whole vocabulary
    labels  of a reflection: the labels of their slot, or by `full` the whole vocabulary
always of logits / temperature, after what the model itself does to its logits. Loss and gradients are those of the
padded batch of R rows, whatever the layout.
"""

import functools
import types
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.actor.attention import take_segments
from recllm.actor.head import Finish, Matrix, code_scores, output_matrix, scaled_logits, text_scores
from recllm.actor.layouts import Feed, Layout, agree, cheapest, check_layout, feed_of, run, takes_mask
from recllm.actor.rows import AnswerRows, Packed
from recllm.actor.targets import Targets
from recllm.decoding.body import plain_attention
from recllm.decoding.decoder import without_dropout
from recllm.decoding.head import Normaliser, check_normaliser, finish_of
from recllm.errors import UserError
from recllm.tokenization import ItemTokens
from recllm.trie import SemanticIdTrie


class Batch(NamedTuple):
    layout: str
    feed: Feed
    targets: Targets
    before: Tensor  # (S',) place of the state that predicts each token, in the targets' order


class AnswerScorer:
    """`tokens_run`: tokens that went through the model in the last call; `layout_run`: the layout it took.

    layout  auto: the one that costs least (`layouts.cheapest`), and padded where the model's attention cannot be
            split: windows, or another implementation than sdpa
    labels  token ids of each slot's labels, of a model that reflects
    """

    def __init__(
        self, model: PreTrainedModel, tokens: ItemTokens | Sequence[Tensor], trie: SemanticIdTrie, *,
        normaliser: Normaliser = "children", temperature: float = 1.0, layout: Layout = "auto",
        labels: Sequence[Tensor] = (),
    ):  # fmt: skip
        check_normaliser(normaliser)
        check_layout(layout)
        if temperature <= 0:
            raise UserError(f"temperature {temperature} must be above 0")
        levels = tokens.levels if isinstance(tokens, ItemTokens) else tokens
        if len(levels) != trie.levels or any(len(ids) < size for ids, size in zip(levels, trie.sizes)):
            raise UserError(f"tokens for {[len(ids) for ids in levels]} codes do not fit the index's {trie.sizes}")
        rows, highest = model.config.get_text_config().vocab_size, max(int(ids.max()) for ids in (*levels, *labels))
        if highest >= rows:
            raise UserError(
                f"the index needs token {highest:,} and the model has {rows:,} rows",
                fix="use the semantic_ids.json inside the model's folder",
            )
        self.normaliser, self.temperature, self.layout = normaliser, temperature, layout
        self.trie, self.levels = trie.to("cpu"), [ids.cpu() for ids in levels]
        self.choices = [*self.levels, *(ids.cpu() for ids in labels)]  # what a token of each kind is one of
        self.code_of = [_code_of(ids) for ids in self.choices]
        self.tokens_run, self.layout_run = 0, ""
        # Found out in a model's first call, when its weights are where its wrappers want them.
        self.splits: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
        self.finish: weakref.WeakKeyDictionary[PreTrainedModel, Finish] = weakref.WeakKeyDictionary()
        # The same rows are asked about as old policy, as reference and in every epoch of the update.
        self.batches: weakref.WeakKeyDictionary[AnswerRows, Batch] = weakref.WeakKeyDictionary()

    def install(self, model: PreTrainedModel) -> None:
        """`model(answer_rows=rows, entropy=…)` answers; every other call is as before. Before the model is wrapped.

        Through `forward`, since the hooks of DDP, DeepSpeed, FSDP, PEFT and autocast sit on it.
        """
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.splits[model] = plain_attention(model) and take_segments(model)
        self._check_split(model)
        underneath = model.forward

        @functools.wraps(type(model).forward)
        def forward(own, *args, answer_rows: AnswerRows | None = None, entropy: bool = False, **settings):
            if answer_rows is None:
                return underneath(*args, **settings)
            return self.score(own, answer_rows, entropy)

        model.forward = types.MethodType(forward, model)

    def score(self, model: PreTrainedModel, rows: AnswerRows, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """logps (R, C) and entropies (R, C) or None; 0 where no token of an answer is, or none that is scored."""
        if model not in self.finish:
            self._look_at(model)
        if not rows.packed.asked.any():
            return self._nothing(model, rows, entropy)
        batch = self._batch(model, rows)
        self.tokens_run, self.layout_run = batch.feed.ids.numel(), batch.layout
        hidden = run(model, batch.feed).flatten(0, 1).index_select(0, batch.before)  # (S', D)
        with output_matrix(model) as matrix:
            scores = list(self._scores(self.finish[model], hidden, batch.targets, matrix, entropy))
        logps = self._spread(rows, batch, [part.logps for part in scores])
        return logps, self._spread(rows, batch, [part.entropies for part in scores]) if entropy else None

    def _scores(self, finish: Finish, hidden: Tensor, targets: Targets, matrix: Matrix, entropy: bool):
        parts, wanted = hidden.split(targets.counts), targets.wanted.split(targets.counts)
        if targets.counts[0]:
            yield text_scores(parts[0], matrix, wanted[0], self.temperature, finish, entropy)
        asked = [kind for kind, count in enumerate(targets.counts[1:]) if count]
        if not asked:
            return
        ids = [self.choices[kind] for kind in asked]
        rows = matrix.rows(torch.cat(ids)).split([len(some) for some in ids])
        for kind, own in zip(asked, rows):
            logits = scaled_logits(parts[kind + 1], own, finish, self.temperature)
            yield code_scores(logits, wanted[kind + 1], targets.allowed[kind], entropy)

    def _spread(self, rows: AnswerRows, batch: Batch, parts: list[Tensor]) -> Tensor:
        """(S',) in the targets' order -> (R, C)"""
        found = torch.cat(parts)  # no view comes out: FSDP2's hooks do not see through one
        return found.new_zeros(rows.answer_ids.shape).index_put(batch.targets.places, found)

    def _batch(self, model: PreTrainedModel, rows: AnswerRows) -> Batch:
        layout = self.layout
        if layout == "auto":
            layout = cheapest(rows.packed, model) if self.splits[model] else "padded"
        known = self.batches.get(rows)
        if known is not None and known.layout == layout:
            return known
        self._check_form(model, rows.packed, layout)
        device, sizes = rows.answer_ids.device, [len(ids) for ids in self.choices]
        feed = feed_of(rows.packed, layout, device)
        targets = Targets.of(rows.packed, self.normaliser, self.trie, self.code_of, sizes, device)
        before = torch.from_numpy(feed.before[targets.order]).to(device)
        self.batches[rows] = Batch(layout, feed, targets, before)
        return self.batches[rows]

    def _look_at(self, model: PreTrainedModel) -> None:
        with without_dropout(model):
            self.splits[model] = self.splits.get(model, False) and agree(model)
            self._check_split(model)
            self.finish[model] = finish_of(model)

    def _check_split(self, model: PreTrainedModel) -> None:
        if self.layout in ("row", "cache") and not self.splits[model]:
            attention = model.config.get_text_config()._attn_implementation
            raise UserError(
                f"layout {self.layout!r} needs full attention computed by sdpa, which {type(model).__name__} with "
                f"{attention!r} has not",
                fix="layout auto or padded",
            )

    def _check_form(self, model: PreTrainedModel, packed: Packed, layout: str) -> None:
        kinds = packed.form.kinds
        if kinds is not None and kinds.max() + 1 != len(self.choices):
            raise UserError(
                f"answers of {int(kinds.max()) + 1} levels and slots, and a scorer for {len(self.levels)} levels and "
                f"{len(self.choices) - len(self.levels)} slots",
                fix="the template and the labels are those of the model",
            )
        if layout == "padded" and not packed.plain and not takes_mask(model):
            attention = model.config.get_text_config()._attn_implementation
            raise UserError(
                f"parallel reflection needs a mask of its own, which {type(model).__name__} with {attention!r} would "
                "not heed",
                fix="a template of layout causal, or a model with full attention computed by sdpa",
            )

    def _nothing(self, model: PreTrainedModel, rows: AnswerRows, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """Zeros that hang together with the weights: other processes wait for their gradients."""
        hidden = run(model, Feed.of_one_token(rows.prompt_ids.device))
        self.tokens_run, self.layout_run = 1, "padded"
        with output_matrix(model) as matrix:
            zero = 0.0 * (hidden.float().sum() + matrix.rows(torch.zeros(1, dtype=torch.int64)).weight.float().sum())
        nothing = zero * torch.zeros(rows.answer_ids.shape, device=zero.device)
        return nothing, nothing if entropy else None


def _code_of(ids: Tensor) -> np.ndarray:
    """Token id → code of the level, -1 for what is none."""
    codes = np.full(int(ids.max()) + 1, -1)
    codes[ids.numpy()] = np.arange(len(ids))
    return codes
