"""Semantic-ID tokens into a tokenizer and a model: add, resize, initialise, find again.

The tokens are ordinary added tokens, not "special" ones: TRL decodes answers with `skip_special_tokens=True`, which
would erase them. The embedding grows to a multiple of 64 rows (others are slow on GPUs, and training has collapsed
on them elsewhere) and never shrinks: a Qwen3 has rows to spare.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable

ROWS_MULTIPLE = 64
ITEMS_AT_ONCE = 4096  # whose text is tokenised together
Initialisation = Literal["cluster", "mean", "random"]


def behaviour_token(behaviour: str) -> str:
    """`<|pay|>`: says what kind of event follows."""
    return f"<|{behaviour.strip().replace(' ', '_')}|>"


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Make each of `tokens` one token; their ids. Those that the tokenizer has already stay as they are."""
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise UserError(
            f"{twice[0]!r} would stand for two things",
            fix="rename the behaviour (--rename old=new in prepare.py) or choose another token pattern",
        )
    special = [token for token in tokens if token in tokenizer.all_special_tokens]
    if special:
        raise UserError(
            f"{special[0]!r} is a special token of the tokenizer, so it cannot stand for data",
            fix="rename the behaviour (--rename old=new in prepare.py) or choose another token pattern",
        )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return [_one_id(tokenizer, token) for token in tokens]


def _one_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"the tokenizer splits {token!r} into {len(ids)} tokens", fix="make the model from this index")
    return ids[0]


@dataclass(frozen=True, eq=False)
class ItemTokens:
    """Where a tokenizer keeps the codes of a table: the bridge between codes and token ids."""

    table: SemanticIdTable
    levels: tuple[Tensor, ...]  # for each level: code -> token id, (V,) int64

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, table: SemanticIdTable) -> "ItemTokens":
        """Refuses a tokenizer that does not hold the table."""
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in table.all_tokens() if token not in vocabulary]
        if missing:
            raise UserError(
                f"the model's vocabulary lacks {len(missing):,} of the index's {sum(table.sizes):,} tokens, "
                f"{missing[0]!r} first",
                fix="use the semantic_ids.json inside the model's folder, or build a model from this index",
            )
        ids = iter([vocabulary[token] for token in table.all_tokens()])
        return cls(table, tuple(torch.tensor([next(ids) for _ in range(size)]) for size in table.sizes))

    def ids_of(self, item: str) -> list[int]:
        return [int(self.levels[level][code]) for level, code in enumerate(self.table.codes_of(item))]

    def codes_of_ids(self, ids: Tensor, level: int) -> Tensor:
        """Token ids → codes at `level`, -1 for what is no code of it. Any shape."""
        order = torch.argsort(self.levels[level])
        sorted_ids = self.levels[level][order].to(ids.device)
        place = torch.searchsorted(sorted_ids, ids).clamp(max=len(sorted_ids) - 1)
        return torch.where(sorted_ids[place] == ids, order.to(ids.device)[place], -1)


def resize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give every token of the tokenizer a row, in a multiple of 64; the number of rows."""
    rows = model.get_input_embeddings().num_embeddings
    wanted = -(-max(rows, len(tokenizer)) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    if wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)  # the new rows are set by `initialise`
    return wanted


@torch.no_grad()
def initialise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_ids: Sequence[int],
    method: Initialisation,
    item_tokens: ItemTokens | None = None,
    texts: dict[str, str] | None = None,
    seed: int = 0,
) -> None:
    """Set the rows of `new_ids` and of every id beyond the tokenizer's end, in the embedding and in an untied head.

    random   normal, with the mean and standard deviation of each column over the trained rows
    mean     the mean of the trained rows, with a hundredth of their standard deviation as noise: no two are equal
    cluster  a code's token: the mean, over the items that carry the code at that level, of the mean row of the item's
             text tokens; what has no text gets `mean`
    """
    fresh = torch.tensor(sorted({*new_ids, *range(len(tokenizer), model.get_input_embeddings().num_embeddings)}))
    if not len(fresh):
        return
    matrices = _matrices(model)
    means = cluster_means(matrices, tokenizer, item_tokens, texts) if method == "cluster" else None
    for number, matrix in enumerate(matrices):
        trained = torch.ones(len(matrix), dtype=torch.bool)
        trained[fresh] = False
        old = matrix[trained].float()
        noise = torch.randn(len(fresh), matrix.size(1), generator=torch.Generator().manual_seed(seed))
        scale = 1.0 if method == "random" else 0.01
        rows = old.mean(0) + scale * old.std(0) * noise
        if means is not None:
            ids, of_matrix = means
            place = torch.searchsorted(fresh, ids)
            assert torch.equal(fresh[place], ids), "a code's token is not among the new ones"
            rows[place] += of_matrix[number] - old.mean(0)
        matrix[fresh] = rows.to(matrix.dtype)


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """The input embedding, and the head's rows where they are not the same tensor."""
    embedding: nn.Embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is None or head.weight.data_ptr() == embedding.weight.data_ptr()
    return [embedding.weight] if tied else [embedding.weight, head.weight]


def cluster_means(
    matrices: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, item_tokens: ItemTokens, texts: dict[str, str]
) -> tuple[Tensor, list[Tensor]]:
    """Ids of the code tokens that an item with text carries (M,), and for each (V, D) matrix their mean rows (M, D).

    row(code) = mean over the items i with that code at that level of (mean over the text tokens t of i of matrix[t])
    """
    table = item_tokens.table
    rows = [row for row, item in enumerate(table.items) if texts.get(item, "").strip()]
    first = [sum(map(len, item_tokens.levels[:level])) for level in range(table.levels)]
    ids = torch.cat(item_tokens.levels)
    sums = [torch.zeros(len(ids), matrix.size(1)) for matrix in matrices]
    count = torch.zeros(len(ids))
    for start in range(0, len(rows), ITEMS_AT_ONCE):
        some = rows[start : start + ITEMS_AT_ONCE]
        encoded = tokenizer([texts[table.items[row]] for row in some], add_special_tokens=False)["input_ids"]
        flat = torch.tensor([id for ids in encoded for id in ids])
        offsets = torch.tensor([0, *map(len, encoded[:-1])]).cumsum(0)
        item_means = [nn.functional.embedding_bag(flat, matrix, offsets, mode="mean").float() for matrix in matrices]
        codes = torch.as_tensor(table.codes[some]).long()  # (n, L)
        for level in range(table.levels):
            has = codes[:, level] >= 0
            place = first[level] + codes[has, level]
            count.index_add_(0, place, torch.ones(len(place)))
            for total, of_items in zip(sums, item_means):
                total.index_add_(0, place, of_items[has])
    used = count.nonzero().squeeze(1)
    used = used[ids[used].argsort()]
    return ids[used], [total[used] / count[used, None] for total in sums]
