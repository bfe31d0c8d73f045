"""The settings of every stage that has text written, and the teacher they describe."""

import json
from dataclasses import dataclass, field
from typing import Literal

from recllm.errors import UserError
from recllm.teacher.openai_server import OpenAITeacher
from recllm.teacher.request import OfflineTeacher, Sampling, Teacher
from recllm.teacher.vllm_batch import VLLMTeacher


@dataclass
class TeacherConfig:
    teacher: Literal["offline", "openai", "vllm"] = field(
        default="offline",
        metadata={"help": "Who writes: templates, any OpenAI-compatible server, or vLLM on this machine's GPUs."},
    )
    teacher_model: str | None = field(default=None, metadata={"help": "Name or path; `openai` and `vllm` need one."})
    base_url: str | None = field(default=None, metadata={"help": "Of the server, e.g. http://localhost:8000/v1."})
    api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "The environment variable that holds the key."},
    )
    concurrency: int = field(default=32, metadata={"help": "Requests under way at a time."})
    retries: int = field(default=8, metadata={"help": "Of a request that met 429, 5xx or a lost connection."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for one answer."})
    temperature: float | None = field(default=0.7, metadata={"help": "Below 0: not sent."})
    top_p: float | None = field(default=None, metadata={"help": "Not sent by default."})
    max_tokens: int | None = field(default=512, metadata={"help": "Of an answer. 0: not sent."})
    teacher_seed: int | None = field(default=0, metadata={"help": "Sent with every request; below 0: not sent."})
    extra_body: str | None = field(
        default=None,
        metadata={"help": 'JSON, further request fields, e.g. {"chat_template_kwargs": {"enable_thinking": false}}.'},
    )
    input_price: float = field(default=0.0, metadata={"help": "Per million tokens, for the estimate."})
    output_price: float = field(default=0.0, metadata={"help": "Per million tokens, for the estimate."})
    estimate_only: bool = field(default=False, metadata={"help": "Say what it would take, and stop."})

    def __post_init__(self):
        if self.teacher != "offline" and not self.teacher_model:
            raise UserError(f"the {self.teacher} teacher needs a model", fix="--teacher_model NAME")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise UserError("concurrency, retries or timeout is out of range", fix="at least 1, 0 and more than 0")
        self.sampling()  # refuses bad values now rather than after an hour

    def sampling(self) -> Sampling:
        """A negative or zero number on the command line stands for YAML's null: not sent."""
        try:
            extra = json.loads(self.extra_body or "{}")
        except json.JSONDecodeError as error:
            raise UserError(f"extra_body is not JSON ({error.msg})", fix="quote it for the shell") from None
        if not isinstance(extra, dict):
            raise UserError("extra_body is not a JSON object", fix='{"name": value}')
        temperature = None if self.temperature is not None and self.temperature < 0 else self.temperature
        seed = None if self.teacher_seed is not None and self.teacher_seed < 0 else self.teacher_seed
        return Sampling(temperature, self.top_p, self.max_tokens or None, seed, extra)

    def make(self) -> Teacher:
        if self.teacher == "offline":
            return OfflineTeacher()
        if self.teacher == "vllm":
            return VLLMTeacher(self.teacher_model, self.sampling())
        return OpenAITeacher(
            self.teacher_model, self.sampling(), self.base_url, self.api_key_env,
            self.concurrency, self.retries, self.timeout,
        )  # fmt: skip
