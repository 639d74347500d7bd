"""`HostEmbedding`: learnable rows in host memory, gathered to where the index lives."""

from __future__ import annotations

import errno
from collections.abc import Callable
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor

from dataeff import _core
from dataeff._flags import checked_bool
from dataeff._integers import checked_int
from dataeff._ops import row_table
from dataeff.features.index import checked_tensor
from dataeff.features.registration import RegisteredMemory
from dataeff.features.row_gradient import gather_rows, sparse_rows
from dataeff.memory import HostBuffer, SharedTensor, new_shared, share_

if TYPE_CHECKING:
    from typing_extensions import Self


_MOST_NBYTES = (1 << 63) - 1


class HostEmbedding(torch.nn.Embedding):
    """`torch.nn.Embedding(sparse=True)` whose rows stay in host memory, whatever the model is on.

        rows = embedding(index)    # where the index is: on a GPU, which reads the rows in place
        rows.sum().backward()      # weight.grad: each touched row once, sparse, on the host
        optimizer.step()           # updates them in place: torch.optim's SGD, Adagrad, SparseAdam

    The optimizer writes rows on the CPU: backward has waited for the gathers that it goes through,
    but after others, under `torch.no_grad()`, call `torch.cuda.synchronize()` before `step()`.

    `model.cuda()` leaves the rows where they are; give them to an optimizer as any parameter.
    Gradients of equal indices are summed in the order of the index, so results are the same bits at
    any number of threads: those of `torch.nn.Embedding(sparse=True)` whose gradient is summed so. A
    state dict goes into `torch.nn.Embedding` and back.

    What torch lacks for sparse gradients it lacks here: `Adam`, weight decay, and the clipping of
    `torch.nn.utils`, instead of which scale the gradient by a norm of its rows:

        rows = model.rows.weight.grad.coalesce().values()
        model.rows.weight.grad *= min(1.0, 1.0 / float(rows.norm() + 1e-6))

    **Several ranks.** On the CPU, `DistributedDataParallel` (gloo) reduces the sparse gradient as
    it does an `nn.Embedding`'s. It refuses a model whose other parameters are on GPUs: have it
    ignore the rows and average their gradients before each step:

        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["rows.weight"])
        host_group = torch.distributed.new_group(backend="gloo")   # moves CPU tensors
        ...
        loss.backward(); model.rows.average_gradients(host_group); optimizer.step()

    **Scaled losses.** `torch.amp.GradScaler("cuda")` copies the scale, and whether a gradient was
    infinite, to where the rows are, and reads and writes there before the copies have ended (torch
    2.10 to 2.13). Autocast to bfloat16 needs no scaler; for float16 give the rows an optimizer of
    their own, and unscale their gradients:

        scaler.scale(loss).backward()
        rows.weight.grad /= scaler.get_scale()     # waits for the device
        if rows.weight.grad.coalesce().values().isfinite().all():
            rows_optimizer.step()
        scaler.step(optimizer); scaler.update()    # of all that is on the GPU

    Free a wrapped model before `destroy_process_group`: one that outlives its gloo group frees it
    with the interpreter's lock held, which gloo's thread may be waiting for (torch 2.13).

    Args:
        num_embeddings: rows.
        embedding_dim: elements of a row.
        padding_idx: a row that gets no gradient, zero at first.
        max_norm: refused, as is scale_grad_by_freq: both rewrite rows while they are read.
        shared: whether the rows begin in memory that other processes map (`share_memory`).
        dtype: of the rows.

    Shape:
        index [*], int32 or int64, each in [-num_embeddings, num_embeddings);
        rows [*, embedding_dim].

    Raises:
        TypeError: a size that is no integer, a flag that is no bool, a dtype without gradients; by
            a call, an index that is no tensor, or of another dtype.
        ValueError: an argument that is refused or out of bounds, or a device other than the CPU.
        NotImplementedError: by a call inside a transform of `torch.func`.
        IndexError: by a call, an index out of range; on CUDA by a later one, and its row is zero.
        OSError: the kernel has no such memory.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = True,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        shared: bool = False,
    ) -> None:
        _refuse(max_norm, scale_grad_by_freq, sparse, device, _weight)
        shared, _freeze = checked_bool("shared", shared), checked_bool("freeze", _freeze)
        weight = _weight
        if weight is None:
            shape = _checked_shape(num_embeddings, embedding_dim)
            weight = _new_rows(shape, _checked_dtype(dtype), shared)
        if padding_idx is not None:
            num_rows = weight.shape[0]
            checked_int("padding_idx", padding_idx, least=-num_rows, most=num_rows - 1)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            sparse=True,
            _weight=share_(weight) if shared else weight,
            _freeze=_freeze,
        )
        if _weight is None:
            self.reset_parameters()
        self._memory: RegisteredMemory | None = None

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = True,
    ) -> Self:
        """Rows that exist already, in place: [num_embeddings, embedding_dim], host memory.

        Raises:
            TypeError: `embeddings` are no tensor.
            ValueError: not two dimensions, not in host memory, rows that are not contiguous, or an
                argument that the class refuses.
        """
        if not isinstance(cast(object, embeddings), Tensor):
            kind = type(embeddings).__name__
            raise TypeError(f"embeddings are a torch.Tensor, got {kind}: torch.as_tensor(...)")
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings have 2 dimensions, got {tuple(embeddings.shape)}")
        row_table(embeddings)
        rows, columns = embeddings.shape
        return cls(
            rows,
            columns,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight=embeddings,
            _freeze=freeze,
        )

    def forward(self, input: Tensor) -> Tensor:
        """`weight[input]`, on the input's device."""
        # `self.weight` takes longer than ten rows do.
        weight = cast(torch.nn.Parameter, self._parameters["weight"])
        compiling = torch.compiler.is_compiling()
        # Another thread may share the rows, which moves them: where they are read stays till then.
        plain = not compiling and type(weight) is torch.nn.Parameter
        held = weight.untyped_storage() if plain else None
        rows = self._gathered(weight, input, compiling)
        del held
        return rows

    def _gathered(self, weight: torch.nn.Parameter, input: Tensor, compiling: bool) -> Tensor:
        if not (compiling or (weight.requires_grad and torch.is_grad_enabled())):
            at_once = _core.gather_tensors(weight, input, None, 0)
            if at_once is not None:
                return at_once
        if isinstance(cast(object, input), torch.fx.Proxy):
            return _traced_leaf(self, input)
        input = checked_tensor(input)
        if torch._C._are_functorch_transforms_active() and not compiling:
            raise NotImplementedError(
                "torch.func's transforms (vmap, grad, jvp, ...) do not pass through a "
                "HostEmbedding, whose gradient is sparse: look rows up before, "
                "rows = embedding(index), and transform what is made of them, as in "
                "torch.func.vmap(f)(rows)"
            )
        if input.is_cuda:
            self.register(input.device)
        if compiling:
            from dataeff.features.uncompiled import gather_outside_graph

            compiled: Tensor = gather_outside_graph(weight, input, self.padding_idx)
            return compiled
        return gather_rows(weight, input, True, self.padding_idx)

    def register(self, device: torch.device | str | int = "cuda") -> Self:
        """Registers the rows with CUDA now instead of at the first call there.

        Raises:
            RuntimeError: CUDA refuses or is not there; says why and what helps.
        """
        if not torch.cuda.is_available():
            raise RuntimeError("this torch finds no CUDA device: index with CPU tensors")
        if self._memory is None or self._memory.x is not self.weight:
            self._memory = RegisteredMemory(self.weight)
        self._memory.register(torch.empty(0, device=device).device)
        return self

    def average_gradients(self, group: dist.ProcessGroup | None = None) -> None:
        """Replaces `weight.grad` by the mean over the ranks of a group, the same bits in each.

        Every rank calls it; one without a gradient adds nothing.

        Args:
            group: one that moves CPU tensors (gloo); default: all ranks.
        """
        grad = self.weight.grad
        if grad is None:
            none = torch.empty(0, dtype=torch.int64, device="cpu")
            rows = self.weight.new_empty(0, self.embedding_dim)
            grad = sparse_rows(none, rows, self.weight.shape)
        grad = grad.coalesce()
        index = _all_gather_rows(grad.indices()[0], group)
        rows = _all_gather_rows(grad.values(), group) / dist.get_world_size(group)
        self.weight.grad = sparse_rows(index, rows, self.weight.shape).coalesce()

    # --- the rows stay on the host ------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A model's .cuda(), .half(), .share_memory() come here: the dtype counts, not the device.
        probe = fn(self.weight.detach().new_zeros(1))
        if probe.dtype != self.weight.dtype:
            self.weight.data = self.weight.data.to(probe.dtype)
            self.weight.grad = None
        if probe.device.type == "cpu" and probe.is_shared():
            share_(self.weight)
        return self

    def share_memory(self) -> Self:
        """Moves the rows into memory that other processes map; what sends the module does so, too.

        The memory is not torch's: `weight.is_shared()` is False, and what sends rows without their
        module (a state dict, by a queue) has torch move them out of it. Send `weight.clone()`.
        """
        share_(self.weight)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}


