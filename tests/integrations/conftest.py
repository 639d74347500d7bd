"""torch_geometric warns of its own use of torch.jit while it is imported."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_geometric.loader  # noqa: F401
