"""What a teacher's work will cost, said before it starts."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from recllm.teacher.cache import read_cache
from recllm.teacher.request import Request, Teacher

BYTES_PER_TOKEN = 4  # of English under the common tokenizers; a rough guess is enough here
TOKENS_PER_SECOND = 40  # of one answer among many, on a busy server


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Counts are exact, tokens and time are guesses: the offline text stands for the length of an answer."""

    requests: int
    cached: int
    tokens_in: int
    tokens_out: int
    cost: float
    seconds: float

    def __str__(self) -> str:
        said = f"{self.requests:,} requests, {self.cached:,} of them answered already"
        if self.requests == self.cached:
            return said
        said += f"; the others: about {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        said += f", {self.cost:,.2f} at the given prices" if self.cost else ""
        minutes = self.seconds / 60
        return said + (f", {minutes:,.0f} minutes" if minutes >= 1 else f", {self.seconds:,.0f} seconds")


def estimate(
    teacher: Teacher,
    requests: Sequence[Request],
    cache_path: str | Path,
    input_price: float = 0.0,
    output_price: float = 0.0,
    concurrency: int = 1,
    read: Callable[[str], str] = str.strip,
) -> Estimate:
    """Prices are per million tokens. Equal requests are asked, and counted, once. `read` as in `cached_write`."""
    cache = read_cache(cache_path, read)
    keys = [teacher.cache_key(request) for request in requests]
    missing = {key: request for key, request in zip(keys, requests) if key not in cache}.values()
    tokens_in = sum(_tokens(message["content"]) for request in missing for message in request.messages)
    tokens_out = sum(_tokens(request.offline) for request in missing)
    return Estimate(
        requests=len(requests),
        cached=len(requests) - sum(key not in cache for key in keys),
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        cost=(tokens_in * input_price + tokens_out * output_price) / 1e6,
        seconds=tokens_out / TOKENS_PER_SECOND / concurrency,
    )


def _tokens(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)
