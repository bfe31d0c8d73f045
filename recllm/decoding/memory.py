"""How many prompts fit into memory at once. An estimate to start from: running out halves it, and nothing else."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from recllm.errors import UserError
from recllm.launch import console

SHARE = 0.6  # of a GPU's memory beside the weights
CPU_BYTES = 2**28  # on a CPU larger batches are no faster
PASS_BYTES = 2**23  # there what a pass over prompts hands on inside a layer should still be near when it is read
MOST = 512


def prompts_at_once(model: PreTrainedModel, tokens: int, positions: int, branches: int, fanout: int) -> int:
    """For prompts of `tokens`, `positions` of answers after each, `branches` of them at a time."""
    config, bytes_each = model.config.get_text_config(), model.dtype.itemsize
    heads, width = heads_of(model)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * config.num_hidden_layers * kv_heads * width * (tokens + positions) * bytes_each
    # While a layer runs: its keys and values for all heads and once more if the cache grows, and the widest activation.
    layer = 4 * heads * width * (tokens + positions) * bytes_each
    layer += 4 * widest(model) * max(tokens, branches) * bytes_each
    candidates = 6 * 4 * branches * fanout
    most = free_bytes(model) // max(1, cache + layer + candidates)
    return int(max(1, min(MOST, most)))


def prompts_in_a_pass(model: PreTrainedModel, prompts: int, tokens: int) -> int:
    """Of a batch of prompts: passes of about the same size."""
    if model.device.type != "cpu":
        return prompts
    most = max(1, PASS_BYTES // (widest(model) * tokens * model.dtype.itemsize))
    passes = -(-prompts // most)
    return -(-prompts // passes)


def heads_of(model: PreTrainedModel) -> tuple[int, int]:
    """How many query heads, and how wide each is."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def widest(model: PreTrainedModel) -> int:
    """Numbers that a token has inside a layer: in its feed-forward, or in the heads' queries."""
    config = model.config.get_text_config()
    heads, width = heads_of(model)
    return max(getattr(config, "intermediate_size", 0) or 4 * config.hidden_size, heads * width)


def free_bytes(model: PreTrainedModel) -> int:
    """Of the device beside the weights. Not what is free just now: the same model has the same batches every time."""
    if model.device.type != "cuda":
        return CPU_BYTES
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return int(SHARE * (torch.cuda.get_device_properties(model.device).total_memory - weights))


def in_batches(total: int, size: int, work: Callable[[int, int], None]) -> int:
    """work(start, end) over 0 … total; a batch that runs out of memory is done again in halves, and so are the rest.

    Returns the size that did fit, for the next call.
    """
    start = 0
    while start < total:
        end = min(total, start + size)
        try:
            work(start, end)
            start = end
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if end - start == 1:
                raise UserError(
                    "one prompt alone does not fit into memory",
                    fix="shorter histories (--max_history), fewer beams, or a smaller dtype",
                ) from None
            size = (end - start) // 2
        else:
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        console.print(f"out of memory: {size} prompts at a time from here on, with as many beams as before")
    return size


def _out_of_memory(error: Exception) -> bool:
    """CPU allocators and CUDA's libraries raise a plain RuntimeError."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
