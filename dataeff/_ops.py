"""The torch operators of dataeff: `torch.ops.dataeff.*`, each with a fake implementation.

Operators are registered with `torch.library.Library.define/impl`, which costs 1 to 2 microseconds a
call (`torch.library.custom_op` costs about 14). Autograd is added where the operator is used, by a
`torch.autograd.Function`.
"""

from __future__ import annotations

import torch

library = torch.library.Library("dataeff", "DEF")

# rgnn: a whole layer is one operator; dataeff.rgnn.operators implements them when it is imported.
library.define(
    "rgnn_forward(Tensor[] inputs, Tensor token, int layer_id, str spec, SymInt[] sizes,"
    " int wanted) -> (Tensor[], Tensor[])"
)
library.define(
    "rgnn_backward(Tensor[] grads, Tensor[] inputs, Tensor[] outputs, Tensor[] saved,"
    " Tensor token, int layer_id, str spec, SymInt[] sizes, int wanted) -> Tensor[]"
)
