"""What a Triton kernel reads and writes, program by program, as its interpreter runs it.

The interpreter runs programs one after another, and a GPU runs them at once, in any order: what two
programs do to one element is a race, unless both only read. Between the threads of one program
nothing orders a store and a later load of global memory either.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class WrongAccess(AssertionError):
    """A kernel touched what is not its to touch."""


@dataclass
class Access:
    """One load or store: the elements of the lanes that the mask lets through."""

    program: int
    addresses: np.ndarray
    itemsize: int


class Launch:
    """One kernel over its grid.

    Attributes:
        name: of the kernel.
        extents: name of each tensor it was given -> first address, one past its last.
    """

    def __init__(self, name, tensors):
        self.name = name
        self.extents = {}
        for argument, tensor in tensors.items():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            length = (last + 1) * tensor.element_size() if tensor.numel() else 0
            self.extents[argument] = (tensor.data_ptr(), tensor.data_ptr() + length)
        self.loads, self.stores = [], []

    def load(self, access):
        self.inside(access, "reads")
        for stored in self.stores:
            if stored.program == access.program:
                both = np.intersect1d(stored.addresses, access.addresses)
                self.refuse(both, f"program {access.program} loads what it has stored")
        self.loads.append(access)

    def store(self, access):
        self.inside(access, "writes")
        found, counts = np.unique(access.addresses, return_counts=True)
        self.refuse(found[counts > 1], f"two lanes of program {access.program} write")
        self.stores.append(access)

    def inside(self, access, verb):
        fits = np.zeros(access.addresses.shape, bool)
        for first, end in self.extents.values():
            fits |= (access.addresses >= first) & (access.addresses + access.itemsize <= end)
        self.refuse(access.addresses[~fits], f"program {access.program} {verb} outside")

    def end(self):
        """Look at what different programs did to the same elements."""
        writes, writers = self.joined(self.stores)
        order = np.lexsort((writers, writes))
        writes, writers = writes[order], writers[order]
        twice = (writes[1:] == writes[:-1]) & (writers[1:] != writers[:-1])
        self.refuse(writes[1:][twice], "two programs write")
        reads, readers = self.joined(self.loads)
        at = np.searchsorted(writes, reads).clip(max=max(len(writes) - 1, 0))
        if len(writes):
            other = (writes[at] == reads) & (writers[at] != readers)
            self.refuse(reads[other], "one program reads what another writes:")

    @staticmethod
    def joined(accesses):
        """Every address of theirs, and the program that each belongs to."""
        if not accesses:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        lengths = [len(access.addresses) for access in accesses]
        programs = np.repeat([access.program for access in accesses], lengths)
        return np.concatenate([access.addresses for access in accesses]), programs

    def refuse(self, addresses, what):
        if len(addresses) == 0:
            return
        address = int(addresses[0])
        named = [
            f"{argument} + {address - first} bytes (of {end - first})"
            for argument, (first, end) in self.extents.items()
            if first <= address < end
        ]
        nearest = min(self.extents.items(), key=lambda item: abs(item[1][0] - address))
        where = " = ".join(named) or f"{address - nearest[1][0]} bytes from {nearest[0]}"
        raise WrongAccess(f"{self.name}: {what} {where}")


@contextlib.contextmanager
def watched_accesses():
    """Refuse wrong accesses of the kernels that are interpreted; yields the names of those seen."""
    names, running = [], []
    call = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_call(self, *args, **kwargs):
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if hasattr(value, "data_ptr")}
        names.append(self.fn.__name__)
        running[:] = [Launch(self.fn.__name__, tensors)]
        call(self, *args, **kwargs)
        running.pop().end()

    def access(builder, pointers, mask):
        x, y, z = builder.grid_idx
        program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        itemsize = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        return Access(program, addresses, itemsize)

    def watched_load(self, ptrs, mask, *rest):
        running[-1].load(access(self, ptrs, mask))
        return load(self, ptrs, mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        running[-1].store(access(self, ptrs, mask))
        return store(self, ptrs, value, mask, *rest)

    GridExecutor.__call__ = watched_call
    InterpreterBuilder.create_masked_load = watched_load
    InterpreterBuilder.create_masked_store = watched_store
    try:
        yield names
    finally:
        GridExecutor.__call__ = call
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
