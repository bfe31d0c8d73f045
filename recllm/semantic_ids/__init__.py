"""Items ↔ short tuples of codes ↔ tokens: the vocabulary in which a language model names items.

table.py       SemanticIdTable: which item has which codes (start here)
quantizer.py   codebooks: embeddings → codes → embeddings, saved as quantizer.safetensors
rqkmeans.py    RQ-KMeans: fits the codebooks by k-means on residuals
rqvae.py       RQ-VAE: a learnt alternative
collisions.py  what to do when two items get the same codes
report.py      how good the IDs are
of_data.py     index_of: the table that belongs to a prepared folder
build.py       the stage: embeddings.safetensors → semantic_ids.json + quantizer.safetensors
"""

from recllm.semantic_ids.table import SemanticIdTable

__all__ = ["SemanticIdTable"]
