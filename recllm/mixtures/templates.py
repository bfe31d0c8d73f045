"""Templates: how the examples of a task are worded. YAML files of prompt and completion pairs, checked when read.

A field is replaced as text, once, in the template alone: what an item's text holds in braces stays as it is.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from recllm.errors import UserError
from recllm.files import read_lines
from recllm.prompting import HISTORY

ALIGNMENT = Path(__file__).with_name("templates") / "alignment.yaml"  # the templates that come with the library
REPLACE = "replace"  # the key of a file that lists the tasks whose earlier templates go
ASKED = "next_item"  # the trained model is asked with the first prompt of this task
SEQUENCE = "sequence"  # or of this one, where it is made
FIELDS = {  # task → (the field of its prompts, the field of its completions)
    "next_item": ("history", "item"),
    "sequence": ("history", "items"),
    "next_item_from_titles": ("titles", "item"),
    "next_title": ("history", "title"),
    "item_from_text": ("text", "item"),
    "title_of_item": ("item", "title"),
    "description_of_item": ("item", "description"),
    "attributes_of_item": ("item", "attributes"),
    "items_of_category": ("category", "items"),
    "preference_summary": ("history", "summary"),
    "item_from_preference": ("summary", "item"),
    "item_from_intent": ("intent", "item"),
}
_FIELD = re.compile(r"\{([^{}\n]*)\}")


@dataclasses.dataclass(frozen=True)
class Template:
    """`{field}` in a prompt or a completion stands for a text; there are no other braces."""

    prompt: str
    completion: str
    prompt_field: str
    completion_field: str
    file: str = dataclasses.field(default="", compare=False)
    line: int | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self):
        for name in ("prompt", "completion"):
            problem = _problem(getattr(self, name), getattr(self, f"{name}_field"))
            if problem:
                raise self.error(f"the {name} {problem}")

    def fill(self, prompt_text: str, completion_text: str) -> tuple[str, str]:
        """Prompt and completion with their fields' texts put in."""
        prompt = self.prompt.replace(f"{{{self.prompt_field}}}", prompt_text)
        return prompt, self.completion.replace(f"{{{self.completion_field}}}", completion_text)

    def error(self, problem: str, fix: str | None = None) -> UserError:
        return UserError(problem, file=self.file or None, line=self.line, fix=fix)


def _problem(text: str, field: str) -> str | None:
    """What is wrong with a prompt or completion that must hold `field`, in words."""
    if "{" in (rest := _FIELD.sub("", text)) or "}" in rest:
        return f"has a brace without its other half, or braces within braces: {text!r}"
    named = _FIELD.findall(text)
    if unknown := [name for name in named if name != field]:
        return f"has the unknown field {{{unknown[0]}}}; this task's is {{{field}}}"
    return None if named else f"lacks its field {{{field}}}: {text!r}"


def read_templates(files: Sequence[str | Path] = ()) -> dict[str, tuple[Template, ...]]:
    """task → its templates: those of the library, then those of each file in turn."""
    templates: dict[str, list[Template]] = {task: [] for task in FIELDS}
    for path in [ALIGNMENT, *map(Path, files)]:
        replaced, added = _read_file(path)
        for task in replaced:
            templates[task] = []
        for task, pairs in added.items():
            templates[task] += pairs
    asked = templates[ASKED][0]
    if asked.prompt.count(HISTORY) != 1 or asked.completion != "{item}":
        raise asked.error(
            f"the first template of {ASKED} is what the trained model is asked with",
            f"let its prompt have {HISTORY} once and its completion be {{item}} and nothing else",
        )
    for template in templates[SEQUENCE]:
        if (
            template.prompt.count(HISTORY) != 1
            or not template.prompt.endswith(HISTORY)
            or template.completion != "{items}"
        ):
            fix = f"let the prompt end in {HISTORY} and the completion be {{items}}"
            raise template.error("in a sequence each item answers to those before it, so nothing may come between", fix)
    return {task: tuple(pairs) for task, pairs in templates.items()}


def _read_file(path: Path) -> tuple[list[str], Mapping[str, list[Template]]]:
    """The tasks whose templates the file replaces, and what it adds to which task."""
    replaced, added = [], {}
    for key, value in _mapping(_compose(path), path, "`task: [{prompt, completion}, …]`"):
        if key.value == REPLACE:
            replaced = [(str(name.value), _line(name)) for name in _sequence(value, path, "`replace: [task, …]`")]
            continue
        _check_task(key.value, path, _line(key))
        pairs = [_pair(key.value, node, path) for node in _sequence(value, path, f"templates of {key.value}")]
        if not pairs:
            raise UserError(f"{key.value} has no template", file=path, line=_line(key))
        added[key.value] = pairs
    for name, line in replaced:
        _check_task(name, path, line)
        if name not in added:
            raise UserError(f"replaces the templates of {name} and gives none", file=path, line=line)
    return [name for name, _ in replaced], added


def _compose(path: Path) -> yaml.Node:
    """The file as nodes, which know their lines."""
    text = b"\n".join(line for _, line in read_lines(path))
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "unreadable"
        fix = "put texts with braces or colons into quotation marks"
        raise UserError(f"not valid YAML: {reason}", file=path, line=mark.line + 1 if mark else None, fix=fix) from None
    if node is None:
        raise UserError("the file holds no template", file=path, fix="`task: [{prompt, completion}, …]`")
    return node


def _pair(task: str, node: yaml.Node, path: Path) -> Template:
    found = {}
    for key, value in _mapping(node, path, "`prompt: …` and `completion: …`"):
        if key.value not in ("prompt", "completion"):
            problem = f"{task}: {key.value!r} is no part of a template"
            raise UserError(problem, file=path, line=_line(key), fix="prompt and completion are")
        if not isinstance(value, yaml.ScalarNode) or not value.tag.endswith(":str"):
            fix = "put it into quotation marks"  # {history} alone is a mapping in YAML
            raise UserError(f"the {key.value} of {task} is not text", file=path, line=_line(value), fix=fix)
        found[key.value] = value.value
    if missing := [name for name in ("prompt", "completion") if name not in found]:
        raise UserError(f"a template of {task} has no {missing[0]}", file=path, line=_line(node))
    try:
        return Template(found["prompt"], found["completion"], *FIELDS[task], str(path), _line(node))
    except UserError as error:
        raise UserError(f"{task}: {error.problem}", file=path, line=_line(node)) from None


def _check_task(name: str, path: Path, line: int) -> None:
    if name not in FIELDS:
        raise UserError(f"{name!r} is no alignment task", file=path, line=line, fix=f"name one of {', '.join(FIELDS)}")


def _mapping(node: yaml.Node, path: Path, form: str) -> list[tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise UserError("not a mapping", file=path, line=_line(node), fix=form)
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in seen:
            raise UserError(f"{key.value!r} stands here twice, or is no name", file=path, line=_line(key))
        seen.add(key.value)
    return node.value


def _sequence(node: yaml.Node, path: Path, form: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"not a list, and {form} are one", file=path, line=_line(node))
    return node.value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
