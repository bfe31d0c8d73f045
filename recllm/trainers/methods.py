"""The methods that draw answers, as recipes, demo and benchmarks run them: `run_rl(SRPO_RUN, …)`."""

from recllm.trainers.grpo import RecGRPO
from recllm.trainers.recast import ReCast
from recllm.trainers.rl_run import Method
from recllm.trainers.srpo import SRPO

GRPO_RUN = Method("grpo", RecGRPO, papers=())
SRPO_RUN = Method("srpo", SRPO, papers=("gream",))
RECAST_RUN = Method("recast", ReCast, papers=("recast",))
