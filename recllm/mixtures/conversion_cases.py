"""Conversions of a prepared folder: targets with their histories, and whether the target was met before.

The folder's own split decides (`prepare.py --split conversion`): a user's last conversion is the test target, the one
before it validation, and what may be learnt from came before both. An event's history is every earlier event of its
user, whatever the behaviour; of an event that trains, all of that trains too.
"""

import dataclasses
import functools
from typing import Literal

import polars as pl

from recllm.catalogue import Catalogue, Split
from recllm.errors import UserError
from recllm.event_prompts import Event


@dataclasses.dataclass(frozen=True, eq=False)
class ConversionEvents:
    """Refuses data of another split, of which conversions that are to be found may be learnt."""

    catalogue: Catalogue

    def __post_init__(self):
        catalogue, settings = self.catalogue, self.catalogue.report.get("settings", {})
        split = settings.get("split", "leave-one-out")
        if split != "conversion":
            known = catalogue.behaviours
            if len(known) == 1:
                problem = f"the data have no behaviours to tell conversions by: every event is one of {known[0]!r}"
                raise UserError(problem, file=catalogue.folder, fix="prepare a log that says what users did")
            raise UserError(
                f"the data are split {split}, so what trains holds conversions that are to be found",
                file=catalogue.folder,
                fix=f"prepare them with --split conversion --target_behaviour X, X one of {', '.join(known)}",
            )

    @property
    def target_behaviour(self) -> str:
        return self.catalogue.report["settings"]["target_behaviour"]

    @functools.cached_property
    def events(self) -> pl.DataFrame:
        """The catalogue's, in its order, with `repeat`: by which behaviours the user had met the item before."""
        return self.catalogue.interactions.with_columns(repeat=met_before(self.catalogue.interactions))

    def cases(self, split: Split, max_history: int | None = None) -> pl.DataFrame:
        """One row for each conversion of `split` that has a history: the columns of `Catalogue.targets`, and

        repeat  the behaviours by which the user had met the item, in the whole past ([]: a new item)
        shown   does the item stand in the history as it is cut?

        The history's events are the user's positions `position − len(history)` … `position − 1`.
        """
        wanted = (pl.col("split") == split) & (pl.col("behaviour") == self.target_behaviour) & (pl.col("position") > 0)
        return self._with_histories(wanted, pl.col("position"), max_history)

    def training_targets(
        self, which: Literal["all", "target"], max_history: int, max_targets: int | None = None
    ) -> pl.DataFrame:
        """The same of training events: the next event of any behaviour, or conversions; a user's latest ones."""
        wanted = (pl.col("split") == "train") & (pl.col("position") > 0)
        if which == "target":
            wanted &= pl.col("behaviour") == self.target_behaviour
        if max_targets is not None:
            wanted &= wanted.cast(pl.Int64).cum_sum(reverse=True).over("user") <= max_targets
        return self._with_histories(wanted, pl.col("position"), max_history)

    def training_pieces(self, max_history: int) -> pl.DataFrame:
        """The same of whole training sequences, in pieces of up to `max_history` + 1 events, the last one the target.

        A piece begins with the last event of the one before, so every event from the second on is answered once.
        """
        train, past = pl.col("split") == "train", pl.col("position").cast(pl.Int64)
        last = past == past.filter(train).max().over("user")
        wanted = train & (past > 0) & (last | (past % max_history == 0))
        return self._with_histories(wanted, past - (past - 1) // max_history * max_history, max_history)

    def _with_histories(self, wanted: pl.Expr, past: pl.Expr, max_history: int | None) -> pl.DataFrame:
        """The wanted events, each with the `past` events before it, and no more than `max_history`."""
        chosen = self.events.select(wanted=wanted, past=past)
        found = self.catalogue.with_histories(self.events, chosen["wanted"], chosen["past"], max_history)
        found = found.with_columns(self.events["repeat"].filter(chosen["wanted"]))
        return found.with_columns(shown=pl.col("history").list.contains(pl.col("item")))


def cases(catalogue: Catalogue, split: Split, max_history: int | None = None) -> pl.DataFrame:
    """What an evaluation asks for: `ConversionEvents.cases`."""
    return ConversionEvents(catalogue).cases(split, max_history)


def histories_of(cases: pl.DataFrame) -> list[list[Event]]:
    """Of each case its (item, behaviour) pairs: what an `EventWriter` asks with."""
    pairs = cases.select("history", "history_behaviours").iter_rows()
    return [list(zip(items, behaviours)) for items, behaviours in pairs]


def met_before(events: pl.DataFrame) -> pl.Series:
    """Of each event, in order: by which behaviours its user had met its item, in the order of their names."""
    names = sorted(events["behaviour"].unique().to_list())
    own = [(pl.col("behaviour") == name).cast(pl.Int32) for name in names]
    earlier = [count.cum_sum().over("user", "item") - count for count in own]
    met = [pl.when(count > 0).then(pl.lit(name)) for name, count in zip(names, earlier)]
    return events.select(repeat=pl.concat_list(met).list.drop_nulls()).to_series()


def repeat_counts(cases: pl.DataFrame) -> dict:
    """targets; new; repeat: met before, by each behaviour too; repeat_not_shown: met before the history begins."""
    repeat = cases["repeat"].list.len() > 0
    by = cases["repeat"].explode(empty_as_null=False).value_counts()
    return {
        "targets": len(cases),
        "new": int((~repeat).sum()),
        "repeat": int(repeat.sum()),
        "repeat_by": dict(sorted(by.iter_rows(), key=lambda pair: (-pair[1], pair[0]))),
        "repeat_not_shown": int((repeat & ~cases["shown"]).sum()),
    }
