"""Settings as others may read them: plain YAML values, without secrets and without places on this machine."""

import dataclasses
import enum
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

SECRET = re.compile(r"token|secret|passw|credential|api_?key|(^|[_-])(keys?|auth)($|[_-])", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_|sk-)[A-Za-z0-9_-]{8,}")
HIDDEN = "***"
OF_THE_MACHINE = ("logging_dir", "local_rank")  # the first holds its name


def plain(value: Any) -> Any:
    """What YAML can hold and others may read: no secret, no place on this machine. A function of the value alone."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        shown = {str(name): part for name, part in value.items() if str(name) not in OF_THE_MACHINE}
        return {name: plain(part) for name, part in shown.items() if not is_secret(name, part)}
    if isinstance(value, set | frozenset):
        return sorted((plain(part) for part in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | PurePath):
        return shortened(str(value))
    if hasattr(value, "item"):
        return plain(value.item())  # a NumPy number
    return type(value).__name__ if " at 0x" in repr(value) else shortened(str(value))


def is_secret(name: str, value: Any) -> bool:
    """Text under a name like a token's or a key's. A number is none, nor is a list of words such as <reflect>."""
    if not SECRET.search(name):
        return False
    if isinstance(value, list | tuple | set | frozenset):
        return any(not isinstance(part, int | float) and not re.fullmatch(r"<[^<>]*>", str(part)) for part in value)
    return isinstance(value, str | bytes)


def shortened(text: str) -> str:
    """A path of this machine is its last part; what looks like a token, and a name and password in a URL, is hidden."""
    text = re.sub(r"(\w+://)[^/\s@]+@", rf"\1{HIDDEN}@", hide(text))
    if re.match(r"(file:/*)?(/|~|\.\./|[A-Za-z]:[\\/])[^\n]*$", text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return text


def hide(text: str) -> str:
    """`text` without what looks like a token."""
    return SECRET_VALUE.sub(HIDDEN, text)
