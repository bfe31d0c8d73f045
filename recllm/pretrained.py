"""Language models and tokenizers as others published them: loaded whole, or refused in one sentence.

Weights come from safetensors alone: a pickle may run code. transformers fills what a folder lacks in silence (a
tokenizer without a vocabulary, layers with random weights); here both are refused.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from recllm.errors import UserError
from recllm.files import digest, sha256_file

COMPLETE = "give the name of a causal LM on the Hub, or a folder with its safetensors, config.json and tokenizer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EVALUATIONS = "evaluations"  # what was measured of a model, inside its folder, does not make it another one
IDENTITY = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")  # files that say which model it is


def load_causal_lm(name: str, dtype: torch.dtype | str, revision: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hub name or a folder, on the CPU."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, dtype, revision)


def load_backbone(name: str, dtype: torch.dtype | str, revision: str | None = None) -> tuple[Any, Any]:
    """The same without the head over the vocabulary: (model, tokenizer)."""
    from transformers import AutoModel

    return _load(AutoModel, name, dtype, revision)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a Hub name or a folder; refused where it knows no token but its special ones."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # a strange tokenizer.json raises anything: KeyError, TypeError, plain Exception
        raise UserError(f"the model {name!r} cannot be loaded (tokenizer): {reason(error)}", fix=COMPLETE) from None
    if not _own_ids(tokenizer):
        raise UserError(
            f"the model {name!r} has no tokenizer: it knows no token but special ones",
            fix="put tokenizer.json and tokenizer_config.json of the model beside its weights",
        )
    return tokenizer


def which_model(name: str, revision: str | None = None) -> str:
    """`name@revision`; of a folder its name and the hash of what lies in it: a model trained further is another."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    named = ((path, path.relative_to(folder).parts) for path in folder.rglob("*") if path.suffix in IDENTITY)
    files = sorted(path for path, parts in named if EVALUATIONS not in parts)
    parts = (part for path in files for part in (path.relative_to(folder).as_posix(), sha256_file(path)))
    return f"{folder.resolve().name}@sha256:{digest(*parts)[:16]}"


def _load(auto: Any, name: str, dtype: torch.dtype | str, revision: str | None) -> tuple[Any, Any]:
    if Path(name).is_dir():
        _check_weights(Path(name))
    tokenizer = load_tokenizer(name, revision)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    try:
        with quiet():
            model, loaded = auto.from_pretrained(
                name, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError for a wrong shape, KeyError …
        raise UserError(f"the model {name!r} cannot be loaded: {reason(error)}", fix=COMPLETE) from None
    if missing := sorted(loaded["missing_keys"]):  # a head tied to the embedding is not missing
        raise UserError(f"the model {name!r} lacks weights, such as {missing[0]}", fix="use a complete one")
    rows = model.get_input_embeddings().weight.size(0)
    ids = _own_ids(tokenizer)
    # A padding token added without a row is common and harmless; half the rows or fewer is another model's tokenizer.
    if max(ids) >= rows or len(tokenizer) < rows / 2:
        problem = f"the tokenizer's {len(tokenizer):,} tokens do not fit the {rows:,} rows of the embedding"
        raise UserError(f"the model {name!r} has another model's tokenizer: {problem}", fix=COMPLETE)
    return model, tokenizer


def _check_weights(folder: Path) -> None:
    """The files' headers: a download that broke off is named."""
    files = sorted(folder.glob("*.safetensors"))
    if not files and (pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])):
        raise UserError(
            "weights stored as a pickle, which may run code, are not loaded",
            file=pickles[0],
            fix="use a model in safetensors, or convert it (save_pretrained writes safetensors)",
        )
    if not files:
        raise UserError("the folder holds no weights (*.safetensors)", file=folder, fix=COMPLETE)
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"not readable as safetensors ({reason(error)})", file=path, fix="download or save the model again"
            ) from None


def _own_ids(tokenizer: Any) -> set[int]:
    """Ids of the vocabulary without the added tokens."""
    added = tokenizer.get_added_vocab()
    return {id for token, id in tokenizer.get_vocab().items() if token not in added}


def reason(error: Exception) -> str:
    """What a library said, on one line; the kind of error too where the message alone says little."""
    said = " ".join(str(error).split())[:200]
    return said if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar, and its report of weights that were left out, such as a head that is not needed."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
