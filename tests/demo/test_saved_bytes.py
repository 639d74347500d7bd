import torch

from dataeff.demo.saved_bytes import SavedBytes


def test_a_storage_counts_once_and_only_while_it_is_held():
    w = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8)
    with SavedBytes([w, x]) as saved:
        hidden = x @ w  # saves x and w: excluded
        assert saved.now == 0
        loss = (hidden * hidden).sum()  # saves hidden twice: one storage
        assert saved.now == hidden.nbytes == 4 * 8 * 4
        wide = hidden[:2].sigmoid()  # saves its result, a storage of its own
        assert saved.now == hidden.nbytes + wide.nbytes
        (loss + wide.sum()).backward()
        del loss, hidden, wide
    assert saved.now == 0 and saved.peak == 4 * 8 * 4 + 2 * 8 * 4


def test_gradients_are_those_without_it():
    def gradient(context):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 1))
        x = torch.randn(3, 5)
        if context:
            with SavedBytes(net.parameters()):
                net(x).sum().backward()
        else:
            net(x).sum().backward()
        return [p.grad for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradient(True), gradient(False), strict=True))
