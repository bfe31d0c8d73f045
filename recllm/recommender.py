"""Recommend with a checkpoint: histories in, items with titles and scores out.

recommender = Recommender.from_pretrained("runs/mine/model")
for one in recommender.recommend(["B0042", "B0007"], k=5, filter={"brand": "Nord"}):
    print(one.item, one.title, one.score)
recommender.recommend(["B0042", "B0007"], mode="reason")[0].reasoning.intent
recommender.recommend(["B0042", "B0007"], mode="reflect")[0].reflection.doubted
recommender.recommend([("B0042", "click"), ("B0007", "cart")], target_behaviour="pay")[0].evidence
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from recllm.checkpoint import Checkpoint
from recllm.converter import Converter
from recllm.decoding import Answers, Decoder, Normaliser
from recllm.decoding.chains import Sampling
from recllm.decoding.reflecting import Reflected, Reflector
from recllm.errors import UserError
from recllm.event_prompts import Event, is_event
from recllm.item_filter import Filter, allowed_items
from recllm.reasoner import Reasoner, opened
from recllm.reasoning import Chain
from recllm.reflection import OTHER

Mode = Literal["direct", "reason", "reflect"]
BEAMS = 20  # fewer are not wanted even for a short list: a good item's first code may be the fifth best
BEST_CHAIN = Sampling(temperature=0)


@dataclasses.dataclass(frozen=True)
class Correction:
    """Where a recommendation of mode reflect comes from."""

    draft: str  # the item that it was at first
    title: str
    score: float  # log-probability of the draft's codes
    first_wrong: int | None  # the code of it, from 1, at which the model says that it goes wrong; None: it names none
    doubted: tuple[str, ...]  # the attributes in which the model says that it is not what the user takes next
    uncertainty: float  # mean entropy of what it says, in nats
    kept: bool  # called right, and recommended as it is
    filler: bool = False  # not corrected either: it fills the list up behind those that were, with no score of its own


@dataclasses.dataclass(frozen=True)
class Evidence:
    """An event of the history that the model put before its answer."""

    item: str
    title: str
    behaviour: str
    relevance: float | None  # as the model measured it; None where it was not by relevance that it was chosen


@dataclasses.dataclass(frozen=True)
class Recommendation:
    item: str
    title: str
    # Log-probability of the item's codes, after the chain where there is one. Mode reflect: that of the correction, and
    # before it the draft's score and what its doubt added.
    score: float
    # Mode reason: the stages that led here, with this item as the answer; the text itself if it has not the form.
    reasoning: Chain | str | None = None
    reflection: Correction | None = None  # mode reflect: the draft that it was made of
    # Of a target behaviour: the events before the answer, the least relevant first; () if the model chooses none.
    evidence: tuple[Evidence, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of the engine beside the prompts."""

    k: int
    beams: int
    allowed: Tensor | None  # (N,) bool
    exclude: list[list[int]] | None  # rows of each prompt

    def best(self, found: Answers) -> Answers:
        return Answers(found.rows[:, : self.k], found.codes[:, : self.k], found.scores[:, : self.k])


