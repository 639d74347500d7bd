"""The standard library's sources as one tensor of bytes: text to train a language model on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dataeff.data.python_sources import PythonSource, find_sources

_FILE_SEPARATOR = b"\n\x00\n"


class ByteCorpus:
    """Windows of bytes drawn from the concatenation of files.

    Args:
        sources: the files to read; the standard library's unless given. Files that cannot be read
            are counted in `num_skipped`.
        max_bytes: where to stop reading.

    Attributes:
        data: [num_bytes], uint8, host.
        num_files: files read.
        num_skipped: files that could not be read.
    """

    def __init__(
        self, sources: Sequence[PythonSource] | None = None, max_bytes: int = 1 << 26
    ) -> None:
        parts: list[bytes] = []
        self.num_files = self.num_skipped = 0
        size = 0
        for source in find_sources(packages=()) if sources is None else sources:
            if size >= max_bytes:
                break
            try:
                with open(source.path, "rb") as file:
                    text = file.read() + _FILE_SEPARATOR
            except OSError:
                self.num_skipped += 1
                continue
            parts.append(text[: max_bytes - size])
            size += len(parts[-1])
            self.num_files += 1
        self.data = torch.from_numpy(np.frombuffer(bytearray(b"".join(parts)), dtype=np.uint8))

    def __len__(self) -> int:
        return self.data.numel()

    def batch(
        self, batch_size: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draws windows and, for each byte of them, the byte that follows.

        Args:
            batch_size: number of windows.
            length: bytes in a window.
            generator: draws where the windows start; a host generator.

        Returns:
            Inputs and targets, both [batch_size, length], int64, host.

        Raises:
            ValueError: the corpus is shorter than one window.
        """
        if len(self) <= length:
            raise ValueError(f"a window of {length} bytes does not fit in a corpus of {len(self)}")
        start = torch.randint(len(self) - length, (batch_size, 1), generator=generator)
        window = self.data[start + torch.arange(length + 1)].long()
        return window[:, :-1], window[:, 1:]
