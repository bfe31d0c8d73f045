"""Semantic-ID tokens into a tokenizer and a model: add, resize, initialise, find again.

The tokens are ordinary added tokens, not "special" ones: TRL decodes answers with `skip_special_tokens=True`, which
would erase them. The embedding grows to a multiple of 64 rows (others are slow on GPUs, and training has collapsed
on them elsewhere) and never shrinks: a Qwen3 has rows to spare.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable

ROWS_MULTIPLE = 64
Initialisation = Literal["cluster", "mean", "random"]


def behaviour_token(behaviour: str) -> str:
    """`<|pay|>`: says what kind of event follows."""
    return f"<|{behaviour.strip().replace(' ', '_')}|>"


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Make each of `tokens` one token; their ids. Those that the tokenizer has already stay as they are."""
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
    shares = None
    if method == "cluster":
        if item_tokens is None or not texts:
            raise UserError("cluster initialisation needs items with text", fix="--initialise mean")
        shares = cluster_shares(tokenizer, item_tokens, texts)
    for matrix in _matrices(model):
        trained = torch.ones(len(matrix), dtype=torch.bool)
        trained[fresh] = False
        old = matrix[trained].float()
        noise = torch.randn(len(fresh), matrix.size(1), generator=torch.Generator().manual_seed(seed))
        scale = 1.0 if method == "random" else 0.01
        rows = old.mean(0) + scale * old.std(0) * noise
        if shares is not None:
            ids, weights = shares  # (M,), (M, rows) sparse
            means = torch.sparse.mm(weights, matrix[: weights.size(1)].float())
            rows[torch.searchsorted(fresh, ids)] += means - old.mean(0)
        matrix[fresh] = rows.to(matrix.dtype)


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """The input embedding, and the head's rows where they are not the same tensor."""
    embedding: nn.Embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is None or head.weight.data_ptr() == embedding.weight.data_ptr()
    return [embedding.weight] if tied else [embedding.weight, head.weight]


def cluster_shares(
    tokenizer: PreTrainedTokenizerBase, item_tokens: ItemTokens, texts: dict[str, str]
) -> tuple[Tensor, Tensor]:
    """(ids (M,), weights (M, V) sparse): code token m's row is `weights[m] @ embedding`; each row of weights sums to 1.

    weights[m, v] = mean over the items i with that code of (share of token v in the text of i).
    """
    table = item_tokens.table
    rows = [row for row, item in enumerate(table.items) if texts.get(item, "").strip()]
    encoded = _encode([texts[table.items[row]] for row in rows], tokenizer)
    lengths = torch.tensor([len(ids) for ids in encoded])
    token = torch.tensor([id for ids in encoded for id in ids])  # (T,) of all items
    owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    codes = torch.as_tensor(table.codes[rows]).long()  # (N', L)
    ids, starts, members = [], [], []
    for level, level_ids in enumerate(item_tokens.levels):
        count = torch.bincount(codes[:, level][codes[:, level] >= 0], minlength=len(level_ids))
        used = torch.nonzero(count).squeeze(1)
        place = torch.full((len(level_ids),), -1)
        place[used] = torch.arange(len(used)) + sum(map(len, ids))
        ids.append(level_ids[used])
        members.append(count[used])
        starts.append(place[codes[:, level]].where(codes[:, level] >= 0, torch.tensor(-1)))
    members, width = torch.cat(members), len(tokenizer)
    indices, values = [], []
    for row_of_item in starts:  # one level: every text token of an item counts for its code there
        row = row_of_item[owner]
        share = 1.0 / lengths[owner] / members[row.clamp(min=0)]
        indices.append(torch.stack([row, token])[:, row >= 0])
        values.append(share[row >= 0])
    shape = (len(members), width)
    weights = torch.sparse_coo_tensor(
        torch.cat(indices, 1), torch.cat(values).float(), shape, check_invariants=True
    ).coalesce()
    ids = torch.cat(ids)
    order = torch.argsort(ids)
    return ids[order], weights.index_select(0, order)


def _encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [ids or [tokenizer.eos_token_id] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
