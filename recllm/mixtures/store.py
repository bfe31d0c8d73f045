"""A mixture on disk: a folder that `datasets.load_from_disk` reads, and mixture.json about it.

Prompts and completions are plain content; what a chat template adds is written when they are tokenised
(`recllm.prompting`), so that one mixture serves every model.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, Value, disable_progress_bars, enable_progress_bars, load_from_disk
from datasets import List as ListOf

from recllm.errors import UserError
from recllm.files import read_object, require, restore_folder, write_folder_whole, write_json
from recllm.launch import console
from recllm.prompting import PromptStyle
from recllm.semantic_ids import SemanticIdTable

REPORT = "mixture.json"
RL_SHARE = "Share of the users whose last training event is left out, for reinforcement learning (docs/rl_targets.md)."
FEATURES = Features(
    {
        "task": Value("string"),
        "prompt": Value("string"),
        "completion": Value("string"),
        "user": Value("string"),  # "" where the example is about an item and not about a user
        "item": Value("string"),  # that the completion names or describes, else ""
        "history": ListOf(Value("string")),  # items, as the prompt shows them
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """`report`: kind, catalogue, semantic_ids, made_of, settings, prompt (the style), tasks (counts), dropped, …"""

    examples: Dataset
    report: dict

    @classmethod
    def load(cls, folder: str | Path, table: SemanticIdTable, command: str) -> "Mixture":
        """Refuses one whose indices are not those of `table`; `command` makes it anew."""
        folder = Path(folder)
        restore_folder(folder)
        report = read_object(require(folder / REPORT, "the mixture", f"run {command}"))
        if report.get("semantic_ids") != table.fingerprint:
            raise UserError("written with other semantic IDs than the model's", file=folder, fix=f"run {command} again")
        try:
            examples = load_from_disk(str(folder))
        except Exception as error:  # a damaged arrow file raises what it likes
            raise UserError(f"not a readable data set ({error})", file=folder, fix=f"run {command} again") from None
        return cls(examples, report)

    @property
    def style(self) -> PromptStyle:
        """How its prompts are written, for whoever asks the trained model."""
        return PromptStyle.read(self.report["prompt"])

    @property
    def rl_share(self) -> float:
        """Of the users, for how many its last training event was left to reinforcement learning."""
        return float(self.report.get("settings", {}).get("rl_share", 0.0))


def check_rl_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"rl_share is {share}", fix="a share from 0 to 1, such as 0.2")


def rl_share_of(mixtures: Sequence[Mixture]) -> float:
    """The one share that a model trained on all of these never saw the last training events of."""
    shares = {mixture.rl_share for mixture in mixtures}
    if len(shares) > 1:
        said = ", ".join(f"{mixture.report.get('kind', 'a mixture')} {mixture.rl_share:g}" for mixture in mixtures)
        raise UserError(
            f"the mixtures differ in rl_share ({said}), so one shows what another keeps for reinforcement learning",
            fix="build them with the same --rl_share",
        )
    share = shares.pop() if shares else 0.0
    if share and len({mixture.report.get("catalogue") for mixture in mixtures}) > 1:
        problem = "the mixtures keep targets for reinforcement learning, and are of different data"
        raise UserError(problem, fix="build them from one prepared folder, or with --rl_share 0")
    return share


def save_mixture(examples: Dataset, report: dict, folder: Path) -> Mixture:
    """The whole folder, or nothing."""
    with write_folder_whole(folder) as partial:
        disable_progress_bars()  # of shards, which say nothing
        try:
            examples.save_to_disk(str(partial))
        finally:
            enable_progress_bars()
        write_json(partial / REPORT, report)
    return Mixture(examples, report)


def already_made(folder: Path, made_of: str, overwrite: bool) -> bool:
    """Is this very mixture there? An error if another one is, or something else."""
    restore_folder(folder)
    if not folder.exists():
        return False
    if not (folder / REPORT).exists():
        if folder.is_dir() and not any(folder.iterdir()):
            return False
        raise UserError("holds files that are no mixture", file=folder, fix="another --output")
    if overwrite:
        return False
    if read_object(folder / REPORT).get("made_of") == made_of:
        console.print(f"{folder} is made already, from the same data with the same settings.", soft_wrap=True)
        return True
    raise UserError("holds a mixture of other data or settings", file=folder, fix="--overwrite, or another --output")
