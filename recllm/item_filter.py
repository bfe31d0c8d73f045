"""Which items may be shown: {"brand": "Nord", "categories": ["Shoes", "Socks"]}, or a polars expression."""

import difflib
from collections.abc import Iterable, Mapping

import polars as pl
import torch
from torch import Tensor

from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable

Filter = Mapping[str, object] | pl.Expr


def allowed_items(
    items: pl.DataFrame, table: SemanticIdTable, filter: Filter | None, exclude: Iterable[str] = ()
) -> Tensor | None:
    """`items` stand in the table's order. None: every one may be shown. -> (N,) bool"""
    excluded = list(exclude)
    if filter is None and not excluded:
        return None
    passes = pl.lit(True) if filter is None else filter if isinstance(filter, pl.Expr) else _expression(items, filter)
    if unknown := [item for item in excluded if item not in table]:
        raise UserError(f"the model knows no item {unknown[0]!r} to exclude", fix="leave it out")
    try:
        mask = items.select(passes=passes).to_series()
    except pl.exceptions.PolarsError as error:
        raise UserError(f"the filter does not fit the items: {error}", fix=_columns(items)) from None
    if mask.dtype != pl.Boolean or len(mask) not in (1, len(table)):
        raise UserError("the filter says neither yes nor no about each item", fix='such as pl.col("price") < 20')
    allowed = torch.tensor(mask.fill_null(False).to_list()).expand(len(table)).clone()
    allowed[[table.row_of[item] for item in excluded]] = False
    if not bool(allowed.any()):
        raise UserError("the filter leaves no item to recommend", fix="loosen it")
    return allowed


def _expression(items: pl.DataFrame, filter: Mapping[str, object]) -> pl.Expr:
    passes = pl.lit(True)
    for column, wanted in filter.items():
        if column not in items.columns:
            near = difflib.get_close_matches(column, items.columns, n=1)
            raise UserError(
                f"items have no column {column!r} to filter by",
                fix=f"did you mean {near[0]!r}?" if near else _columns(items),
            )
        wanted = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
        kind, several = items.schema[column], isinstance(items.schema[column], pl.List)
        values = [_value(column, value, kind.inner if several else kind) for value in wanted]
        one_of = [pl.col(column).list.contains(value) if several else pl.col(column) == value for value in values]
        passes &= pl.any_horizontal(one_of or [pl.lit(False)])
    return passes


def _value(column: str, value: object, kind: pl.DataType) -> object:
    """As the column holds it: `"true"` of the command line is True."""
    if kind == pl.Boolean:
        found = {"true": True, "false": False}.get(str(value).lower())
    elif kind.is_numeric():
        try:
            found = float(str(value))
        except ValueError:
            found = None
    else:
        found = str(value)
    if found is None:
        raise UserError(f"filter {column}: {value!r} is no value of this column of {kind}", fix="another value")
    return found


def _columns(items: pl.DataFrame) -> str:
    return f"columns of the items: {', '.join(items.columns)}"
