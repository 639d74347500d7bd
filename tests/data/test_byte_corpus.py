import pytest
import torch

from dataeff.data.byte_corpus import ByteCorpus
from dataeff.data.python_sources import PythonSource


def test_windows_and_what_follows_them(package):
    sources = package({"a": "abcdefgh", "b": "ijkl"})
    corpus = ByteCorpus([*sources, PythonSource("/nonexistent.py", "c", False)])
    assert bytes(corpus.data.tolist()) == b"abcdefgh\n\0\nijkl\n\0\n"
    assert (corpus.num_files, corpus.num_skipped) == (2, 1)
    x, y = corpus.batch(50, 6, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (50, 6) and x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert all(bytes(row.tolist()) in bytes(corpus.data.tolist()) for row in torch.cat([x, y]))
    again, _ = corpus.batch(50, 6, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)


def test_reading_stops_at_max_bytes(package):
    corpus = ByteCorpus(package({"a": "x" * 100, "b": "y" * 100}), max_bytes=120)
    assert len(corpus) == 120
    assert ByteCorpus(max_bytes=5000).data.numel() == 5000


def test_a_window_longer_than_the_corpus_is_an_error(package):
    corpus = ByteCorpus(package({"a": "abc"}))
    with pytest.raises(ValueError, match="does not fit in a corpus of 6"):
        corpus.batch(1, 6, torch.Generator())
