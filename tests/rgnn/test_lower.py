"""Which values of edges are stored: what kernels would else read and compute time and again."""

import pytest

from dataeff.rgnn.ir import Builder, Type
from dataeff.rgnn.kernels_ir import Traversal, parse_schedule, render_schedule
from dataeff.rgnn.lower import lower


def summed_twice(num_factors):
    """The product of so many values of edges, added up by destination and by source pair."""
    b = Builder()
    factors = [b.emit("input", attrs=(f"f{k}",), type=Type("edge", ())) for k in range(num_factors)]
    product = factors[0]
    for factor in factors[1:]:
        product = b.emit("mul", product, factor)
    sums = [b.emit("sum", product, attrs=(m,)) for m in ("edge.dst", "edge.src_pair")]
    return b.program(sums), factors, product


@pytest.mark.parametrize("num_factors", [2, 3, 5])
def test_a_value_of_many_that_two_kernels_read_is_made_by_one(num_factors):
    program, factors, product = summed_twice(num_factors)
    schedule = lower(program)
    traversals = [step for step in schedule.steps if isinstance(step, Traversal)]
    assert [t.center for t in traversals] == ["dst", "src_pair"]
    reads = [schedule.reads(t) & {*factors, product} for t in traversals]
    if num_factors > 2:  # one value read is less than three
        assert product in schedule.stored
        assert reads[0] >= set(factors) and reads[1] == {product}
    else:
        assert product not in schedule.stored
        assert reads == [set(factors)] * 2


def test_a_value_of_many_that_one_kernel_reads_is_not_stored():
    b = Builder()
    factors = [b.emit("input", attrs=(f"f{k}",), type=Type("edge", ())) for k in range(3)]
    product = b.emit("mul", b.emit("mul", factors[0], factors[1]), factors[2])
    schedule = lower(b.program([b.emit("sum", product, attrs=("edge.dst",))]))
    assert product not in schedule.stored


@pytest.mark.parametrize("read", ["product", "scores"])
def test_the_first_rows_of_a_computed_value_are_stored_with_it(read):
    """A prefix is a view, so a step that stores it needs the whole value in memory."""
    b = Builder()
    x = b.emit("input", attrs=("x",), type=Type("node", (16,)))
    w = b.emit("input", attrs=("w",), type=Type("one", (16, 16) if read == "product" else (16,)))
    if read == "product":
        whole = b.emit("relu", x)
        first = b.emit("prefix", whole)
        out = b.emit("linear", first, w)
    else:
        whole = b.emit("linear", x, w)
        first = b.emit("prefix", whole)
        out = b.emit("sum", b.emit("gather", first, attrs=("edge.dst",)), attrs=("edge.dst",))
    schedule = lower(b.program([out]))
    assert first in schedule.stored and whole in schedule.stored


def test_a_constant_that_is_an_output_too_is_not_read_from_memory():
    """What no input reaches has zeros as gradients: one number, and rows of it."""
    b = Builder()
    zero = b.emit("const", attrs=(0.0,), type=Type("one"))
    rows = b.emit("gather", zero, attrs=("node.one",))
    schedule = lower(b.program([zero, b.emit("expand", rows, attrs=((3,),))]))
    assert all(zero not in schedule.reads(step) for step in schedule.steps)
    assert parse_schedule(render_schedule(schedule), schedule.program) == schedule
