"""Hidden states → log-probabilities of answer tokens with gradient, without the logits of a batch in memory.

Codes are compared with the codes of their level alone: (n, V) logits. Text is compared with the whole vocabulary, some
positions at a time, and their logits are computed again for the backward pass. fp32 whatever the weights are in.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recllm.errors import UserError

Finish = Callable[[Tensor], Tensor]
# Logits at a time: on a CPU about what its caches hold, on a GPU what fills it.
CELLS = {"cpu": 2**21, "cuda": 2**27}


class Scores(NamedTuple):
    logps: Tensor  # (n,)
    entropies: Tensor | None  # (n,)


class Matrix(NamedTuple):
    """Of the head, or some rows of it."""

    weight: Tensor  # (rows, D)
    bias: Tensor | None  # (rows,)

    def rows(self, ids: Tensor) -> "Matrix":
        """Those of some tokens. (n,), on the host"""
        first, count = int(ids[0]), len(ids)
        if torch.equal(ids, torch.arange(first, first + count)):
            return Matrix(*(None if part is None else part[first : first + count] for part in self))
        ids = ids.to(self.weight.device)
        return Matrix(*(None if part is None else part.index_select(0, ids) for part in self))

    def split(self, sizes: Sequence[int]) -> list["Matrix"]:
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        return [Matrix(*parts) for parts in zip(self.weight.split(sizes), biases)]


@contextlib.contextmanager
def output_matrix(model: PreTrainedModel) -> Iterator[Matrix]:
    """What the model's head multiplies with and trains: under an adapter its own copy, under ZeRO-3 and FSDP2 whole."""
    out = model.get_output_embeddings()
    if any("lora_" in name for name, _ in out.named_parameters()):
        raise UserError("LoRA on the head is not supported", fix="train the head whole (modules_to_save)")
    plain = getattr(out, "original_module", out)
    bias = out.bias if getattr(plain, "bias", None) is not None else None
    with _gathered(out):
        weight = out.weight  # under adapters that keep new rows apart it is put together when asked for: once
        yield Matrix(_whole(weight), None if bias is None else _whole(bias))


def _whole(weight: Tensor) -> Tensor:
    if hasattr(weight, "ds_id"):  # ZeRO-3 takes it away again before the backward pass
        return weight.clone()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _gathered(out: nn.Module):
    shards = [parameter for parameter in out.parameters() if hasattr(parameter, "ds_id")]
    if not shards:
        return contextlib.nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    shards = [parameter for parameter in shards if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(shards) if shards else contextlib.nullcontext()


def _in_compute_dtype(hidden: Tensor, matrix: Matrix) -> tuple[Tensor, Matrix]:
    """As in a linear layer: autocast's dtype, or the weights'."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.weight.dtype
    return hidden.to(dtype), Matrix(*(None if part is None else part.to(dtype) for part in matrix))


def scaled_logits(hidden: Tensor, matrix: Matrix, finish: Finish, temperature: float) -> Tensor:
    """Of the rows of `matrix`. (n, D) -> (n, rows), fp32 or wider"""
    hidden, matrix = _in_compute_dtype(hidden, matrix)
    return _logits(hidden, *matrix, finish, temperature)


def code_scores(logits: Tensor, codes: Tensor, allowed: Tensor | None, entropy: bool) -> Scores:
    """log softmax over the codes of a level, or over those `allowed` (n, V). (n, V) float, (n,)"""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    logps = logits.log_softmax(dim=-1)
    entropies = None
    if entropy:
        sure = logps if allowed is None else logps.masked_fill(~allowed, 0.0)  # 0 · −∞ is 0 here
        entropies = -(logps.exp() * sure).sum(dim=-1)
    return Scores(logps.gather(1, codes.unsqueeze(1)).squeeze(1), entropies)


def text_scores(
    hidden: Tensor, matrix: Matrix, tokens: Tensor, temperature: float, finish: Finish, entropy: bool
) -> Scores:
    """log softmax over the whole vocabulary. (n, D), (n,)"""
    hidden, matrix = _in_compute_dtype(hidden, matrix)
    with torch.autocast(hidden.device.type, enabled=False):
        logps, entropies = _TextScores.apply(hidden, *matrix, tokens, temperature, finish, entropy)
    return Scores(logps, entropies if entropy else None)


class _TextScores(torch.autograd.Function):
    """z = finish(h Wᵀ + b) / t;   ℓ = z_y − lse(z),  ∂ℓ/∂z = 1_y − p;
    H = lse(z) − Σ p z,  ∂H/∂z = −p (z − lse(z) + H).

    Positions go through in chunks; a chunk's logits are made twice and kept never.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, temperature, finish, entropy):
        ctx.temperature, ctx.finish, ctx.entropy = temperature, finish, entropy
        totals = hidden.new_empty(len(hidden), dtype=_float(hidden))
        logps, entropies = torch.empty_like(totals), torch.zeros_like(totals)
        for part in _chunks(hidden, weight):
            logits = _logits(hidden[part], weight, bias, finish, temperature)
            totals[part] = torch.logsumexp(logits, dim=-1)
            logps[part] = logits.gather(1, tokens[part].unsqueeze(1)).squeeze(1) - totals[part]
            if entropy:
                expected = ((logits - totals[part].unsqueeze(1)).exp_() * logits).sum(dim=-1)
                entropies[part] = totals[part] - expected
        ctx.save_for_backward(hidden, weight, bias, tokens, totals, entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, of_logps, of_entropies):
        hidden, weight, bias, tokens, totals, entropies = ctx.saved_tensors
        wide = _float(hidden)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.empty_like(hidden) if needs_hidden else None
        to_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        to_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for part in _chunks(hidden, weight):
            raw = torch.nn.functional.linear(hidden[part], weight, bias).to(wide)
            with torch.enable_grad():
                raw.requires_grad_(True)
                finished = ctx.finish(raw)
            plain = finished is raw
            logits = finished.detach() / ctx.temperature
            logits -= totals[part].unsqueeze(1)
            slope = -of_logps[part].unsqueeze(1)
            if ctx.entropy:  # here `logits` are log-probabilities
                slope = slope - of_entropies[part].unsqueeze(1) * (logits + entropies[part].unsqueeze(1))
            gradient = logits.exp_().mul_(slope)
            gradient.scatter_add_(1, tokens[part].unsqueeze(1), of_logps[part].unsqueeze(1))
            gradient /= ctx.temperature
            if not plain:
                (gradient,) = torch.autograd.grad(finished, raw, gradient)
            own = gradient.to(hidden.dtype)
            if needs_hidden:
                torch.mm(own, weight, out=to_hidden[part])
            if needs_weight:
                to_weight += own.T @ hidden[part]
            if needs_bias:
                to_bias += gradient.sum(dim=0)
        to_weight = None if to_weight is None else to_weight.to(weight.dtype)
        return to_hidden, to_weight, None if to_bias is None else to_bias.to(bias.dtype), None, None, None, None


def _float(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, finish: Finish, temperature: float) -> Tensor:
    logits = finish(torch.nn.functional.linear(hidden, weight, bias).to(_float(hidden)))
    return logits if temperature == 1 else logits / temperature


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    step = max(16, CELLS.get(hidden.device.type, CELLS["cuda"]) // len(weight))
    return (slice(start, start + step) for start in range(0, len(hidden), step))
