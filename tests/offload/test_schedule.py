"""The order in which bytes are expected to be asked for."""

from dataclasses import dataclass

import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.offload.schedule import Orders, Tape


@dataclass(eq=False)
class Sized:
    nbytes: int


def make_tape(orders, items):
    tape = Tape(orders)
    for item in items:
        tape.append(item)
    return tape


def expected(tape):
    return [item.nbytes for item in tape.upcoming()]


def test_first_backward_is_expected_in_reverse():
    items = [Sized(n) for n in (10, 11, 12, 13)]
    tape = make_tape(Orders(), items)
    tape.ask(3)
    assert expected(tape) == [12, 11, 10] and tape.num_replans == 0
    assert (tape.nbytes, tape.largest) == (46, 13)


def test_recorded_order_is_expected_of_a_pass_of_the_same_sizes():
    items, orders = [Sized(n) for n in (10, 11, 12, 13)], Orders()
    first = make_tape(orders, items)
    for position in (3, 1, 2, 0):
        first.ask(position)
    first.finish()
    second = make_tape(orders, items)
    second.ask(3)
    assert expected(second) == [11, 12, 10]
    for position in (1, 2, 0):
        second.ask(position)
    assert second.num_replans == 0
    other = make_tape(orders, items[:3])
    other.ask(2)
    assert expected(other) == [11, 10]


def test_what_the_last_pass_never_asked_for_is_not_expected():
    items, orders = [Sized(n) for n in (10, 11, 12)], Orders()
    first = make_tape(orders, items)
    first.ask(2)
    first.ask(0)
    first.finish()
    second = make_tape(orders, items)
    second.ask(2)
    assert expected(second) == [10]
    second.ask(1)  # now it is
    assert second.num_replans == 1 and expected(second) == [10]


def test_leaving_the_order_moves_the_cursor():
    items = [Sized(n) for n in (10, 11, 12, 13, 14)]
    tape = make_tape(Orders(), items)
    tape.ask(4)
    tape.ask(1)
    assert tape.num_replans == 1
    assert expected(tape) == [10]
    tape.ask(3)
    assert tape.num_replans == 2
    assert expected(tape) == [12, 10]  # 11 was asked for


def test_asking_again_is_no_replan():
    tape = make_tape(Orders(), items := [Sized(1), Sized(2), Sized(3)])
    for position in (2, 2, 1, 2, 0, 1):
        tape.ask(position)
    assert tape.num_replans == 0 and items


def test_dead_storages_are_not_expected():
    items = [Sized(n) for n in (10, 11, 12)]
    tape = make_tape(Orders(), items)
    tape.ask(2)
    del items[0]
    assert expected(tape) == [11]


def test_old_orders_are_forgotten():
    orders = Orders()
    for n in range(2, 40):
        orders.learn([1] * n, list(range(n)))
    assert orders.recall([1] * 39) == list(range(39))
    assert orders.recall([1, 1]) == [1, 0]


def test_longer_inputs_are_expected_to_be_asked_for_in_the_same_order():
    orders = Orders()
    orders.learn([10, 20, 30], [2, 0, 1])
    orders.learn([11, 21, 31], [1, 2, 0])
    assert orders.recall([12, 22, 32]) == [1, 2, 0]
    assert orders.recall([10, 20, 30]) == [2, 0, 1]  # it knows better
    assert orders.recall([10, 20]) == [1, 0]


def reads(offload):
    """Reads under way, or bytes that have arrived."""
    return len(offload._cache._incoming) or offload._cache.counters.bytes_read


def test_reads_begin_when_backward_reaches_what_was_kept_behind_them(tmp_path):
    layers = [nn.Sequential(nn.Linear(256, 256), nn.Sigmoid()) for _ in range(3)]
    model = nn.Sequential(*layers)
    offload = ActivationOffload(model, tmp_path, policy=["0", "1"], min_bytes=0)
    begun = []
    with offload:
        moved = model[1](model[0](torch.ones(256, 256)))
        offload._cache.drain()
        kept = model[2][0](moved)
        kept.register_hook(lambda grad: begun.append(reads(offload)))
        loss = model[2][1](kept).sum()
        before = offload.report().bytes_read
        loss.backward()
    assert before == 0 and offload.report().bytes_read > 0
    assert begun[0] > 0  # only the last sigmoid's own output was asked for by then
    offload.close()
