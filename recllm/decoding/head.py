"""Hidden states → log-probabilities of the codes of one level, without the logits of the whole vocabulary.

What a code's probability is normalised over is a setting, and changes rankings:

    children  the codes that lead to an item from here: the probabilities of all items sum to one. What constrained
              sampling draws from.
    level     every code of the level: a prefix with few continuations is not rewarded for being narrow.
    full      the whole vocabulary: what HF generate scores with, and what the model was trained on.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.decoding.body import backbone
from recllm.errors import UserError

Normaliser = Literal["full", "level", "children"]
# Logits at a time for the normaliser `full`: on a CPU what stays in its cache until they are summed.
CELLS = {"cpu": 5 * 2**18, "cuda": 2**26}


def check_normaliser(name: str) -> None:
    if name not in get_args(Normaliser):
        raise UserError(f"normaliser {name!r} is not one of {', '.join(get_args(Normaliser))}")


class Head:
    """The rows of the output matrix that belong to each level, and the matrix itself for the normaliser `full`."""

    def __init__(self, model: PreTrainedModel, levels: Sequence[Tensor]):
        out = model.get_output_embeddings()
        self.weight, self.bias = out.weight.detach(), getattr(out, "bias", None)
        highest = max(int(ids.max()) for ids in levels)
        if highest >= len(self.weight):
            raise UserError(
                f"the index needs token {highest:,} and the model has {len(self.weight):,} rows",
                fix="use the semantic_ids.json inside the model's folder",
            )
        self.ids = [ids.to(self.weight.device) for ids in levels]  # L of (V,)
        self.finish = finish_of(model)
        self.gather()

    def gather(self) -> None:
        """Take the levels' rows as they are now: training may have changed them since."""
        self.rows = [self.weight[ids] for ids in self.ids]  # L of (V, D)

    def logits(self, hidden: Tensor, level: int) -> Tensor:
        """Of the codes of `level`. (…, D) -> (…, V) float"""
        logits = hidden.to(self.weight.dtype) @ self.rows[level].T
        if self.bias is not None:
            logits = logits + self.bias[self.ids[level]]
        return self.finish(logits).float()

    def full_normaliser(self, hidden: Tensor) -> Tensor:
        """log Σ exp over the whole vocabulary, some of its rows at a time. (…, D) -> (…)

        All at once, a batch's logits take gigabytes and twice the time.
        """
        hidden, parts = hidden.to(self.weight.dtype), []
        cells = CELLS.get(hidden.device.type, CELLS["cuda"])
        step = max(512, min(len(self.weight), cells // max(1, hidden[..., 0].numel())))
        for start in range(0, len(self.weight), step):
            rows = slice(start, start + step)
            bias = None if self.bias is None else self.bias[rows]
            logits = torch.nn.functional.linear(hidden, self.weight[rows], bias)
            parts.append(self.finish(logits).float().logsumexp(dim=-1))
        return torch.stack(parts).logsumexp(dim=0)


def finish_of(model: PreTrainedModel):
    """What the model does to its logits after the matrix: Gemma's soft cap, Cohere's or Granite's scale. (…) -> (…)

    Compared with the model's own logits on a few tokens: an unknown head is refused rather than scored wrongly.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    def finish(logits: Tensor) -> Tensor:
        logits = logits if scale == 1 else logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    tokens = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.no_grad():
        out = model.get_output_embeddings()
        ours = finish(out(backbone(model)(input_ids=tokens, use_cache=False).last_hidden_state)).float()
        # The class's own forward: accelerate wraps the object's in autocast, whose rounding is no other arithmetic.
        theirs = type(model).forward(model, input_ids=tokens, use_cache=False).logits.float()
    if not bool(theirs.isfinite().all()):
        raise UserError("the model's logits are not finite", fix="use weights from before the training went wrong")
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise UserError(
            f"{type(model).__name__} treats its logits in a way that the engine does not know",
            fix="report the architecture: recllm/decoding/head.py has the place for it",
        )
    return finish
