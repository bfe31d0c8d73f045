"""Chains from vLLM, many at a time; their answers are the engine's of `recllm.decoding`, as those of other chains.

So an answer is constrained, excludes what it shall, and is scored in one way, whoever wrote the chain. A request has
the seed of its prompt's key, but vLLM's arithmetic depends on what else is in a batch: a draw near a boundary may fall
otherwise when a run is resumed.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from recllm.decoding.chains import Sampling, WrittenChain
from recllm.decoding.decoder import Prompts, generator_of
from recllm.errors import UserError
from recllm.reasoning import OPENING

MEMORY = 0.55  # of a GPU for vLLM: the model that answers lies beside


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
                logprobs=0, stop=[OPENING], include_stop_str_in_output=True, skip_special_tokens=False,
                spaces_between_special_tokens=False, seed=generator_of(seed, key, "chain").initial_seed(),
            )
            for key in keys
        ]  # fmt: skip
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(asked, parameters, use_tqdm=False)
        greedy = sampling.temperature == 0
        return [[_chain(one, openings, greedy) for one in output.outputs] for output in outputs]


def _chain(output, openings: Sequence[tuple[int, ...]], greedy: bool) -> WrittenChain:
    ids = tuple(output.token_ids)
    logps = tuple(0.0 if greedy else step[id].logprob for id, step in zip(ids, output.logprobs, strict=True))
    return WrittenChain(ids, logps, any(ids[-len(tag) :] == tag for tag in openings))
