"""The embedding stage: prepared folder → embeddings.safetensors."""

import dataclasses
import tempfile
from dataclasses import field
from pathlib import Path
from typing import Literal

from recllm.catalogue import Catalogue
from recllm.embeddings.collaborative import CollaborativeEncoder, hash_events
from recllm.embeddings.container import FILE_NAME, Embeddings, read_about
from recllm.embeddings.fusion import centred, fuse_vectors
from recllm.embeddings.hf import HFEncoder, Pooling
from recllm.embeddings.sentence import SentenceEncoder
from recllm.embeddings.shards import TextEncoder, encode_in_shards, remove_shards, shard_folder
from recllm.embeddings.tfidf import TfidfEncoder
from recllm.embeddings.vllm_pooling import VLLMEncoder
from recllm.errors import UserError
from recllm.files import digest
from recllm.launch import console
from recllm.processes import Processes, processes
from recllm.text import TEXT_COLUMNS, TEXT_SOURCES, item_texts


@dataclasses.dataclass
class EmbedConfig:
    """What `embed` does; the defaults need no model, no server and no download."""

    data: str = field(metadata={"help": "The prepared folder (data_prep/prepare.py)."})
    output: str | None = field(default=None, metadata={"help": f"Default: {FILE_NAME} in the data folder."})
    encoder: Literal["tfidf", "hf", "sentence", "vllm", "collaborative"] = field(
        default="tfidf",
        metadata={
            "help": "What reads the text: TF-IDF + SVD, a causal LM's last token (hf, vllm), a sentence encoder; "
            "`collaborative` reads none, only who consumed what."
        },
    )
    text: str = field(
        default="fused", metadata={"help": f"What is read: {', '.join(TEXT_SOURCES)}, or a column of items.parquet."}
    )
    text_columns: list[str] = field(
        default_factory=lambda: list(TEXT_COLUMNS),
        metadata={"help": "What `fused` is made of; for an item without title, the first that it has is its title."},
    )
    max_words: int = field(default=400, metadata={"help": "A longer text is cut."})
    collaborative_weight: float = field(
        default=0.5, metadata={"help": "Share of the collaborative vectors, 0 … 1; 0 is text alone."}
    )
    dim: int = field(default=128, metadata={"help": "D of the TF-IDF and of the collaborative vectors, each."})
    window: int = field(default=5, metadata={"help": "Events before and after that count as near (collaborative)."})
    seed: int = field(default=0, metadata={"help": "Of the SVD's random projection."})
    model: str | None = field(default=None, metadata={"help": "Name or folder, for hf, sentence and vllm."})
    revision: str | None = field(default=None, metadata={"help": "Of the model on the Hub."})
    pooling: Pooling = field(default="last", metadata={"help": "hf: the last token's state, or the mean of all."})
    max_tokens: int = field(default=512, metadata={"help": "Of a text, for hf, sentence and vllm."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Of the model; auto: bfloat16 on a GPU, float32 on a CPU."}
    )
    batch_tokens: int = field(default=16_384, metadata={"help": "hf: tokens of a batch; lower it if memory runs out."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace a file that was made in another way or from other data."}
    )

    def __post_init__(self):
        if not 0 <= self.collaborative_weight <= 1:
            raise UserError(f"collaborative_weight is {self.collaborative_weight}", fix="a number from 0 to 1")
        for name in ("dim", "window", "max_words", "max_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", fix="1 or more")
        if self.encoder in ("hf", "sentence", "vllm") and not self.model:
            raise UserError(f"the {self.encoder} encoder needs a model", fix="--model NAME_OR_FOLDER")
        if self.encoder == "collaborative":
            self.collaborative_weight = 1.0

    @property
    def path(self) -> Path:
        return Path(self.output) if self.output else Path(self.data) / FILE_NAME


def embed(config: EmbedConfig) -> Embeddings:
    """Encode every item and write the file, unless the same settings wrote it from the same data.

    A file made in another way or from other data is replaced only with `overwrite`.
    Under `accelerate launch` or `torchrun` a language model's work is shared; the first process does the rest.
    """
    if config.path.is_dir():
        raise UserError("the output is a folder", file=config.path, fix=f"name a file: --output FOLDER/{FILE_NAME}")
    catalogue = Catalogue.load(config.data)
    weight = config.collaborative_weight
    texts = item_texts(catalogue, config.text, config.text_columns, config.max_words) if weight < 1 else []
    with processes() as group:
        encoder = _text_encoder(config, group)
        collaborative = CollaborativeEncoder(config.dim, config.window, seed=config.seed)
        said = [f"{encoder.description} of {config.text} text"] if weight < 1 else []
        if weight > 0:
            said.append(f"{collaborative.description} of events {hash_events(catalogue)[:16]}")
        description, text_hash = said[0], digest(*texts)
        if len(said) == 2:
            description = f"{1 - weight:g} × {said[0]}, centred, + {weight:g} × {said[1]}"
        shards = None if isinstance(encoder, TfidfEncoder) else shard_folder(config.path, encoder, texts)
        there = not config.overwrite and _is_there(config.path, catalogue, description, text_hash)
        if not there:
            _check_writable(config.path)
        group.wait()  # nobody writes before everybody has looked
        if there:
            if shards and group.first:
                remove_shards(shards)  # of a run that was killed between its last two steps
            _say(group, f"{config.path} is there, made with these settings from this data")
            return Embeddings.load(config.path, catalogue.items_fingerprint, catalogue.fingerprint)

        _say(group, f"embedding {len(catalogue.items):,} items: {description}")
        matrix = None
        if weight < 1 and shards:
            matrix = encode_in_shards(encoder, texts, shards, group)
        elif weight < 1 and group.first:
            matrix = encoder.encode(texts)  # TF-IDF needs all texts at once, and minutes at most: it has no shards
        if group.first:
            if weight > 0:
                by_use = collaborative.encode(catalogue)
                matrix = by_use if matrix is None else fuse_vectors([(centred(matrix), 1 - weight), (by_use, weight)])
            items = tuple(catalogue.item_ids)
            Embeddings(items, matrix, description, text_hash, catalogue.fingerprint).save(config.path)
            if shards:
                remove_shards(shards)
        group.wait()
        return Embeddings.load(config.path, catalogue.items_fingerprint, catalogue.fingerprint)


def _text_encoder(config: EmbedConfig, group: Processes) -> TfidfEncoder | TextEncoder:
    dtype = config.dtype if config.dtype != "auto" else "float32" if group.device == "cpu" else "bfloat16"
    if config.encoder == "hf":
        return HFEncoder(
            config.model, config.pooling, config.max_tokens, dtype, group.device, config.batch_tokens, config.revision
        )
    if config.encoder == "sentence":
        return SentenceEncoder(config.model, config.max_tokens, dtype, group.device, revision=config.revision)
    if config.encoder == "vllm":
        return VLLMEncoder(config.model, config.max_tokens, dtype, config.revision)
    return TfidfEncoder(config.dim, config.seed)


def _say(group: Processes, what: str) -> None:
    if group.first:
        console.print(what, highlight=False, soft_wrap=True)


def _is_there(path: Path, catalogue: Catalogue, encoder: str, text_hash: str) -> bool:
    """Whether the file is what would be written. Something else is not replaced unasked."""
    if not path.exists():
        return False
    fix = "--overwrite, or another --output"
    try:
        about = read_about(path)
    except UserError as error:
        raise UserError(f"the file is there already and is {error.problem}", file=path, fix=fix) from None
    if about.get("catalogue_fingerprint") != catalogue.fingerprint:
        problem = "holds vectors made from other data: the catalogue's items, text, events or split have changed"
        raise UserError(problem, file=path, fix=fix)
    if (about["encoder"], about["text_hash"]) != (encoder, text_hash):
        raise UserError(f"holds vectors made in another way ({about['encoder']})", file=path, fix=fix)
    return True


def _check_writable(path: Path) -> None:
    """Now rather than after hours of encoding."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", file=path, fix="choose another --output") from None
