import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from dataeff import rgnn

sys.path.insert(0, str(Path(__file__).parent))  # for rgnn_layers, shared by these tests


@pytest.fixture(autouse=True, scope="session")
def _accesses_are_watched():
    """Interpreted kernels are held to what programs that run at once may touch."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton_accesses import watched_accesses

    with watched_accesses():
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def small():
    """A graph of 20 nodes, 60 edges and 4 relations."""
    g = torch.Generator().manual_seed(1)
    edge_index = torch.randint(0, 20, (2, 60), generator=g)
    return rgnn.Graph(edge_index, torch.randint(0, 4, (60,), generator=g), num_nodes=20)
