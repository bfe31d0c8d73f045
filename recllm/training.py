"""What every training run needs: where it goes on after a kill, its bar, and whether the processor is made for bf16."""

import shutil
from pathlib import Path

import torch
from transformers import ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME

from recllm.launch import console


def last_whole_step(steps: Path) -> str | None:
    """The newest checkpoint to go on from. Trainer writes its state at the end: a folder without it was cut off."""
    for folder in sorted(steps.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        if (folder / TRAINER_STATE_NAME).exists():
            return str(folder)
        shutil.rmtree(folder)
    return None


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