def _refuse(
    max_norm: float | None,
    scale_grad_by_freq: bool,
    sparse: bool,
    device: torch.device | str | None,
    weight: Tensor | None,
) -> None:
    if max_norm is not None or checked_bool("scale_grad_by_freq", scale_grad_by_freq):
        raise ValueError(
            f"max_norm={max_norm} and scale_grad_by_freq={scale_grad_by_freq} are not for rows in "
            "host memory: clip or scale the gathered rows"
        )
    if not checked_bool("sparse", sparse):
        raise ValueError("the gradient of rows in host memory is sparse: sparse=True")
    device = torch.device("cpu" if device is None else device) if weight is None else weight.device
    if device.type != "cpu":
        raise ValueError(f"the rows are in host memory, not on {device}")


def _checked_shape(num_embeddings: int, embedding_dim: int) -> tuple[int, int]:
    num_rows = checked_int("num_embeddings", num_embeddings, least=0)
    return num_rows, checked_int("embedding_dim", embedding_dim, least=0)


def _checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"dtype={dtype!r} is no torch.dtype that gradients have: torch.float32")
    return dtype


def _new_rows(shape: tuple[int, int], dtype: torch.dtype, shared: bool) -> Tensor:
    nbytes = prod(shape) * dtype.itemsize
    if nbytes > _MOST_NBYTES:  # sizes in the core would wrap around
        raise OSError(errno.ENOMEM, f"rows of shape {shape} of {dtype} take {nbytes} bytes")
    if shared:
        return new_shared(shape, dtype)
    return HostBuffer(nbytes).tensor(dtype, shape)


