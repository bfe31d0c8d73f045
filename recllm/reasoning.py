"""The form of a reasoned answer: five stages, written and read in one place.   GREAM, section 4.2 and appendix C.

<think>
Step 1: Extraction of Behavioral Evidence: …
Step 2: Modeling of Latent Preferences: …
Step 3: Inference of User Intent and Goal Formulation: …
</think>
Let's rewrite user's purchase history: {the history without its noise, as indices}
{why this item follows}
Based on the above analysis, the recommended product is <answer>{the item's index}</answer>

The line of justification may be absent; everything else must be there, once, in this order.
"""

import dataclasses
import re
from collections.abc import Mapping

from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable

STEPS = {
    "evidence": "Step 1: Extraction of Behavioral Evidence:",
    "preferences": "Step 2: Modeling of Latent Preferences:",
    "intent": "Step 3: Inference of User Intent and Goal Formulation:",
}
REWRITE = "Let's rewrite user's purchase history:"
RECOMMEND = "Based on the above analysis, the recommended product is"
OPENING, CLOSING = "<answer>", "</answer>"
TEMPLATE = """You are an AI recommendation model. Analyze the user's purchase history to recommend what they would \
likely purchase next. Think first, between <think> and </think>, in three steps:
Step 1: Extraction of Behavioral Evidence: examine the items in the purchase history for patterns and trends.
Step 2: Modeling of Latent Preferences: summarize the user's preferences.
Step 3: Inference of User Intent and Goal Formulation: deduce what the user is likely to look for next.
Then rewrite the purchase history without its noise, and recommend the next item between <answer> and </answer>.
The user has interacted with items {history} in chronological order. Can you predict the next possible item?
"""
SHORT_TEMPLATE = "A user's history, oldest first: {history}\nThink, then recommend the next item.\n"  # for tiny models
# Why a text is no chain, in a word; drops are counted under these.
REASONS = ("no_think", "steps", "empty_step", "no_rewrite", "unknown_item", "no_answer", "not_one_item", "rest")

# What no stage may hold, or the form could be read in two ways.
MARKS = (*STEPS.values(), REWRITE, RECOMMEND, "<think>", "</think>", OPENING, CLOSING)

_FORM = re.compile(
    r"\s*<think>(?P<steps>.*?)</think>\s*"
    + re.escape(REWRITE)
    + r"[ \t]*(?P<history>[^\n]*)\n+(?:(?P<justification>[^\n]+)\n+)?[ \t]*"
    + re.escape(RECOMMEND)
    + r"\s*<answer>(?P<answer>.*?)</answer>\s*",
    re.DOTALL,
)


class NotAChain(ValueError):
    """A text that does not have the form; `reason` is one of REASONS."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Chain:
    """A reasoned answer. No stage is empty but the justification, which may be left out."""

    evidence: str
    preferences: str
    intent: str
    history: tuple[str, ...]  # items, in the order of the user's history, without what was noise
    item: str
    justification: str = ""

    def __post_init__(self):
        for name in STEPS:
            if not getattr(self, name).strip():
                raise UserError(f"the stage {name!r} of a chain is empty")
        for name in (*STEPS, "justification"):
            said = getattr(self, name)
            if any(mark in said for mark in MARKS):
                raise UserError(f"the stage {name!r} of a chain holds a mark of its form: {said!r}")
        if not self.history:
            raise UserError("a chain rewrites a history of at least one item")
        if "\n" in self.justification:
            raise UserError("the justification of a chain is one line")

    def text(self, table: SemanticIdTable, separator: str = "") -> str:
        steps = [f"{title} {getattr(self, name).strip()}" for name, title in STEPS.items()]
        kept = separator.join(map(table.text_of, self.history))
        lines = ["<think>", *steps, "</think>", f"{REWRITE} {kept}"]
        lines += [self.justification.strip()] if self.justification.strip() else []
        return "\n".join([*lines, f"{RECOMMEND} {OPENING}{table.text_of(self.item)}{CLOSING}"])

    @classmethod
    def parse(cls, text: str, table: SemanticIdTable) -> "Chain":
        """Strictly: raises NotAChain with the reason."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise NotAChain(_what_is_wrong(text))
        steps = _steps(match["steps"].strip())
        justification = (match["justification"] or "").strip()
        if any(mark in said for said in (*steps.values(), justification, match["answer"]) for mark in MARKS):
            raise NotAChain("rest")
        history = _items(match["history"], table)
        answer = _items(match["answer"], table)
        if not history:
            raise NotAChain("no_rewrite")
        if len(answer) != 1:
            raise NotAChain("not_one_item")
        return cls(**steps, history=history, item=answer[0], justification=justification)


def _steps(text: str) -> Mapping[str, str]:
    """The three stages between the think tags, each with its title, in order."""
    titles = list(STEPS.values())
    if [text.count(title) for title in titles] != [1, 1, 1]:
        raise NotAChain("steps")
    places = [text.index(title) for title in titles]
    if places != sorted(places) or places[0] != 0 or "<think>" in text or "</think>" in text:
        raise NotAChain("steps")
    ends = [*places[1:], len(text)]
    said = [text[place + len(title) : end].strip() for place, title, end in zip(places, titles, ends)]
    if not all(said):
        raise NotAChain("empty_step")
    return dict(zip(STEPS, said))


def _items(text: str, table: SemanticIdTable) -> tuple[str, ...]:
    """The items of a run of indices and nothing else but what may separate them."""
    found = [table.item_of(codes) for codes in table.parse(text)]
    if None in found or _bare(text) != _bare("".join(map(table.text_of, found))):
        raise NotAChain("unknown_item")
    return tuple(found)


def _bare(text: str) -> str:
    """Without white space, commas and full stops."""
    return re.sub(r"[\s,.]+", "", text)


def _what_is_wrong(text: str) -> str:
    if "<think>" not in text or "</think>" not in text:
        return "no_think"
    if REWRITE not in text:
        return "no_rewrite"
    if RECOMMEND not in text or OPENING not in text or CLOSING not in text:
        return "no_answer"
    return "rest"
