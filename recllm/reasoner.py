"""A checkpoint that thinks first: a chain in free text, then an item under the catalogue's constraint.

An answer's score is the log-probability of its codes after prompt and chain, under the decoder's normaliser; how
probable the chain was stands beside it and is not part of it.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from recllm.checkpoint import Checkpoint
from recllm.decoding import Answers, Decoder, Normaliser
from recllm.decoding.chains import Sampling, WrittenChain, sample_chains
from recllm.decoding.search import NONE
from recllm.errors import UserError
from recllm.prompting import PromptWriter
from recllm.reasoning import CLOSING, OPENING, Chain, NotAChain
from recllm.rollouts import openings_of
from recllm.vllm_chains import ChainWriter

Chains = list[list[WrittenChain]]  # P lists of n


@dataclasses.dataclass(frozen=True, eq=False)
class Reasoner:
    checkpoint: Checkpoint
    writer: PromptWriter
    decoder: Decoder
    openings: tuple[tuple[int, ...], ...]
    sampling: Sampling
    batch_size: int | None = None
    vllm: ChainWriter | None = None  # writes the chains in place of the checkpoint's own model

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, sampling: Sampling, normaliser: Normaliser = "level",
        batch_size: int | None = None, vllm: ChainWriter | None = None,
    ) -> "Reasoner":  # fmt: skip
        """Refuses a model that was not taught to reason. `batch_size`: histories whose chains are written at once."""
        writer, tokenizer = checkpoint.writer_of(checkpoint.reasoning), checkpoint.tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token, so a chain cannot end", fix="set its eos_token")
        decoder = Decoder(checkpoint.model, checkpoint.tokens, normaliser=normaliser, prefix=writer.prefix)
        return cls(checkpoint, writer, decoder, openings_of(tokenizer, OPENING), sampling, batch_size, vllm)

    def chains(
        self, prompts: Sequence[Sequence[int]], n: int = 1, seed: int = 0, keys: Sequence[object] | None = None
    ) -> Chains:
        """`keys`: of each prompt, what its draws depend on beside the seed; its place without them."""
        if self.vllm is not None:
            keys = range(len(prompts)) if keys is None else keys
            return self.vllm(prompts, n, self.openings, self.sampling, seed, keys)
        return sample_chains(
            self.checkpoint.model, prompts, n, openings=self.openings, eos=self.checkpoint.tokenizer.eos_token_id,
            sampling=self.sampling, seed=seed, keys=keys, prefix=self.writer.prefix, batch_size=self.batch_size,
        )  # fmt: skip

    def one_answer_each(
        self, prompts: Sequence[Sequence[int]], chains: Chains, seed: int = 0, keys: Sequence[object] | None = None,
        allowed: Tensor | None = None, exclude: Sequence[Sequence[int]] | None = None,
    ) -> Answers:  # fmt: skip
        """An item after each of the P·n chains, drawn as the chain was: rows (P, n). None after a chain without end."""
        keys = range(len(prompts)) if keys is None else keys
        places = [(case, sample) for case, some in enumerate(chains) for sample, one in enumerate(some) if one.opened]
        whole = [[*prompts[case], *chains[case][sample].ids] for case, sample in places]
        own = None if exclude is None else [exclude[case] for case, _ in places]
        if self.sampling.temperature == 0:
            found = self.decoder.greedy(whole, allowed=allowed, exclude=own)
        else:
            found = self.decoder.samples(
                whole, 1, temperature=self.sampling.temperature, top_p=self.sampling.top_p, seed=seed,
                keys=[f"{sample} {keys[case]}" for case, sample in places], allowed=allowed, exclude=own,
            )  # fmt: skip
        return _spread(found, places, (len(prompts), len(chains[0]) if chains else 0), first=True)

    def beams(
        self, prompts: Sequence[Sequence[int]], chains: Chains, width: int, allowed: Tensor | None = None,
        exclude: Sequence[Sequence[int]] | None = None,
    ) -> Answers:  # fmt: skip
        """The best items after each prompt's first chain: rows (P, width). None after a chain without end."""
        places = [(case, 0) for case, some in enumerate(chains) if some[0].opened]
        whole = [[*prompts[case], *chains[case][0].ids] for case, _ in places]
        own = None if exclude is None else [exclude[case] for case, _ in places]
        found = self.decoder.beams(whole, width, allowed, own)
        return _spread(found, places, (len(prompts), width), first=False)

    # ---- as people read it

    def text(self, chain: WrittenChain) -> str:
        """What was written, without the end token."""
        eos = self.checkpoint.tokenizer.eos_token_id
        ids = chain.ids[:-1] if chain.ids and chain.ids[-1] == eos else chain.ids
        return self.checkpoint.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def parsed(self, chain: WrittenChain, item: str | None) -> Chain | None:
        """Its stages, with this item as the answer; None if it does not have the form, or opens no answer."""
        if item is None or not chain.opened:
            return None
        table = self.checkpoint.table
        try:
            return Chain.parse(self.text(chain) + table.text_of(item) + CLOSING, table)
        except (NotAChain, UserError):
            return None


def opened(chain: WrittenChain, opening: Sequence[int], eos: int) -> WrittenChain:
    """The same, where it came to no answer cut short by an opening that is set, with probability 1, not written."""
    if chain.opened:
        return chain
    ended = bool(chain.ids) and chain.ids[-1] == eos
    ids, logps = (chain.ids[:-1], chain.logps[:-1]) if ended else (chain.ids, chain.logps)
    return WrittenChain((*ids, *opening), (*logps, *(0.0 for _ in opening)), True)


def _spread(found: Answers, places: Sequence[tuple[int, int]], shape: tuple[int, int], first: bool) -> Answers:
    """Answers of the chains that came to one, at their places among all.   (M, G) -> (P, n) or (P, G)"""
    levels = found.codes.size(-1)
    rows, scores = torch.full(shape, -1), torch.full(shape, NONE)
    codes = torch.full((*shape, levels), -1)
    logps = None if found.logps is None else torch.zeros(*shape, levels)
    if places:
        at = tuple(torch.tensor(places).T) if first else torch.tensor([case for case, _ in places])
        pick = 0 if first else slice(None)
        rows[at], scores[at], codes[at] = found.rows[:, pick], found.scores[:, pick], found.codes[:, pick]
        if logps is not None:
            logps[at] = found.logps[:, pick]
    return Answers(rows, codes, scores, logps)