def _traced_leaf(module: HostEmbedding, proxy: Any) -> Tensor:
    # As torch's own modules are traced: torch.fx knows them by the name of torch.nn.
    path = proxy.tracer.path_of_module(module)
    traced: Tensor = proxy.tracer.create_proxy("call_module", path, (proxy,), {})
    return traced


def _all_gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks, one after another; ranks may have different numbers of them."""
    counts = [
        torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(counts, torch.tensor([len(rows)], device="cpu"), group=group)
    most = max(int(count) for count in counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])


# --- between processes ----------------------------------------------------------------------------


def _receive(
    kind: type[HostEmbedding], state: dict[str, Any], shared: SharedTensor, requires_grad: bool
) -> HostEmbedding:
    module = kind.__new__(kind)
    module.__setstate__(state)  # type: ignore[no-untyped-call]
    module.weight = torch.nn.Parameter(shared.tensor(), requires_grad=requires_grad)
    return module


def _send(module: HostEmbedding) -> tuple[Callable[..., HostEmbedding], tuple[Any, ...]]:
    shared = SharedTensor(module.weight)
    state = {**module.__getstate__(), "_parameters": {}}
    return _receive, (type(module), state, shared, module.weight.requires_grad)


ForkingPickler.register(HostEmbedding, _send)
