import pytest

from dataeff.storage import open_engine

ENGINES = ["threads"]


@pytest.fixture(params=ENGINES)
def kind(request):
    """Every kind of engine that this machine runs."""
    return request.param


@pytest.fixture
def engine(kind):
    with open_engine(kind) as engine:
        yield engine
