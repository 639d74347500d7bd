import torch
from rgnn_layers import rgcn

from dataeff import rgnn
from dataeff.rgnn import plan
from dataeff.rgnn.profile import nearby


def step(num_nodes, num_edges):
    """One training step on a random graph; returns its size."""
    edge_index = torch.randint(num_nodes, (2, num_edges))
    graph = rgnn.Graph(edge_index, torch.randint(2, (num_edges,)), num_nodes=num_nodes)
    x = torch.randn(num_nodes, 4, requires_grad=True)
    rgcn(graph, x, torch.randn(2, 4, 4)).sum().backward()
    assert x.grad.shape == x.shape


def test_graphs_of_about_one_size_share_what_was_compiled(monkeypatch):
    made = []
    compiled = plan.Compiled
    monkeypatch.setattr(plan, "_COMPILED", {})
    monkeypatch.setattr(plan, "Compiled", lambda *args: made.append(args[1]) or compiled(*args))
    for num_nodes in (1000, 1007, 993, 4000):
        step(num_nodes, 4 * num_nodes)
    assert len(made) == 2
    assert made[0][0] == 1024 and made[1][0] == 4096


def test_a_backend_that_is_chosen_later_is_the_one_that_runs(monkeypatch):
    index = torch.zeros(2, 1, dtype=torch.int64)
    graph = rgnn.Graph(index, index[0], num_nodes=1)
    args = torch.randn(1, 3), torch.randn(1, 3, 3)
    for name in ("reference", "cpp", "reference"):
        monkeypatch.setenv("DATAEFF_RGNN_BACKEND", name)
        with plan.watched_plans() as seen:
            rgcn(graph, *args)
        assert [p.compiled.forward_runner.name for p in seen] == [name]
        assert rgcn.plan(graph, *args).compiled.forward_runner.name == name


def test_plans_do_not_pile_up():
    bound = plan._plan_for.cache_info().maxsize
    plan._plan_for.cache_clear()
    for num_nodes in range(500, 500 + bound + 10):
        graph = rgnn.Graph(
            torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            num_nodes=num_nodes,
        )
        rgcn(graph, torch.randn(num_nodes, 1), torch.randn(1, 1, 1))
    assert plan._plan_for.cache_info().currsize == bound


def test_compiled_programs_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(plan, "_COMPILED", {})
    monkeypatch.setattr(plan, "KEPT_COMPILED", 3)
    plan._plan_for.cache_clear()
    for num_nodes in (10, 100, 1000, 10_000, 1000):
        step(num_nodes, 2 * num_nodes)
    assert [key[1][0] for key in plan._COMPILED] == [nearby(n) for n in (100, 1000, 10_000)]


def test_sizes_are_rounded_the_same_whatever_came_before():
    found = [nearby(n) for n in range(4000)]
    assert found == sorted(found) and found[:3] == [0, 1, 2]
    assert all(abs(near - n) <= 0.2 * n + 0.5 for n, near in enumerate(found))
