"""What HGTConv keeps of its parameters between calls is used while they hold the same bytes."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch.func import functional_call

from dataeff import nn, rgnn
from dataeff.memory.scratch import clear_idle
from dataeff.rgnn import constants, execute
from dataeff.rgnn.constants import constants_of
from dataeff.rgnn.plan import disabled_passes

NODE_TYPES = ["a", "b"]
EDGE_TYPES = [("a", "x", "b"), ("b", "y", "a"), ("a", "z", "a")]


def graph(seed, nodes=150, edges=700):
    g = torch.Generator().manual_seed(seed)
    ends = {key: torch.randint(0, nodes, (2, edges), generator=g) for key in EDGE_TYPES}
    return rgnn.Graph.from_typed(ends, dict.fromkeys(NODE_TYPES, nodes), edge_types=EDGE_TYPES)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    conv = nn.HGTConv(8, 8, (NODE_TYPES, EDGE_TYPES))
    with torch.no_grad():
        for p in conv.parameters():
            p.normal_()
    return conv, {t: torch.randn(150, 8) for t in NODE_TYPES}, graph(0)


@pytest.fixture
def products(monkeypatch):
    """The products of weights that were computed."""
    found, compute = [], execute.weight_product
    monkeypatch.setattr(
        execute, "weight_product", lambda *args: found.append(args[0]) or compute(*args)
    )
    return found


def run(conv, x, where):
    with torch.no_grad():
        return torch.cat([*conv(x, where).values()])


def fresh(conv, x, where):
    return run(copy.deepcopy(conv), x, where)


def _numpy(p):
    p.detach().numpy()[...] *= 1.5


def _other_memory(p):
    p.data = p.data * 1.5


def _same_memory_transposed(p):
    p.data = p.data.transpose(-1, -2)


WRITES = {
    "in place": lambda p: p.data.mul_(1.5),
    "one element": lambda p: p.data.view(-1)[-1:].add_(1),
    "numpy": _numpy,
    "other memory": _other_memory,
}
PARAMETERS = [
    *("kqv_lin.lins.a.weight", "kqv_lin.lins.b.bias", "out_lin.lins.b.weight"),
    *("out_lin.lins.a.bias", "k_rel.weight", "v_rel.weight", "skip.b", "p_rel.b__y__a"),
]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("write", WRITES)
def test_every_change_of_a_parameter_is_seen(problem, name, write):
    conv, *rest = problem
    before = [run(conv, *rest) for _ in range(3)]
    assert torch.equal(before[0], before[1]) and torch.equal(before[0], before[2])
    WRITES[write](conv.get_parameter(name))
    after = run(conv, *rest)
    assert torch.equal(after, fresh(conv, *rest)) and not torch.equal(after, before[0])
    assert torch.equal(run(conv, *rest), after)


@pytest.mark.parametrize("name", ["kqv_lin.lins.a.weight", "k_rel.weight"])
def test_the_same_bytes_read_in_another_order_are_another_weight(problem, name):
    conv, *rest = problem
    run(conv, *rest)
    p = conv.get_parameter(name)
    if p.shape[-1] != p.shape[-2]:
        p.data = p.data.view(p.shape[-1], -1).mT  # same memory, same shape
    else:
        _same_memory_transposed(p)
    assert torch.equal(run(conv, *rest), fresh(conv, *rest))


def test_a_shape_that_does_not_fit_is_refused_after_a_call_too(problem):
    conv, *rest = problem
    run(conv, *rest)
    conv.k_rel.weight.data = conv.k_rel.weight.data.view(6, 8, 4)
    with pytest.raises(rgnn.LayerTypeError, match="row shapes"):
        fresh(conv, *rest)
    with pytest.raises(rgnn.LayerTypeError, match="row shapes"):
        run(conv, *rest)


def test_programs_of_other_passes_compute_their_own(problem):
    conv, *rest = problem
    run(conv, *rest)
    for _ in range(2):
        with disabled_passes("fold_types"):
            assert torch.equal(run(conv, *rest), fresh(conv, *rest))
        assert torch.equal(run(conv, *rest), fresh(conv, *rest))


def test_products_of_weights_are_kept_until_a_bit_changes(problem, products):
    conv, x, where = problem
    run(conv, x, where)
    count = len(products)
    assert count >= 2
    run(conv, x, where)
    run(conv, {t: v * 2 for t, v in x.items()}, graph(1, edges=690))
    assert len(products) == count
    conv.k_rel.weight.data.view(-1)[3].mul_(-1)
    run(conv, x, where)
    assert len(products) == 2 * count


def test_weights_that_are_no_numbers_are_compared_too(problem, products):
    conv, *rest = problem
    conv.k_rel.weight.data.fill_(float("nan"))
    run(conv, *rest)
    count = len(products)
    assert run(conv, *rest).isnan().any() and len(products) == count
    assert torch.equal(run(conv, *rest).nan_to_num(), fresh(conv, *rest).nan_to_num())


def test_loaded_replaced_and_converted_parameters(problem):
    conv, x, where = problem
    run(conv, x, where)
    conv.load_state_dict({n: v * 1.5 for n, v in conv.state_dict().items()})
    assert torch.equal(run(conv, x, where), fresh(conv, x, where))
    conv.v_rel.weight = torch.nn.Parameter(torch.randn_like(conv.v_rel.weight))
    assert torch.equal(run(conv, x, where), fresh(conv, x, where))
    given = {n: p.detach() * 0.5 for n, p in conv.named_parameters()}
    with torch.no_grad():
        have = torch.cat([*functional_call(conv, given, (x, where)).values()])
    assert not torch.equal(have, run(conv, x, where))
    conv.double()
    x = {t: v.double() for t, v in x.items()}
    assert run(conv, x, where).dtype == torch.float64
    assert torch.equal(run(conv, x, where), fresh(conv, x, where))


@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_kept_gives_the_bits_of_a_call_with_gradients(problem, heads):
    _, x, where = problem
    conv = nn.HGTConv(8, 8, (NODE_TYPES, EDGE_TYPES), heads=heads)
    want = torch.cat([*conv(x, where).values()]).detach()
    for _ in range(3):
        assert torch.equal(run(conv, x, where), want)
    with torch.inference_mode():
        assert torch.equal(torch.cat([*conv(x, where).values()]), want)


def kept(conv):
    return constants_of(conv)._kept


def test_what_is_kept_goes_with_training_and_with_idle_memory(problem):
    conv, *rest = problem
    run(conv, *rest)
    assert kept(conv) is not None
    conv(*rest)
    assert kept(conv) is None
    run(conv, *rest)
    clear_idle()
    assert kept(conv) is None


def test_what_is_kept_goes_with_the_module(problem):
    conv = copy.deepcopy(problem[0])
    run(conv, *problem[1:])
    ref = weakref.ref(kept(conv))
    assert ref() is not None
    del conv
    gc.collect()
    assert ref() is None


def test_copies_start_with_nothing_kept(problem):
    conv, *rest = problem
    run(conv, *rest)
    other = copy.deepcopy(conv)
    assert kept(other) is None and kept(conv) is not None
    other.k_rel.weight.data.zero_()
    assert torch.equal(run(other, *rest), fresh(other, *rest))
    assert torch.equal(run(conv, *rest), fresh(conv, *rest))


def test_weights_that_always_change_are_seldom_copied(problem, monkeypatch):
    conv, *rest = problem
    made = []
    make = constants._Kept
    monkeypatch.setattr(constants, "_Kept", lambda *args: made.append(1) or make(*args))
    for _ in range(40):
        conv.k_rel.weight.data.mul_(1.01)
        assert torch.equal(run(conv, *rest), fresh(conv, *rest))
    copies = len(made) - 40  # each fresh copy of the module makes one
    assert 2 <= copies <= 7
    for _ in range(70):
        run(conv, *rest)
    assert kept(conv) is not None


def test_comparing_that_does_not_pay_is_given_up(problem, monkeypatch):
    conv, *rest = problem
    monkeypatch.setattr(constants, "FEW_NBYTES", 0)
    monkeypatch.setattr(constants, "FLOPS_PER_BYTE", 10**9)
    for _ in range(3):
        assert torch.equal(run(conv, *rest), fresh(conv, *rest))
    assert kept(conv) is None


def test_threads_share_what_is_kept(problem):
    conv, *rest = problem
    want, found = fresh(conv, *rest), []

    def work():
        for _ in range(20):
            found.append(torch.equal(run(conv, *rest), want))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 80 and all(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_nothing(problem, dtype):
    conv, x, where = problem
    conv.to(dtype)
    x = {t: v.to(dtype) for t, v in x.items()}
    run(conv, x, where)
    assert kept(conv) is None
