"""What a stage asks of a teacher, and what a teacher is. The stage brings prompt and offline text together."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Protocol

from recllm.errors import UserError
from recllm.files import digest

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": "…"}


@dataclasses.dataclass(frozen=True)
class Request:
    """key: what the text is about, for messages to people (an item's id); offline: what the template writer says."""

    key: str
    messages: tuple[Message, ...]
    offline: str


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a model writes. A setting that is None is not sent: the server's own default holds.

    extra: further fields of a chat request, e.g. {"chat_template_kwargs": {"enable_thinking": False}}.
    """

    temperature: float | None = 0.7
    top_p: float | None = None
    max_tokens: int | None = 512
    seed: int | None = 0
    extra: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.temperature is not None and self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}", fix="0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}", fix="above 0, at most 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}", fix="1 or more")

    def given(self) -> dict:
        """The settings that are sent, without `extra`."""
        names = ("temperature", "top_p", "max_tokens", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Teacher(Protocol):
    """Something that writes text. `OfflineTeacher`, `OpenAITeacher`, `VLLMTeacher`, or a test's own."""

    def write(self, requests: Iterable[Request]) -> Iterator[tuple[Request, str]]:
        """Each request with its text, in any order. A text is empty if the model said nothing, or was cut off.

        What `max_tokens` cuts off is a part of a description, or of a thought before it: neither is of use.
        """
        ...

    def cache_key(self, request: Request) -> str:
        """Equal for requests that this teacher, under its settings, need answer only once."""
        ...


def model_cache_key(model: str, sampling: Sampling, request: Request) -> str:
    """Without `max_tokens`: answers that it cut off are not kept, and the others it did not change."""
    settings = sampling.given() | {"extra": sampling.extra}
    settings.pop("max_tokens", None)
    return digest(model, json.dumps(settings, sort_keys=True), json.dumps(request.messages, sort_keys=True))


@dataclasses.dataclass(frozen=True)
class OfflineTeacher:
    """Gives the text that came with the request: true statements from a template, no model, no network."""

    def write(self, requests: Iterable[Request]) -> Iterator[tuple[Request, str]]:
        for request in requests:
            yield request, request.offline

    def cache_key(self, request: Request) -> str:
        return digest("offline", request.offline)
