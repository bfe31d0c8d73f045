"""Free text before an answer: several samples of a prompt that is computed once, until each opens its answer or ends.

Differences from HF `generate` with num_return_sequences:

1. The prompt is computed once, and its cache repeated for the samples.
2. A sample ends where it has written the opening of an answer; what comes then is the constrained engine's work.
3. A sample that has ended leaves the batch at once, cache and all: those that go on for long cost only themselves.
4. A draw depends on the seed, the prompt's key and the sample's number: not on what else is in the batch.
5. The log-probability of every draw is kept, under the distribution that it was drawn from.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.decoding.body import backbone, plain_attention
from recllm.decoding.branches import prefill
from recllm.decoding.decoder import Prompts, generator_of, without_dropout
from recllm.decoding.head import finish_of
from recllm.decoding.memory import in_batches, prompts_at_once
from recllm.decoding.prompts import PromptBatch
from recllm.errors import UserError

LIKELY = 1024  # the tokens that top-p looks at first: sorting the whole vocabulary at every step is seldom needed


@dataclasses.dataclass(frozen=True)
class WrittenChain:
    """One sample. The opening, or the end token, stands at its end if it was written."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]  # of each draw, temperature and top-p included; 0 where the best was taken
    opened: bool  # does an answer begin right after it?

    @property
    def logp(self) -> float:
        return sum(self.logps)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How free text is drawn. Temperature 0 takes the best token every time."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature {self.temperature} must be at least 0, top_p {self.top_p} in (0, 1]")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


