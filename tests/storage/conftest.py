import pytest

from dataeff.storage import open_engine, uring_refusal

REFUSAL = uring_refusal()
ENGINES = [
    "threads",
    pytest.param("io_uring", marks=pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))),
]


@pytest.fixture(params=ENGINES)
def kind(request):
    """Every kind of engine that this machine runs."""
    return request.param


@pytest.fixture
def engine(kind):
    with open_engine(kind) as engine:
        yield engine
