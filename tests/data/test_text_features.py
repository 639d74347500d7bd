import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataeff.data.text_features import WordMask, hashed_ngrams, split_words


def test_identifiers_split_into_words():
    assert split_words("readHTTPHeader_v2 _Foo x") == ["read", "http", "header", "v", "foo", "x"]


def test_masked_words_are_left_out_in_every_spelling():
    mask = WordMask(["asyncio", "torch.nn"])
    assert mask("AsyncIO asyncioLoop run_asyncio_NN torch_run nnz") == ["loop", "run", "run", "nnz"]
    assert mask("TorchRun nnRun") == ["run", "run"]


def test_words_of_four_letters_are_masked_inside_others_and_shorter_ones_are_not():
    assert WordMask(["json", "csv"])("jsonable csvable") == ["csvable"]


@given(st.text(alphabet="aAsSyYnNcCiIoO_ xX1.", max_size=60))
def test_no_masked_word_survives(text):
    mask = WordMask(["async", "io"])
    for word in mask(text):
        assert "async" not in word and word != "io"


def naive_ngrams(words, sizes):
    return [f"<{w}>"[i : i + n] for w in words for n in sizes for i in range(len(w) + 3 - n)]


words = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=5)


@given(st.lists(words, max_size=6), st.sampled_from([1, 7, 64]))
def test_features_are_the_normalised_sums_of_ngram_vectors(texts, dim):
    sizes = (3, 4)
    rows = hashed_ngrams(texts, dim, sizes)
    assert rows.shape == (len(texts), dim) and rows.dtype == np.float32
    for text, row in zip(texts, rows, strict=True):
        total = sum((scalar_ngram(g, dim) for g in naive_ngrams(text, sizes)), np.zeros(dim))
        norm = np.linalg.norm(total)
        np.testing.assert_allclose(row, total / norm if norm else total, atol=1e-6)


def scalar_ngram(gram, dim):
    """The definition, one n-gram at a time with Python's integers."""
    keep = 2**64 - 1
    hashed = len(gram)
    for byte in gram.encode():
        hashed = (hashed * 0x100000001B3 + byte) & keep
    hashed = ((hashed ^ (hashed >> 30)) * 0xBF58476D1CE4E5B9) & keep
    hashed = ((hashed ^ (hashed >> 27)) * 0x94D049BB133111EB) & keep
    hashed ^= hashed >> 31
    vector = np.zeros(dim)
    vector[hashed % dim] = -1 if hashed >> 63 else 1
    return vector


def test_similar_words_are_near_and_rows_do_not_depend_on_their_neighbours():
    rows = hashed_ngrams([["convolution"], ["convolutional"], ["sqlite"], []], 256)
    assert rows[0] @ rows[1] > 0.7 > 0.2 > abs(rows[0] @ rows[2])
    assert not rows[3].any()
    many = hashed_ngrams([["convolution"]] * 5000, 256)
    assert (many == rows[0]).all()


def test_no_bucket_is_an_error():
    with pytest.raises(ValueError, match="dim"):
        hashed_ngrams([["a"]], 0)
