"""A teacher behind any server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama, a gateway …"""

import asyncio
import contextlib
import dataclasses
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import openai

from recllm.errors import UserError
from recllm.teacher.request import Request, Sampling, model_cache_key

AGAIN = "what was written is kept; run the same command again to go on"


@dataclasses.dataclass(frozen=True)
class OpenAITeacher:
    """At most `concurrency` requests at a time; 408, 409, 429, 5xx and lost connections are tried again with back-off.

    The key is read from the environment variable `api_key_env` when it is needed, and never printed or stored.
    """

    model: str
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    base_url: str | None = None  # None: OPENAI_BASE_URL, or OpenAI itself
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    retries: int = 8
    timeout: float = 120.0

    def cache_key(self, request: Request) -> str:
        return model_cache_key(self.model, self.sampling, request)

    def write(self, requests: Iterable[Request]) -> Iterator[tuple[Request, str]]:
        """As the answers come. The event loop has a thread of its own, so that this works in a notebook too."""
        answers: queue.SimpleQueue = queue.SimpleQueue()  # (request, text) …, at the end an exception or None
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._answer_all(iter(requests), answers.put))
        thread = threading.Thread(target=_run, args=(loop, task, answers.put), daemon=True)
        thread.start()
        try:
            while (answer := answers.get()) is not None:
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _answer_all(self, requests: Iterator[Request], put: Callable) -> None:
        async with self._client() as client:

            async def work() -> None:
                for request in requests:  # one iterator for all workers: each request goes to one of them
                    put((request, await self._answer(client, request)))

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.concurrency):
                        group.create_task(work())
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None  # the first failure; the group cancelled the others

    def _client(self) -> openai.AsyncOpenAI:
        key = os.environ.get(self.api_key_env)
        if not key and not (self.base_url or os.environ.get("OPENAI_BASE_URL")):
            raise UserError(
                f"the environment variable {self.api_key_env} is not set",
                fix="set it to the API key, or name a server of your own by --base_url",
            )
        return openai.AsyncOpenAI(
            api_key=key or "none", base_url=self.base_url, timeout=self.timeout, max_retries=self.retries
        )

    async def _answer(self, client: openai.AsyncOpenAI, request: Request) -> str:
        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=list(request.messages),
                extra_body=self.sampling.extra or None,
                **self.sampling.given(),
            )
            choice = completion.choices[0]
            return "" if choice.finish_reason == "length" else choice.message.content or ""
        except openai.OpenAIError as error:
            raise self._explained(error, client, request) from None
        except (AttributeError, IndexError, TypeError, ValueError):
            raise UserError(
                f"the server at {_host(client)} did not answer with a chat completion",
                fix="check --base_url (it often ends in /v1)",
            ) from None

    def _explained(self, error: openai.OpenAIError, client: openai.AsyncOpenAI, request: Request) -> UserError:
        """What a server says is repeated only where it helps, and never with the key in it: some echo it."""
        where = f"the teacher's server at {_host(client)}"
        said = str(getattr(error, "message", error)).replace(client.api_key, "***")[:300]
        match error:
            case openai.APITimeoutError():
                return UserError(f"{where} gave no answer within {self.timeout:g} s", fix=f"--timeout; {AGAIN}")
            case openai.APIConnectionError():
                return UserError(f"{where} cannot be reached", fix=f"start it or correct --base_url; {AGAIN}")
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                fix = f"put a valid key into the environment variable {self.api_key_env}"
                return UserError(f"{where} refuses the API key ({error.status_code})", fix=fix)
            case openai.NotFoundError():
                return UserError(
                    f"{where} knows no model {self.model!r} or no such path", fix="--teacher_model, --base_url"
                )
            case openai.RateLimitError() | openai.InternalServerError():
                tried = f"still answers {error.status_code} after {self.retries} retries"
                return UserError(f"{where} {tried}", fix=f"lower --concurrency; {AGAIN}")
            case _:
                return UserError(f"{where} refuses the request for {request.key!r}: {said}")


def _host(client: openai.AsyncOpenAI) -> str:
    port = f":{client.base_url.port}" if client.base_url.port else ""
    return f"{client.base_url.host}{port}"  # not the whole URL: a password may stand in it


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task, put: Callable) -> None:
    try:
        loop.run_until_complete(task)
        put(None)
    except BaseException as error:
        put(error)
    finally:
        loop.close()
