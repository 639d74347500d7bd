import pytest
import torch
from rgnn_layers import gated, rgat, rgcn_mean

from dataeff.rgnn.ir import IRTypeError, Op, Program, Type
from dataeff.rgnn.text import parse, render
from dataeff.rgnn.verify import verify


def plans(small):
    x, W = torch.randn(20, 5), torch.randn(4, 5, 6)
    yield rgat.plan(small, x, W, torch.randn(4, 6), torch.randn(4, 6))
    yield rgcn_mean.plan(small, x, W, torch.randn(5, 6), torch.randn(6))
    yield gated.plan(small, x, W, torch.randn(5, 6), torch.randn(4), torch.randn(60))


def test_text_round_trips_for_forward_and_backward(small):
    for plan in plans(small):
        for program in (plan.traced, plan.compiled.forward, plan.compiled.backward):
            assert parse(render(program)) == program


def test_parser_refuses_what_does_not_hold():
    with pytest.raises(ValueError, match="not the next operation"):
        parse("%1 = input[x]() : node[4]\nreturn %1\n")
    with pytest.raises(ValueError, match="states"):
        parse("%0 = input[x]() : node[4]\n%1 = relu(%0) : node[5]\nreturn %1\n")
    with pytest.raises(ValueError, match="returns nothing"):
        parse("%0 = input[x]() : node[4]\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%0 = exp(%1) : node[4]\nreturn %0", "no earlier line defines"),
        ("%0 = input[x]() : planet[4]\nreturn %0", "of no domain"),
        ("%0 = const[abc]() : one[]\nreturn %0", "'abc' is no number"),
        ("%0 = input[x]() : node[4]\n%1 = reduce[abc](%0) : node[]\nreturn %1", "no row shape"),
        ("%0 = input[x]() : node[4]\n%1 = slice[a, 6](%0) : node[6]\nreturn %1", "no columns"),
        ("%0 = input[x]() : node[4]\n%1 = embed[-1, 6](%0) : node[6]\nreturn %1", "cannot place"),
        ("%0 = input[x]() : one[4]\n%1 = einsum[i](%0, %0) : one[]\nreturn %1", "no equation"),
        ("%0 = input[x]() : one[4]\n%1 = einsum[i,i->z](%0, %0) : one[4]\nreturn %1", "neither"),
    ],
)
def test_what_no_program_may_hold(text, message):
    with pytest.raises((ValueError, IRTypeError), match=message):
        parse(text)


def test_names_and_numbers_are_kept_apart():
    text = "%0 = input[inf]() : node[2]\n%1 = const[inf]() : one[]\nreturn %0, %1\n"
    program = parse(text)
    assert [op.attrs for op in program.ops] == [("inf",), (float("inf"),)]
    assert render(program) == text


def test_verifier_finds_a_broken_program(small):
    program = next(plans(small)).traced
    ops = list(program.ops)
    broken = type(ops[3])(3, ops[3].kind, ops[3].args, ops[3].attrs, Type("edge", (9,)))
    with pytest.raises(ValueError, match="should have"):
        verify(Program((*ops[:3], broken, *ops[4:]), program.outputs))
    with pytest.raises(ValueError, match="does not exist"):
        verify(Program(program.ops, (99,)))


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([(1, "input", (), ("x",))], "operation 0 is numbered %1"),
        ([(0, "input", (), ("x",)), (1, "relu", (1,), ())], "reads %1, which is not defined"),
        ([(0, "input", (), ("x",)), (1, "relu", (-1,), ())], "reads %-1, which is not defined"),
        ([(0, "input", (), ("x",)), (1, "input", (), ("x",))], "two inputs share a name"),
    ],
)
def test_verifier_says_what_is_out_of_order(ops, message):
    program = Program(tuple(Op(*parts, Type("node", (4,))) for parts in ops), (0,))
    with pytest.raises(ValueError, match=message):
        verify(program)
