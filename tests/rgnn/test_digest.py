"""The digest of a layer's code, by which compiled programs on disk are told apart."""

import os
import subprocess
import sys
import types

import pytest
import torch

from dataeff import rgnn
from dataeff.rgnn.digest import digest_of

SOURCE = """
import functools
import math
import operator

from dataeff import rgnn

HEADS = 2
bend = math.exp
NAMED = {"a": (1, 2.5), "b": {"x", "y", "z"}}

class settings:
    slope = 0.2

def twice(function):
    @functools.wraps(function)
    def called(z):
        return function(z) + function(z)
    return called

@functools.cache
def kept():
    return 5

@twice
def widen(z):
    return z * HEADS * bend(kept())

@rgnn.layer
def other(g, z):
    return g.dst(z) * 13

def named(z):
    return z * NAMED["a"][0]

class Settings:
    def __init__(self):
        self._width = 16
        self.name = "relu"

    @property
    def width(self):
        return self._width

    def __call__(self, z):
        return self.bent(z)

    def bent(self, z):
        return getattr(rgnn, self.name)(z)

chosen = Settings()
scaled = functools.partial(lambda z, *, by: z * by, by=7)
last = operator.itemgetter(11)

def make(factor):
    def f(g, x, W, power=1):
        x = scaled(chosen(x)) * getattr(chosen, "wid" + "th") + last(range(30))
        rows = [widen(value) for value in (x,)]
        z = rgnn.linear(g.src(rows[0]), W[g.etype])
        return g.sum(named(z) * factor + other(g, x)) + settings.slope
    return f

f = make(3)
"""


def digest(source=SOURCE, backends="cpp"):
    module = types.ModuleType("layers_of_a_user")
    exec(source, module.__dict__)
    return digest_of(module.f, backends)


def test_the_same_code_has_the_same_digest_in_every_process():
    program = f"from dataeff.rgnn.digest import digest_of\n{SOURCE}\nprint(digest_of(f, 'cpp'))"
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.strip())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("g.sum(", "g.mean("),  # what the layer calls
        ("HEADS = 2", "HEADS = 4"),  # a global of a function that it calls
        ("z * HEADS", "z + HEADS"),  # that function
        ("function(z) + function(z)", "function(z) - function(z)"),  # what decorates it
        ("return 5", "return 6"),  # a function whose results are cached
        ("math.exp", "math.sin"),  # another by the same name
        ('"a": (1,', '"a": (7,'),  # within a dictionary
        ("slope = 0.2", "slope = 0.3"),  # an attribute
        ("make(3)", "make(4)"),  # a captured value
        ("power=1", "power=2"),  # a default
        ("_width = 16", "_width = 32"),  # what an object holds, read by a computed name
        ('name = "relu"', 'name = "tanh"'),  # by a method of its own
        ("return self.bent(z)", "return self.bent(z) + 1"),  # what calling it does
        ("getattr(rgnn, self.name)(z)", "-getattr(rgnn, self.name)(z)"),  # what that calls
        ("by=7", "by=8"),  # what a function is given ahead
        ("itemgetter(11)", "itemgetter(12)"),  # what only pickling tells
        ("(x,)", "(x, x)"),  # a constant
        ("g.dst(z) * 13", "g.dst(z) * 14"),  # a layer that it calls
    ],
)
def test_another_code_has_another_digest(old, new):
    assert SOURCE.count(old) == 1
    assert digest(SOURCE.replace(old, new)) != digest()
    assert digest(backends="reference") != digest() == digest()


def test_what_small_tensors_hold_and_globals_read_by_computed_names():
    held = (
        "import torch\nfrom dataeff import rgnn\nshift = torch.tensor([0.5, 1.5])\nPOWER = 2\n"
        "def f(g, x):\n    return g.sum(g.src(x) * float(shift[1]))\n"
    )
    assert digest(held.replace("1.5", "2.5")) != digest(held) == digest(held)
    assert digest(held.replace("= 2", "= 3")) == digest(held)  # nothing reads it
    named = held.replace("float(shift[1])", 'globals()["PO" + "WER"]')
    assert digest(named.replace("= 2", "= 3")) != digest(named) == digest(named)


def test_functions_that_call_each_other_and_names_without_a_value():
    source = SOURCE + "\ndef widen(z):\n    return named(z) or later(z)\n"
    source += "\ndef named(z):\n    return widen(z)\n"
    source += (
        "\ndef unfilled():\n    f = lambda g, x: hole\n    return f\n    hole = 1\nf = unfilled()"
    )
    assert digest(source) == digest(source) != digest()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_program_holds_the_digest_of_its_layer(trained):
    # Inductor finds a program of an earlier process by its text. Another layer of the same number
    # and arguments gave that of this one before, with the shapes of its results.
    graph = rgnn.Graph(torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 1]), num_nodes=3).prepare()
    x, W = (torch.rand(size, requires_grad=trained) for size in ((3, 4), (2, 4, 4)))

    def narrow(g, x, W):
        return g.sum(rgnn.linear(g.src(x), W[g.etype]))

    def wide(g, x, W):
        z = rgnn.linear(g.src(x), W[g.etype])
        return g.sum(rgnn.concat(z, z))

    made = []

    def backend(module, example_inputs):
        made.append(module.print_readable(print_output=False))
        return module.forward

    layer, codes = rgnn.layer(narrow), set()
    for function in (narrow, wide):
        layer.function = function
        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend=backend)(graph, x, W)
        codes.add(layer.code())
        assert layer.code() in made[-1]
    assert len(codes) == 2
