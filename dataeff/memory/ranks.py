"""One copy of tensors for all ranks of a machine, whoever started them."""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dataeff.memory.shared import attach_shared, share_, shared_buffer

TIMEOUT_S = 600.0
MAX_FDS = 253  # what Linux passes in one message


def share_among_ranks(
    make: Callable[[], Tensor],
    group: dist.ProcessGroup | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Tensor:
    """The tensor that the first rank of each machine makes, in memory that its other ranks map.

    Every rank of the group calls it (under torchrun, mpirun or any other launcher). The first rank
    of each machine runs `make` and passes the descriptor of the memory to the others over a unix
    socket, so a machine holds one copy however many ranks it runs.

    Args:
        make: gives the tensor, in host memory; run by one rank of each machine. What
            `dataeff.memory.new_shared` gave is not copied again.
        group: default: all ranks.
        timeout_s: the longest wait for the first rank's `make`, and for any single rank.

    Returns:
        The tensor, the same memory in every rank of the machine; without initialised
        `torch.distributed`, what `make` gives, in shared memory.

    Raises:
        RuntimeError: `make` failed in the machine's first rank (that rank raises what it was).
        TimeoutError: a rank of this machine did not come for the memory, or was not given it.
        PermissionError: ranks of this machine run as different users.
    """
    return share_all_among_ranks(lambda: [make()], group, timeout_s)[0]


def share_all_among_ranks(
    make: Callable[[], Sequence[Tensor]],
    group: dist.ProcessGroup | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Tensor]:
    """The tensors that the first rank of each machine makes; `share_among_ranks` of several."""
    if not (dist.is_available() and dist.is_initialized()):
        return [share_(x) for x in make()]
    rank = dist.get_rank(group)
    with _listening_socket() as listener:
        offers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(offers, (_machine(), listener.getsockname()), group=group)
        here = [other for other, (machine, _) in enumerate(offers) if machine == _machine()]
        if rank == here[0]:
            return _make_and_send(make, listener, len(here) - 1, timeout_s)
    return _receive_from(offers[here[0]][1], here[0], timeout_s)


def _machine() -> tuple[str, int]:
    # Ranks in containers of one host have one boot id but sockets of their own.
    with open("/proc/sys/kernel/random/boot_id") as boot_id:
        return boot_id.read().strip(), os.stat("/proc/self/ns/net").st_ino


def _listening_socket() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # An abstract name: no file that could be left behind.
    listener.bind(f"\0dataeff-{os.getpid()}-{secrets.token_hex(8)}")
    listener.listen(128)
    return listener


def _make_and_send(
    make: Callable[[], Sequence[Tensor]],
    listener: socket.socket,
    num_others: int,
    timeout_s: float,
) -> list[Tensor]:
    try:
        tensors = [share_(x) for x in make()]
    except BaseException as error:
        _answer_all(listener, num_others, timeout_s, f"{type(error).__name__}: {error}", [])
        raise
    _answer_all(listener, num_others, timeout_s, "", tensors)
    return tensors


def _answer_all(
    listener: socket.socket,
    num_others: int,
    timeout_s: float,
    failure: str,
    tensors: Sequence[Tensor],
) -> None:
    buffers = [shared_buffer(x) for x in tensors]  # none for a tensor without elements
    layouts = [
        (x.dtype, tuple(x.shape), x.stride(), x.storage_offset(), buffer and buffer.nbytes)
        for x, buffer in zip(tensors, buffers, strict=True)
    ]
    message = pickle.dumps((failure, layouts))
    fds = [buffer.fd for buffer in buffers if buffer is not None]
    deadline = time.monotonic() + timeout_s
    answered = 0
    while answered < num_others:
        listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            raise TimeoutError(
                f"{num_others - answered} of this machine's {num_others} other ranks did not come "
                f"for the shared tensor within {timeout_s:g} s"
            ) from None
        with connection:
            # Abstract sockets have no permissions: whoever runs as another user gets nothing.
            if _peer_uid(connection) != os.getuid():
                continue
            socket.send_fds(connection, [struct.pack("<q", len(message)) + message], fds)
            answered += 1


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def _receive_from(address: bytes, leader: int, timeout_s: float) -> list[Tensor]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(address)
        if _peer_uid(connection) != os.getuid():
            raise PermissionError(f"rank {leader} of this machine runs as another user")
        try:
            message, fds = _read_answer(connection)
        except TimeoutError:
            raise TimeoutError(
                f"rank {leader} of this machine did not share its tensor within {timeout_s:g} s"
            ) from None
    try:
        failure, layouts = pickle.loads(message) if message else ("it ended", [])
        if failure:
            raise RuntimeError(
                f"rank {leader}, which makes the tensor for this machine, failed: {failure}"
            )
        left = iter(fds)
        return [_mapped(left, *layout) for layout in layouts]
    finally:
        for fd in fds:
            os.close(fd)


def _mapped(
    fds: Iterator[int],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    nbytes: int | None,
) -> Tensor:
    if nbytes is None:
        return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
    return attach_shared(next(fds), nbytes).tensor(dtype).as_strided(shape, stride, offset)


def _read_answer(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The message, empty when the sender ended before it was whole, and its descriptors."""
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, MAX_FDS)
    while len(data) < 8 or len(data) < 8 + struct.unpack("<q", data[:8])[0]:
        more = connection.recv(1 << 16)
        if not more:
            return b"", list(fds)
        data += more
    return data[8:], list(fds)
