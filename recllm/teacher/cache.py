"""Every text a teacher writes is kept at once, by the hash of what was asked, so that nothing is paid for twice."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from recllm.errors import UserError
from recllm.files import read_lines
from recllm.progress import progress
from recllm.teacher.request import Request, Teacher


def cached_write(
    teacher: Teacher,
    requests: Sequence[Request],
    cache_path: str | Path,
    what: str = "writing",
    read: Callable[[str], str] = str.strip,
) -> list[str]:
    """The texts, in the order of `requests`: from the cache where it has them, else from the teacher, and then cached.

    read  what a stage takes from an answer; "" says that nothing in it is of use

    The cache is a JSON Lines file of the answers as they came, and only grows. Killed at any moment, it loses at most
    the line being written; run again, only what is missing is asked. An answer that `read` finds empty is returned so,
    but not kept: the next run asks again.
    """
    cache_path = Path(cache_path)
    keys = [teacher.cache_key(request) for request in requests]
    _cut_partial_line(cache_path)
    texts = read_cache(cache_path, read)
    missing = {key: request for key, request in zip(keys, requests) if key not in texts}
    if missing:
        key_of = {id(request): key for key, request in missing.items()}
        done = len(requests) - sum(key in missing for key in keys)
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        with open(cache_path, "ab") as cache, progress(what, done + len(missing), done) as advance:
            for request, answer in teacher.write(list(missing.values())):
                key = key_of[id(request)]
                texts[key] = read(answer)
                if texts[key]:
                    cache.write(json.dumps({"key": key, "text": answer}).encode() + b"\n")
                    cache.flush()
                advance(1)
    return [texts[key] for key in keys]


def read_cache(path: str | Path, read: Callable[[str], str] = str.strip) -> dict[str, str]:
    """key → what `read` takes from the answer, unless that is nothing. A last line cut short does not count."""
    path = Path(path)
    if not path.exists():
        return {}
    texts, broken = {}, None
    for number, line in read_lines(path):
        if broken:
            raise UserError("not a line of the teacher's cache", file=path, line=broken, fix="delete that line")
        try:
            entry = json.loads(line)
            key, text = entry["key"], read(str(entry["text"]))
        except (ValueError, KeyError, TypeError):
            broken = number
            continue
        if text:
            texts[key] = text
    return texts


def _cut_partial_line(path: Path) -> None:
    """Remove what follows the last end of line: the next text is appended there."""
    if not path.exists():
        return
    with open(path, "r+b") as stream:
        end = stream.seek(0, 2)
        kept = end
        while kept > 0:
            start = max(0, kept - 65536)
            stream.seek(start)
            newline = stream.read(kept - start).rfind(b"\n")
            kept = start + newline + 1
            if newline >= 0:
                break
        if kept != end:
            stream.truncate(kept)
