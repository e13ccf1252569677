"""Weights over a socket: the trainer listens, and the workers of rollout servers fetch them, one tensor at a time.

    worker -> trainer    the listener's token
    trainer -> worker    for each weight: the number of the following bytes, in 8 bytes, big-endian; the weight by its
                         name in the format of safetensors
                         at the end: a number of 0

The trainer holds one weight in whole, a worker one or two. Whoever has the token gets the weights; nothing but tensors
is read from the socket.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType

import torch
from safetensors.torch import load, save
from torch import Tensor

LENGTH = 8
PATIENCE = 1.0
"Seconds between two looks at whether the workers are still expected."
INTRODUCTION = 5.0
"Seconds that a connection has to give its token."


class WeightListener:
    """A port at which workers ask for weights.

    with WeightListener(address) as listener:
        connections = listener.accept(number of workers, ...)
    """

    def __init__(self, address: str) -> None:
        """Listen at `address`, on a free port; raise OSError when this machine does not have that address."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family)
        self.address: str = address
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._connections: list[socket.socket] = []

    def __enter__(self) -> WeightListener:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in (*self._connections, self._socket):
            connection.close()

    def accept(self, number: int, timeout: float, check: Callable[[], None]) -> list[socket.socket]:
        """Wait for `number` workers that know the token; others are turned away.

        `check` is called every second and may raise what makes waiting useless. Raises TimeoutError after `timeout`
        seconds, which sending to a worker may also take.
        """
        deadline = time.monotonic() + timeout
        self._socket.settimeout(PATIENCE)
        while len(self._connections) < number:
            check()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{len(self._connections)} of {number} workers asked for the weights within {timeout:.0f} s"
                )
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            connection.settimeout(min(INTRODUCTION, timeout))
            if self._knows_token(connection):
                connection.settimeout(timeout)
                self._connections.append(connection)
            else:
                connection.close()
        return self._connections

    def _knows_token(self, connection: socket.socket) -> bool:
        try:
            return secrets.compare_digest(_read(connection, len(self.token)), self.token.encode())
        except OSError:
            return False


def send_weights(
    connections: Sequence[socket.socket], weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Send weights, floating ones in `dtype`, to every connection."""
    for name, weight in weights:
        rounded = weight.to(dtype) if weight.is_floating_point() else weight
        frame = save({name: rounded.cpu().contiguous()})
        for connection in connections:
            connection.sendall(len(frame).to_bytes(LENGTH, "big"))
            connection.sendall(frame)
    for connection in connections:
        connection.sendall(bytes(LENGTH))


def fetch_weights(address: str, port: int, token: str, timeout: float) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a listener sends; raise ConnectionError when it stops before the end."""
    with socket.create_connection((address, port), timeout) as connection:
        connection.sendall(token.encode())
        while length := int.from_bytes(_read(connection, LENGTH), "big"):
            yield from load(bytes(_read(connection, length))).items()


def _read(connection: socket.socket, length: int) -> bytearray:
    """Read so many bytes."""
    data = bytearray(length)
    view = memoryview(data)
    while view:
        if (size := connection.recv_into(view)) == 0:
            raise ConnectionError("the other side closed the connection before all weights were there")
        view = view[size:]
    return data
