"""The data path on public data sets: RECLLM_DATA=folder make test-data. Counts are those of the data's own README."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recllm.catalogue import Catalogue
from recllm.semantic_ids import SemanticIdTable

DATA = Path(os.environ.get("RECLLM_DATA", "nowhere"))
SCRIPTS = Path(__file__).parents[1] / "data_prep"
BEAUTY_TEXT = ["--text_columns", "generated_tags", "brand", "categories"]
SETS = {  # users, items, events; how it is embedded
    "beauty": (22_363, 12_101, 198_502, BEAUTY_TEXT),
    "office2014": (4_905, 2_420, 53_258, []),
    "instruments": (24_772, 9_922, 206_153, ["--encoder", "collaborative"]),
    "retailrocket-mb": (11_061, 31_239, 115_196, ["--encoder", "collaborative"]),
    "industrial": (3_285, 3_541, 22_743, []),
}


def run(script: str, *arguments) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.data
@pytest.mark.parametrize("name", SETS)
def test_counts_and_a_distinct_index(name, tmp_path):
    users, items, events, embedding = SETS[name]
    folder = tmp_path / name
    log, catalogue = DATA / name / "interactions.jsonl.gz", DATA / name / "items.jsonl.gz"
    cores = ["--user_core", 1, "--item_core", 1]  # retailrocket and industrial are not 5-cores
    run("prepare.py", "--interactions", log, "--items", catalogue, "--output", folder, *cores)
    made = Catalogue.load(folder)
    assert (made.report["users"], made.report["items"], made.report["interactions"]) == (users, items, events)
    run("embed_items.py", "--data", folder, *embedding)
    run("build_semantic_ids.py", "--data", folder)
    table = SemanticIdTable.load(folder / "semantic_ids.json", expect_items_fingerprint=made.items_fingerprint)
    assert len({table.codes_of(item) for item in made.item_ids}) == items


@pytest.mark.data
def test_the_five_cores_of_the_literature_are_five_cores(tmp_path):
    for name in ("beauty", "instruments", "office2014"):
        log = DATA / name / "interactions.jsonl.gz"
        run("prepare.py", "--interactions", log, "--output", tmp_path / name)
        assert Catalogue.load(tmp_path / name).report["interactions"] == SETS[name][2]
