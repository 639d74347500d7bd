"""Training steps with activations offloaded, kept, recomputed, and under other offloaders.

`training` holds the step and its providers, `growth` what happens as sizes grow, `planned` the
planner's prediction beside measurement, `ssdtrain` the cases of the paper (on a GPU), `rok` the
curve of recomputing, offloading and keeping (`dataeff bench offload --rok`).
"""

from __future__ import annotations

from collections.abc import Iterator

from dataeff.bench.case import Case, Options


def cases(options: Options) -> Iterator[Case]:
    """All cases, the paper's last."""
    from dataeff.bench.offload import growth, planned, ssdtrain, training

    for part in (training, planned, growth, ssdtrain):
        yield from part.cases(options)
