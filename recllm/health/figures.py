"""What a step logs of its sampled groups and of its use of the device.

P prompts, G answers to each, L levels.
"""

import re

from torch import Tensor

from recllm.objectives.group import has_signal

# FLOP/s of bf16 matrix products accumulated in fp32, without sparsity, from the makers' data sheets. A name has all
# the words of its line; the first line that fits holds.
PEAKS = (
    ("B200", 2250e12), ("GH200", 989e12), ("H200 NVL", 835e12), ("H200", 989e12), ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12), ("H100", 989e12), ("H800 PCIe", 756e12), ("H800", 989e12), ("H20", 148e12),
    ("A100", 312e12), ("A800", 312e12), ("A40", 149.7e12), ("A30", 165e12), ("L40S", 362e12), ("L40", 181e12),
    ("L4", 121e12), ("RTX A6000", 154.8e12), ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)  # fmt: skip
PARTS = {"mig", "laptop", "d"}  # a slice of a device, or a smaller device of the same name


def group_figures(rewards: Tensor, hits: Tensor, named: Tensor, codes: Tensor) -> dict[str, tuple[float, float]]:
    """Each figure as (sum, count), so that processes add theirs before they divide.   (P, G) × 3, (P, G, L)

    ReCast, Table 2: groups of no hit, of one, of more (all hits included), and answers that earn nothing. A group is
    trainable if its rewards differ; where the reward is the hit, this is ReCast's naturally trainable share.
    """
    groups, answers = rewards.shape
    count = hits.sum(dim=1)  # (P,)
    shares = {
        "group/all_zero": count == 0,
        "group/single_hit": count == 1,
        "group/richer": count > 1,
        "group/trainable": has_signal(rewards),
        "rollout/distinct": distinct_share(codes, named),
    }
    of_groups = {name: (float(share.sum()), float(groups)) for name, share in shares.items()}
    of_answers = {"group/zero_reward": rewards == 0, "rollout/validity": named}
    return of_groups | {name: (float(share.sum()), float(groups * answers)) for name, share in of_answers.items()}


def distinct_share(codes: Tensor, named: Tensor) -> Tensor:
    """Different items over answers; an answer that names none counts as an answer only.   (P, G, L), (P, G) -> (P,)"""
    same = (codes.unsqueeze(2) == codes.unsqueeze(1)).all(dim=-1)  # (P, G, G)
    said_before = same.tril(diagonal=-1).any(dim=-1)  # (P, G)
    return (named & ~said_before).float().mean(dim=1)


def model_flops(parameters_without_embeddings: int, tokens: float, training: bool = True) -> float:
    """6·N·tokens: 2 a parameter forward and 4 backward; 2·N·tokens without gradient.   Kaplan et al. 2020, section 2.1

    Attention over the context and the head are left out, and what gradient checkpointing computes again is no work of
    the model: over seconds and `peak_flops` this is the model FLOPs utilisation, MFU.
    """
    return (6 if training else 2) * parameters_without_embeddings * tokens


def peak_flops(device_name: str) -> float | None:
    """bf16 FLOP/s of what `torch.cuda.get_device_name()` names; None where it is not known."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if words & PARTS:
        return None
    return next((peak for name, peak in PEAKS if words.issuperset(name.lower().split())), None)
