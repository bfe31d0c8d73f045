"""Answers of the model that is being trained: what TRL's trainer calls in place of `generate`.

    direct   an item at once: draws down the catalogue's trie with replacement (samples) or without (distinct), or the
             best items by beam search (beams)
    reason   free text until it opens an answer, by the engine or by vLLM, then one item down the trie, drawn likewise

Every draw keeps its log-probability under the distribution that it was drawn from: codes over the children that the
trie allows, text over the vocabulary, both after temperature and top-p. A trainer that normalises a code over the whole
vocabulary has a smaller probability for it: the two differ by the mass that the trie took away. For distinct items it
is the probability that one draw alone would have had; beams were not drawn, and have none.

Draws depend on the seed, a prompt's key and the number of the answer, not on what else is in a batch. Distinct items
depend on how many there are, too, and what TRL's vLLM writes on everything that it was asked before.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder, Normaliser
from recllm.decoding.chains import Sampling, WrittenChain
from recllm.decoding.head import check_normaliser
from recllm.errors import UserError
from recllm.reasoner import Reasoner, opened
from recllm.trainers.groups import Rollouts
from recllm.vllm_chains import ChainWriter

Direct = Literal["samples", "distinct", "beams"]
MODES = ("direct", "reason")
Row = Mapping[str, Any]  # of the data set: prompt_ids, mode, target (L codes, -1 where the item has no such level)


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """How answers are drawn. Greedy answers would all be one: temperature 0 is refused."""

    sampling: Direct = "samples"  # of direct prompts; an item after a chain is always one sample
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512  # of a chain, its opening included
    normaliser: Normaliser = "level"  # what beams are ranked by

    def __post_init__(self):
        if self.sampling not in get_args(Direct):
            raise UserError(f"sampling {self.sampling!r} is not one of {', '.join(get_args(Direct))}")
        if not self.temperature > 0:
            raise UserError(f"temperature {self.temperature} must be above 0", fix="answers of a group have to differ")
        if not isinstance(self.max_new_tokens, int):
            raise UserError(f"max_new_tokens must be a whole number, got {self.max_new_tokens!r}")
        check_normaliser(self.normaliser)
        if self.sampling == "distinct" and self.top_p < 1:
            raise UserError(f"top_p {self.top_p} may leave fewer items than are to be distinct", fix="top_p: 1")
        _ = self.of_chains  # refuses the rest

    @property
    def of_chains(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_new_tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutSource:
    """Answers come from the weights as they are when asked.

    Whatever replaces modules or moves them (PEFT, a device) has to have happened before the first call.
    """

    checkpoint: Checkpoint
    settings: RolloutSettings
    vllm: ChainWriter | None = None  # writes the chains in place of the model itself

    form, labels = None, ()  # an answer's tokens follow each other, and are text and codes

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, settings: RolloutSettings, vllm: ChainWriter | None = None,
        model: PreTrainedModel | None = None,
    ) -> "RolloutSource":  # fmt: skip
        """`model`: the one in training where it is not the checkpoint's own object, unwrapped."""
        own = checkpoint if model is None else dataclasses.replace(checkpoint, model=model)
        return cls(own, settings, vllm)

    def check(self, modes: Collection[str], answers: int) -> None:
        """At the start: would answers to a data set of these modes fail later, or a setting mean nothing?"""
        self._check(modes, answers)
        how = self.settings.sampling
        if "direct" not in modes and how != "samples":
            raise UserError(f"sampling {how!r} is for direct prompts, and there are none", fix="sampling: samples")
        if "reason" not in modes and self.vllm is not None:
            raise UserError("vLLM writes chains, and no prompt asks for one", fix="use_vllm: false")
        if "reason" in modes:
            _ = self.checkpoint.reasoning  # refuses a model that was not taught to

    def __call__(self, rows: Sequence[Row], answers: int, seed: int, keys: Sequence[object]) -> Rollouts:
        """`answers` to each row, in the order of the rows; `keys`: what a row's draws depend on beside the seed."""
        self._check({row["mode"] for row in rows}, answers)
        parts, order = [], []
        for mode, write in (("direct", self._direct), ("reason", self._reason)):
            places = [place for place, row in enumerate(rows) if row["mode"] == mode]
            if places:
                prompts = [list(rows[place]["prompt_ids"]) for place in places]
                parts.append(write(prompts, answers, seed, [keys[place] for place in places]))
                order += places
            elif mode == "reason" and self.vllm is not None:
                self.reasoner.chains([], answers, seed, [])  # a request that all processes take part in
        return Rollouts.joined(parts).take(sorted(range(len(order)), key=order.__getitem__))

    def anchor(self, row: Row, answer: Sequence[int], start: int) -> tuple[list[int], int]:
        """The truth as an answer to this row, in place of `answer` whose codes begin at `start`: ids, and its start.

        After a chain it stands where that chain opened its answer. One that never did is opened here, and shortened by
        as much as the opening needs: an anchor is never longer than an answer may be.
        """
        codes = self._ids_of(row["target"])
        if row["mode"] == "direct":
            return codes, 0
        if start < len(answer):
            return [*answer[:start], *codes], start
        opening, eos = self.reasoner.openings[0], self.checkpoint.tokenizer.eos_token_id
        chain = opened(_chain(answer, False), (), eos).ids  # without its end
        chain = [*chain[: max(0, self.settings.max_new_tokens - len(opening))], *opening]
        return [*chain, *codes], len(chain)

    def formed(self, rollouts: Rollouts, rows: Sequence[Row]) -> list[bool]:
        """Does each answer have the form that its prompt asks for? A direct one names an item; a reasoned one has the
        stages of a chain before it."""
        table = self.checkpoint.table
        items = table.rows_of(rollouts.codes.numpy())
        found = []
        for place, (ids, start) in enumerate(zip(rollouts.answers, rollouts.starts)):
            item = table.items[items[place]] if items[place] >= 0 else None
            if rows[place // rollouts.group]["mode"] == "direct":
                found.append(item is not None)
            else:
                found.append(self.reasoner.parsed(_chain(ids[:start], start < len(ids)), item) is not None)
        return found

    # ---- the two modes

    def _direct(self, prompts: list[list[int]], answers: int, seed: int, keys: Sequence[object]) -> Rollouts:
        how, decoder = self.settings, self.decoder
        if how.sampling == "beams":
            found = decoder.beams(prompts, answers)
        else:
            found = decoder.samples(
                prompts, answers, temperature=how.temperature, top_p=how.top_p, seed=seed, keys=keys,
                replacement=how.sampling == "samples",
            )  # fmt: skip
        assert bool((found.rows >= 0).all()), "there are as many items as answers (_check)"
        codes = found.codes.flatten(0, 1)  # (R, L)
        ids = [self._ids_of(some) for some in codes.tolist()]
        logps = None
        if found.logps is not None:
            logps = [some[: len(own)] for some, own in zip(found.logps.flatten(0, 1).tolist(), ids)]
        return Rollouts(prompts, ids, [0] * len(ids), codes, logps)

    def _reason(self, prompts: list[list[int]], answers: int, seed: int, keys: Sequence[object]) -> Rollouts:
        reasoner = self.reasoner
        written = reasoner.chains(prompts, answers, seed, keys)
        found = reasoner.one_answer_each(prompts, written, seed, keys)
        chains = [one for some in written for one in some]
        codes = found.codes.flatten(0, 1)
        # Where no chain came to an answer, nothing was drawn after any.
        drawn = torch.zeros(codes.shape) if found.logps is None else found.logps.flatten(0, 1)
        ids, logps = [], []
        for chain, own, values in zip(chains, codes.tolist(), drawn.tolist()):
            named = self._ids_of(own)
            ids.append([*chain.ids, *named])
            logps.append([*chain.logps, *values[: len(named)]])
        return Rollouts(prompts, ids, [len(chain.ids) for chain in chains], codes, logps)

    @property
    def decoder(self) -> Decoder:
        return _current(self._decoder, self.checkpoint.model)

    @property
    def reasoner(self) -> Reasoner:
        _current(self._reasoner.decoder, self.checkpoint.model)
        return self._reasoner

    @functools.cached_property
    def _decoder(self) -> Decoder:
        tokens, prefix = self.checkpoint.tokens, self.checkpoint.writer.prefix
        return Decoder(self.checkpoint.model, tokens, normaliser=self.settings.normaliser, prefix=prefix)

    @functools.cached_property
    def _reasoner(self) -> Reasoner:
        return Reasoner.of(self.checkpoint, self.settings.of_chains, self.settings.normaliser, vllm=self.vllm)

    def _ids_of(self, codes: Sequence[int]) -> list[int]:
        """Token ids of an item's codes; it may end before the last level."""
        return [int(self.checkpoint.tokens.levels[level][code]) for level, code in enumerate(codes) if code >= 0]

    def _check(self, modes: Collection[str], answers: int) -> None:
        how, items = self.settings.sampling, len(self.checkpoint.table)
        if unknown := sorted(set(modes) - set(MODES)):
            raise UserError(f"mode {unknown[0]!r} of a prompt is not one of {', '.join(MODES)}")
        if how == "beams" and "reason" in modes:
            raise UserError(
                "beams are for direct prompts alone: an answer after a chain is drawn, and the two cannot be weighed "
                "in one batch",
                fix="sampling: samples or distinct, or no reasoning prompts",
            )
        if how != "samples" and "direct" in modes and answers > items:
            raise UserError(
                f"num_generations {answers} is above the {items} items there are, and {how} are all different",
                fix="a lower num_generations, or sampling: samples",
            )


def _chain(ids: Sequence[int], opened: bool) -> WrittenChain:
    """Its draws do not matter here."""
    return WrittenChain(tuple(ids), (0.0,) * len(ids), opened)


def _current(decoder: Decoder, model: PreTrainedModel) -> Decoder:
    own: Tensor = model.get_output_embeddings().weight
    assert decoder.head.weight.data_ptr() == own.data_ptr(), "the head was replaced after the first call"
    return decoder
