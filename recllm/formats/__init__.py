"""Readers of the data people have. Each gives events in batches and items one by one, with one batch in memory.

reader = formats.by_name("amazon2018")
for batch in reader.events("Office_Products_5.json.gz", BadLines("skip")): ...
"""

from recllm.errors import UserError
from recllm.formats.amazon import AMAZON, AmazonRatings
from recllm.formats.lcrec import LCRec
from recllm.formats.minionerec import MiniOneRec
from recllm.formats.native import Jsonl, Parquet
from recllm.formats.recbole import RecBole
from recllm.formats.records import EVENT_COLUMNS, BadLines, Reader
from recllm.formats.s3rec import S3Rec
from recllm.formats.shops import JData, RetailRocket, Taobao, Tmall

__all__ = ["EVENT_COLUMNS", "FORMATS", "BadLines", "Reader", "by_name"]

FORMATS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Jsonl(),
        Parquet(),
        *AMAZON,
        AmazonRatings(),
        RecBole(),
        S3Rec(),
        LCRec(),
        MiniOneRec(),
        RetailRocket(),
        Tmall(),
        Taobao(),
        JData(),
    )
}


def by_name(name: str) -> Reader:
    """The reader of --format."""
    if name not in FORMATS:
        raise UserError(f"format {name!r} is not known", fix=f"--format is one of {', '.join(FORMATS)}, or shop")
    return FORMATS[name]
