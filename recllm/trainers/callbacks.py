"""What every trainer of ours does around its steps: early stopping, the epoch told to the sampler, a bar on stderr."""

from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from recllm.training import BarOnStderr


def add_callbacks(trainer: Trainer) -> None:
    """To a trainer whose `sampler` is a function of seed and epoch. Standard output is for results."""
    if trainer.args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(trainer.args.early_stopping_patience))
    trainer.add_callback(TellsTheEpoch(trainer))
    trainer.pop_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(BarOnStderr)


class TellsTheEpoch(TrainerCallback):
    """To the sampler. After a resume on several processes neither Trainer's nor accelerate's `set_epoch` reaches it."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.set_epoch(int((state.epoch or 0) + 1e-6))
