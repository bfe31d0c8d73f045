import pytest

from recllm.errors import UserError
from recllm.mixtures.templates import ALIGNMENT, FIELDS, Template, read_templates
from recllm.prompting import PromptStyle

PAIR = "  - prompt: 'What is {item}?'\n    completion: '{title}'\n"


def test_every_task_has_several_and_the_first_is_what_a_model_is_asked_with():
    templates = read_templates()
    assert list(templates) == list(FIELDS)
    for task, pairs in templates.items():  # a sequence has the one wording in which nothing stands between items
        assert len(set(pairs)) == len(pairs) >= (1 if task == "sequence" else 3)
    assert templates["next_item"][0].prompt == PromptStyle().template


def test_a_file_adds_templates_or_replaces_those_of_a_task(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("title_of_item:\n" + PAIR)
    theirs, added = read_templates(), read_templates([path])
    assert added["title_of_item"] == (*theirs["title_of_item"], Template("What is {item}?", "{title}", "item", "title"))
    assert all(added[task] == theirs[task] for task in FIELDS if task != "title_of_item")

    path.write_text("replace: [title_of_item]\ntitle_of_item:\n" + PAIR)
    assert [template.prompt for template in read_templates([path])["title_of_item"]] == ["What is {item}?"]


def test_texts_in_braces_stay_as_they_are():
    template = Template("{text}: ", "{item}", "text", "item")
    assert template.fill("a {item} of {text} {", "<1>") == ("a {item} of {text} {: ", "<1>")
    assert template.fill("t", "{text}")[1] == "{text}"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("titel_of_item:\n" + PAIR, 1, "'titel_of_item' is no alignment task"),
        ("title_of_item:\n" + PAIR.replace("{item}", "{itm}"), 2, "unknown field {itm}; this task's is {item}"),
        ("title_of_item:\n" + PAIR + PAIR.replace("{item}", "it"), 4, "the prompt lacks its field {item}"),
        ("title_of_item:\n" + PAIR.replace("{title}", "{title"), 2, "the completion has a brace without"),
        ("title_of_item:\n" + PAIR.replace("{title}", "{{title}}"), 2, "the completion has a brace without"),
        ("title_of_item:\n" + PAIR.replace("{item}", "{}"), 2, "unknown field {}"),
        ("title_of_item:\n  - prompt: 'a {item}'\n", 2, "a template of title_of_item has no completion"),
        ("title_of_item:\n" + PAIR + "    weight: 2\n", 4, "'weight' is no part of a template"),
        ("title_of_item:\n  - prompt: 'a {item}'\n    completion: {title}\n", 3, "the completion of title_of_item is"),
        ("title_of_item:\n  - prompt: 5\n    completion: '{title}'\n", 2, "the prompt of title_of_item is not text"),
        ("title_of_item:\n  prompt: x\n", 2, "not a list"),
        ("title_of_item: []\n", 1, "title_of_item has no template"),
        ("title_of_item:\n" + PAIR + "title_of_item:\n" + PAIR, 4, "'title_of_item' stands here twice"),
        ("- title_of_item\n", 1, "not a mapping"),
        ("replace: [title_of_item]\n", 1, "replaces the templates of title_of_item and gives none"),
        ("replace: [x]\ntitle_of_item:\n" + PAIR, 1, "'x' is no alignment task"),
        ("replace: title_of_item\ntitle_of_item:\n" + PAIR, 1, "not a list"),
        ("title_of_item:\n" + PAIR + "  - prompt: 'a\n", 4, "not valid YAML"),
        (
            "replace: [next_item]\nnext_item:\n  - {prompt: '{history}?', completion: 'It is {item}'}\n",
            3,
            "first templ",
        ),
        (
            "replace: [next_item]\nnext_item:\n  - {prompt: '{history}{history}', completion: '{item}'}\n",
            3,
            "first temp",
        ),
    ],
)
def test_a_broken_file_is_one_sentence_with_the_line(tmp_path, text, line, problem):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_templates([path])
    assert str(error.value).startswith(f"{path}, line {line}: ")
    assert problem in str(error.value)


def test_an_empty_or_missing_file_is_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(UserError, match="the file holds no template"):
        read_templates([tmp_path / "empty.yaml"])
    with pytest.raises(UserError, match="does not exist"):
        read_templates([tmp_path / "none.yaml"])


def test_the_templates_are_among_the_package_data():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ALIGNMENT.parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["recllm.mixtures"]
    assert ALIGNMENT in {path for pattern in patterns for path in ALIGNMENT.parents[1].glob(pattern)}