class Recommender:
    """A checkpoint and its engine. Thread-safe to read; one question at a time."""

    def __init__(self, checkpoint: Checkpoint, normaliser: Normaliser = "level", batch_size: int | None = None):
        self.checkpoint, self.normaliser, self.batch_size = checkpoint, normaliser, batch_size
        self._converters: dict[str, Converter] = {}
        self.writer = checkpoint.writer
        self.decoder = Decoder(
            checkpoint.model,
            checkpoint.tokens,
            normaliser=normaliser,
            prefix=self.writer.prefix,
            batch_size=batch_size,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        normaliser: Normaliser = "level",
    ) -> "Recommender":
        """A checkpoint folder or a Hub repository; on CUDA if there is one."""
        return cls(Checkpoint.load(path_or_repo, device, dtype, revision), normaliser)

    def recommend(
        self,
        history: Sequence[str] | Sequence[Sequence[str]] | Sequence[Event] | Sequence[Sequence[Event]],
        k: int = 10,
        mode: Mode = "direct",
        *,
        target_behaviour: str | None = None,
        user: str | Sequence[str | None] | None = None,
        beams: int | None = None,
        exclude: Iterable[str] | Literal["history"] | None = None,
        filter: Filter | None = None,
        sampling: Sampling = BEST_CHAIN,
        seed: int = 0,
        entropy_weight: float = 0.2,
        skip: bool = True,
    ) -> list[Recommendation] | list[list[Recommendation]]:
        """The k best items for one history (item ids, oldest first) or for each of several.

        target_behaviour  what the user does with the items, of a model that was trained on behaviours: a history is
                  then of (item, behaviour) pairs, and each recommendation has the events that led to it as `evidence`
        user      of a target behaviour: who asks, a name of the training data; several for several histories
        exclude   items never to show, or "history": none of the history itself; fewer than k if no more are left
        filter    {"brand": "Nord", "categories": ["Shoes", "Socks"]} (any of them), or a polars expression over
                  the item columns; decoding stays among the items that pass, so k of them come back if there are k
        beams     width of the search, by default 20 or k
        mode      reason: the model writes a chain first and the list follows from it, filters and all; each
                  recommendation has it as `reasoning`. A chain that comes to no answer within its limit is cut
                  short, and the list follows from what there is. reflect: it drafts a list, says of each item where it
                  is wrong, and corrects it; each recommendation has its draft as `reflection`
        sampling  mode reason: how the chain is drawn; by default the best token every time
        seed      mode reason: of the draws
        skip      mode reflect: a draft that the model calls right is left as it is
        entropy_weight  mode reflect: how much its doubt about a draft adds to the draft's score; 0: nothing
        """
        if mode not in get_args(Mode):
            raise UserError(f"mode {mode!r} is not one of {', '.join(get_args(Mode))}")
        history = history if isinstance(history, str) else list(history)
        if target_behaviour is not None:
            if mode != "direct":
                raise UserError(f"a target behaviour has no mode {mode}", fix="mode direct")
            return self._converted(history, user, target_behaviour, k, beams, exclude, filter)
        self._refuse_pairs(history)
        single = not history or isinstance(history, str) or not isinstance(history[0], list | tuple)
        histories = [history] if single else history
        if mode == "direct":
            found = self.ranked(histories, k, beams, exclude, filter)
            lists = [self._named(rows, scores) for rows, scores in zip(found.rows.tolist(), found.scores.tolist())]
        elif mode == "reason":
            lists = self._reasoned(histories, self._question(histories, k, beams, exclude, filter), sampling, seed)
        else:
            asked = self._question(histories, k, beams, exclude, filter)
            lists = self._reflected(histories, asked, entropy_weight, skip)
        return lists[0] if single else lists

    def ranked(
        self,
        histories: Sequence[Sequence[str]],
        k: int,
        beams: int | None = None,
        exclude: Iterable[str] | Literal["history"] | None = None,
        filter: Filter | None = None,
    ) -> Answers:
        """The same as rows of the checkpoint's table."""
        asked = self._question(histories, k, beams, exclude, filter)
        prompts = self.writer.ids(histories)
        return asked.best(self.decoder.beams(prompts, asked.beams, asked.allowed, asked.exclude))

    def _refuse_pairs(self, history: Sequence) -> None:
        """Pairs would be read as several histories of two items each."""
        table = self.checkpoint.table
        if history and all(
            isinstance(one, list | tuple) and len(one) == 2 and one[0] in table and isinstance(one[1], str)
            and one[1] not in table for one in history
        ):  # fmt: skip
            raise UserError(
                f"the history is of pairs such as {tuple(history[0])!r}, and no behaviour is asked for",
                fix='target_behaviour="pay", or a history of items alone',
            )

    def _converted(
        self, history: Sequence, user: str | Sequence[str | None] | None, target_behaviour: str, k: int,
        beams: int | None, exclude: Iterable[str] | Literal["history"] | None, filter: Filter | None,
    ) -> list[Recommendation] | list[list[Recommendation]]:  # fmt: skip
        """Behind the events that the model chooses from each history."""
        converter = self.converter(target_behaviour)
        single = not history or isinstance(history, str) or isinstance(history[0], str) or is_event(history[0])
        histories = [history] if single else history
        if not isinstance(user, str | list | tuple | None):
            raise UserError(f"a user is a name, got {user!r}", fix=f"{str(user)!r}")
        users = [user] * len(histories) if user is None or isinstance(user, str) else list(user)
        if len(users) != len(histories):
            raise UserError(f"{len(users)} users of {len(histories)} histories", fix="one each, None if unknown")
        for events in histories:
            converter.writer.check(events)
        items = [[item for item, _ in events] for events in histories]
        asked = self._question(items, k, beams, exclude, filter, events=True)
        found = converter.beams(histories, asked.beams, users, asked.allowed, asked.exclude)
        best, titles = asked.best(found.found), self.checkpoint.items["title"]
        lists = []
        for case, (rows, scores) in enumerate(zip(best.rows.tolist(), best.scores.tolist())):
            chosen = converter.evidence(histories[case], found, case)
            row_of = self.checkpoint.table.row_of
            evidence = tuple(Evidence(item, titles[row_of[item]], kind, score) for (item, kind), score in chosen)
            lists.append([dataclasses.replace(one, evidence=evidence) for one in self._named(rows, scores)])
        return lists[0] if single else lists

    def converter(self, target_behaviour: str) -> Converter:
        """The same checkpoint, asked for this behaviour."""
        if target_behaviour not in self._converters:
            made = Converter.of(self.checkpoint, target_behaviour, self.normaliser, self.batch_size)
            self._converters[target_behaviour] = made
        return self._converters[target_behaviour]

    def _question(
        self, histories: Sequence[Sequence[str]], k: int, beams: int | None,
        exclude: Iterable[str] | Literal["history"] | None, filter: Filter | None, events: bool = False,
    ) -> "Question":  # fmt: skip
        """What is asked, checked."""
        table = self.checkpoint.table
        if isinstance(exclude, str) and exclude != "history":
            raise UserError(f"exclude is a list of items or 'history', got {exclude!r}", fix=f"[{exclude!r}]")
        for history in histories:
            if len(history) or not events:  # nothing that was done yet is a history of events too
                self.writer.check(history)
        allowed = self.allowed(filter, () if exclude in (None, "history") else exclude)
        possible = len(table) if allowed is None else int(allowed.sum())
        if not isinstance(k, int) or not 1 <= k <= possible:
            left = f"the filter leaves {possible:,} items" if possible < len(table) else f"there are {possible:,} items"
            raise UserError(f"k = {k}, and {left}", fix=f"a k of 1 to {possible:,}")
        if beams is not None and beams < k:
            raise UserError(f"{beams} beams cannot give {k} items", fix=f"--beams {k} or more")
        own = [[table.row_of[item] for item in history] for history in histories] if exclude == "history" else None
        return Question(k, beams or max(k, min(BEAMS, possible)), allowed, own)

    def _reasoned(
        self, histories: Sequence[Sequence[str]], asked: "Question", sampling: Sampling, seed: int
    ) -> list[list[Recommendation]]:
        """A chain for each history, then beams."""
        reasoner = dataclasses.replace(self._reasoner, sampling=sampling)
        prompts = reasoner.writer.ids(histories)
        eos = self.checkpoint.tokenizer.eos_token_id
        chains = [[opened(one, reasoner.openings[0], eos)] for (one,) in reasoner.chains(prompts, 1, seed)]
        found = asked.best(reasoner.beams(prompts, chains, asked.beams, asked.allowed, asked.exclude))
        lists = []
        for (chain,), rows, scores in zip(chains, found.rows.tolist(), found.scores.tolist()):
            named = self._named(rows, scores)
            said = reasoner.parsed(chain, named[0].item) if named else None
            lists.append([
                dataclasses.replace(
                    one,
                    reasoning=dataclasses.replace(said, item=one.item) if said else reasoner.text(chain),
                )
                for one in named
            ])  # fmt: skip
        return lists

    def _reflected(
        self, histories: Sequence[Sequence[str]], asked: "Question", entropy_weight: float, skip: bool
    ) -> list[list[Recommendation]]:
        """Drafts for each history, what the model says of them, their corrections."""
        found = self._reflector.scheduled(
            self.writer.ids(histories), asked.beams, entropy_weight=entropy_weight, skip=skip, allowed=asked.allowed,
            exclude=asked.exclude,
        )  # fmt: skip
        best = asked.best(found.found)
        return [
            [
                dataclasses.replace(one, reflection=self._correction(found, case, place))
                for place, one in enumerate(self._named(rows, scores))
            ]
            for case, (rows, scores) in enumerate(zip(best.rows.tolist(), best.scores.tolist()))
        ]

    @functools.cached_property
    def _reflector(self) -> Reflector:
        return Reflector(self.decoder, self.checkpoint.reflection.tokens)

    def _correction(self, found: Reflected, case: int, place: int) -> Correction:
        draft = int(found.source[case, place])
        template, labels = self.checkpoint.reflection.template, found.labels[case, draft].tolist()
        loc, *same = labels or [template.levels]  # without labels (GC) nothing is said
        doubt = found.entropies[case, draft]
        (named,) = self._named([int(found.drafts.rows[case, draft])], [float(found.drafts.scores[case, draft])])
        return Correction(
            named.item, named.title, named.score, loc + 1 if loc < template.levels else None,
            tuple(name for name, label in zip(template.attributes, same) if label == OTHER),
            float(doubt.mean()) if len(doubt) else 0.0, bool(found.kept[case, draft]),
            bool(found.filled[case, place]),
        )  # fmt: skip

    @functools.cached_property
    def _reasoner(self) -> Reasoner:
        return Reasoner.of(self.checkpoint, BEST_CHAIN, self.normaliser, self.decoder.batch_size)

    def allowed(self, filter: Filter | None, exclude: Iterable[str] = ()) -> Tensor | None:
        """Which items may be shown, None for all. (N,) bool"""
        return allowed_items(self.checkpoint.items, self.checkpoint.table, filter, exclude)

    def _named(self, rows: Sequence[int], scores: Sequence[float]) -> list[Recommendation]:
        titles, items = self.checkpoint.items["title"], self.checkpoint.table.items
        return [Recommendation(items[row], titles[row], score) for row, score in zip(rows, scores) if row >= 0]
