"""Turns names and docstrings into vectors: hashed character n-grams, with chosen words masked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_OPEN, _CLOSE = ord("<"), ord(">")
_ROWS_PER_CHUNK = 2048


def split_words(text: str) -> list[str]:
    """The words of identifiers and prose, in lower case: `readHTTPHead` is read, http, head."""
    return [word.lower() for word in _WORD.findall(text)]


class WordMask:
    """Leaves out words that would tell the answer.

    A word is masked when it is one of `words`, or contains one of at least four letters: with
    `asyncio` masked, so is `asyncioloop`.

    Args:
        words: the words to leave out, in any case; identifiers are split into their words.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = frozenset(
            part for word in words for part in [*split_words(word), word.lower()]
        )
        long = sorted(word for word in self.words if len(word) >= 4 and word.isalpha())
        self._inside = re.compile("|".join(long) if long else r"(?!)")

    def __call__(self, text: str) -> list[str]:
        """The words of `text` that are not masked."""
        kept: list[str] = []
        for run in re.findall(r"[A-Za-z]+", text):
            words = [word for word in split_words(run) if not self.hides(word)]
            if not self.hides("".join(words)):  # camel case must not hide `AsyncIO`
                kept += words
        return kept

    def hides(self, word: str) -> bool:
        """Whether a lower-case word is masked."""
        return word in self.words or self._inside.search(word) is not None


def hashed_ngrams(
    texts: Sequence[Sequence[str]], dim: int, sizes: Sequence[int] = (3, 4, 5)
) -> NDArray[np.float32]:
    """Counts the character n-grams of each text into `dim` signed buckets and normalises.

    Each word is closed in angle brackets, so that `<the` and `the>` differ; n-grams do not cross
    words. Row i is `v / max(|v|, tiny)` with `v[h(g) % dim] += sign(g)` for each n-gram g of text i
    (feature hashing, Weinberger et al. 2009, arXiv 0902.2206). The same on every machine.

    Args:
        texts: the words of each text.
        dim: number of buckets.
        sizes: n-gram lengths in bytes.

    Returns:
        [len(texts), dim], rows of length 1, or 0 for a text without n-grams.

    Raises:
        ValueError: `dim` is below 1.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    rows = np.zeros((len(texts), dim), dtype=np.float32)
    for start in range(0, len(texts), _ROWS_PER_CHUNK):
        chunk = texts[start : start + _ROWS_PER_CHUNK]
        rows[start : start + len(chunk)] = _count_chunk(chunk, dim, sizes)
    return rows


def _count_chunk(
    texts: Sequence[Sequence[str]], dim: int, sizes: Sequence[int]
) -> NDArray[np.float32]:
    encoded = ["".join(f"<{word}>" for word in words).encode() for words in texts]
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    row = np.repeat(np.arange(len(texts)), [len(text) for text in encoded])
    counts = np.zeros(len(texts) * dim)
    for size in sizes:
        num = len(data) - size + 1
        if num <= 0:
            continue
        hashed = np.full(num, size, dtype=np.uint64)
        whole = np.ones(
            num, dtype=bool
        )  # no word ends before the last byte, or starts after the first
        for i in range(size):
            byte = data[i : i + num]
            hashed = hashed * np.uint64(0x100000001B3) + byte
            whole &= (byte != _CLOSE) | (i == size - 1)
            whole &= (byte != _OPEN) | (i == 0)
        hashed = _mix(hashed[whole])
        bucket = row[:num][whole] * dim + (hashed % np.uint64(dim)).astype(np.int64)
        sign = 1.0 - 2.0 * (hashed >> np.uint64(63)).astype(np.float64)
        counts += np.bincount(bucket, weights=sign, minlength=len(counts))
    vectors = counts.reshape(len(texts), dim)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalised: NDArray[np.float32] = (vectors / np.maximum(norm, 1e-12)).astype(np.float32)
    return normalised


def _mix(hashed: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads every input bit over all output bits (the finaliser of SplitMix64)."""
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashed ^ (hashed >> np.uint64(31))
