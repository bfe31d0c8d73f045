"""GRC on the embedded shop: the paper's Tables 1-3, every row from one checkpoint.

    python benchmarks/grc_shop.py --output runs/grc_shop                 (about an hour on 2 quiet CPU cores)
    python benchmarks/grc_shop.py --output runs/grc_beauty --data runs/beauty --model runs/beauty/sft --seeds 0 \
        --attributes categories --limit 8000 --users 1000 --steps 60    (docs/grc.md has what comes before)

For each seed: a shop, an index whose items are all equally deep, a tiny Qwen3 trained on whole sequences (TIGER-style);
its drafts of every event it was trained on; then the supervised stage with reflection (GRC) and without (GC), and
reinforcement learning on the targets that were kept out of all that, with the whole reward and with each of its terms
left out. `gone on` trains the start on the same events for as many steps as the supervised stages, without a draft:
what more training alone does. `classifier` is no model of ours: boosted trees that are given a draft's rank, score and
share of the beams, learnt on validation users: about what can be known of a draft here at all. Interrupted, the same
command goes on.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from rl_shop import shop, start_of
from trl import ModelConfig

from recllm import launch
from recllm.attributes import ItemAttributes, attributes_of
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.errors import UserError
from recllm.evaluation.stage import EvaluateConfig, evaluate
from recllm.files import read_object, write_json
from recllm.mixtures.reflection import ReflectionConfig, build_reflection
from recllm.objectives.grc import first_divergence
from recllm.trainers.exact import ExactConfig
from recllm.trainers.exact_run import run_exact
from recllm.trainers.grc import GRCSettings
from recllm.trainers.grc_run import GRC_RUN
from recllm.trainers.grc_sft import GRCSFTConfig
from recllm.trainers.grc_sft_run import GRCData, run_grc_sft
from recllm.trainers.rl_run import RLData, run_rl

START, MORE, GC, SFT, RL, NO_EGRS = "TIGER-style", "TIGER, gone on", "GC SFT", "GRC SFT", "GRC RL", "w/o EGRS"
LEFT_OUT = {
    "w/o R_task": {"task_weight": 0.0}, "w/o R_cor": {"beta_cor": 0.0}, "w/o R_loc": {"beta_loc": 0.0},
    "w/o R_sem": {"beta_sem": 0.0}, "w/o R_Δ": {"beta_delta": 0.0}, "ReCast's boundary": {"contrast": "boundary"},
}  # fmt: skip
CLASSIFIER = "classifier"
METHODS = (START, MORE, GC, SFT, RL, NO_EGRS, *LEFT_OUT)
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@50")
HEALTH = (
    "rewards/task/mean", "rewards/loc/mean", "rewards/sem/mean", "rewards/delta/mean", "grc/draft_hit", "kl",
)  # fmt: skip


@dataclass
class GRCShopConfig:
    output: str = field(default="runs/grc_shop", metadata={"help": "Folder for everything."})
    data: str | None = field(default=None, metadata={"help": "Prepared folder in place of a shop of each seed."})
    model: str | None = field(
        default=None, metadata={"help": "With --data: the start, a checkpoint of recipes/sft.py."}
    )
    attributes: list[str] = field(default_factory=lambda: ["categories", "brand"], metadata={"help": "K slots."})
    limit: int | None = field(default=None, metadata={"help": "Targets of the supervised stages. Default: all."})
    users: int | None = field(default=None, metadata={"help": "So many test users, drawn. Default: all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of shop, model and training."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Rows."})
    share: float = field(default=0.5, metadata={"help": "Of the users whose last training event is kept for RL."})
    epochs: float = field(default=1, metadata={"help": "Of the supervised stages over all training events."})
    batch: int = field(default=32, metadata={"help": "Prompts of a supervised step."})
    sft_learning_rate: float = field(default=1e-3, metadata={"help": "Of the supervised stages."})
    steps: int = field(default=100, metadata={"help": "Updates of reinforcement learning."})
    prompts: int = field(default=16, metadata={"help": "P of an update."})
    answers: int = field(default=16, metadata={"help": "G."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Of reinforcement learning."})
    split: str = field(default="test", metadata={"help": "valid, to choose settings by."})
    show: bool = field(default=False, metadata={"help": "Only print what is there."})

    def __post_init__(self):
        if unknown := set(self.methods) - set(METHODS):
            raise UserError(f"{unknown.pop()!r} is no row", fix=f"some of {', '.join(METHODS)}")
        if bool(self.data) != bool(self.model):
            raise UserError("--data and --model belong together", fix="give both, or neither for the shop")

    @property
    def slots(self) -> list[str]:
        return ["loc", *self.attributes]

    @property
    def accuracies(self) -> list[str]:
        return [f"acc_{slot}@{k}" for slot in self.slots for k in (5, 10)]

    def place(self, seed: int) -> Path:
        """Where everything of a seed lies."""
        return Path(self.output) / (f"seed{seed}" if self.data else f"shop{seed}")


def train(config: GRCShopConfig, data: Path, folder: Path, begin: Path, method: str, seed: int) -> Path:
    common = {"output_dir": str(folder / slug(method)), "seed": seed, "bf16": False, "report_to": "none"}
    supervised = {
        **common, "learning_rate": config.sft_learning_rate, "lr_scheduler_type": "cosine", "warmup_steps": 20,
        "num_train_epochs": config.epochs, "per_device_train_batch_size": config.batch, "logging_steps": 50,
        "validation_users": 0, "weight_decay": 0.01,
    }  # fmt: skip
    start = ModelConfig(model_name_or_path=str(begin))
    if method == MORE:
        weights = {"hit_weight": 0.0, "log_weight": 1.0, "kl_weight": 0.0, "normaliser": "full"}
        return run_exact(
            RLData(data=str(data), rl_targets="trained", limit=config.limit),
            ExactConfig(**supervised, **weights),
            start,
        )
    if method in (GC, SFT):
        given = GRCData(data=str(data), drafts=str(folder / "reflection"))
        return run_grc_sft(given, GRCSFTConfig(**supervised, reflection=method == SFT), start)
    settings = GRCSettings(
        **common, learning_rate=config.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=10,
        weight_decay=0.01, num_generations=config.answers, max_steps=config.steps, logging_steps=5,
        per_device_train_batch_size=config.answers * config.prompts, validation_users=0, **LEFT_OUT.get(method, {}),
    )  # fmt: skip
    return run_rl(GRC_RUN, RLData(data=str(data)), settings, ModelConfig(model_name_or_path=str(folder / slug(SFT))))


def measure(config: GRCShopConfig, data: Path, folder: Path, method: str, model: Path, seed: int) -> dict:
    reflects = method not in (START, MORE)
    asked = EvaluateConfig(
        model=str(model), data=str(data), output=str(folder / f"{slug(method)}-{config.split}"), split=config.split,
        seed=seed, beams=50, k=[5, 10, 50], mode="reflection" if reflects else "direct", users=config.users,
        **({"entropy_weight": 0.0} if method == NO_EGRS else {}),
    )  # fmt: skip
    result = evaluate(asked)
    found = {name: value for name, value in result["metrics"].items() if name in METRICS}
    if reflection := result.get("reflection"):
        found |= reflection["metrics"] | {"kept": reflection["kept"]}
        found |= {f"majority {name}": value for name, value in reflection["majority"].items()}
    if method in (RL, *LEFT_OUT):
        log = [entry for entry in read_object(model / "recllm.json")["rl"]["log"] if "reward" in entry]
        found |= {name: log[-1][name] - log[0][name] for name in HEALTH}
    return found


def classifier(config: GRCShopConfig, data: Path, begin: Path) -> dict[str, float]:
    """Accuracy of boosted trees on the drafts of the start, learnt on validation users; of test users here."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    start, catalogue = Checkpoint.load(begin, "cpu"), Catalogue.load(data)
    decoder = Decoder(start.model, start.tokens, prefix=start.writer.prefix)
    codes = torch.tensor(start.table.codes).long()
    attributes = ItemAttributes.of(attributes_of(config.attributes, start.items), start.items)
    known, labels = {}, {}
    for split in ("valid", config.split):
        cases = catalogue.targets(split, start.style.max_history)
        cases = cases.sample(min(4000, len(cases)), seed=0)
        target = torch.tensor([start.table.row_of[item] for item in cases["item"].to_list()])
        found = decoder.beams(start.writer.ids(cases["history"].to_list()), 50)
        shares, same = found.scores.softmax(dim=1), [found.codes[..., 0], *attributes.ids[found.rows].unbind(-1)]
        alike = [(shares.unsqueeze(1) * (one.unsqueeze(2) == one.unsqueeze(1))).sum(-1) for one in same]
        rank = torch.arange(50.0).expand_as(found.scores)
        known[split] = torch.stack([rank, found.scores, shares, *alike], dim=-1)  # (P, B, features)
        right = attributes.same(found.rows, target.unsqueeze(1)).unbind(-1)
        labels[split] = dict(zip(config.slots, (first_divergence(found.codes, codes[target]), *right)))
    accuracy = {}
    for slot in config.slots:
        trees = HistGradientBoostingClassifier(max_iter=100, learning_rate=0.05, random_state=0)
        trees.fit(known["valid"].flatten(0, 1), labels["valid"][slot].flatten())
        for k in (5, 10):
            said = trees.predict(known[config.split][:, :k].flatten(0, 1))
            accuracy[f"acc_{slot}@{k}"] = float((said == labels[config.split][slot][:, :k].flatten().numpy()).mean())
    return accuracy


