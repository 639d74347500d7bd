import pytest
import torch

from dataeff.demo.gpt import GPT


def test_a_byte_sees_only_those_before_it():
    torch.manual_seed(0)
    model = GPT(dim=16, num_layers=2, num_heads=2, context=12)
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 12, 256)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
        GPT(dim=16, num_layers=1, num_heads=3, context=4)
