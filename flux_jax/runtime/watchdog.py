"""Several processes that make up one mesh end together: none waits for a sum that another will never send.

In: the coordinator's HOST:PORT, and how many processes there are. Out: a connection from each process to the first, on
the next port up. When one closes without a goodbye, its process has gone: every other one says so in one sentence and
ends. JAX's own heartbeat notices too, but after a minute, and with a stack trace.
"""

import os
import socket
import threading
import time
from typing import NoReturn

from flux_jax.errors import UserError
from flux_jax.runtime import stopping
from flux_jax.runtime.console import say

PATIENCE = 60  # seconds until processes must have found each other
GOODBYE = b"."
_speaking = threading.Lock()
_connections: list[socket.socket] = []  # a process joins one run in its life


def stop() -> NoReturn:
    """Ends this process with the one message; an ordinary exit would wait for the process that is gone."""
    _speaking.acquire()  # for good: whoever comes second says nothing
    if number := stopping.stopped_by():  # Ctrl-C reaches all of them
        stopping.leave(number)
    say("Another process of this run has stopped, and with it this one; start all again.")
    os._exit(1)


def several() -> bool:
    """Whether this process is one of several."""
    return bool(_connections)


def join(coordinator: str, processes: int, process: int) -> None:
    """Makes this process number `process` of `processes`, which find each other at HOST:PORT of the first: from here on
    JAX sees the devices of all. Call it before JAX is used, and `leave` before an ordinary end. UserError where they do
    not find each other."""
    import jax

    _connect_all(coordinator, processes, process)
    jax.distributed.initialize(coordinator, processes, process)


def _connect_all(coordinator: str, processes: int, process: int) -> None:
    """Connects this process to the first, and watches from here on."""
    host, _, port = coordinator.rpartition(":")
    try:
        address = host, int(port) + 1
        _connections.extend(_accept(address, processes - 1) if process == 0 else [_connect(address)])
    except (OSError, ValueError) as error:
        raise UserError(f"Process {process} of {processes} found no others at {coordinator}: {error}.") from error
    for connection in _connections:
        threading.Thread(target=_watch, args=(connection,), daemon=True).start()


def leave() -> None:
    """The goodbye, before an ordinary end."""
    for connection in _connections:
        connection.sendall(GOODBYE)


def _accept(address: tuple[str, int], count: int) -> list[socket.socket]:
    with socket.create_server(address) as server:
        server.settimeout(PATIENCE)
        found = [server.accept()[0] for _ in range(count)]
    for connection in found:
        connection.settimeout(None)
    return found


def _connect(address: tuple[str, int]) -> socket.socket:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection(address, timeout=PATIENCE)
        except ConnectionRefusedError:  # the first process is not there yet
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            connection.settimeout(None)
            return connection


def _watch(connection: socket.socket) -> None:
    try:
        received = connection.recv(1)
    except OSError:
        received = b""
    if received != GOODBYE:
        stop()
