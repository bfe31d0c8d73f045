"""Answers that stay inside the catalogue, in engines that write token by token: vLLM, and Hugging Face's `generate`.

    free text … <answer> | a code of each level, as the trie allows | </answer> end

What may follow is read off the last tokens alone, every time: no counter that could drift when an engine preempts a
request, moves it to another row, or submits the answer so far as part of a longer prompt, as vLLM's beam search does.
The vLLM class is in `recllm.vllm_processor`, so that this module needs no vLLM.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recllm.errors import UserError
from recllm.files import require
from recllm.pretrained import load_tokenizer, reason
from recllm.semantic_ids import SemanticIdTable
from recllm.tokenization import ItemTokens
from recllm.trie import SemanticIdTrie

MODES = ("reason", "direct", "free")
PROCESSOR = "recllm.vllm_processor:CatalogueProcessor"  # the fully qualified name that vLLM wants
SETTINGS = "recllm"  # our key in vLLM's `additional_config`
REMEMBERED = 16_384  # prefixes whose continuations are kept
BEFORE_TAG = ("", " ", "\n")  # what stands before a tag may melt into its first token


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerRule:
    """Which tokens may follow. Pure: the same ids always give the same answer."""

    trie: SemanticIdTrie
    levels: tuple[Tensor, ...]  # for each level: code -> token id, (V,) int64
    eos: int
    openings: tuple[tuple[int, ...], ...] = ()  # an answer begins after any of these; none: with the first id
    closing: tuple[int, ...] = ()  # what follows a finished item, before the end

    @classmethod
    def of(cls, tokenizer: Any, table: SemanticIdTable, opening: str = "", closing: str = "") -> "AnswerRule":
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token, so an answer cannot end", fix="set its eos_token")
        return cls(
            SemanticIdTrie.from_codes(table.codes, table.sizes),
            ItemTokens.of(tokenizer, table).levels,
            tokenizer.eos_token_id,
            openings_of(tokenizer, opening) if opening else (),
            _ids_of_tag(tokenizer, closing, "closing") if closing else (),
        )

    @functools.cached_property
    def direct(self) -> "AnswerRule":
        """The same catalogue from the first id on: codes, then the end."""
        return dataclasses.replace(self, openings=(), closing=())

    @property
    def reach(self) -> int:
        """As many ids from the end decide, where there is an opening."""
        return max(map(len, self.openings), default=0) + len(self.levels) + len(self.closing)

    def allowed_next(self, ids: Sequence[int]) -> Tensor | None:
        """Token ids that may follow `ids`, or None for any. With an opening, the last `reach` ids are enough.

        A prefix that no item has cannot be written under this rule; a prompt that ends in one gets the end.
        """
        if self.openings and (not ids or ids[-1] not in self._telling):  # most steps of a chain of thought
            return None
        for closed in range(len(self.closing) + 1):  # how much of the closing is written
            end = len(ids) - closed
            if closed and (end < 0 or tuple(ids[end:]) != self.closing[:closed]):
                continue
            codes = self.codes_before(ids, end)
            if self._opens_before(ids, end - len(codes)):
                if len(following := self._children(codes)) and not closed:
                    return following
                if not len(following):
                    return self._ending[closed]
        return None if self.openings else self._ending[-1]

    def codes_before(self, ids: Sequence[int], end: int) -> tuple[int, ...]:
        """The codes of levels 0, 1, … that stand right before place `end`; () if there are none."""
        last = self._code_of.get(ids[end - 1], (-1, -1))[0] if end > 0 else -1
        start = end - last - 1
        found = [self._code_of.get(id, (-1, -1)) for id in ids[max(0, start) : end]]
        right = start >= 0 and [level for level, _ in found] == list(range(last + 1))
        return tuple(code for _, code in found) if right else ()

    def _opens_before(self, ids: Sequence[int], start: int) -> bool:
        if not self.openings:
            return start == 0
        return any(tuple(ids[max(0, start - len(tag)) : start]) == tag for tag in self.openings)

    @functools.cached_property
    def _children(self):
        @functools.lru_cache(REMEMBERED)
        def children(codes: tuple[int, ...]) -> Tensor:
            """Token ids of the codes that may follow; none after a finished item."""
            following = torch.tensor(self.trie.allowed_next(codes), dtype=torch.int64)
            return self.levels[len(codes)][following] if len(following) else following

        return children

    @functools.cached_property
    def _ending(self) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([id]) for id in (*self.closing, self.eos))

    @functools.cached_property
    def _code_of(self) -> dict[int, tuple[int, int]]:
        """Token id → (level, code)."""
        levels = enumerate(map(Tensor.tolist, self.levels))
        return {id: (level, code) for level, ids in levels for code, id in enumerate(ids)}

    @functools.cached_property
    def _telling(self) -> frozenset[int]:
        """Ids after which the next token may be constrained."""
        return frozenset({*self._code_of, *self.closing, *(tag[-1] for tag in self.openings)})


def openings_of(tokenizer: Any, tag: str) -> tuple[tuple[int, ...], ...]:
    """The ways in which a tag of several tokens may be written; not those that end in another of them."""
    alone = _ids_of_tag(tokenizer, tag, "opening")
    melted = {_ids_of_tag(tokenizer, before + tag, "opening") for before in BEFORE_TAG}
    return (alone, *sorted(ids for ids in melted if ids[-len(alone) :] != alone))


def _ids_of_tag(tokenizer: Any, tag: str, which: str) -> tuple[int, ...]:
    ids = tuple(tokenizer(tag, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError(f"the tokenizer encodes the {which} tag {tag!r} to nothing", fix="choose another tag")
    return ids


def keep_allowed(logits: Tensor, allowed: Mapping[int, Tensor]) -> Tensor:
    """−∞ on every other token of the rows that `allowed` names (row → token ids). In place. (R, V) -> (R, V)

    A token that is allowed alone gets 0 instead of its logit: it follows with probability 1, whatever was done to the
    logits before (vLLM's `min_tokens` sets the end to −∞, and then nothing would be left).
    """
    if not allowed:
        return logits
    counts = torch.tensor([len(ids) for ids in allowed.values()])
    named = torch.tensor(list(allowed))
    rows = named.repeat_interleave(counts).to(logits.device)
    columns = torch.cat(list(allowed.values())).to(logits.device)
    alone = (counts == 1).repeat_interleave(counts).to(logits.device)
    kept = logits[rows, columns].masked_fill(alone, 0.0)
    logits[named.to(logits.device)] = -torch.inf
    logits[rows, columns] = kept
    return logits


@dataclasses.dataclass(frozen=True)
class CatalogueLogits:
    """For Hugging Face: `model.generate(…, logits_processor=[CatalogueLogits(rule, prompt_length)])`."""

    rule: AnswerRule
    prompt_length: int  # padding included

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T), (B, V) -> (B, V)"""
        start = 0 if self.rule.openings else self.prompt_length
        allowed = {row: self.rule.allowed_next(ids) for row, ids in enumerate(input_ids[:, start:].tolist())}
        return keep_allowed(scores.clone(), {row: ids for row, ids in allowed.items() if ids is not None})


# ---- settings of an engine


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """What the processor of an engine needs to know; a request chooses another `mode` for itself."""

    folder: str  # checkpoint with semantic_ids.json, or its name on the Hub
    mode: str = "reason"  # reason: free text, then an item between the tags; direct: an item at once; free: anything
    opening: str = "<answer>"
    closing: str = "</answer>"

    def __post_init__(self):
        check_mode(self.mode)
        for name, value in vars(self).items():
            if not isinstance(value, str):
                raise UserError(f"{name} must be text, got {value!r}")

    @classmethod
    def from_dict(cls, given: Any, folder: str) -> "AnswerSettings":
        """From vLLM's `additional_config["recllm"]`."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(given, dict) or (unknown := sorted(set(given) - set(known))):
            what = f"no setting {unknown[0]!r}" if isinstance(given, dict) else f"no settings in {given!r}"
            raise UserError(f"additional_config[{SETTINGS!r}] holds {what}", fix=f"give some of {', '.join(known)}")
        return cls(**{"folder": folder, **given})

    def rule(self, tokenizer: Any | None = None, revision: str | None = None) -> AnswerRule:
        """The rule of the checkpoint, with its own tokenizer unless another is given."""
        table = SemanticIdTable.load(_semantic_ids_of(self.folder, revision))
        return AnswerRule.of(tokenizer or load_tokenizer(self.folder, revision), table, self.opening, self.closing)


def check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is not one of {', '.join(MODES)}")


def engine_arguments(folder: str | Path, **settings: str) -> dict[str, Any]:
    """For `vllm.LLM(**engine_arguments(folder, mode="direct"), …)`. What is wrong is said before an engine starts."""
    checked = AnswerSettings(str(folder), **settings)
    checked.rule()
    config = {name: value for name, value in vars(checked).items() if name != "folder"}
    return {"model": str(folder), "logits_processors": [PROCESSOR], "additional_config": {SETTINGS: config}}


def _semantic_ids_of(folder: str, revision: str | None) -> Path:
    name = "semantic_ids.json"
    fix = "give a checkpoint that build_model.py or a training stage of recllm wrote"
    if Path(folder).is_dir():
        return require(Path(folder) / name, "the checkpoint's index", fix)
    from transformers.utils import cached_file

    try:
        return Path(cached_file(folder, name, revision=revision))
    except Exception as error:  # OSError of a file or a network; a strange name raises its own kinds
        raise UserError(f"no {name} can be had from {folder!r}: {reason(error)}", fix=fix) from None
