"""How the tokens of an answer hang together: by the form that they stand at the places of, or each after the other."""

import functools
from dataclasses import dataclass

import numpy as np

from recllm.errors import UserError
from recllm.reflection import NOTHING, PROMPT, Form


@dataclass(frozen=True, eq=False)
class HostForm:
    """A form on the host, of which an answer of its own free length is the plainest."""

    sees: np.ndarray | None  # (C, C) bool: [i, j], does place i see place j? None: all before it, and itself
    offsets: np.ndarray  # (C,) a token's position, counted from the prompt's end
    before: np.ndarray  # (C,) the place whose state predicts it; PROMPT, NOTHING: below 0
    kinds: np.ndarray | None  # (C,) as in `Form`; None: an answer's `starts` says

    @classmethod
    def of(cls, form: Form | None, width: int) -> "HostForm":
        if form is None:
            return cls(None, np.arange(width), np.arange(PROMPT, width - 1), None)
        return cls(*(part.cpu().numpy() for part in (form.sees, form.offsets, form.before, form.kinds)))

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """(C,) bool"""
        return self.before != NOTHING

    @functools.cached_property
    def walk(self) -> np.ndarray:
        """Which walk down the trie a code at each place is a step of: the draft's or the item's. (C,)"""
        return np.zeros_like(self.before) if self.kinds is None else (self.kinds == 0).cumsum() - 1

    def sees_of(self, used: np.ndarray) -> np.ndarray | None:
        """`sees`, or None where these places (C,) alone would see all before them."""
        if self.sees is None or np.array_equal(self.sees[np.ix_(used, used)], np.tri(used.sum(), dtype=bool)):
            return None
        return self.sees

    def check(self, present: np.ndarray, rows: np.ndarray) -> None:
        """Whatever is predicted must have before it what predicts it. (B, C) bool, (B,) what the answers are called"""
        if self.kinds is None:
            return
        after = np.flatnonzero(self.before >= 0)
        gaps = present[:, after] & ~present[:, self.before[after]]
        if gaps.any():
            answer, which = (int(part[0]) for part in np.nonzero(gaps))
            raise UserError(
                f"answer {int(rows[answer])} holds place {int(after[which])} of its form and not place "
                f"{int(self.before[after[which]])}, which predicts it",
                fix="leave out all that stands behind a place that is left out",
            )
