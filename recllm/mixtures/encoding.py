"""Mixtures → token ids and labels, as one data set: alignment rows first, then reasoning rows.

Prompt and completion are tokenised apart, as they are when the model is asked, and joined as ids; the loss is on the
completion and the end token. What does not fit is left out whole and counted: half an item teaches nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from recllm.errors import UserError
from recllm.mixtures.store import Mixture
from recllm.prompting import rendered

IGNORED = -100
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


@dataclass(frozen=True, eq=False)
class Encoded:
    """`rows` for the trainer; the first `align` of them are alignment."""

    rows: Dataset
    align: int
    too_long: int  # examples that were left out
    examples: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row. (rows,)"""
        return self.rows.data.column("input_ids").combine_chunks().value_lengths().to_numpy()


def encode(
    align: Sequence[Mixture], reason: Sequence[Mixture], tokenizer: PreTrainedTokenizerBase, max_length: int,
    pack: bool = False, cache: Path | None = None,
) -> Encoded:  # fmt: skip
    """`pack`: several examples a row of up to `max_length` tokens, alignment and reasoning apart.

    `cache`: a folder for the result, read again by the same call; without it everything stays in memory.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token, so an answer cannot end", fix="set its eos_token")
    parts, dropped, examples = [], 0, 0
    for kind, mixtures in (("align", align), ("reason", reason)):
        encoded = [
            _encoded(mixture, tokenizer, max_length, cache and cache / f"{kind}-{number}.arrow")
            for number, mixture in enumerate(mixtures)
        ]
        examples += sum(map(len, encoded))
        dropped += sum(len(mixture.examples) for mixture in mixtures) - sum(map(len, encoded))
        rows = concatenate_datasets(encoded) if encoded else None
        if pack and rows is not None and len(rows):
            rows = pack_dataset(rows, max_length, "bfd", {"keep_in_memory": True})
        parts.append(rows if rows is not None else [])
    if not any(map(len, parts)):
        raise UserError(f"no example fits into {max_length} tokens", fix="a larger --max_length")
    rows = concatenate_datasets([part for part in parts if len(part)])
    return Encoded(rows, len(parts[0]), dropped, examples)


def _encoded(mixture: Mixture, tokenizer: PreTrainedTokenizerBase, max_length: int, cache: Path | None) -> Dataset:
    chat, end = mixture.style.chat, tokenizer.eos_token_id

    def work(batch: dict) -> dict:
        prompts = [rendered(text, tokenizer, chat) for text in batch["prompt"]]
        prompts = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        completions = tokenizer(batch["completion"], add_special_tokens=False)["input_ids"]
        pairs = [
            (prompt, [*completion, end])
            for prompt, completion in zip(prompts, completions)
            if len(prompt) + len(completion) < max_length
        ]
        return {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "labels": [[IGNORED] * len(prompt) + completion for prompt, completion in pairs],
        }

    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
    return mixture.examples.map(
        work, batched=True, remove_columns=mixture.examples.column_names, features=FEATURES,
        desc="tokenising", keep_in_memory=cache is None, cache_file_name=cache and str(cache),
    )  # fmt: skip
