"""A teacher on this machine's GPUs: vLLM in offline batch mode. Written for vLLM 0.31; it has not been run."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

from recllm.errors import UserError
from recllm.teacher.request import Request, Sampling, model_cache_key

CHUNK = 1024  # requests handed to vLLM at a time: what an interruption can lose


@dataclasses.dataclass(frozen=True)
class VLLMTeacher:
    """`vllm.LLM(model).chat(…)`, chunk by chunk; vLLM batches within a chunk."""

    model: str
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    tensor_parallel_size: int = 1

    def cache_key(self, request: Request) -> str:
        return model_cache_key(self.model, self.sampling, request)

    @functools.cached_property
    def _engine(self):
        try:
            import vllm
        except ImportError:
            raise UserError("vLLM is not installed", fix="pip install -r requirements-gpu.txt (needs a GPU)") from None
        seed = self.sampling.seed or 0
        return vllm.LLM(model=self.model, tensor_parallel_size=self.tensor_parallel_size, seed=seed)

    def write(self, requests: Iterable[Request]) -> Iterator[tuple[Request, str]]:
        engine = self._engine
        from vllm import SamplingParams

        extra = dict(self.sampling.extra)
        template = extra.pop("chat_template_kwargs", None)  # the one field that is not a sampling parameter here
        parameters = SamplingParams(**self.sampling.given(), **extra)
        requests = iter(requests)
        while chunk := list(itertools.islice(requests, CHUNK)):
            conversations = [list(request.messages) for request in chunk]
            answers = engine.chat(conversations, parameters, chat_template_kwargs=template, use_tqdm=False)
            for request, answer in zip(chunk, answers, strict=True):
                written = answer.outputs[0]
                yield request, "" if written.finish_reason == "length" else written.text
