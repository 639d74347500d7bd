"""Arguments that are no such thing are refused by their names, before anything is opened."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.storage import open_engine


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("host_bytes", -1),
        ("min_bytes", -1),
        ("in_flight_bytes", -1),
        ("prefetch_bytes", -1),
        ("spill_bytes", 0),
        ("staging_bytes", 0),
        ("memory_budget", -1.0),
        ("memory_budget", float("nan")),
    ],
)
def test_a_size_that_is_none_is_refused(tmp_path, name, bad):
    with pytest.raises(ValueError, match=f"{name}={bad:g} is too small"):
        ActivationOffload(nn.Identity(), tmp_path, policy="auto", **{name: bad})


NUMBERS = (
    "host_bytes",
    "min_bytes",
    "in_flight_bytes",
    "prefetch_bytes",
    "spill_bytes",
    "staging_bytes",
    "num_threads",
    "memory_budget",
    "endurance_tbw",
    "write_cap_tb",
)
OPTIONAL = {"in_flight_bytes", "prefetch_bytes", "spill_bytes", *NUMBERS[-3:]}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "bad",
    ["600", True, np.True_, None, b"6", [4], torch.tensor([4, 4]), torch.tensor(4.0)],
    ids=str,
)
def test_what_is_no_number_is_refused_by_its_name(tmp_path, name, bad):
    if bad is None and name in OPTIONAL:
        return
    with pytest.raises(TypeError, match=re.escape(f"{name}={bad!r} is no ")):
        ActivationOffload(nn.Identity(), tmp_path, policy="auto", **{name: bad})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_are_taken(tmp_path, name):
    value = np.uint8(200)  # whose sums would run over, were it not made an int
    offload = ActivationOffload(nn.Identity(), tmp_path, policy="auto", **{name: value})
    offload.close()


@pytest.mark.parametrize(
    ("name", "bad", "error"),
    [
        ("num_threads", 0, "num_threads=0 is not between 1 and 256"),
        ("num_threads", 1 << 40, f"num_threads={1 << 40} is too large"),
        ("spill_bytes", 1 << 70, f"spill_bytes={1 << 70} is too large"),
        ("endurance_tbw", float("nan"), "endurance_tbw=nan"),
        ("write_cap_tb", -1, "write_cap_tb=-1"),
        ("engine", np.array(["a", "b"]), "engine=array"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_name(tmp_path, name, bad, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        ActivationOffload(nn.Identity(), tmp_path, **{name: bad})


@pytest.mark.parametrize(
    ("name", "bad", "error"),
    [
        ("checksum", "yes", "checksum='yes' is neither True nor False"),
        ("live", 1, "live=1 is neither True nor False"),
        ("faults", "EIO", "faults='EIO' is no FaultPlan"),
        ("streams_of", None, "streams_of=None cannot be called"),
        ("policy", torch.tensor(4), "policy: tensor(4) is neither a name"),
        ("spill", torch.tensor(4), "spill=tensor(4): a directory"),
        ("spill", b"/tmp", "spill=b'/tmp': b'/tmp' is no path"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_name(tmp_path, name, bad, error):
    with pytest.raises(TypeError, match=re.escape(error)):
        ActivationOffload(nn.Identity(), **{"spill": tmp_path, name: bad})


def test_an_array_of_names_is_a_policy(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    offload = ActivationOffload(model, tmp_path, policy=np.array(["0", "1"]))
    offload.close()


@pytest.mark.parametrize("name", ["num_threads", "queue_depth"])
def test_an_engine_names_what_is_no_number(name):
    with pytest.raises(TypeError, match=re.escape(f"{name}='4' is no integer")):
        open_engine(**{name: "4"})
