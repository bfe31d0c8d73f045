"""What every script does around its one call: parse, run, and say a user's mistake in one line."""

import argparse
import difflib
import logging
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Sequence

import yaml
from rich.console import Console
from trl import TrlParser

from recllm.errors import UserError
from recllm.files import read_lines

EPILOG = "--config FILE.yaml takes settings from a file, a later --config goes before it, the command line before both."
console = Console(stderr=True)  # progress and notes
results = Console(soft_wrap=True)  # standard output is for results
# transformers imports DeepSpeed when it saves; that a CPU was found is no warning to a user of a CPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def run(
    main: Callable,
    *config_types: type,
    description: str | None = None,
    args: list[str] | None = None,
    prog: str | None = None,
) -> None:
    """`main(*configs)` under the command line's and --config's settings; exits 2 on a user's mistake, 130 on Ctrl-C."""
    with exit_codes():
        main(*parse(*config_types, description=description, args=args, prog=prog))


class exit_codes:
    """UserError → one line on stderr and exit 2; Ctrl-C → 130; a closed pipe (`| head`) → silence."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, KeyboardInterrupt):
            print("interrupted: finished files are whole; run the same command again", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
            raise SystemExit(0) from None


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A script's docstring as it stands, and every setting's default."""


def parse(
    *config_types: type, description: str | None = None, args: list[str] | None = None, prog: str | None = None
) -> tuple:
    """TrlParser (--config x.yaml, overrides after it), with its tracebacks turned into sentences and types checked."""
    args = [part for arg in (sys.argv[1:] if args is None else args) for part in _split_config(arg)]
    parser = TrlParser(
        config_types, description=description, formatter_class=_Help, prog=prog, epilog=EPILOG, allow_abbrev=False
    )
    paths, args = _take_configs(args)
    for path in paths:
        settings = check_file(path, config_types)
        os.environ.update({name: str(value) for name, value in (settings.pop("env", None) or {}).items()})
        parser.set_defaults_with_config(**settings)  # a later file goes before an earlier one
    try:
        configs = parser.parse_args_into_dataclasses(args=args)
    except ValueError as error:
        unknown = [arg for arg in args if arg.startswith("--") and arg in str(error)]
        if unknown:
            refuse_unknown(unknown[0].removeprefix("--"), config_types)
        raise UserError(str(error), file=paths[-1] if paths else None, fix="--help lists the settings") from None
    for config in configs:
        check_types(config)
    return configs


def _take_configs(args: list[str]) -> tuple[list[str], list[str]]:
    """The files after --config, and what else stands on the command line."""
    paths, others = [], []
    rest = iter(args)
    for arg in rest:
        if arg != "--config":
            others.append(arg)
        elif (path := next(rest, None)) is None or path.startswith("--"):
            raise UserError("--config needs a path", fix="--config settings.yaml")
        else:
            paths.append(path)
    return paths, others


def check_file(path: str, config_types: Sequence[type]) -> dict:
    """The settings of a YAML whose values are of the settings' types: argparse checks the command line alone.

    Text passes for any single value, since argparse converts it (`5e-5` is text in YAML).
    """
    text = b"\n".join(line for _, line in read_lines(path))
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"not valid YAML: {reason}", file=path, line=mark.line + 1 if mark else None) from None
    if not isinstance(values, dict):
        raise UserError("the config is no mapping of settings to values", file=path, fix="lines of `setting: value`")
    for name in values:
        if name != "env" and not any(name in kind.__dataclass_fields__ for kind in config_types):
            refuse_unknown(name, config_types, path)
    for name, hint in (pair for kind in config_types for pair in typing.get_type_hints(kind).items()):
        value = values.get(name)
        converted = isinstance(value, str) and not _fits([], hint)
        if name in values and not converted and not _fits(value, hint):
            fix = f"`{name}: [{value}]`" if isinstance(value, str) else f"correct `{name}`"
            raise UserError(f"{name}: {value!r} is not of type {_name(hint)}", file=path, fix=fix)
    return values


def refuse_unknown(name: str, config_types: Sequence[type], path: str | None = None) -> None:
    """`codse` is not a setting; did you mean `codes`?"""
    known = [field for kind in config_types for field in kind.__dataclass_fields__]
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    fix = f"did you mean `{near[0]}`?" if near else "--help lists the settings"
    raise UserError(f"`{name}` is not a setting", file=path, fix=fix)


def check_types(config) -> None:
    """What argparse let through is refused: a value that is none of the choices, text for a number."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name, None)
        if name in config.__dataclass_fields__ and not _fits(value, hint):
            raise UserError(f"{name}: {value!r} is not of type {_name(hint)}", fix=f"correct `{name}`")


def _name(hint) -> str:
    return str(hint).removeprefix("typing.") if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


def _fits(value, hint) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(part, inner[0]) for part in value)
    if hint in (int, float) and isinstance(value, bool):
        return False  # `yes` in YAML is not a number
    if hint is float:
        return isinstance(value, int | float)
    if hint is type(None):
        return value is None
    return isinstance(value, hint) if isinstance(hint, type) and hint in (int, str, bool) else True


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]