def slug(method: str) -> str:
    return method.replace(", ", "-").replace(" ", "-").replace("/", "").replace("'", "").replace("Δ", "delta")


def short(name: str) -> str:
    return name.removeprefix("majority ").removeprefix("rewards/").removesuffix("/mean")


def table_of(title: str, columns: dict[str, str], found: dict[str, list[dict]]) -> Table:
    """Mean ± standard deviation over the seeds that are there."""
    table = Table("", "seeds", *columns.values(), title=title)
    for method, runs in found.items():
        cells = []
        for name in columns:
            values = [run[name] for run in runs if run.get(name) is not None]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "–")
        table.add_row(method, str(len(runs)), *cells)
    return table


def main(config: GRCShopConfig) -> None:
    for seed in [] if config.show else config.seeds:
        folder = config.place(seed)
        data = Path(config.data) if config.data else shop(config, seed, "reassign")
        start = Path(config.model) if config.model else start_of(config, data, seed)
        drafts = ReflectionConfig(
            data=str(data), model=str(start), output=str(folder / "reflection"), attributes=config.attributes,
            rl_targets="trained", limit=config.limit, seed=seed,
        )  # fmt: skip
        build_reflection(drafts)
        write_json(folder / f"{CLASSIFIER}-{config.split}.json", classifier(config, data, start))
        for method in config.methods:
            known = {START: start, NO_EGRS: folder / slug(RL)}
            model = known.get(method) or train(config, data, folder, start, method, seed)
            figures = measure(config, data, folder, method, model, seed)
            write_json(folder / f"{slug(method)}-{config.split}.json", figures)
    found = {}
    for method in (*METHODS, CLASSIFIER):
        files = [config.place(seed) / f"{slug(method)}-{config.split}.json" for seed in config.seeds]
        if runs := [read_object(file) for file in files if file.exists()]:
            found[method] = runs
    tables = {
        f"{config.data or 'the shop'}, {config.split}": METRICS,
        "before correcting, and what is said of drafts": ("draft_recall@10", "draft_ndcg@10", "kept"),
        "accuracy of reflection": config.accuracies,
        "the same of the most frequent label": [f"majority {name}" for name in config.accuracies],
        "what training moved: last step less first": HEALTH,
    }
    for title, names in tables.items():
        of_them = {method: runs for method, runs in found.items() if any(name in runs[0] for name in names)}
        launch.results.print(table_of(title, dict(zip(names, map(short, names))), of_them))


if __name__ == "__main__":
    launch.run(main, GRCShopConfig, description=__doc__)
