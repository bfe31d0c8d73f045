"""Generate, reflect, correct, in tokens: what stands behind a prompt, what sees what, and what is predicted from where.

    draft ẑ_1 … ẑ_L   ·   slots s_0 … s_K   ·   labels y_0 … y_K   ·   item z_1 … z_L                      (parallel)
    draft ẑ_1 … ẑ_L   ·   s_0 y_0   ·   s_1 y_1   ·   …   ·   item z_1 … z_L                               (causal)
    draft ẑ_1 … ẑ_L   ·   <|correct|>   ·   item z_1 … z_L                                       (labels left out: GC)

A slot is a token of its own, `<|reflect_loc|>` or `<|reflect_brand|>`, whose state predicts its label: where the draft
first goes wrong, 1 … L, or L + 1 for nowhere; whether the attribute is the target's. The state of the last label (of
`<|correct|>` in GC) predicts the first code of the item.

parallel   A slot sees prompt, draft and itself: the labels are independent given the two. Labels and item see prompt,
           draft and labels, no slot. Slots share a position, labels the next one, the item goes on from there.
causal     Every token sees all before it, and positions count on: what an engine without masks of its own can serve.
           A label sees those before it.

Training, rollouts and inference take their order, mask and positions from here.   GRC, section 4.1
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recllm.attributes import Attribute, ItemAttributes
from recllm.errors import UserError

Layout = Literal["parallel", "causal"]
PROMPT, NOTHING = -1, -2  # in `Form.before`: predicted from the prompt's last token, and not predicted at all
LOC, CORRECT = "loc", "<|correct|>"
OTHER, SAME = 0, 1  # labels of an attribute


class Place(NamedTuple):
    """`number`: the level of a code, the slot of a slot or label."""

    kind: Literal["draft", "slot", "label", "correct", "item"]
    number: int


@dataclass(frozen=True, eq=False)
class Form:
    """How F tokens behind a prompt hang together."""

    sees: Tensor  # (F, F) bool: [i, j], does token i attend to token j? Itself always, none after it
    offsets: Tensor  # (F,) int64: its position, counted from the prompt's end
    before: Tensor  # (F,) int64: the place whose state predicts it; PROMPT, NOTHING
    kinds: Tensor  # (F,) int64: what it is chosen from: code of level 0 … L-1, label of slot L … L+K; -1 a given token

    @property
    def places(self) -> int:
        """F"""
        return len(self.before)


@dataclass(frozen=True)
class Template:
    """Stored in the checkpoint (recllm.json), since a model knows only the template it was trained on."""

    levels: int  # L
    attributes: tuple[str, ...]  # K names
    layout: Layout = "parallel"
    labels: bool = True  # False: the ablation GC, a second item without reflection between the two

    def __post_init__(self):
        if self.layout not in get_args(Layout):
            raise UserError(f"layout {self.layout!r} is not one of {', '.join(get_args(Layout))}")
        if self.labels and not self.attributes:
            raise UserError(
                "no attribute to reflect on: K = 0", fix="attributes: [categories], or another column of the items"
            )
        twice = {name for name in self.attributes if self.attributes.count(name) > 1} | {LOC} & set(self.attributes)
        names = self.new_tokens
        if not twice and len(set(names)) < len(names):
            raise UserError(
                f"the attributes {', '.join(self.attributes)} have two meanings for one token",
                fix="another column than one named reflect",
            )
        if twice:
            raise UserError(f"two slots would be called {twice.pop()!r}", fix="each attribute once, and none named loc")

    @property
    def slots(self) -> tuple[str, ...]:
        """K + 1 names, the place of the first error before the attributes; none in GC."""
        return (LOC, *self.attributes) if self.labels else ()

    def values(self, slot: int) -> tuple[str, ...]:
        """What a slot's labels are called: 1 … L + 1, or other and same."""
        return tuple(str(place + 1) for place in range(self.levels + 1)) if slot == 0 else ("other", "same")

    @property
    def slot_tokens(self) -> list[str]:
        return [f"<|reflect_{name}|>" for name in self.slots]

    @property
    def label_tokens(self) -> list[list[str]]:
        return [[f"<|{name}_{value}|>" for value in self.values(slot)] for slot, name in enumerate(self.slots)]

    @property
    def new_tokens(self) -> list[str]:
        """All that a tokenizer has to know beside the codes."""
        return [*self.slot_tokens, *(token for some in self.label_tokens for token in some)] or [CORRECT]

    @functools.cached_property
    def places(self) -> tuple[Place, ...]:
        """What stands at each of the F places."""
        slots = [Place("slot", number) for number in range(len(self.slots))]
        labels = [Place("label", number) for number in range(len(self.slots))]
        between = slots + labels
        if self.layout == "causal":
            between = [place for pair in zip(slots, labels) for place in pair]
        ends = [[Place(kind, level) for level in range(self.levels)] for kind in ("draft", "item")]
        return (*ends[0], *(between or [Place("correct", 0)]), *ends[1])

    def at(self, kind: str) -> list[int]:
        """The places of drafts, slots, labels or items."""
        return [place for place, (own, _) in enumerate(self.places) if own == kind]

    @functools.cached_property
    def form(self) -> Form:
        places, number = self.places, range(len(self.places))
        sees = torch.ones(len(places), len(places)).tril().bool()
        offsets = list(number)
        if self.layout == "parallel" and self.labels:
            for place in number:
                if places[place].kind == "slot":  # nobody but itself
                    sees[:, place] = False
                    sees[place, place] = True
            end = {"slot": self.levels, "label": self.levels + 1, "item": self.levels + 2}
            offsets = [end.get(kind, 0) + (0 if kind in ("slot", "label") else level) for kind, level in places]
        slot_of = {number: place for place, (kind, number) in enumerate(places) if kind == "slot"}
        before, kinds = [], []
        for place, (kind, which) in enumerate(places):
            given = kind in ("slot", "correct")
            before.append(NOTHING if given else slot_of[which] if kind == "label" else place - 1)
            kinds.append(-1 if given else which + self.levels if kind == "label" else which)
        return Form(sees, *map(torch.tensor, (offsets, before, kinds)))

    def as_json(self) -> dict:
        return asdict(self) | {"attributes": list(self.attributes)}

    @classmethod
    def read(cls, value: Mapping) -> "Template":
        try:
            return cls(**{**value, "attributes": tuple(value["attributes"])})
        except (TypeError, KeyError):
            raise UserError(
                f"the checkpoint's reflection template is unknown here: {value}", fix="update recllm"
            ) from None


