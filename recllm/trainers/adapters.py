"""LoRA with the new rows trained, and a stage that trains only them. No choice leaves a new token as it was made."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config

from recllm.errors import UserError
from recllm.files import write_whole


def lora_of(model: PreTrainedModel, settings: ModelConfig) -> LoraConfig | None:
    """TRL's LoRA settings with embedding and head added to what is trained and saved whole; None without --use_peft.

    On tied embeddings the head must follow the embedding (`ensure_weight_tying`), or it would keep the untrained rows;
    `trainable_token_indices` does not work with the loss of TRL's SFT, and LoRA on the head raises: both are refused.
    """
    if settings.load_in_8bit or settings.load_in_4bit:
        raise UserError("new rows of a quantised model cannot be trained", fix="bfloat16 weights, with or without LoRA")
    config = get_peft_config(settings)
    if config is None:
        return None
    names = row_modules(model)
    targets = config.target_modules
    targets = [targets] if isinstance(targets, str) else list(targets or ())
    everything = [*names, *module_names(model, [model.get_output_embeddings()])]  # a tied head too
    if wrong := [name for name in targets if any(name == own or own.endswith(f".{name}") for own in everything)]:
        raise UserError(
            f"lora_target_modules names {wrong[0]!r}, whose rows are trained whole for the new tokens",
            fix="leave it out: embedding and head are trained already",
        )
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *(name.rpartition(".")[2] for name in names)})
    config.ensure_weight_tying = len(names) == 1
    return config


def row_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the modules that hold a row for each token: the embedding, and a head that is not tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return module_names(model, [embedding] if head is None or head.weight is embedding.weight else [embedding, head])


def module_names(model: PreTrainedModel, modules: Sequence[nn.Module | None]) -> list[str]:
    named = {id(module): name for name, module in model.named_modules()}
    return [named[id(module)] for module in modules if module is not None]


def merged(model: nn.Module) -> PreTrainedModel:
    """The plain model, with what an adapter learnt inside its weights."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def only_new_rows(model: PreTrainedModel, first_new: int) -> Iterator[None]:
    """Within, gradients reach the rows from `first_new` on and nothing else. Weight decay must be 0: it asks nobody."""
    held = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = [model.get_submodule(name) for name in row_modules(model)]
    model.requires_grad_(False)
    hooks = []
    for module in modules:
        module.weight.requires_grad_(True)
        hooks.append(module.weight.register_hook(lambda gradient: without_old(gradient, first_new)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(held[name])


def without_old(gradient: Tensor, first_new: int) -> Tensor:
    """(rows, D) -> (rows, D)"""
    return torch.cat([torch.zeros_like(gradient[:first_new]), gradient[first_new:]])


def save_new_rows(model: PreTrainedModel, first_new: int, path: Path) -> None:
    rows = {name: model.get_submodule(name).weight[first_new:].detach().clone() for name in row_modules(model)}
    with write_whole(path) as partial:
        save_file(rows, partial)


@torch.no_grad()
def load_new_rows(model: PreTrainedModel, first_new: int, path: Path) -> None:
    for name, rows in load_file(path).items():
        model.get_submodule(name).weight[first_new:] = rows
