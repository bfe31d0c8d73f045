"""SemanticIdTable: item ↔ codes ↔ tokens. Frozen, and valid by construction.

No two items share their codes and no item's codes are a prefix of another's, so a finished tuple names one item. Depth
may vary: `codes` is (N, L), -1 only as padding at the end.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from recllm.catalogue import fingerprint_items
from recllm.errors import UserError
from recllm.files import digest, read_json, write_whole
from recllm.semantic_ids.collisions import resolve
from recllm.semantic_ids.prefixes import PADDING, find_prefixes, number_prefixes
from recllm.semantic_ids.tokens import DEFAULT_PATTERN, LETTERS, check_pattern, infer_pattern, read_token, token_regex

FORMAT = "recllm semantic IDs 1"
BUILD = "run data_prep/build_semantic_ids.py"
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SemanticIdTable:
    items: tuple[str, ...]  # (N,)
    codes: np.ndarray  # (N, L) int32, read-only
    sizes: tuple[int, ...]  # (L,) codes a level
    pattern: str = DEFAULT_PATTERN
    items_fingerprint: str = ""  # of the catalogue that the table was built from; default: these items
    report: dict = dataclasses.field(
        default_factory=dict
    )  # figures of the build: kept in the file, not part of the IDs

    def __post_init__(self):
        items, sizes = tuple(self.items), tuple(map(int, self.sizes))
        check_pattern(self.pattern)
        codes = _checked_codes(items, self.codes, sizes)
        for name, value in (("items", items), ("codes", codes), ("sizes", sizes)):
            object.__setattr__(self, name, value)
        _check_unique(items, codes, self._index[1])
        if not self.items_fingerprint:
            object.__setattr__(self, "items_fingerprint", self.own_items_fingerprint)

    # ---- questions about items

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item: str) -> bool:
        return item in self.row_of

    def __eq__(self, other) -> bool:
        return isinstance(other, SemanticIdTable) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"SemanticIdTable({len(self)} items, sizes={self.sizes}, pattern={self.pattern!r})"

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        return {item: row for row, item in enumerate(self.items)}

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """How many codes each item has. (N,)"""
        return (self.codes != PADDING).sum(axis=1)

    def depth_of(self, item: str) -> int:
        return int(self.depths[self._row(item)])

    def codes_of(self, item: str) -> tuple[int, ...]:
        row = self._row(item)
        return tuple(self.codes[row, : self.depths[row]].tolist())

    def item_of(self, codes: Sequence[int]) -> str | None:
        """The item with exactly these codes (padding at the end is ignored), or None."""
        row = self.rows_of(np.array(codes, np.int64).reshape(1, -1))[0]
        return None if row < 0 else self.items[row]

    def rows_of(self, codes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """The row of the item with exactly these codes, -1 where no item has them. (M, up to L) -> (M,)"""
        if not isinstance(codes, np.ndarray):
            codes = pad(codes)
        if codes.shape[1] < self.levels:
            codes = np.pad(codes, ((0, 0), (0, self.levels - codes.shape[1])), constant_values=PADDING)
        keys, order = self._index
        rank = find_prefixes(codes, self.sizes, keys)
        too_deep = (codes[:, self.levels :] != PADDING).any(axis=1)
        return np.where((rank < 0) | too_deep, -1, order[rank])

    # ---- questions about tokens

    def token(self, level: int, code: int) -> str:
        if not (0 <= level < self.levels and 0 <= code < self.sizes[level]):
            raise UserError(f"no code {code} at level {level}: the levels have {self.sizes} codes")
        return self.pattern.format(level=LETTERS[level], code=code)

    def all_tokens(self) -> list[str]:
        """Every token, whether an item uses it or not: all of level a, then all of level b, …"""
        return [self.token(level, code) for level, size in enumerate(self.sizes) for code in range(size)]

    def tokens_of(self, item: str) -> list[str]:
        return [self.token(level, code) for level, code in enumerate(self.codes_of(item))]

    def text_of(self, item: str) -> str:
        return "".join(self.tokens_of(item))

    def parse(self, text: str) -> list[tuple[int, ...]]:
        """The codes of every complete run of tokens a, b, c, … in a text, whether or not an item has them.

        Complete is as deep as the shallowest item. Only white space may stand between the tokens of a run; a token that
        is not of this table (<|a_999|>) ends it.
        """
        found, run, end = [], [], -1
        for match in self._token_in_text.finditer(text):
            level, code = LETTERS.index(match["level"]), int(match["code"])
            follows = level == len(run) and (not run or not text[end : match.start()].strip())
            if not follows:
                found.append(tuple(run))
                run = []
            known = level < self.levels and code < self.sizes[level]
            if known and level == len(run):
                run.append(code)
            elif run:
                found.append(tuple(run))
                run = []
            end = match.end()
        shallowest = int(self.depths.min())
        return [codes for codes in [*found, tuple(run)] if len(codes) >= shallowest]

    # ---- files

    @functools.cached_property
    def own_items_fingerprint(self) -> str:
        """Of the items as they are now: differs from `items_fingerprint` once new items have been added."""
        return fingerprint_items(self.items)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What a model and its table must agree on: items, codes, sizes and pattern."""
        return digest(self.own_items_fingerprint, self.codes.astype("<i4").tobytes(), str(self.sizes), self.pattern)

    def save(self, path: str | Path) -> None:
        """semantic_ids.json, one item a line."""
        head = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "items_fingerprint": self.items_fingerprint,
            "pattern": self.pattern,
            "sizes": self.sizes,
            "report": self.report,
        }
        rows = zip(self.items, self.codes.tolist(), self.depths.tolist())
        with write_whole(path) as partial, open(partial, "w", encoding="utf-8") as stream:
            for name, value in head.items():
                stream.write(f"{'{' if name == 'format' else ''}{_compact(name)}:{_compact(value)},\n")
            stream.write('"items":{')
            for number, (item, codes, depth) in enumerate(rows):
                stream.write(f"{',' if number else ''}\n{_compact(item)}:{_compact(codes[:depth])}")
            stream.write("}}\n")

    @classmethod
    def load(cls, path: str | Path, expect_items_fingerprint: str | None = None) -> "SemanticIdTable":
        """Refuses a file that was edited and, if asked, one that belongs to another catalogue."""
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError("not a file of semantic IDs", file=path, fix=BUILD)
        try:
            codes = pad(value["items"].values())
            fields = {name: value[name] for name in ("sizes", "pattern", "items_fingerprint", "report")}
            table = cls(items=tuple(value["items"]), codes=codes, **fields)
        except UserError as error:
            raise UserError(error.problem, file=path, fix=error.fix or BUILD + " again") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError("a part is missing or of another type", file=path, fix=BUILD + " again") from None
        if table.fingerprint != value.get("fingerprint"):
            raise UserError("the file was edited after it was written", file=path, fix=BUILD + " again")
        if expect_items_fingerprint not in (None, table.items_fingerprint, table.own_items_fingerprint):
            raise UserError("the semantic IDs were built from another catalogue", file=path, fix=BUILD + " on this one")
        return table

    def to_index(self) -> dict[str, list[str]]:
        """item → tokens, the content of an LC-Rec/LETTER *.index.json (recllm.formats.lcrec writes it)."""
        return {item: self.tokens_of(item) for item in self.items}

    @classmethod
    def from_index(
        cls,
        index: Mapping[str, Sequence[str]],
        pattern: str | None = None,
        sizes: Sequence[int] | None = None,
        on_collision: str = "refuse",
    ) -> "SemanticIdTable":
        """From item → tokens; pattern and sizes are read off the tokens unless given.

        Published indices do hold items with the same tokens (LETTER's Beauty, say). `on_collision`: "refuse", or
        "extra-level" / "extra-level-all" as in `collisions`.
        """
        pattern, codes, found = cls.read_index(index, pattern)
        codes, sizes = resolve(codes, tuple(sizes or found), on_collision)
        return cls(items=tuple(index), codes=codes, sizes=sizes, pattern=pattern)

    @staticmethod
    def read_index(
        index: Mapping[str, Sequence[str]], pattern: str | None = None
    ) -> tuple[str, np.ndarray, tuple[int, ...]]:
        """Pattern, codes (N, L) and sizes of item → tokens; two items may still have the same codes."""
        if not index:
            raise UserError("the index holds no item")
        pattern = pattern or infer_pattern(index)
        read = functools.lru_cache(maxsize=None)(functools.partial(read_token, token_regex(pattern)))
        rows = []
        for item, tokens in index.items():
            row = [read(token) for token in tokens]
            if not row or [level for level, _ in row] != list(range(len(row))):
                raise UserError(f"item {item!r}: {' '.join(map(str, tokens))!r} is not a sequence like {pattern} …")
            rows.append([code for _, code in row])
        codes = pad(rows)
        return pattern, codes, tuple((codes.max(axis=0) + 1).tolist())

    # ---- how it is done

    @functools.cached_property
    def _index(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Sorted prefixes of each level, and the row of each full tuple."""
        keys, numbers = number_prefixes(self.codes, self.sizes)
        order = np.zeros(len(keys[-1]), np.int64)
        order[numbers[-1]] = np.arange(len(self.items))
        return keys, order

    @functools.cached_property
    def _token_in_text(self) -> re.Pattern:
        return token_regex(self.pattern)

    def _row(self, item: str) -> int:
        try:
            return self.row_of[item]
        except KeyError:
            raise UserError(
                f"item {item!r} has no semantic ID", fix="encode it with the stored quantizer (encode_new)"
            ) from None


def pad(rows: Iterable[Sequence[int]]) -> np.ndarray:
    """Rows of any length → (N, L) int32 with -1 at the end."""
    rows = list(rows)
    depths = np.fromiter(map(len, rows), np.int64, len(rows))
    codes = np.full((len(rows), int(depths.max(initial=0))), PADDING, np.int64)
    flat = np.array([code for row in rows for code in row])
    if len(flat) and flat.dtype.kind not in "iu":
        raise TypeError("a code is not an integer")
    codes[np.arange(codes.shape[1]) < depths[:, None]] = flat
    return codes.astype(np.int32)


def _checked_codes(items: tuple[str, ...], codes, sizes: tuple[int, ...]) -> np.ndarray:
    """The codes as a read-only int32 copy, once they are known to fit items and sizes."""
    try:
        codes = np.array(codes, order="C", ndmin=2)
    except ValueError:
        raise UserError("rows of codes differ in length", fix="pad the shorter ones with -1") from None
    if not items:
        raise UserError("a table of semantic IDs needs at least one item")
    if not all(isinstance(item, str) for item in items):
        raise UserError("item ids must be text", fix="convert them with str")
    if len(set(items)) < len(items):
        seen = set()
        raise UserError(f"item {next(item for item in items if item in seen or seen.add(item))!r} is there twice")
    if not 1 <= len(sizes) <= len(LETTERS) or min(sizes) < 1:
        raise UserError(f"sizes {sizes}: 1 to {len(LETTERS)} levels of at least one code each are possible")
    if codes.shape != (len(items), len(sizes)) or codes.dtype.kind not in "iu":
        kind = f"codes of shape {codes.shape} and type {codes.dtype}"
        raise UserError(f"{kind} do not fit {len(items)} items and {len(sizes)} levels")
    bad = (codes < PADDING) | (codes >= np.array(sizes))
    bad[:, 1:] |= (codes[:, :-1] == PADDING) & (codes[:, 1:] != PADDING)
    bad[:, 0] |= codes[:, 0] == PADDING
    if bad.any():
        row = int(bad.any(axis=1).argmax())
        raise UserError(f"item {items[row]!r}: codes {codes[row].tolist()} do not fit the levels' sizes {sizes}")
    codes = codes.astype(np.int32)
    codes.flags.writeable = False
    return codes


def _check_unique(items: tuple[str, ...], codes: np.ndarray, order: np.ndarray) -> None:
    """`order` holds the row of each distinct tuple, in lexicographic order."""
    if len(order) < len(items):  # some tuple has several rows, of which `order` names one
        row = int(np.setdiff1d(np.arange(len(items)), order)[0])
        other = next(int(o) for o in np.flatnonzero((codes == codes[row]).all(axis=1)) if o != row)
        raise UserError(
            f"items {items[row]!r} and {items[other]!r} have the same codes {codes[row].tolist()}",
            fix="choose a collision policy that resolves it, such as extra-level",
        )
    first, second = codes[order[:-1]], codes[order[1:]]  # what a tuple is a prefix of follows right after it
    prefix = ((first == second) | (first == PADDING)).all(axis=1)
    if prefix.any():
        short, long = order[prefix.argmax()], order[prefix.argmax() + 1]
        raise UserError(
            f"the codes of item {items[short]!r} are the beginning of those of {items[long]!r}: {codes[long].tolist()}",
            fix="give both the same depth or different codes",
        )
