"""What every training run needs: where it goes on after a kill, its bar, dropout, and whether bf16 pays."""

import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME

from recllm.launch import console
from recllm.processes import ALONE, Processes


def last_whole_step(steps: Path, group: Processes = ALONE) -> str | None:
    """The newest checkpoint to go on from; the first process removes what a kill cut off.

    Trainer writes its state at the end, and each process its random numbers: a folder without them was cut off.
    """
    folders = sorted(steps.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    whole = [folder for folder in folders if _is_whole(folder, group.count)]
    group.wait()
    if group.first:
        for folder in folders[: folders.index(whole[0]) if whole else len(folders)]:
            shutil.rmtree(folder)
    group.wait()
    return str(whole[0]) if whole else None


def _is_whole(folder: Path, processes: int) -> bool:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return processes == 1 or all((folder / f"rng_state_{rank}.pth").exists() for rank in range(processes))


class BarOnStderr(ProgressCallback):
    """The bar alone: ProgressCallback prints every log to standard output, which is for results."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "eval_recall@10" in (logs or {}):
            console.print(
                f"epoch {logs['epoch']:.4g}: validation Recall@10 {logs['eval_recall@10']:.4f}", highlight=False
            )


def made_for_bf16() -> bool:
    """CUDA devices since Ampere, and processors with AMX tiles; on others bf16 is slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()


def add_dropout(model: PreTrainedModel, share: float) -> None:
    """On the embeddings and on what attention and MLP add to the stream: Qwen3 has none of its own."""

    def drop(module, inputs, output):
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], share), *output[1:])
        return torch.nn.functional.dropout(output, share)

    model.get_input_embeddings().register_forward_hook(drop)
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
