"""A checkpoint folder is completed, checked, uploaded to a fake Hub on loopback, and loaded back from there."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import polars as pl
import pytest
import yaml
from fake_hub import TOKEN, FakeHub
from helpers import write_small_model
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recllm import Recommender, cli
from recllm.errors import UserError
from recllm.files import read_object, write_json
from recllm.hub import belonging
from recllm.pretrained import which_model
from recllm.publish import check_complete, complete, finish, push
from recllm.settings import plain

REASONING = {"samples": 8, "metrics": {"pass@5": 0.125}, "intervals": {"pass@5": [0.1, 0.15]}, "tokens_mean": 90.5}
SETTINGS = {"learning_rate": 1e-3, "data": "/home/someone/shop", "hub_token": TOKEN}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("publish"))[1]


@pytest.fixture
def model(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "model")


def write_evaluation(folder: Path, model: Path, split: str = "test", **more) -> Path:
    """As eval/evaluate.py writes it, of this checkpoint."""
    ranker = {"ranker": "direct", "weights": which_model(str(model))}
    ranker["semantic_ids"] = read_object(model / "recllm.json")["semantic_ids"]
    run = {
        "name": "mine", "ranker": ranker, "catalogue": {"name": "a|b_shop", "fingerprint": "f"}, "split": split,
        "protocol": {"split": split, "k": [5], "length": 20, "max_history": None, "exclude_history": False}, "seed": 0,
    }  # fmt: skip
    figures = {"metrics": {"recall@5": 0.25}, "intervals": {"recall@5": [0.2, 0.3]}}
    folder.mkdir()
    write_json(folder / "metrics.json", {"run": run, "users": 1234, "targets": 1234, **figures, **more})
    return folder


def head_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


# ---- the folder


def test_a_completed_folder_says_what_it_came_from(model, tmp_path):
    results = [write_evaluation(tmp_path / "one", model)]
    complete(model, settings=SETTINGS, results=results, method="sft", papers=["gream"], repo="user/name")
    check_complete(model)
    text = (model / "README.md").read_text()
    assert yaml.safe_load((model / "training.yaml").read_text()) == {"learning_rate": 1e-3, "data": "shop"}
    assert read_object(model / "evaluations" / "a-b-shop-test-direct.json") == read_object(results[0] / "metrics.json")
    assert read_object(model / "recllm.json")["method"] == "sft"
    assert "| a\\|b\\_shop | test |" in text
    assert "| 1,234 | 0.2500 (0.2000 – 0.3000) |" in text
    for said in ("https://arxiv.org/abs/2510.20815", "@software{werra2020trl", "learning_rate: 0.001", "12 items"):
        assert said in text
    for place in (str(tmp_path), "/home/", TOKEN):
        assert place not in text


def test_the_head_is_what_the_hub_reads(model, tmp_path):
    write_json(model / "recllm.json", read_object(model / "recllm.json") | {"base_model": "Qwen/Qwen3-0.6B"})
    complete(model, results=[write_evaluation(tmp_path / "one", model)], method="sft", papers=["gream"])
    data = ModelCard.load(model / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers", "text-generation", "Qwen/Qwen3-0.6B",
    )  # fmt: skip
    assert data.tags == ["recllm", "trl", "generative-recommendation", "recommendation", "sft"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("a|b_shop", "test")
    assert (result.metric_type, result.metric_value) == ("recall@5", 0.25)


@pytest.mark.parametrize("base", ["/srv/models/Qwen3", "tiny"])
def test_a_base_model_on_this_machine_is_not_named_as_the_hubs(model, base):
    write_json(model / "recllm.json", read_object(model / "recllm.json") | {"base_model": base})
    complete(model)
    assert "base_model" not in head_of(model)
    assert "/srv" not in (model / "README.md").read_text() + (model / "recllm.json").read_text()


def test_more_results_join_the_earlier_ones_and_the_same_replaces_itself(model, tmp_path):
    test = write_evaluation(tmp_path / "test", model)
    valid = write_evaluation(tmp_path / "valid", model, "valid", reasoning=REASONING)
    complete(model, settings=SETTINGS, results=[test], method="sft", papers=["gream"])
    first = (model / "training.yaml").read_text()
    again = read_object(valid / "metrics.json")
    again["run"]["ranker"]["weights"] = which_model(str(model))
    write_json(valid / "metrics.json", again)
    complete(model, results=[valid])
    assert sorted(path.stem for path in (model / "evaluations").iterdir()) == [
        "a-b-shop-test-direct", "a-b-shop-valid-direct",
    ]  # fmt: skip
    rows = [line for line in (model / "README.md").read_text().splitlines() if line.startswith("| a-b-shop")]
    assert [row.split(" | ")[5:] for row in rows] == [
        ["0.2500 (0.2000 – 0.3000)", "–", "–", "– |"],
        ["0.2500 (0.2000 – 0.3000)", "8", "0.1250 (0.1000 – 0.1500)", "90.5000 |"],
    ]  # fmt: skip
    assert (model / "training.yaml").read_text() == first
    other = read_object(valid / "metrics.json")
    other["run"]["ranker"]["weights"] = which_model(str(model))
    other["metrics"]["recall@5"] = 0.5
    write_json(valid / "metrics.json", other)
    complete(model, results=[valid])
    assert len(list((model / "evaluations").iterdir())) == 2
    other["run"]["ranker"] |= {"beams": 50, "weights": which_model(str(model))}
    write_json(valid / "metrics.json", other)
    complete(model, results=[valid])
    assert (model / "evaluations" / "a-b-shop-valid-direct-2.json").exists()


@pytest.mark.parametrize("part", ["weights", "semantic_ids"])
def test_results_of_another_model_are_refused_and_nothing_is_written(model, tmp_path, part):
    folder = write_evaluation(tmp_path / "one", model)
    result = read_object(folder / "metrics.json")
    result["run"]["ranker"][part] = "model@sha256:0123456789abcdef"
    write_json(folder / "metrics.json", result)
    with pytest.raises(UserError, match="of another model"):
        complete(model, results=[folder], method="sft")
    assert not (model / "README.md").exists()
    assert "method" not in read_object(model / "recllm.json")


def test_titles_and_names_do_not_break_the_card(model):
    name = "*Best* shop | <b>2024</b>\n# `x`"
    report = read_object(model / "recllm.json") | {"catalogue": {"name": name, "fingerprint": "f"}}
    write_json(model / "recllm.json", report | {"prompt": {"template": "```\n{history}"}})
    complete(model, settings={"note": "```\n# not a title"})
    lines = (model / "README.md").read_text().splitlines()
    assert any("\\*Best\\* shop \\| \\<b\\>2024\\</b\\> \\# \\`x\\`" in line for line in lines)
    outside, fence = [], ""
    for line in lines:
        if mark := re.match("```+", line):
            fence = "" if fence and mark[0] == fence else fence or mark[0]
        elif not fence:
            outside.append(line)
    titles = [line for line in outside if line.startswith("#")]
    assert titles == [
        "# model", "## Use", "## Results", "## Prompt", "## Training", "## Limits", "## Citation",
    ]  # fmt: skip


def test_the_cards_snippets_run(model):
    complete(model, repo=str(model))
    ours, plain_one = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    said = []
    exec(ours, {"print": lambda *parts: said.append(parts[0])})
    recommender = Recommender.from_pretrained(model, device="cpu")
    assert said == [one.item for one in recommender.recommend(["i0", "i1"], k=5)]
    said.clear()
    exec(plain_one, {"print": said.append})  # probabilities over the whole vocabulary, as transformers has them
    full = Recommender.from_pretrained(model, device="cpu", normaliser="full")
    assert said == [one.item for one in full.recommend(["i0", "i1"], k=5, beams=12)]


def test_the_same_again_changes_no_byte(model, tmp_path):
    settings = {"settings": SETTINGS, "method": "sft", "papers": ["gream"]}
    results = [write_evaluation(tmp_path / "one", model)]
    complete(model, results=results, **settings)
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    complete(model, **settings)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_a_paper_that_nobody_knows_is_refused(model):
    with pytest.raises(UserError, match="'graem' is no paper"):
        complete(model, method="sft", papers=["graem"])


def test_a_model_that_was_taught_to_reason_says_how(model):
    report = read_object(model / "recllm.json") | {"reasoning_prompt": {"template": "Think about {history}."}}
    write_json(model / "recllm.json", report)
    complete(model)
    text = (model / "README.md").read_text()
    assert "Think about {history}." in text
    assert 'mode="reason"' in text


# ---- settings


def test_settings_are_plain_and_hold_no_secret():
    settings = {
        "hub_token": TOKEN, "api_key": "x", "WANDB_API_KEY": "x", "env": {"HF_TOKEN": "x", "A": "b"},
        "max_tokens": 512, "extra_tokens": ["<|reflect|>", "<x>"], "auth": "x", "author": "y",
        "note": "my token is hf_fakefakefakefake!", "url": "https://me:pw@host/v1", "resume": Path("/data/run-3/"),
        "output": "runs/a", "eos_token": "<HUB_TOKEN>", "tokens": ["<a>", "secret"], "logging_dir": "runs/a-computer",
        "home": "~/x/y", "text": "</think> ends", "share": (1, 2.5), "names": {"b", "a"}, "none": None,
    }  # fmt: skip
    assert plain(settings) == {
        "env": {"A": "b"}, "max_tokens": 512, "extra_tokens": ["<|reflect|>", "<x>"], "author": "y",
        "note": "my token is ***!", "url": "https://***@host/v1", "resume": "run-3", "output": "runs/a", "home": "y",
        "text": "</think> ends", "share": [1, 2.5], "names": ["a", "b"], "none": None,
    }  # fmt: skip


# ---- what is refused


def remove(name):
    return lambda folder: (folder / name).unlink()


def add(name, content="x"):
    return lambda folder: (folder / name).write_text(content)


def cut_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def few_rows(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(weights | {name: weights[name][:64].clone()}, folder / "model.safetensors", {"format": "pt"})


def forget_an_item(folder):
    pl.read_parquet(folder / "items.parquet").filter(pl.col("item") != "i7").write_parquet(folder / "items.parquet")


def another_index(folder):
    write_json(folder / "recllm.json", read_object(folder / "recllm.json") | {"semantic_ids": "0" * 64})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove("model.safetensors"), "lacks model.safetensors"),
        (remove("items.parquet"), "lacks items.parquet"),
        (remove("config.json"), "lacks config.json"),
        (remove("tokenizer.json"), "lacks tokenizer.json"),
        (remove("semantic_ids.json"), "holds no semantic_ids.json"),
        (remove("README.md"), "lacks README.md.*recllm publish"),
        (remove("training.yaml"), "lacks training.yaml"),
        (add("pytorch_model.bin"), "is a pickle"),
        (add("training_args.bin"), "is a pickle"),
        (add("adapter_config.json", "{}"), "merge"),
        (add("items.parquet"), "not a readable parquet"),
        (cut_weights, "model.safetensors: not readable"),
        (few_rows, "has 64 rows"),
        (forget_an_item, "lacks the item 'i7'"),
        (another_index, "is not the index that the model was made with"),
    ],
)
def test_an_incomplete_folder_is_refused(model, spoil, said):
    complete(model)
    check_complete(model)
    spoil(model)
    with pytest.raises(UserError, match=said) as caught:
        check_complete(model)
    assert caught.value.fix


def test_weights_in_parts_are_whole_or_refused(model):
    complete(model)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="200KB")
    parts = sorted(path.name for path in model.glob("model-*.safetensors"))
    assert len(parts) > 1
    with pytest.raises(UserError, match="and weights in parts"):  # transformers would load the older one
        check_complete(model)
    (model / "model.safetensors").unlink()
    check_complete(model)
    assert set(parts) < set(belonging(model))
    (model / parts[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {parts[1]}"):
        check_complete(model)


# ---- the Hub


@pytest.fixture
def hub(monkeypatch):
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        yield hub


def test_what_belongs_to_a_checkpoint_is_uploaded_and_nothing_else(model, hub):
    complete(model, method="sft", papers=["gream"])
    for name in ("checkpoint-5/model.safetensors", "checkpoint-5/optimizer.pt", ".cache/x.json", "trainer_state.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    assert push(model, "user/name", private=True) == f"{hub.url}/user/name"
    files = hub.repositories["user/name"]["main"]
    assert sorted(files) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "items.parquet",
        "model.safetensors", "recllm.json", "semantic_ids.json", "tokenizer.json", "tokenizer_config.json",
        "training.yaml",
    ]  # fmt: skip
    assert all(content == (model / path).read_bytes() for path, content in files.items())
    assert hub.private == {"user/name"}


def test_weights_of_an_earlier_push_go(model, hub):
    complete(model)
    push(model, "name")  # the user's own name goes before it
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
    hub.repositories["user/name"]["main"] |= old
    push(model, "user/name")
    assert set(old) & set(hub.repositories["user/name"]["main"]) == {"notes.md"}


def test_a_revision_is_a_branch_of_its_own(model, hub):
    complete(model)
    assert push(model, "user/name", revision="v2") == f"{hub.url}/user/name/tree/v2"
    assert hub.repositories["user/name"]["main"] == {}
    assert "model.safetensors" in hub.repositories["user/name"]["v2"]


def test_private_is_not_said_of_a_repository_that_is_public(model, hub):
    complete(model)
    hub.repositories["user/name"] = {"main": {}}
    with pytest.raises(UserError, match="exists and is public"):
        push(model, "user/name", private=True)
    assert hub.repositories["user/name"]["main"] == {}


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("/api/repos/create", 401, "does not accept the token"),
        ("/api/repos/create", 403, "may not write to 'user/name'"),
        ("/api/repos/create", 404, "it is no Hub"),
        ("/preupload/", 403, "may not write to 'user/name'"),
        ("/commit/", 400, "answered 400"),
        ("/lfs/", 400, "answered 400"),
    ],
)
def test_a_refusal_is_one_sentence_without_the_token(model, hub, capfd, part, status, said):
    complete(model)
    hub.refuse = (part, status)
    with pytest.raises(UserError, match=said) as caught:
        push(model, "user/name")
    assert any(part in call for call in hub.calls)
    error = caught.value
    assert "\n" not in str(error)
    assert error.fix
    assert error.__context__ is None
    assert error.__cause__ is None
    assert TOKEN not in str(error) + repr(vars(error)) + "".join(capfd.readouterr())


def test_other_ways_not_to_reach_the_hub(model, hub, monkeypatch):
    complete(model)
    with pytest.raises(UserError, match="is no name of a repository"):
        push(model, "user/na me")
    with pytest.raises(UserError, match="does not accept the token"):
        push(model, "user/name", token="hf_wrong")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=re.escape("127.0.0.1:9 cannot be reached")):
        push(model, "user/name")
    monkeypatch.setattr(constants, "ENDPOINT", "nowhere")
    with pytest.raises(UserError, match="'nowhere' is no address"):
        push(model, "user/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        push(model, "user/name")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="nobody is logged in"):
        push(model, "user/name")


def test_a_folder_that_holds_the_token_is_not_uploaded(model, hub):
    complete(model)
    write_json(model / "generation_config.json", {"note": TOKEN})
    with pytest.raises(UserError, match=r"generation_config.json: holds your Hub token") as caught:
        push(model, "user/name")
    assert TOKEN not in str(caught.value)
    assert hub.calls == []


def test_finish_completes_pushes_and_says_what_is_next(model, hub, capfd):
    settings = {"settings": SETTINGS, "method": "sft", "papers": ["gream"]}
    assert finish(model, **settings) is None
    assert "recllm publish" in capfd.readouterr().err
    assert finish(model, **settings, push_to_hub=True, hub_token=TOKEN) == f"{hub.url}/user/model"
    assert f"{hub.url}/user/model" in capfd.readouterr().err
    hub.refuse = ("/commit/", 403)
    with pytest.raises(UserError, match="the checkpoint is whole"):
        finish(model, **settings, push_to_hub=True, hub_model_id="user/other", hub_token=TOKEN)
    check_complete(model)
    content = b"".join(content for branch in hub.repositories["user/model"].values() for content in branch.values())
    assert TOKEN.encode() not in content


def test_the_command(model, hub, capfd, monkeypatch, tmp_path):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["recllm", "publish", *map(str, args)])
        cli.main()
        return capfd.readouterr()

    results = write_evaluation(tmp_path / "one", model)
    out, err = run(model, "--results", results)
    assert out == f"{model / 'README.md'}\n"
    assert "is complete" in err
    out, _ = run(model, "--repo", "user/name", "--private")
    assert out == f"{hub.url}/user/name\n"
    assert "evaluations/a-b-shop-test-direct.json" in hub.repositories["user/name"]["main"]
    assert "'user/name'" in hub.repositories["user/name"]["main"]["README.md"].decode()
    with pytest.raises(SystemExit):
        run(model, "--private")
    assert "--repo user/name" in capfd.readouterr().err


BACK = """
    import json, sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from recllm import Recommender
    from safetensors.torch import save_file
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("user/name"), AutoTokenizer.from_pretrained("user/name")
    save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, sys.argv[1])
    found = Recommender.from_pretrained("user/name", device="cpu").recommend(["i1", "i2"], k=5)
    print(json.dumps([len(tokenizer), [[one.item, one.title, one.score] for one in found]]))
"""


def test_it_comes_back_from_the_hub_as_it_was(model, hub, tmp_path):
    complete(model, method="sft", papers=["gream"])
    push(model, "user/name")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BACK), str(tmp_path / "back.safetensors")],
        env=clean, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    there, back = load_file(model / "model.safetensors"), load_file(tmp_path / "back.safetensors")
    assert set(there) <= set(back)
    assert all((back[name] == value).all() for name, value in there.items())
    recommender = Recommender.from_pretrained(model, device="cpu")
    tokens, found = json.loads(said.stdout.splitlines()[-1])
    assert tokens == len(recommender.checkpoint.tokenizer)
    here = recommender.recommend(["i1", "i2"], k=5)
    assert [(item, title) for item, title, _ in found] == [(one.item, one.title) for one in here]
    assert [score for *_, score in found] == pytest.approx([one.score for one in here], abs=1e-5)
    assert any(call.startswith("GET /user/name/resolve/") for call in hub.calls)
