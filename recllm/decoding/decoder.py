"""The engine: prompts in, items out. Batches, filters and seeds around the walks of `recllm.decoding.search`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.decoding.allowed import Allowed
from recllm.decoding.body import plain_attention
from recllm.decoding.branches import branches_of
from recllm.decoding.head import Head, Normaliser, check_normaliser
from recllm.decoding.memory import in_batches, prompts_at_once
from recllm.decoding.prompts import PromptBatch
from recllm.decoding.search import NONE, Found, Walk, beams, distinct_samples, samples
from recllm.errors import UserError
from recllm.files import digest
from recllm.tokenization import ItemTokens
from recllm.trie import SemanticIdTrie

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Answers:
    """What was found for each prompt. Where fewer items were possible: row -1, codes -1, score -inf."""

    rows: Tensor  # (P, G) int64, items of the table
    codes: Tensor  # (P, G, L) int64
    scores: Tensor  # (P, G) log-probability under the decoder's normaliser
    logps: Tensor | None = None  # (P, G, L) of samples: log-probability of each draw, temperature and top-p included


class Behind(NamedTuple):
    """What is computed behind each prompt."""

    tokens: int  # in a row
    branches: int  # at a time
    positions: int  # in all


class Decoder:
    """A model and the items it may answer with.

    Answers are those of the weights as they are when asked, without dropout; the model is left as it was. `fits` is the
    batch size that memory has allowed so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: ItemTokens | Sequence[Tensor],
        trie: SemanticIdTrie | None = None,
        *,
        normaliser: Normaliser = "level",
        prefix: Sequence[int] = (),
        batch_size: int | None = None,
    ):
        """`tokens`: where the codes are in the vocabulary; `prefix`: what all prompts begin with, computed once."""
        check_normaliser(normaliser)
        if trie is None:
            trie = SemanticIdTrie.from_codes(tokens.table.codes, tokens.table.sizes)
        levels = tokens.levels if isinstance(tokens, ItemTokens) else tokens
        if len(levels) != trie.levels or any(len(ids) < size for ids, size in zip(levels, trie.sizes)):
            raise UserError(f"tokens for {[len(ids) for ids in levels]} codes do not fit the index's {trie.sizes}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.normaliser, self.batch_size = model, normaliser, batch_size
        # Padding stands between prefix and prompt, and a window would count it: there each prompt is computed whole.
        self.prefix = tuple(prefix) if plain_attention(model) else ()
        self.fits: int | None = None
        self.trie, self.items = trie.to(model.device), trie.to("cpu")  # for the search; for naming what it found
        with without_dropout(model):
            self.head = Head(model, levels)

    def beams(
        self,
        prompts: Prompts,
        width: int,
        allowed: Tensor | None = None,
        exclude: Sequence[Sequence[int]] | None = None,
    ) -> Answers:
        """The `width` best items by beam search. `allowed` (N,) bool and `exclude` (rows for each prompt) filter."""
        return self._answer(prompts, width, allowed, exclude, lambda walk, _: beams(walk, width))

    def greedy(self, prompts: Prompts, **filters) -> Answers:
        """The best code at every level."""
        return self.beams(prompts, 1, **filters)

    def samples(
        self, prompts: Prompts, answers: int, *, temperature: float = 1.0, top_p: float = 1.0, replacement: bool = True,
        seed: int = 0, keys: Sequence[object] | None = None, allowed: Tensor | None = None,
        exclude: Sequence[Sequence[int]] | None = None,
    ) -> Answers:  # fmt: skip
        """`answers` draws from softmax(logits / temperature) over the allowed children of each prefix, cut at top_p.

        Without replacement they are different items. A prompt's draws depend on the seed and its key (without `keys`,
        its place among the prompts), not on the batches.
        """
        if temperature <= 0 or not 0 < top_p <= 1:
            raise UserError(
                f"temperature {temperature} must be above 0, top_p {top_p} in (0, 1]", fix="greedy draws nothing"
            )
        levels, device = self.trie.levels, self.trie.rows.device

        def draw(walk: Walk, places: Sequence[int]) -> Found:
            generators = [generator_of(seed, place if keys is None else keys[place]) for place in places]
            if replacement:
                uniform = torch.stack([torch.rand(answers, levels, generator=g) for g in generators])
                return samples(walk, uniform.to(device), temperature, top_p)

            def noise(depth: int, shape: torch.Size) -> Tensor:
                uniform = torch.stack([torch.rand(shape[1:], generator=g) for g in generators])
                return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))).to(device)

            return distinct_samples(walk, noise, answers, temperature, top_p)

        return self._answer(prompts, answers, allowed, exclude, draw, repeated=replacement)

    def _answer(
        self, prompts: Prompts, answers: int, allowed: Tensor | None, exclude: Sequence[Sequence[int]] | None,
        search: Callable[[Walk, Sequence[int]], Found], repeated: bool = False,
    ) -> Answers:  # fmt: skip
        """`repeated`: may two branches say the same?"""
        if answers < 1:
            raise UserError(f"at least one answer a prompt is needed, got {answers}")
        shape, levels = (len(prompts), answers), self.trie.levels
        leaves, scores = torch.full(shape, -1), torch.full(shape, NONE)
        logps = torch.zeros(*shape, levels)
        drawn = False

        def work(walk: Walk, places: Sequence[int]) -> None:
            nonlocal drawn
            found = search(walk, places)
            width = found.leaves.size(1)
            leaves[places, :width], scores[places, :width] = found.leaves.cpu(), found.scores.float().cpu()
            if found.logps is not None:
                logps[places, :width], drawn = found.logps.float().cpu(), True

        positions = answers * (levels - 1) if repeated else self.positions(answers)
        self.walk(prompts, Behind(levels, answers, positions), work, allowed, exclude)
        return self.named(leaves, scores, logps if drawn else None)

    @torch.no_grad()
    def walk(
        self, prompts: Prompts, behind: Behind, work: Callable[[Walk, Sequence[int]], None],
        allowed: Tensor | None = None, exclude: Sequence[Sequence[int]] | None = None,
        read: Sequence[Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        """work(walk, places of its prompts) for every batch, in the sizes that memory allows.

        `read`: the tokens of each prompt whose states `work` reads, by their place in it, behind the prefix.
        """
        lengths = self._checked_lengths(prompts, behind.tokens)
        shared = Allowed.of(self.trie, allowed)
        if shared.below is not None and not int(shared.below[-1]):
            raise UserError("the filter leaves no item to recommend", fix="loosen it")
        order = sorted(range(len(prompts)), key=lambda place: (-lengths[place], place))  # like lengths side by side

        def one_batch(start: int, end: int) -> None:
            places = order[start:end]
            asked = [read[place] for place in places] if read else None
            batch = PromptBatch.of([prompts[place] for place in places], self.prefix, self.model.device, asked)
            some = shared.without(self.trie, [exclude[place] for place in places]) if exclude else shared
            branches = branches_of(self.model, batch, behind.positions)
            work(Walk(branches, self.head, self.trie, self.normaliser, some), places)

        self.head.gather()
        with without_dropout(self.model):
            size = self.batch_size or self._fitting(lengths, behind)
            fits = in_batches(len(prompts), min(size, self.fits or size), one_batch)
        self.fits = fits if fits < size else self.fits

    def positions(self, width: int) -> int:
        """Tokens that a search of `width` different branches computes behind a prompt, at most."""
        return sum(min(width, self.trie.nodes(depth)) for depth in range(1, self.trie.levels))

    def _checked_lengths(self, prompts: Prompts, behind: int) -> list[int]:
        lengths = [len(prompt) for prompt in prompts]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for place, length in enumerate(lengths):
            if length <= len(self.prefix):
                raise UserError(f"prompt {place} is empty", fix="begin it with a token that stands for a start")
            if tuple(prompts[place][: len(self.prefix)]) != self.prefix:
                raise UserError(f"prompt {place} does not begin with the prefix of the decoder")
            if context and length + behind > context:
                raise UserError(
                    f"a prompt of {length:,} tokens and an answer of {behind} do not fit the model's context "
                    f"of {context:,}",
                    fix="shorter histories (--max_history)",
                )
        return lengths

    def _fitting(self, lengths: Sequence[int], behind: Behind) -> int:
        if not lengths:
            return 1
        fanout = max(self.trie.fanout)
        return prompts_at_once(self.model, max(lengths), behind.positions, behind.branches, fanout)

    def named(self, leaves: Tensor, scores: Tensor, logps: Tensor | None = None) -> Answers:
        """Leaves of the trie → rows and codes of the items."""
        none = leaves < 0
        rows = self.items.rows[leaves.clamp(min=0)].long().masked_fill(none, -1)
        return Answers(
            rows, self.items.codes_of_leaves(leaves.clamp(min=0)).masked_fill(none.unsqueeze(-1), -1), scores, logps
        )


@contextlib.contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def generator_of(seed: int, *which: object) -> torch.Generator:
    """One for each prompt. torch keeps the last 32 bits of a seed, so seed and place are hashed into them."""
    return torch.Generator().manual_seed(int(digest(str(seed), *map(str, which))[:8], 16))


def beam_search(
    model: PreTrainedModel, prompts: Prompts, trie: SemanticIdTrie, beams: int, tokens: ItemTokens | Sequence[Tensor],
    normaliser: Normaliser = "level", **filters,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (P, B, L) and scores (P, B) of the `beams` most probable items after each prompt, best first.

    `tokens`: the token ids of each level's codes, (V,) each, or ItemTokens.of(tokenizer, table).
    """
    found = Decoder(model, tokens, trie, normaliser=normaliser).beams(prompts, beams, **filters)
    return found.codes, found.scores
