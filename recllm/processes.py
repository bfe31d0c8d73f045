"""Which of several processes this one is: `accelerate launch` or `torchrun` starts them; alone, it is 0 of 1."""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Processes:
    index: int = 0
    count: int = 1
    device: str = "cpu"
    wait: Callable[[], None] = lambda: None  # until every process has come here

    @property
    def first(self) -> bool:
        return self.index == 0


ALONE = Processes()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """One device each, on CUDA where there is one (ACCELERATE_USE_CPU=true keeps it on the CPU)."""
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device="cpu" if cpu else "cuda")
        return
    from accelerate import PartialState

    # One process may wait for the others for as long as its own share of the work has run ahead of theirs.
    state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=7))
    try:
        device = "cpu" if cpu else str(state.device)  # accelerate may say "cpu:1"
        yield Processes(state.process_index, state.num_processes, device, state.wait_for_everyone)
    finally:
        state.destroy_process_group()