@dataclass(frozen=True, eq=False)
class ReflectionTokens:
    """Where a tokenizer keeps a template's slots and labels."""

    template: Template
    slots: Tensor  # (K + 1,) token ids; of GC: the one of <|correct|>
    labels: tuple[Tensor, ...]  # of each slot: label → token id; (L + 1,), then (2,) each

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: Template) -> "ReflectionTokens":
        """Refuses a tokenizer that does not know them."""
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in template.new_tokens if token not in vocabulary]:
            raise UserError(
                f"the model's vocabulary lacks {missing[0]!r}: it was not taught to reflect",
                fix="train it with recipes/grc_sft.py",
            )
        slots = template.slot_tokens or [CORRECT]
        return cls(
            template, torch.tensor([vocabulary[token] for token in slots]),
            tuple(torch.tensor([vocabulary[token] for token in some]) for some in template.label_tokens),
        )  # fmt: skip

    def ids(self, draft: Sequence[int], labels: Sequence[int], item: Sequence[int]) -> list[int]:
        """F token ids, in the template's order. `draft`, `item`: token ids; `labels`: of each slot, counted from 0."""
        chosen = {"draft": draft, "item": item, "slot": self.slots.tolist(), "correct": self.slots.tolist()}
        chosen["label"] = [int(ids[label]) for ids, label in zip(self.labels, labels)]
        return [int(chosen[kind][number]) for kind, number in self.template.places]


@dataclass(frozen=True, eq=False)
class Reflection:
    """What a model was taught to reflect on."""

    template: Template
    tokens: ReflectionTokens
    attributes: ItemAttributes

    def __post_init__(self):
        assert not self.template.labels or self.attributes.names == self.template.attributes

    @classmethod
    def read(cls, value: Mapping, tokenizer: PreTrainedTokenizerBase, items: pl.DataFrame) -> "Reflection":
        """From recllm.json."""
        template = Template.read(value["template"])
        attributes = tuple(Attribute.read(one) for one in value["attributes"])
        return cls(template, ReflectionTokens.of(tokenizer, template), ItemAttributes.of(attributes, items))

    def as_json(self) -> dict:
        return {
            "template": self.template.as_json(), "attributes": [one.as_json() for one in self.attributes.attributes],
        }  # fmt: skip