def sample_chains(
    model: PreTrainedModel, prompts: Prompts, n: int, *, openings: Sequence[Sequence[int]], eos: int,
    sampling: Sampling = Sampling(), seed: int = 0, keys: Sequence[object] | None = None, prefix: Sequence[int] = (),
    batch_size: int | None = None,
) -> list[list[WrittenChain]]:  # fmt: skip
    """`n` texts after each prompt.   P prompts -> P lists of n

    openings    the ways in which an answer is opened, as token ids (`recllm.rollouts.openings_of`)
    keys        of each prompt, what its draws depend on beside the seed; its place among the prompts without them
    prefix      what all prompts begin with, computed once a batch
    batch_size  prompts at a time, n rows each; by default what memory allows
    """
    if n < 1:
        raise UserError(f"at least one chain a prompt is needed, got {n}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    lengths = _checked_lengths(model, prompts, sampling.max_new_tokens)
    keys = range(len(prompts)) if keys is None else keys
    prefix = prefix if plain_attention(model) else ()  # padding stands behind it, and a window would count it
    order = sorted(range(len(prompts)), key=lambda place: (-lengths[place], place))  # like lengths side by side
    found: list[list[WrittenChain]] = [[] for _ in prompts]
    endings = tuple(map(tuple, openings))

    def work(start: int, end: int) -> None:
        places = order[start:end]
        batch = PromptBatch.of([prompts[place] for place in places], prefix, model.device)
        uniform = torch.stack([
            torch.rand(sampling.max_new_tokens, generator=generator_of(seed, keys[place], "chain", sample))
            for place in places for sample in range(n)
        ])  # fmt: skip
        written = _write(model, batch, n, endings, eos, sampling, uniform)
        for row, place in enumerate(places):
            found[place] = written[row * n : (row + 1) * n]

    size = batch_size or _fitting(model, lengths, n, sampling.max_new_tokens)
    with torch.no_grad(), without_dropout(model):
        in_batches(len(prompts), size, work)
    return found


def _write(
    model: PreTrainedModel, batch: PromptBatch, n: int, openings: Sequence[tuple[int, ...]], eos: int,
    sampling: Sampling, uniform: Tensor,
) -> list[WrittenChain]:  # fmt: skip
    """R = P·n rows, token by token; `uniform` (R, most tokens) decides the draws."""
    body, head, finish = backbone(model), model.get_output_embeddings(), finish_of(model)
    cache, seen, states = prefill(model, batch)
    hidden = states[:, -1]
    if n > 1:
        cache.batch_repeat_interleave(n)
    seen, hidden = seen.repeat_interleave(n, dim=0), hidden.repeat_interleave(n, dim=0)  # (R, T), (R, D)
    lengths = batch.lengths.repeat_interleave(n)
    rows = list(range(len(seen)))  # which samples the rows that are left belong to
    ids: list[list[int]] = [[] for _ in rows]
    logps: list[list[float]] = [[] for _ in rows]
    opened = [False] * len(rows)
    for step in range(uniform.size(1)):
        logits = finish(head(hidden.to(head.weight.dtype))).float()
        drawn, logp = draw(logits, uniform[rows, step].to(logits.device), sampling.temperature, sampling.top_p)
        kept = []
        for place, (row, token, value) in enumerate(zip(rows, drawn.tolist(), logp.tolist())):
            ids[row].append(token)
            logps[row].append(value)
            opened[row] = any(tuple(ids[row][-len(tag) :]) == tag for tag in openings)
            if not opened[row] and token != eos:
                kept.append(place)
        if not kept or step + 1 == uniform.size(1):
            break
        if len(kept) < len(rows):
            places = torch.tensor(kept, device=drawn.device)
            cache.batch_select_indices(places)
            seen, lengths, drawn = seen[places], lengths[places], drawn[places]
            rows = [rows[place] for place in kept]
        seen = torch.nn.functional.pad(seen, (0, 1), value=True)
        hidden = body(
            input_ids=drawn.unsqueeze(1),
            attention_mask=None if bool(seen.all()) else seen.long(),
            position_ids=(lengths + step).unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return [WrittenChain(tuple(some), tuple(those), there) for some, those, there in zip(ids, logps, opened)]


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens, and their log-probabilities as drawn, from softmax(logits / temperature) cut to the fewest that reach
    top_p.   (R, V), (R,) in [0, 1) -> (R,), (R,)

    Tokens stand by falling probability; the first whose cumulated share exceeds the number is taken.
    """
    if temperature == 0:
        best = logits.argmax(dim=-1)
        return best, torch.zeros_like(logits[:, 0])
    logps = (logits / temperature).log_softmax(dim=-1)
    if top_p >= 1 or logps.size(-1) <= LIKELY:
        return _take(*logps.sort(dim=-1, descending=True, stable=True), uniform, top_p)
    likely = logps.topk(LIKELY, dim=-1)
    drawn, logp = _take(*likely, uniform, top_p)
    if (wide := likely.values.exp().sum(dim=-1) < top_p).any():  # these rows' nucleus is larger
        some = logps[wide].sort(dim=-1, descending=True, stable=True)
        drawn[wide], logp[wide] = _take(*some, uniform[wide], top_p)
    return drawn, logp


def _take(logps: Tensor, tokens: Tensor, uniform: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The draw from tokens in the order of their probability.   (R, C), (R, C), (R,) -> (R,), (R,)"""
    shares = logps.double().exp()
    if top_p < 1:
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= top_p, 0)  # what stands before reaches it
    cumulated = shares.cumsum(dim=-1)
    total = cumulated[:, -1:]
    chosen = torch.searchsorted(cumulated, uniform.double().unsqueeze(1) * total, right=True)  # (R, 1)
    chosen = torch.minimum(chosen, (shares > 0).sum(dim=-1, keepdim=True) - 1)
    logp = logps.double().gather(1, chosen) - total.log()
    return tokens.gather(1, chosen).squeeze(1), logp.squeeze(1).float()


def _checked_lengths(model: PreTrainedModel, prompts: Prompts, most: int) -> list[int]:
    lengths = [len(prompt) for prompt in prompts]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and max(lengths, default=0) + most > context:
        raise UserError(
            f"a prompt of {max(lengths):,} tokens and {most:,} to reason with do not fit the model's context of "
            f"{context:,}",
            fix="shorter histories (--max_history), or a smaller max_new_tokens",
        )
    if 0 in lengths:
        raise UserError(f"prompt {lengths.index(0)} is empty", fix="begin it with a token that stands for a start")
    return lengths


def _fitting(model: PreTrainedModel, lengths: Sequence[int], n: int, most: int) -> int:
    """Prompts at a time: each has n rows, with caches of their own."""
    vocabulary = model.get_output_embeddings().weight.size(0)
    return prompts_at_once(model, n * (max(lengths, default=0) + most), 0, n, vocabulary)
