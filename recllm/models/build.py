"""The model that every later stage trains: a causal LM whose vocabulary holds every item.

A folder that AutoModelForCausalLM and AutoTokenizer load, with semantic_ids.json inside and recllm.json beside it.
"""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from recllm.catalogue import Catalogue
from recllm.checkpoint import REPORT, TABLE, save_items
from recllm.errors import UserError
from recllm.files import digest, read_object, restore_folder, write_folder_whole, write_json
from recllm.launch import console
from recllm.mixtures.offline_chains import OFFLINE_WORDS
from recllm.mixtures.templates import read_templates
from recllm.models.tiny import tiny_model, tiny_tokenizer
from recllm.pretrained import DTYPES, load_causal_lm, which_model
from recllm.reasoning import RECOMMEND, REWRITE, SHORT_TEMPLATE, STEPS, TEMPLATE
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids.of_data import index_of
from recllm.text import TEXT_COLUMNS, check_columns, fuse
from recllm.tokenization import Initialisation, ItemTokens, add_tokens, behaviour_token, initialise, resize

TINY = "tiny"
TEXT_WORDS = 128  # of an item, for the tiny tokenizer and the cluster means: the facts stand first


@dataclass
class BuildModelConfig:
    """Settings of `data_prep/build_model.py`."""

    data: str = field(metadata={"help": "Prepared folder, with semantic_ids.json inside."})
    output: str = field(metadata={"help": "Checkpoint folder to write."})
    model: str = field(default=TINY, metadata={"help": "Hub name or path of a causal LM, or `tiny`."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Default: semantic_ids.json of the data folder."})
    initialise: Initialisation = field(
        default="cluster", metadata={"help": "New rows: cluster (mean of the members' text), mean, or random."}
    )
    text_columns: list[str] = field(
        default_factory=lambda: list(TEXT_COLUMNS), metadata={"help": "Columns of items.parquet that describe an item."}
    )
    extra_tokens: list[str] = field(default_factory=list, metadata={"help": "Further tokens to add, as they are."})
    dtype: str = field(default="float32", metadata={"help": f"Weights: {', '.join(DTYPES)}."})
    tiny_width: int = field(default=128, metadata={"help": "model tiny: hidden width, a multiple of 64."})
    tiny_layers: int = field(default=4, metadata={"help": "model tiny: layers."})
    tiny_vocabulary: int = field(default=4096, metadata={"help": "model tiny: most text tokens of its BPE."})
    seed: int = field(default=0, metadata={"help": "Of the new rows, and of the tiny model's weights."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a checkpoint that was made in another way."})

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.tiny_width < 64 or self.tiny_width % 64:
            raise UserError(f"tiny_width must be a multiple of 64, got {self.tiny_width}")
        if self.tiny_layers < 1 or self.tiny_vocabulary < 512:
            raise UserError("tiny_layers must be at least 1 and tiny_vocabulary at least 512")


def build_model(config: BuildModelConfig) -> Path:
    """Make `config.output`, or leave it when it was made from the same index with the same settings."""
    catalogue, output = Catalogue.load(config.data), Path(config.output)
    table = index_of(catalogue, config.semantic_ids)
    made_of = _made_of(config, catalogue, table)
    if _already(output, made_of, config.overwrite):
        console.print(f"{output} is made already, from the same index with the same settings.")
        return output

    check_columns(catalogue, config.text_columns)
    rows = catalogue.items.iter_rows(named=True)
    texts = {row["item"]: fuse(row, config.text_columns, max_words=TEXT_WORDS) for row in rows}
    texts = {item: text for item, text in texts.items() if text}
    model, tokenizer = base_model(config, list(texts.values()))
    if table.token(0, 0) in tokenizer.get_vocab():
        raise UserError(
            "the model holds item tokens already, and they would lose what they learnt",
            file=config.model,
            fix="use it as it is, or start from the model it was made from",
        )
    behaviours = [behaviour_token(behaviour) for behaviour in catalogue.behaviours]
    before = len(tokenizer)
    ids = add_tokens(tokenizer, [*table.all_tokens(), *behaviours, *config.extra_tokens])
    embedding_rows = resize(model, tokenizer)
    method = config.initialise if texts or config.initialise != "cluster" else "mean"
    if method != config.initialise:
        console.print("The catalogue has no text: new rows start at the mean instead of the cluster's text.")
    new = [id for id in ids if id >= before]
    initialise(model, tokenizer, new, method, ItemTokens.of(tokenizer, table), texts, config.seed)
    report = {
        "recllm": version("recllm"),
        "transformers": version("transformers"),
        "made_of": made_of,
        "base_model": config.model,
        "catalogue": {"name": catalogue.name, "fingerprint": catalogue.fingerprint},
        "semantic_ids": table.fingerprint,
        "tokens": {"text": before, "items": sum(table.sizes), "behaviours": behaviours, "rows": embedding_rows},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "initialise": method,
        "seed": config.seed,
    }
    transformers_logging.disable_progress_bar()  # one line for each shard says nothing
    with write_folder_whole(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        table.save(folder / TABLE)
        save_items(catalogue.items, folder)
        write_json(folder / REPORT, report)
    return output


def made_of(config: BuildModelConfig) -> str:
    """The fingerprint of what `build_model` would make."""
    catalogue = Catalogue.load(config.data)
    return _made_of(config, catalogue, index_of(catalogue, config.semantic_ids))


def _made_of(config: BuildModelConfig, catalogue: Catalogue, table: SemanticIdTable) -> str:
    """Everything that the checkpoint is a function of; of a model in a folder its content, not its place."""
    places = ("data", "output", "overwrite", "model", "semantic_ids")
    settings = {name: value for name, value in vars(config).items() if name not in places}
    base = TINY if config.model == TINY else which_model(config.model)
    return digest(table.fingerprint, catalogue.fingerprint, repr(settings), base)


def _already(output: Path, made_of: str, overwrite: bool) -> bool:
    """Is the checkpoint there? An error if something else is."""
    restore_folder(output)
    if output.exists() and not output.is_dir():
        raise UserError("is a file, and a folder is to be written", file=output, fix="another --output")
    if not (output / REPORT).exists():
        if output.exists() and any(output.iterdir()):
            raise UserError(
                "the folder holds files that are no checkpoint of ours", file=output, fix="another --output"
            )
        return False
    if not overwrite and read_object(output / REPORT).get("made_of") != made_of:
        raise UserError("the folder holds another checkpoint", file=output, fix="another --output, or --overwrite")
    return not overwrite


def wordings() -> list[str]:
    """What mixtures say around an item's facts: a tokenizer of our own holds these words whole."""
    templates = [
        text for pairs in read_templates().values() for pair in pairs for text in (pair.prompt, pair.completion)
    ]
    return [*templates, *STEPS.values(), REWRITE, RECOMMEND, TEMPLATE, SHORT_TEMPLATE, OFFLINE_WORDS]


def base_model(config: BuildModelConfig, texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The named model and tokenizer, or a tiny pair made for these texts."""
    if config.model == TINY:
        tokenizer = tiny_tokenizer([*texts, *wordings() * max(1, len(texts) // 10)], config.tiny_vocabulary)
        model = tiny_model(len(tokenizer), config.tiny_width, config.tiny_layers, config.seed)
        return model.to(DTYPES[config.dtype]), tokenizer
    return load_causal_lm(config.model, DTYPES[config.dtype])
