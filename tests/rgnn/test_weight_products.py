"""Products of weights equal `torch.einsum`'s, in the forms that folding and its gradients take."""

from __future__ import annotations

import pytest
import torch

from dataeff.rgnn import weight_products
from dataeff.rgnn.cpp import gemm as gemm_native
from dataeff.rgnn.weight_products import weight_product

SIZES = {"i": 5, "u": 3, "v": 7, "o": 18, "b": 2}
TYPED = ("iuv,uvo->iuo", "uv,uvo->uo", "iuo,uvo->iuv", "uo,uvo->uv", "iv,vo->io", "v,v->")
OTHER = ("iuo,iuv->uvo", "uo,uv->uvo", "biv,bvo->bio")


@pytest.mark.parametrize("types", [0, 1, 4])
@pytest.mark.parametrize("equation", TYPED + OTHER)
def test_equals_einsum(equation: str, types: int, monkeypatch: pytest.MonkeyPatch) -> None:
    native = []
    forward = gemm_native.forward

    def noted(*args: object) -> torch.Tensor:
        native.append(args)
        return forward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_products.gemm_native, "forward", noted)
    (a, b), out = equation.split("->")[0].split(","), equation.split("->")[1]
    # Transposed in memory, as weights that are slices of stacked ones.
    left, right = (
        torch.randn(*(SIZES[c] for c in reversed(x)), types, dtype=torch.float64).permute(
            *reversed(range(len(x) + 1))
        )
        for x in (a, b)
    )
    found = weight_product(equation, left, right)
    torch.testing.assert_close(found, torch.einsum(f"n{a},n{b}->n{out}", left, right))
    assert found.is_contiguous()
    if gemm_native.available(torch.float64):
        assert bool(native) == (equation in TYPED)


def test_half_precision_is_einsum() -> None:
    left, right = torch.randn(2, 5, 3).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    assert torch.equal(weight_product("iv,vo->io", left, right), torch.bmm(left, right))
