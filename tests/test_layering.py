"""Imports point one way. What a module may import is written here, lowest first; the test reads the source."""

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "recllm"
PREFIX = "models.prefix_module"  # what a checkpoint carries, far below the other models: a layer of its own
LAYERS = [  # a module may import modules of earlier lines, and of its own package
    {"errors"},
    {"files", "papers", "settings"},
    {"catalogue", "metrics", "objectives", "plots"},
    {"launch", "processes"},
    {"progress", "text", "pretrained", "training"},
    {"formats", "shop", "teacher", "embeddings", "semantic_ids", "attributes"},
    {"rewriting", "tokenization", "preparation", "trie", "reflection", PREFIX},
    {"decoding", "prompting", "reasoning"},
    {"event_prompts"},
    {"checkpoint", "rollouts"},
    {"mixtures", "vllm_chains", "health"},
    {"reasoner", "converter", "item_filter"},
    {"recommender", "vllm_processor", "evaluation"},
    {"card", "hub"},
    {"baselines", "publish"},
    {"models"},
    {"rewards", "actor"},
    {"trainers"},
    {"yardstick"},
    {"summary"},
    {"demo"},
    {"cli"},
]
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level recllm modules that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "recllm":
            found |= {f"recllm.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {layer_name(name.split(".")[1:]) for name in found if name.startswith("recllm.")}


def layer_name(parts: Sequence[str]) -> str:
    return PREFIX if ".".join(parts[:2]) == PREFIX else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = layer_name(path.relative_to(ROOT).with_suffix("").parts)
    if own == "__init__":
        return
    assert own in LAYER_OF, f"recllm/{own} has no layer: give it a line in {Path(__file__).name}"
    # Two packages of one layer may use each other in one direction only; none does so far but these.
    sideways = {("semantic_ids", "embeddings"), ("semantic_ids", "formats")}
    for other in imported(path) - {own}:
        down = LAYER_OF[other] < LAYER_OF[own]
        assert down or (own, other) in sideways, f"recllm/{own} imports recllm/{other}, which is not below it"


@pytest.mark.parametrize("name", ["catalogue", "errors", "files"])
def test_the_ground_needs_no_deep_learning(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not roots & {"torch", "transformers", "trl"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe_is_loaded(path):
    text = path.read_text()
    for word in (
        "import pickle",
        "pickle.load",
        "trust_remote_code=True",
        "torch.load(",
        "weights_only=False",
        "eval(",
    ):
        assert word not in text.replace("literal_eval(", "").replace(".eval()", ""), word
