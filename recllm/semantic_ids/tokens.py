"""One code ↔ one token: `<|a_12|>` is code 12 of level a. The pattern is a setting; this is all that knows about it."""

import re
import string
from collections.abc import Mapping, Sequence

from recllm.errors import UserError

DEFAULT_PATTERN = "<|{level}_{code}|>"
LETTERS = string.ascii_lowercase  # one for each level


def check_pattern(pattern: str) -> None:
    try:
        parts = [part for part in string.Formatter().parse(pattern) if part[1] is not None]
        fields = [(name, bool(spec or conversion)) for _, name, spec, conversion in parts]
    except (ValueError, TypeError):
        fields = []
    if sorted(fields) != [("code", False), ("level", False)]:
        raise UserError(
            f"the token pattern {pattern!r} must hold {{level}} and {{code}}, once each", fix=f"use {DEFAULT_PATTERN!r}"
        )


def token_regex(pattern: str) -> re.Pattern:
    """What finds the tokens of a pattern in text, with groups `level` and `code`."""
    check_pattern(pattern)
    groups = {"level": "(?P<level>[a-z])", "code": "(?P<code>0|[1-9][0-9]{0,8})", None: ""}
    return re.compile("".join(re.escape(text) + groups[name] for text, name, *_ in string.Formatter().parse(pattern)))


def read_token(regex: re.Pattern, token: str) -> tuple[int, int]:
    """(level, code) of a token, (-1, -1) if it is none."""
    match = regex.fullmatch(token) if isinstance(token, str) else None
    return (LETTERS.index(match["level"]), int(match["code"])) if match else (-1, -1)


def infer_pattern(index: Mapping[str, Sequence[str]]) -> str:
    """The pattern of an index whose tokens look like "<a_56>": here "<{level}_{code}>"."""
    token = next((tokens[0] for tokens in index.values() if tokens), "")
    match = re.fullmatch(r"([^0-9A-Za-z]*)a([^0-9A-Za-z]*)[0-9]+([^0-9A-Za-z]*)", str(token))
    if not match:
        raise UserError(f"no level and code can be read off the token {token!r}", fix="give the pattern of the tokens")
    before, between, after = (part.replace("{", "{{").replace("}", "}}") for part in match.groups())
    return f"{before}{{level}}{between}{{code}}{after}"
