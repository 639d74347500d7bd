import torch

from dataeff.memory.huge_pages import on_huge_pages


def test_a_tensor_comes_back_whatever_its_size():
    for rows in (0, 1, 3_000_000):  # the last is large enough to be asked for
        new = torch.empty(rows)
        assert on_huge_pages(new) is new
        new.fill_(2.0)
        assert float(new.sum()) == 2.0 * rows
