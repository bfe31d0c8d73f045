"""Numbering the prefixes of code tuples: what the table, the collision policies and the report all ask."""

import numpy as np

PADDING = -1  # only at the end of a tuple: the item is shallower than the deepest one


def tuple_keys(codes: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """One integer for each tuple, in lexicographic order with padding first. (N, L) -> (N,) int64"""
    key, bound = np.zeros(len(codes), np.int64), 1
    for level, size in enumerate(sizes):
        if bound * (size + 1) >= 2**62:  # would overflow: number the prefixes so far without gaps
            key = np.unique(key, return_inverse=True)[1]
            bound = len(codes)
        key = key * (size + 1) + codes[:, level] + 1
        bound *= size + 1
    return key


def number_prefixes(codes: np.ndarray, sizes: tuple[int, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For every level h, the distinct prefixes of length h + 1 and the number of each row's own.

    codes: (N, L), padding at the end allowed. Returns two lists of L:
        keys[h]     (U_h,) sorted:  number of the prefix of length h × (V_h + 1) + code + 1
        numbers[h]  (N,):           index into keys[h]
    Prefixes are numbered in lexicographic order, padding first; no key exceeds N (V + 1), so nothing overflows.
    """
    number = np.zeros(len(codes), np.int64)
    keys, numbers = [], []
    for level, size in enumerate(sizes):
        distinct, number = np.unique(number * (size + 1) + codes[:, level] + 1, return_inverse=True)
        keys.append(distinct)
        numbers.append(number)
    return keys, numbers


def find_prefixes(codes: np.ndarray, sizes: tuple[int, ...], keys: list[np.ndarray]) -> np.ndarray:
    """The number of each row of `codes` (M, L) among the full tuples numbered by `keys`, -1 where there is none."""
    number = np.zeros(len(codes), np.int64)
    found = np.ones(len(codes), bool)
    for level, size in enumerate(sizes):
        code = codes[:, level].astype(np.int64)
        found &= (code >= PADDING) & (code < size)
        key = number * (size + 1) + code + 1
        number = np.searchsorted(keys[level], key).clip(max=len(keys[level]) - 1)
        found &= keys[level][number] == key
    return np.where(found, number, -1)
