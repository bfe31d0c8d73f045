"""--config, overrides, types, and what a user's mistake looks like."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from recllm import launch
from recllm.errors import UserError


@dataclass
class Config:
    name: str = field(metadata={"help": "A name."})
    count: int = 3
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    many: list[str] = field(default_factory=list)
    maybe: int | None = None
    flag: bool = False

    def __post_init__(self):
        if self.count < 0:
            raise UserError("count must not be negative")


def parse(*args: str) -> Config:
    return launch.parse(Config, args=list(args))[0]


def config_file(tmp_path, text: str) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_then_command_line(tmp_path):
    path = config_file(tmp_path, "name: yaml\ncount: 5\nrate: 5e-5\nmany: [x, y]\nmaybe: 2\nflag: true\n")
    assert parse("--config", path) == Config("yaml", 5, 5e-5, "a", ["x", "y"], 2, True)
    assert parse(f"--config={path}", "--count", "7", "--many", "z").many == ["z"]
    assert parse("--config", path, "--count", "7").count == 7


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: a\ncuont: 1", "`cuont` is not a setting. Fix: did you mean `count`"),
        ("name: a\nzzz: 1", "`zzz` is not a setting. Fix: --help"),
        ("name: a\ncount: 5.5", "count: 5.5 is not of type int"),
        ("name: a\ncount: yes", "count: True is not of type int"),
        ("name: a\nmany: [1, 2]", r"many: \[1, 2\] is not of type"),
        ("name: a\nkind: c", "kind: 'c' is not of type"),
        ("name: a\ncount: -1", "count must not be negative"),
        ("name: [a", "line 1: not valid YAML|line 2: not valid YAML"),
        ("- a", "no mapping of settings"),
        ("", "no mapping of settings"),
        ("name: a\ncount: null", "count: None is not of type int"),
        ("name: a\ncount: [1]", r"count: \[1\] is not of type int"),
        ("name: a\nmany: x", r"many: 'x' is not of type list\[str\]. Fix: `many: \[x\]`"),
        ("name: a\nrate: {a: 1}", "rate: .* is not of type float"),
    ],
)
def test_a_bad_yaml_is_a_sentence(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse("--config", config_file(tmp_path, text))


def test_config_that_is_missing():
    with pytest.raises(UserError, match=r"none\.yaml: the file does not exist"):
        parse("--config", "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        parse("--config", ".")
    with pytest.raises(UserError, match="--config needs a path"):
        parse("--config")


def test_a_setting_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"`cuont` is not a setting. Fix: did you mean `count`"):
        parse("--name", "a", "--cuont", "3")
    with pytest.raises(UserError, match=r"`coun` is not a setting"):  # no abbreviations: they change meaning unseen
        parse("--name", "a", "--coun", "3")


def test_help_names_the_config_file(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--config FILE.yaml" in capsys.readouterr().out


def test_exit_codes(capsys):
    def fails(config):
        raise UserError("the shop is closed", file="shop.json", line=3, fix="come back tomorrow")

    def stops(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        launch.run(fails, Config, args=["--name", "a"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: shop.json, line 3: the shop is closed. Fix: come back tomorrow\n"
    with pytest.raises(SystemExit) as stop:
        launch.run(stops, Config, args=["--name", "a"])
    assert stop.value.code == 130


def test_a_real_bug_is_still_a_traceback():
    def broken(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch.run(broken, Config, args=["--name", "a"])
