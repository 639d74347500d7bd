"""Training steps with activations offloaded, kept, recomputed, and under other offloaders.

`training` holds the step and its providers, `growth` what happens as sizes grow, `planned` the
planner's prediction beside measurement, `ssdtrain` the cases of the paper (on a GPU), `rok` the
curve of recomputing, offloading and keeping (`dataeff bench offload --rok`). What the disk and the
engine do by themselves stands beside them; `dataeff bench storage` has more of it.

All of it takes half an hour on two idle cores, more than half of that the large step. `--only TEXT`
runs a part: `small step`, `middle step`, `large step`, `planned: layers`, `planned: mlp`, `growth`,
`past the page cache`, `ssdtrain`; of the curve, `--rok --only batch=8`.
"""

from __future__ import annotations

from collections.abc import Iterator

from dataeff.bench.case import Case, Options


def cases(options: Options) -> Iterator[Case]:
    """All cases, the paper's last."""
    from dataeff.bench import storage
    from dataeff.bench.offload import growth, planned, ssdtrain, training

    for part in (training, planned, growth):
        yield from part.cases(options)
    for way in ("write", "read"):
        yield storage.case(options, way, block_nbytes=1 << 20, depth=4)
    yield from ssdtrain.cases(options)
