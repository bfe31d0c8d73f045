"""Figures of the rollouts and of the actor, gathered between two logs: shares, amounts a step, seconds a phase."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator

from recllm.health import model_flops, peak_flops


class HealthLog:
    """`recllm.health` says what the names mean, and reads them again."""

    def __init__(self, accelerator: Accelerator, parameters: int):
        """`parameters`: of the model without its embeddings, for the share of the device's arithmetic (MFU)."""
        self.accelerator, self.parameters = accelerator, parameters
        self.seconds: dict[str, float] = defaultdict(float)
        self.shares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.amounts: dict[str, float] = defaultdict(float)
        self.steps = 0  # of the optimizer when the sums began

    @classmethod
    def of(cls, accelerator: Accelerator, model: torch.nn.Module) -> "HealthLog":
        embeddings = model.get_input_embeddings().weight.numel()
        return cls(accelerator, sum(each.numel() for each in model.parameters()) - embeddings)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start

    @contextlib.contextmanager
    def rest(self, name: str) -> Iterator[None]:
        """What of this time is no phase that was named inside."""
        start, busy = self.now(), self.busy
        try:
            yield
        finally:
            self.seconds[name] += self.now() - start - (self.busy - busy)

    def now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # a phase ends when its kernels have run
        return time.perf_counter()

    @property
    def busy(self) -> float:
        return sum(self.seconds.values())

    def share(self, name: str, total: float, count: float) -> None:
        """A mean over everything since the last log: Σ total / Σ count."""
        self.shares[name][0] += float(total)
        self.shares[name][1] += float(count)

    def all_shares(self, found: Mapping[str, tuple[float, float]]) -> None:
        for name, (total, count) in found.items():
            self.share(name, total, count)

    def amount(self, name: str, total: float) -> None:
        """A sum over the processes, a step."""
        self.amounts[name] += float(total)

    def take(self, steps: int) -> dict[str, float]:
        """What has come together since the last call, `steps` steps of the optimizer ago; every process calls."""
        if not steps or not self.seconds:
            return {}
        names = sorted(self.shares)
        sums = [*(part for name in names for part in self.shares[name]), *self.amounts.values()]
        total = torch.tensor(sums, dtype=torch.float32, device=self.accelerator.device)
        total = self.accelerator.reduce(total, "sum").tolist()
        pairs = zip(names, total[: 2 * len(names) : 2], total[1 : 2 * len(names) : 2])
        found = {name: value / count for name, value, count in pairs if count}
        found |= {name: value / steps for name, value in zip(self.amounts, total[2 * len(names) :])}
        found |= {f"time/{name}": value / steps for name, value in self.seconds.items()}
        found |= self.speed(found)
        if self.accelerator.device.type == "cuda":
            found["memory/peak_gb"] = torch.cuda.max_memory_allocated(self.accelerator.device) / 1e9
        self.seconds.clear(), self.shares.clear(), self.amounts.clear()
        return found

    def speed(self, found: Mapping[str, float]) -> dict[str, float]:
        tokens, seconds = found.get("actor/tokens", 0.0), found.get("time/update", 0.0)
        if not tokens or not seconds:
            return {}
        speed = {"actor/tokens_per_second": tokens / seconds}
        device = self.accelerator.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak:
            speed["actor/mfu"] = model_flops(self.parameters, tokens) / (
                seconds * peak * self.accelerator.num_processes
            )
        return speed


class LogsHealth:
    """For a Trainer, first of its bases: `health` goes into each line of its log."""

    health: HealthLog

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if not self.health.seconds:  # the first since a line of the log, or since a kill
            self.health.steps = self.state.global_step
        with self.health.rest("update"):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if any(name.startswith("eval_") for name in logs):
            return self.log_evaluation(logs, start_time)
        return super().log({**logs, **self.health.take(self.state.global_step - self.health.steps)}, start_time)

    def log_evaluation(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Between two lines of the training's."""
        super().log(logs, start_time)
