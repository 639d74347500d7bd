"""A GPU that is host memory: torch's functions tell which tensors it has, and do not mix them.

In the mode, tensors made for `cuda` are on the host but say they are on the GPU, as does what is
computed from them; to compute with these and with what was made on the host raises what CUDA would.
Nothing but where tensors are is pretended, so what is computed is right.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dataeff.memory.stream_order import StreamOrder
from dataeff.rgnn import structure

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
MIXING = {"copy_", "to", "cpu", "__get__", "__set__", "backward"}
MIXING |= {"_has_compatible_shallow_copy_type"}


class PretendedGpu(TorchFunctionMode):
    def __init__(self, monkeypatch):
        super().__init__()
        self.places = {}  # by storage, which is kept, so that no other gets its address
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 36, 1 << 37))
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(structure, "StreamOrder", lambda device: StreamOrder(HOST))

    def place(self, tensor):
        key, _ = _memory(tensor)
        return self.places.get(key, (None, None))[0]

    def put(self, result, place, only_new=False):
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                key, memory = _memory(tensor)
                if not (only_new and key in self.places):
                    self.places[key] = place, memory
        return result

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func == Tensor.device.__get__:
            return self.place(given[0]) or HOST
        if func == Tensor.is_cuda.__get__:
            return self.place(given[0]) == GPU
        name = getattr(func, "__name__", "")
        if func is torch.device or name in ("device", "_parse_to"):
            return func(*args, **kwargs)
        asked = [d for d in tree_leaves((args, kwargs)) if isinstance(d, torch.device | str)]
        asked = [torch.device(d) for d in asked if str(d).partition(":")[0] in ("cuda", "cpu")]
        if name == "to" and len(given) > 1:
            asked = [self.place(given[1]) or HOST]
        if name in ("cpu", "cuda"):
            asked = [HOST if name == "cpu" else GPU]
        places = {self.place(t) for t in given if t.dim()}
        if name not in MIXING and {GPU, HOST} <= places:
            index_on_host = func in INDEXING and self.place(given[0]) == GPU
            if not index_on_host:
                raise RuntimeError(f"{name}: tensors on {GPU} and on {HOST}")
        args, kwargs = _on_host((args, kwargs))
        result = func(*args, **kwargs)
        if asked:
            place = GPU if asked[0].type == "cuda" else HOST
            if given and _memory(result)[0] == _memory(given[0])[0]:
                if place == (self.place(given[0]) or HOST):
                    return result
                result = result.clone()
            return self.put(result, place)
        if GPU in {self.place(t) for t in given}:
            return self.put(result, GPU, only_new=True)
        if not given and isinstance(result, Tensor):
            return self.put(result, HOST, only_new=True)
        return self.put(result, HOST, only_new=True) if HOST in places else result


def _memory(tensor):
    if tensor.layout != torch.strided:
        return id(tensor), tensor
    storage = tensor.untyped_storage()
    return storage._cdata, storage


def _on_host(values):
    values = tree_map_only(torch.device, lambda d: HOST if d.type == "cuda" else d, values)
    return tree_map_only(str, lambda s: "cpu" if s.partition(":")[0] == "cuda" else s, values)
