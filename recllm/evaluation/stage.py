"""The stage behind eval/evaluate.py: a checkpoint on a split."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recllm.catalogue import Catalogue, Split
from recllm.checkpoint import Checkpoint
from recllm.decoding import Normaliser
from recllm.decoding.chains import Sampling
from recllm.decoding.reflecting import check_entropy_weight
from recllm.errors import UserError
from recllm.evaluation.conversion import ConversionRanker
from recllm.evaluation.direct import DirectRanker
from recllm.evaluation.drafts import Truth
from recllm.evaluation.predicting import BLOCK
from recllm.evaluation.ranking import Ranker
from recllm.evaluation.reasoning import ReasoningRanker, ReasonThenBeamRanker
from recllm.evaluation.reflection import ReflectionRanker
from recllm.evaluation.repeats import checked
from recllm.evaluation.run import Protocol, evaluate_ranker
from recllm.pretrained import DTYPES
from recllm.processes import processes
from recllm.prompting import PromptStyle
from recllm.vllm_chains import VLLMChains

Mode = Literal["direct", "reasoning", "reason_then_beam", "reflection", "conversion"]
WITHOUT_CHAINS = ("direct", "reflection", "conversion")
BLOCK_OF_CHAINS = 32  # users of a block where each costs thousands of tokens
PASS_KS = (1, 5, 10)


@dataclass
class EvaluateConfig:
    """Settings of `eval/evaluate.py`."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub repository."})
    data: str = field(metadata={"help": "Prepared folder."})
    output: str = field(metadata={"help": "Folder for predictions.jsonl and metrics.json."})
    mode: Mode = field(
        default="direct",
        metadata={
            "help": "direct: beams right after the history. reasoning: chains with an item each. reason_then_beam: "
            "beams after one chain. reflection: beams, what the model says of them, and their corrections. conversion: "
            "beams for what the user buys, behind the events that the model chose from the history."
        },
    )
    split: Split = field(default="test", metadata={"help": "valid or test."})
    beams: int = field(default=20, metadata={"help": "Width of the search, and length of the lists."})
    k: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "Cut-offs of the metrics."})
    normaliser: Normaliser = field(
        default="level", metadata={"help": "What a code's probability is over: full, level or children (docs)."}
    )
    max_history: int | None = field(default=None, metadata={"help": "Items of a history. Default: as prepared."})
    exclude_history: bool = field(
        default=False, metadata={"help": "Never recommend an item of the history that the model is given."}
    )
    name: str | None = field(default=None, metadata={"help": "Of the row in compare.py. Default: the model's folder."})
    seed: int = field(
        default=0, metadata={"help": "Of the training run, for compare.py, and of the draws; beams draw nothing."}
    )
    users: int | None = field(
        default=None, metadata={"help": "So many of the split's users, the same for every run. Default: all."}
    )
    users_seed: int = field(default=0, metadata={"help": "Which users those are."})
    samples: int = field(default=10, metadata={"help": "reasoning: chains a user, each with an answer."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "Of chains and their answers. Default: 0.7; reason_then_beam: 0, the best token."},
    )
    top_p: float = field(default=0.9, metadata={"help": "Of chains and their answers."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest chain; a longer one gives no answer."})
    pass_k: list[int] | None = field(
        default=None, metadata={"help": "reasoning: k of pass@k. Default: 1, 5 and 10, as far as there are samples."}
    )
    engine: Literal["hf", "vllm"] = field(
        default="hf",
        metadata={"help": "Who writes the chains: the model itself, or vLLM on it, which is faster on a GPU."},
    )
    entropy_weight: float = field(
        default=0.2,
        metadata={"help": "reflection: α_e, what doubt adds to a draft's score while correcting; 0: nothing."},
    )
    skip: bool = field(
        default=True, metadata={"help": "reflection: a draft that is called right is not generated again."}
    )
    reflect_on: int | None = field(
        default=None,
        metadata={"help": "reflection: only so many of the best drafts, the others fill up the list. Default: all."},
    )
    target_behaviour: str | None = field(
        default=None, metadata={"help": "conversion: what a conversion is. Default: what the data hold out."}
    )
    keep_chains: bool = field(default=False, metadata={"help": "Write the chains into predictions.jsonl."})
    batch_size: int | None = field(default=None, metadata={"help": "Users at once. Default: what memory allows."})
    block: int | None = field(
        default=None,
        metadata={
            "help": f"Users that a process finishes at once: what a kill can lose. Default: {BLOCK}; {BLOCK_OF_CHAINS} "
            "with chains."
        },
    )
    dtype: str | None = field(default=None, metadata={"help": f"{', '.join(DTYPES)}. Default: as stored."})
    overwrite: bool = field(default=False, metadata={"help": "Begin anew in a folder that holds another evaluation."})

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.block is not None and self.block < 1:
            raise UserError(f"block must be at least 1, got {self.block}")
        if self.max_history is not None and self.max_history < 1:
            raise UserError(f"max_history must be at least 1, got {self.max_history}")
        if self.mode == "reasoning" and max(self.pass_ks, default=self.samples) > self.samples:
            raise UserError(f"pass@{max(self.pass_ks)} needs as many samples, not {self.samples}", fix="--samples")
        if self.engine == "vllm" and self.mode in WITHOUT_CHAINS:
            raise UserError(f"vLLM writes chains, and mode {self.mode} has none", fix="--engine hf")
        check_entropy_weight(self.entropy_weight)
        if self.reflect_on is not None and not 1 <= self.reflect_on <= self.beams:
            raise UserError(f"reflect_on {self.reflect_on} must be between 1 and the {self.beams} beams")
        if self.target_behaviour is not None and self.mode != "conversion":
            raise UserError(f"target_behaviour has no meaning in mode {self.mode}", fix="--mode conversion")
        self.protocol()
        self.sampling()

    @property
    def pass_ks(self) -> tuple[int, ...]:
        if self.mode != "reasoning":
            return ()
        return tuple(k for k in PASS_KS if k <= self.samples) if self.pass_k is None else tuple(self.pass_k)

    def sampling(self) -> Sampling:
        default = 0.0 if self.mode == "reason_then_beam" else 0.7
        temperature = default if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_p, self.max_new_tokens)

    def protocol(self, target_behaviour: str | None = None) -> Protocol:
        """The lists of mode reasoning are as long as there are samples. `target_behaviour` is that of the data."""
        length = self.samples if self.mode == "reasoning" else self.beams
        subset = () if self.users is None else (self.users, self.users_seed)
        return Protocol(
            self.split, tuple(self.k), length, self.max_history, self.exclude_history, self.pass_ks, *subset,
            target_behaviour=target_behaviour,
        )  # fmt: skip


def evaluate(config: EvaluateConfig) -> dict | None:
    """Under `accelerate launch` or `torchrun` each process takes its share of the users; None on all but the first."""
    with processes() as group:
        if config.engine == "vllm" and group.count > 1:
            raise UserError("vLLM writes chains for one process", fix="start one, or --engine hf")
        catalogue = Catalogue.load(config.data)
        checkpoint = Checkpoint.load(config.model, group.device, config.dtype)
        target = checked(catalogue, config.target_behaviour).target_behaviour if config.mode == "conversion" else None
        ranker = ranker_of(config, checkpoint, catalogue, target)  # refuses what does not fit
        style = style_of(config, checkpoint, ranker)
        if (config.max_history or 0) > style.max_history:
            raise UserError(
                f"max_history {config.max_history}: the model reads the last {style.max_history} items",
                fix=f"--max_history {style.max_history} or fewer",
            )
        name = config.name or Path(config.model).name
        block = config.block or (BLOCK if config.mode in WITHOUT_CHAINS else BLOCK_OF_CHAINS)
        truth = Truth.of(checkpoint, catalogue) if config.mode == "reflection" else None
        return evaluate_ranker(
            name, ranker, catalogue, config.protocol(target), config.output,
            seed=config.seed, overwrite=config.overwrite, group=group, block=block, truth=truth,
        )  # fmt: skip


def style_of(config: EvaluateConfig, checkpoint: Checkpoint, ranker: Ranker) -> PromptStyle:
    """How the histories are written."""
    if isinstance(ranker, ConversionRanker):
        return ranker.converter.writer.style
    return checkpoint.style if config.mode in WITHOUT_CHAINS else checkpoint.reasoning


def ranker_of(
    config: EvaluateConfig, checkpoint: Checkpoint, catalogue: Catalogue, target_behaviour: str | None = None
) -> Ranker:
    """The checkpoint asked in the config's mode."""
    if config.mode in WITHOUT_CHAINS:
        given = checkpoint, catalogue, config.beams, config.normaliser, config.exclude_history, config.batch_size
        if config.mode == "reflection":
            return ReflectionRanker(*given, config.entropy_weight, config.skip, config.reflect_on)
        if config.mode == "conversion":
            return ConversionRanker(*given, target_behaviour)
        return DirectRanker(*given)
    given = {
        "sampling": config.sampling(), "normaliser": config.normaliser, "exclude_history": config.exclude_history,
        "keep_chains": config.keep_chains, "seed": config.seed, "batch_size": config.batch_size,
        "vllm": vllm_of(config, checkpoint) if config.engine == "vllm" else None,
    }  # fmt: skip
    if config.mode == "reasoning":
        return ReasoningRanker(checkpoint, catalogue, **given, samples=config.samples)
    return ReasonThenBeamRanker(checkpoint, catalogue, **given, beams=config.beams)


def vllm_of(config: EvaluateConfig, checkpoint: Checkpoint) -> VLLMChains:
    dtype = str(checkpoint.model.dtype).removeprefix("torch.")
    return VLLMChains(config.model, {"dtype": dtype, "seed": config.seed})
