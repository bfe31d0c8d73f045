"""Chains from vLLM, many at a time; their answers are the engine's of `recllm.decoding`, as those of other chains.

So an answer is constrained, excludes what it shall, and is scored in one way, whoever wrote the chain. A request has
the seed of its prompt's key, but vLLM's arithmetic depends on what else is in a batch: a draw near a boundary may fall
otherwise when a run is resumed. `TRLChains` has no such seeds: TRL gives all its requests the same parameters.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from recllm.decoding.chains import Sampling, WrittenChain
from recllm.decoding.decoder import Prompts, generator_of
from recllm.errors import UserError
from recllm.reasoning import OPENING

MEMORY = 0.55  # of a GPU for vLLM: the model that answers lies beside
# A chain ends with its opening, which belongs to it.
STOPPING = {
    "stop": [OPENING],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
}


class ChainWriter(Protocol):
    """What `Reasoner` and the rollouts of a training ask for chains."""

    def __call__(
        self, prompts: Prompts, n: int, openings: Sequence[tuple[int, ...]], sampling: Sampling, seed: int,
        keys: Sequence[object],
    ) -> list[list[WrittenChain]]: ...  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VLLMChains:
    """`vllm.LLM` on the checkpoint's folder, or its repository; started when the first chain is asked for."""

    model: str
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of vllm.LLM

    def __post_init__(self):
        if importlib.util.find_spec("vllm") is None:
            raise UserError("vLLM is not installed", fix="pip install -r requirements-gpu.txt, or engine hf")

    @functools.cached_property
    def llm(self):
        import vllm

        given = {"gpu_memory_utilization": MEMORY, "logprobs_mode": "processed_logprobs"}
        if vllm.platforms.current_platform.is_cpu():
            given["enable_chunked_prefill"] = False  # a seeded request in pieces crashes vLLM 0.31 on a CPU
        return vllm.LLM(model=self.model, **{**given, **self.engine})

    def __call__(
        self, prompts: Prompts, n: int, openings: Sequence[tuple[int, ...]], sampling: Sampling, seed: int,
        keys: Sequence[object],
    ) -> list[list[WrittenChain]]:  # fmt: skip
        """As `recllm.decoding.chains.sample_chains`, with other draws."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                n=n, temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens,
                logprobs=0, seed=generator_of(seed, key, "chain").initial_seed(), **STOPPING,
            )
            for key in keys
        ]  # fmt: skip
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(asked, parameters, use_tqdm=False)
        greedy = sampling.temperature == 0
        return [[_chain(one, openings, greedy) for one in output.outputs] for output in outputs]


@dataclasses.dataclass(frozen=True, eq=False)
class TRLChains:
    """The vLLM that a trainer of TRL's holds (`trainer.vllm_generation`), in its process or a server, with the weights
    that TRL gave it last.

    Settings of ours go with each call, so none of GRPOConfig's can disagree. Draws come from one stream for all
    requests: `seed` and `keys` change nothing, and a run that is resumed draws otherwise.
    """

    generation: Any  # trl.generation.vllm_generation.VLLMGeneration

    def __post_init__(self):
        asked = self.generation
        odd = {
            "top_k": asked.top_k not in (0, -1, None),
            "min_p": asked.min_p not in (0, None),
            "repetition_penalty": asked.repetition_penalty != 1,
            "vllm_structured_outputs_regex": asked.structured_outputs_regex is not None,
            "generation_kwargs": bool(asked.generation_kwargs) and asked.generation_kwargs != STOPPING,
        }
        for name in (name for name, is_odd in odd.items() if is_odd):
            raise UserError(f"{name} is set, which answers after a chain would not follow", fix="leave it out")

    def __call__(
        self, prompts: Prompts, n: int, openings: Sequence[tuple[int, ...]], sampling: Sampling, seed: int,
        keys: Sequence[object],
    ) -> list[list[WrittenChain]]:  # fmt: skip
        """As `recllm.decoding.chains.sample_chains`. Every process of a training has to ask, if only for nothing."""
        asked = self._as_many_everywhere([list(prompt) for prompt in prompts])
        if not asked:
            return []
        with _set(
            self.generation, temperature=sampling.temperature, top_p=sampling.top_p,
            max_completion_length=sampling.max_new_tokens, generation_kwargs=dict(STOPPING),
        ):  # fmt: skip
            repeated = [prompt for prompt in asked for _ in range(n)]  # TRL itself takes every n-th for its server
            _, ids, logps, which = self.generation.generate(prompts=repeated, images=None, num_generations=n)
        if logps is None:
            raise UserError("vLLM reported no log-probs", fix="start its server as TRL's documentation says")
        rows = len(prompts) * n
        written = [_written(*one, openings, sampling) for one in zip(ids[:rows], logps, which)]
        return [written[start : start + n] for start in range(0, rows, n)]

    def _as_many_everywhere(self, prompts: list[list[int]]) -> list[list[int]]:
        """Where processes ask together, TRL takes it that all ask for as many: filled up with what nobody will read."""
        generation = self.generation
        together = generation.mode == "server" or generation.tensor_parallel_size > 1
        if not together or generation.accelerator.num_processes == 1:
            return prompts
        from accelerate.utils import gather_object

        most = max(gather_object([len(prompts)]))
        return prompts + [[generation.processing_class.eos_token_id]] * (most - len(prompts))


@contextlib.contextmanager
def _set(thing: Any, **values: Any) -> Iterator[None]:
    """Attributes that are there, for as long as this lasts."""
    before = {name: getattr(thing, name) for name in values}
    vars(thing).update(values)
    try:
        yield
    finally:
        vars(thing).update(before)


def _written(
    ids: Sequence[int], logps: Sequence[Sequence[float | None]], which: Sequence[Sequence[int]],
    openings: Sequence[tuple[int, ...]], sampling: Sampling,
) -> WrittenChain:  # fmt: skip
    """From TRL: of each token, the log-probs of the likeliest few and of itself, and whose they are.

    One that vLLM could not tell is nan, which TRL's correction for the sampler takes for no difference.
    """
    own = [dict(zip(tokens, values))[id] for id, tokens, values in zip(ids, which, logps, strict=True)]
    own = [0.0 if sampling.temperature == 0 else math.nan if value is None else value for value in own]
    return WrittenChain(tuple(ids), tuple(own), _opens(ids, openings))


def _chain(output, openings: Sequence[tuple[int, ...]], greedy: bool) -> WrittenChain:
    ids = tuple(output.token_ids)
    logps = tuple(0.0 if greedy else step[id].logprob for id, step in zip(ids, output.logprobs, strict=True))
    return WrittenChain(ids, logps, _opens(ids, openings))


def _opens(ids: Sequence[int], openings: Sequence[tuple[int, ...]]) -> bool:
    return any(tuple(ids[-len(tag) :]) == tag for tag in openings)
