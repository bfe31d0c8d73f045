"""Turn every item of a prepared folder into a vector: FOLDER/embeddings.safetensors.

python data_prep/embed_items.py --data data/shop                                              # needs no model
python data_prep/embed_items.py --data data/shop --collaborative_weight 0                       # text alone
python data_prep/embed_items.py --data data/log  --encoder collaborative                      # a log without text
python data_prep/embed_items.py --data data/shop --encoder hf --model Qwen/Qwen3-0.6B         # as GREAM does
accelerate launch data_prep/embed_items.py --data data/shop --encoder hf --model Qwen/Qwen3-4B-Instruct-2507

Interrupted, the same command goes on where it stopped; once the file is there, it returns at once.
A file made in another way or from other data is replaced only with --overwrite.
"""

import os

from recllm import launch
from recllm.embeddings import EmbedConfig, embed


def main(config: EmbedConfig) -> None:
    embeddings = embed(config)
    if os.environ.get("RANK", "0") != "0":
        return
    items, width = embeddings.matrix.shape
    print(f"items      {items:,}\nwidth      {width}\nencoder    {embeddings.encoder}\nwritten to {config.path}")


if __name__ == "__main__":
    launch.run(main, EmbedConfig, description=__doc__)
