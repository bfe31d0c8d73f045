"""How a history is written for a model: the one place where training, evaluation and serving get their prompts from."""

import dataclasses
import functools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable

HISTORY = "{history}"


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """Stored in the checkpoint (recllm.json), since a model knows only the prompts it was trained on."""

    template: str = "A user's history, oldest first: {history}\nThe next item: "
    separator: str = ""
    chat: bool = False  # as a user's message in the tokenizer's chat template; else the text as it stands
    max_history: int = 50  # the most recent items of a history
    events: bool = False  # a history holds events, each a behaviour and an item: `event_prompts` fills it

    def __post_init__(self):
        if not isinstance(self.template, str) or self.template.count(HISTORY) != 1:
            raise UserError(f"a prompt template has {HISTORY} once: {self.template!r}")
        if self.max_history < 1:
            raise UserError(f"max_history must be at least 1, got {self.max_history}")

    @classmethod
    def read(cls, value: dict | None) -> "PromptStyle":
        """From recllm.json; what a later version added is an error, not a silent default."""
        try:
            return cls(**(value or {}))
        except TypeError:
            raise UserError(
                f"the checkpoint's prompt settings are unknown here: {value}", fix="update recllm"
            ) from None

    def text(self, history: Sequence[str], table: SemanticIdTable, tokenizer: PreTrainedTokenizerBase) -> str:
        items = self.separator.join(map(table.text_of, history[-self.max_history :]))
        text = self.template.replace(HISTORY, items)
        return rendered(text, tokenizer, self.chat)


def rendered(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> str:
    """What the model reads: the text as it stands, or as a user's message after which the model speaks.

    Training writes its prompts with this too. A template applied to question and answer together may write otherwise:
    Qwen3's puts an empty thought before the answer, which then is trained on and never seen again.
    """
    if not chat:
        return text
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptWriter:
    """Histories → token ids. Refuses what has no semantic ID and what is empty."""

    style: PromptStyle
    table: SemanticIdTable
    tokenizer: PreTrainedTokenizerBase

    def ids(self, histories: Sequence[Sequence[str]]) -> list[list[int]]:
        if self.style.events:
            raise UserError(
                "the model reads events, and was asked with items alone",
                fix="--mode conversion, or recommend(history of (item, behaviour) pairs, target_behaviour=…)",
            )
        for history in histories:
            self.check(history)
        if not histories:
            return []
        texts = [self.style.text(history, self.table, self.tokenizer) for history in histories]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def check(self, history: Sequence[str]) -> None:
        if not len(history):
            raise UserError("the history is empty", fix="give at least one item that the user took")
        if isinstance(history, str):
            raise UserError(f"a history is a list of items, got the text {history!r}", fix=f"[{history!r}]")
        unknown = [item for item in history if item not in self.table]
        if unknown:
            raise UserError(
                f"the model knows no item {unknown[0]!r}" + (f" (and {len(unknown) - 1} more)" if unknown[1:] else ""),
                fix="leave it out of the history, or give it a semantic ID (recllm.semantic_ids.encode_new)",
            )

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """The tokens before the first item, the same in every prompt."""
        item = self.table.items[0]
        text = self.style.text([item], self.table, self.tokenizer)
        before = text[: text.index(self.table.text_of(item))]  # an item's tokens are added ones: they cut the text
        return tuple(self.tokenizer(before, add_special_tokens=False)["input_ids"])
