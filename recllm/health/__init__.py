"""How a training run is doing: what it logs of its groups, and what its log says afterwards."""

from recllm.health.figures import distinct_share, group_figures, model_flops, peak_flops
from recllm.health.log import RunLog, read_log

__all__ = ["RunLog", "distinct_share", "group_figures", "model_flops", "peak_flops", "read_log"]
