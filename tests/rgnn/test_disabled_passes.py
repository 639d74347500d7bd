import threading

import pytest
import torch
from rgnn_layers import rgat

from dataeff.rgnn.plan import disabled_passes, watched_plans


def arguments():
    shapes = ((20, 6), (4, 6, 5), (4, 5), (4, 5))
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_a_pass_left_out_changes_the_plan_and_not_the_result(small):
    given = arguments()
    with watched_plans() as plans:
        expected = rgat(small, *given)
        with disabled_passes("reorder", "compact"):
            found = rgat(small, *given)
    usual, without = plans
    names = [name for name, _ in usual.compiled.stages]
    assert "reorder" in names and "compact" in names
    assert not {"reorder", "compact"} & {name for name, _ in without.compiled.stages}
    torch.testing.assert_close(found, expected)

    grads = torch.autograd.grad(expected.square().sum(), given)
    # Backward finds the plan of its forward, in whatever context and thread it runs.
    other = []
    thread = threading.Thread(
        target=lambda: other.extend(torch.autograd.grad(found.square().sum(), given))
    )
    thread.start()
    thread.join()
    torch.testing.assert_close(other, list(grads))


def test_a_pass_that_cannot_be_left_out_is_refused():
    with pytest.raises(ValueError, match="differentiate"), disabled_passes("differentiate"):
        pass
