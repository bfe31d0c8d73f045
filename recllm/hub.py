"""A checkpoint's way to the Hub: which files go, and what the Hub's errors mean. A token appears in none of them."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

from recllm.checkpoint import ITEMS
from recllm.errors import UserError
from recllm.files import read_lines, read_object
from recllm.settings import HIDDEN, hide, shortened

CARD, SETTINGS, EVALUATIONS = "README.md", "training.yaml", "evaluations"
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # of a tokenizer, a config or a report
OF_A_RUN = ("trainer_state.json",)  # of the training run, not of the model
T = TypeVar("T")


def belonging(folder: str | Path) -> list[str]:
    """The files of a checkpoint, and nothing of the run that made it: no optimiser, no step, no cache."""
    folder = Path(folder)
    shards = set(read_object(folder / SHARDS).get("weight_map", {}).values()) if (folder / SHARDS).exists() else set()
    weights = {WEIGHTS, *shards, "quantizer.safetensors", "prefix_module.safetensors"}
    own = {CARD, SETTINGS, ITEMS, "LICENSE", "NOTICE", *weights}
    top = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    names = [path.name for path in top if path.name in own or (path.suffix in TEXTS and path.name not in OF_A_RUN)]
    names += [f"{EVALUATIONS}/{path.name}" for path in (folder / EVALUATIONS).glob("*.json")]
    templates = "additional_chat_templates"
    names += [f"{templates}/{path.name}" for path in (folder / templates).glob("*.jinja")]
    return sorted(names)


def upload(folder: Path, repo: str, private: bool, revision: str | None, token: str | None) -> str:
    """What belongs to the checkpoint, in one go; the URL. `token`: default is that of `hf auth login` or HF_TOKEN."""
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    if not token:
        raise UserError("nobody is logged in to the Hub", fix="hf auth login, or set HF_TOKEN")
    files = belonging(folder)
    for name in files:
        if not name.endswith((".safetensors", ".parquet")) and token in read_text(folder / name):
            raise UserError("holds your Hub token, which would be published", file=folder / name, fix="remove it")

    def send() -> str:
        api = HfApi(token=token)
        made = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(made.repo_id).private:
            raise UserError(f"{repo!r} exists and is public", fix="another --repo, or make it private on the Hub first")
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a model's repository holds a table of its items is meant
            api.upload_folder(
                repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message="A checkpoint of recllm",
                allow_patterns=[re.sub(r"([\[*?])", r"[\1]", name) for name in files],
                delete_patterns=["*.safetensors", SHARDS, f"{EVALUATIONS}/*.json"],  # of an earlier push, if not anew
            )  # fmt: skip
        return f"{api.endpoint}/{made.repo_id}" + (f"/tree/{revision}" if revision else "")

    return _asked(send, repo, token)


def _asked(call: Callable[[], T], repo: str, token: str) -> T:
    """The answer of the Hub, or one sentence that never holds the token."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # of httpx, huggingface_hub, its Xet library or json
        problem, fix = _sentence(error, repo, token)
    # Raised out here, so that the error with the request's headers does not hang on it as its context.
    raise UserError(problem, fix=fix)


def _sentence(error: BaseException, repo: str, token: str) -> tuple[str, str]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper not in chain:
        chain.append(deeper)
    hub = shortened(constants.ENDPOINT)
    said = " ".join(hide(str(error).replace(token, HIDDEN)).split())[:200]
    for one in chain:
        if isinstance(one, HFValidationError):
            return f"{repo!r} is no name of a repository", "--repo user/name, of letters, digits, -, _ and ."
        if isinstance(one, OfflineModeIsEnabled):
            return "the Hub is switched off here by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE"
        if isinstance(one, HfHubHTTPError):
            return _refused(one.response.status_code, repo, hub, said)
        if isinstance(one, httpx.UnsupportedProtocol | httpx.InvalidURL):
            return f"HF_ENDPOINT {hub!r} is no address", "https://huggingface.co, or unset it"
        if isinstance(one, httpx.TransportError):
            return f"{hub} cannot be reached ({type(one).__name__})", "check the network and HF_ENDPOINT"
    if isinstance(error, ValueError):  # an answer that is no JSON, or without the parts of the Hub's
        return f"{hub} does not answer as a Hub ({said})", "check HF_ENDPOINT"
    return f"the upload to {repo!r} failed: {said}", "push again: what arrived is not sent twice"


def _refused(status: int, repo: str, hub: str, said: str) -> tuple[str, str]:
    known = {
        401: (f"{hub} does not accept the token", "hf auth login with a token that may write, or set HF_TOKEN"),
        403: (f"the token may not write to {repo!r}", "a token with write access, or a repository of your own"),
        404: (f"{hub} knows no such address: it is no Hub, or {repo!r} is gone", "check HF_ENDPOINT and --repo"),
        429: (f"{hub} asks to wait: too many requests", "push again later"),
    }
    return known.get(status, (f"{hub} answered {status}: {said}", "push again, or correct what it names"))


def read_text(path: Path) -> str:
    return b"\n".join(line for _, line in read_lines(path)).decode(errors="replace")
