"""Lets a file here time the cases of one workload with pytest-benchmark.

A file names its workload and asks for `step`; there is one test per size and provider:

    WORKLOAD = "gather"

    def test_gather(benchmark, step):
        benchmark(step)

`dataeff bench NAME` runs the same cases interleaved and beside the ceilings, and is what the
README's tables come from; here they are for comparing one provider with its own past.
`DATAEFF_BENCH_FULL=1` takes the full sizes.
"""

import os

import pytest
import torch

from dataeff.bench import Options, Unavailable, cases


def pytest_generate_tests(metafunc):
    if "step" not in metafunc.fixturenames:
        return
    options = Options(quick=os.environ.get("DATAEFF_BENCH_FULL") != "1")
    params = [
        pytest.param((options, case, provider), id=f"{case.size} {provider.name}")
        for case in cases(metafunc.module.WORKLOAD, options)
        for provider in case.providers
    ]
    metafunc.parametrize("step", params, indirect=True)


@pytest.fixture(scope="session")
def latest_inputs():
    return {}


@pytest.fixture
def step(request, latest_inputs):
    """A callable that does the work once and waits for the device."""
    options, case, provider = request.param
    if latest_inputs.get("case") is not case:
        latest_inputs.clear()  # before the next inputs are made, so that one set is held at most
        torch.manual_seed(options.seed)
        latest_inputs.update(case=case, inputs=case.inputs())
    torch.manual_seed(options.seed)
    try:
        prepared = provider.prepare(latest_inputs["inputs"])
    except Unavailable as reason:
        pytest.skip(str(reason))

    def call():
        if prepared.before is not None:
            prepared.before()
        prepared.call()
        if options.device.type == "cuda":
            torch.cuda.synchronize(options.device)

    yield call
    if prepared.close is not None:
        prepared.close()
