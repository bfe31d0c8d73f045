"""The index that belongs to a prepared folder: what every stage after it begins with."""

from pathlib import Path

from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.semantic_ids.table import SemanticIdTable


def index_of(catalogue: Catalogue, path: str | Path | None = None) -> SemanticIdTable:
    """The data folder's own semantic_ids.json must be of this preparation, a named one of the same items."""
    own = catalogue.folder / "semantic_ids.json"
    table = SemanticIdTable.load(path or own, expect_items_fingerprint=catalogue.items_fingerprint)
    made_from = table.report.get("made_from", {}).get("catalogue", catalogue.fingerprint)
    if path is None and made_from != catalogue.fingerprint:
        raise UserError(
            "was made before the data were prepared anew",
            file=own,
            fix="run embed_items.py and build_semantic_ids.py again, or name the index with --semantic_ids",
        )
    return table
