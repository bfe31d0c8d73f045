"""Answers to prompts as a batch, and the same without its padding: what is computed at all, found once on the host."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from recllm.actor.forms import HostForm
from recllm.errors import UserError
from recllm.reflection import Form
from recllm.trie import SemanticIdTrie


@dataclass(frozen=True, eq=False)
class AnswerRows:
    """R answers, each with its prompt; rows of one prompt stand side by side. A row of an empty answer costs nothing.

    Prompts are left-padded, answers right-padded. From `starts` on an answer holds the codes of an item, level by
    level, to its end; where it names no item, `starts` is its length or more.

    With a `form` an answer's token c stands at place c of it. The mask says which places are held: those of the draft
    alone make a direct answer. `starts` is not looked at.
    """

    prompt_ids: Tensor  # (R, Tp) int64
    prompt_mask: Tensor  # (R, Tp)
    answer_ids: Tensor  # (R, C) int64
    answer_mask: Tensor  # (R, C)
    starts: Tensor  # (R,)
    form: Form | None = None  # of C places
    scored: Tensor | None = None  # (R, C) which tokens get a log-probability; None: all that anything predicts

    def __post_init__(self):
        assert self.prompt_ids.shape == self.prompt_mask.shape
        assert self.answer_ids.shape == self.answer_mask.shape
        assert len(self.prompt_ids) == len(self.answer_ids) == len(self.starts)
        assert self.form is None or self.form.places == self.answer_ids.size(1)
        assert self.scored is None or self.scored.shape == self.answer_ids.shape

    @functools.cached_property
    def packed(self) -> "Packed":
        return Packed.of(self)


@dataclass(frozen=True, eq=False)
class Packed:
    """The same on the host: B answers that are not empty, behind Pg prompts; every prompt computed has an answer.

    One flat row of tokens: all prompts, one after the other, then all answers. An answer's last token is never fed.
    """

    shape: tuple[int, int]  # R, C of the rows
    rows: np.ndarray  # (B,) which of the R they are
    group: np.ndarray  # (B,) ascending: which prompt each stands behind
    lengths: np.ndarray  # (B,) tokens of each answer
    prompt_lengths: np.ndarray  # (Pg,)
    prompt_tokens: np.ndarray  # (Σ prompt_lengths,)
    answer_ids: np.ndarray  # (B, C)
    starts: np.ndarray  # (B,)
    present: np.ndarray  # (B, C) bool: where an answer has tokens
    scored: np.ndarray | None  # (B, C) bool
    form: HostForm

    @classmethod
    def of(cls, rows: AnswerRows) -> "Packed":
        prompts, answers = _host(rows.prompt_ids), _host(rows.answer_ids)
        seen, answered = _host(rows.prompt_mask) != 0, _host(rows.answer_mask) != 0
        lengths, form = answered.sum(axis=1), HostForm.of(rows.form, answers.shape[1])
        prompts = np.where(seen, prompts, -1)
        first = np.ones(len(prompts), bool)
        first[1:] = (prompts[1:] != prompts[:-1]).any(axis=1)
        kept = np.flatnonzero(lengths)
        _, heads, group = np.unique(first.cumsum()[kept], return_index=True, return_inverse=True)
        own = kept[heads]  # the first row of each prompt that has an answer
        prompt_lengths = seen[own].sum(axis=1)
        if not prompt_lengths.all():
            raise UserError(f"the prompt of answer {int(own[prompt_lengths.argmin()])} is empty")
        present = answered[kept] if rows.form is not None else np.arange(answers.shape[1]) < lengths[kept][:, None]
        form.check(present, kept)
        return cls(
            answers.shape, kept, group, lengths[kept], prompt_lengths, prompts[own][seen[own]], answers[kept],
            _host(rows.starts)[kept], present, None if rows.scored is None else _host(rows.scored)[kept] != 0, form,
        )  # fmt: skip

    @functools.cached_property
    def fed(self) -> np.ndarray:
        """Tokens of each answer that go through the model. (B,)"""
        return self.lengths - 1

    @functools.cached_property
    def fed_places(self) -> np.ndarray:
        """Which places of the answers do: those before another. (B, C) bool"""
        if self.form.kinds is None:
            return np.arange(self.shape[1]) < self.fed[:, None]
        fed = self.present.copy()
        fed[np.arange(len(fed)), self.shape[1] - 1 - fed[:, ::-1].argmax(axis=1)] = False
        return fed

    @functools.cached_property
    def used(self) -> np.ndarray:
        """Places that are fed in any answer. (C,) bool"""
        return self.fed_places.any(axis=0)

    @functools.cached_property
    def rank(self) -> np.ndarray:
        """How many of an answer's fed tokens stand before each of them. (B, C)"""
        if self.form.kinds is None:
            return np.broadcast_to(np.arange(self.shape[1]), self.present.shape)
        return self.fed_places.cumsum(axis=1) - 1

    @functools.cached_property
    def sees(self) -> np.ndarray | None:
        """Which places see which; None where all see what stands before them. (C, C) bool"""
        return self.form.sees_of(self.used)

    @functools.cached_property
    def plain(self) -> bool:
        """Is it as if every answer were text, which the model's own masks and positions would do for?"""
        if self.form.kinds is None:
            return True
        row, place = np.nonzero(self.fed_places)
        return self.sees is None and bool((self.form.offsets[place] == self.rank[row, place]).all())

    @functools.cached_property
    def of_group(self) -> np.ndarray:
        """Answers behind each prompt. (Pg,)"""
        return np.bincount(self.group)

    @functools.cached_property
    def fed_of_group(self) -> np.ndarray:
        """Tokens of answers behind each prompt. (Pg,)"""
        return np.bincount(self.group, weights=self.fed).astype(np.int64)

    @functools.cached_property
    def token_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and place of every answer token, answer after answer. (S,), (S,)"""
        return np.nonzero(self.present)

    @functools.cached_property
    def asked(self) -> np.ndarray:
        """Which of them get a log-probability. (S,) bool"""
        row, place = self.token_places
        asked = self.form.predicted[place]
        return asked if self.scored is None else asked & self.scored[row, place]

    def kinds_of(self, levels: int) -> np.ndarray:
        """What each answer token is chosen from: level of a code, `levels` + slot of a label, -1 for text. (S,)"""
        row, place = self.token_places
        if self.form.kinds is not None:
            return self.form.kinds[place]
        level = np.where(place >= self.starts[row], place - self.starts[row], -1)
        if len(level) and level.max() >= levels:
            answer = int(self.rows[row[level.argmax()]])
            raise UserError(
                f"answer {answer} goes on after the {levels} codes of an item", fix="cut it off behind the item"
            )
        return level


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def codes_of_tokens(packed: Packed, kind: np.ndarray, ids: Sequence[np.ndarray], levels: int) -> np.ndarray:
    """The code or label of each answer token, 0 for text. `ids`: of each kind token id → code, -1. (S,) -> (S,)"""
    row, place = packed.token_places
    tokens, codes = packed.answer_ids[row, place], np.zeros(len(kind), np.int64)
    for number, code_of in enumerate(ids):
        here = np.flatnonzero(kind == number)
        codes[here] = np.where(tokens[here] < len(code_of), code_of[np.minimum(tokens[here], len(code_of) - 1)], -1)
        if len(here) and codes[here].min() < 0:
            wrong = here[codes[here].argmin()]
            what = f"a code of level {number}" if number < levels else f"a label of slot {number - levels}"
            fix = "`starts` must be the answer's length where it names no item"
            raise UserError(
                f"answer {int(packed.rows[row[wrong]])} holds token {int(tokens[wrong])} where {what} belongs",
                fix=fix if packed.form.kinds is None else "its places are those of the model's template",
            )
    return codes


def siblings(
    packed: Packed, kind: np.ndarray, codes: np.ndarray, trie: SemanticIdTrie
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each level the tokens that are its codes, and as pairs (which of them, code) what the trie allows there.

    A code that no item has after the codes before it has no probability: it is refused.
    """
    (row, place), found = packed.token_places, []
    walks = packed.form.walk.max(initial=0) + 1
    walk = row * walks + packed.form.walk[place]
    nodes = np.zeros(len(packed.rows) * walks, np.int64)  # reached by each walk
    for depth in range(trie.levels):
        here = np.flatnonzero(kind == depth)
        ptr, tok = trie.ptr[depth].numpy(), trie.tok[depth].numpy()
        first, last = ptr[nodes[walk[here]]].astype(np.int64), ptr[nodes[walk[here]] + 1].astype(np.int64)
        count = last - first
        which = np.repeat(np.arange(len(here)), count)
        children = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + first[which]
        allowed = tok[children].astype(np.int64)
        same = allowed == codes[here][which]
        if len(trie.pad[depth]):
            same &= ~trie.pad[depth].numpy()[children]
        if same.sum() < len(here):
            wrong = here[np.setdiff1d(np.arange(len(here)), which[same])[0]]
            raise UserError(
                f"answer {int(packed.rows[row[wrong]])} has code {int(codes[wrong])} at level {depth}, where no item "
                "has it",
                fix="normaliser `children` is for answers drawn from the trie: level or full takes any codes",
            )
        nodes[walk[here]] = children[same]
        found.append((here, which, allowed))
    return found
