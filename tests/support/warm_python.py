"""Run scripts as fresh processes that need not import torch: forked from one process that has imported it.

Everything else is as in a process of its own: arguments, environment, folder, output, exit code. The parent has
computed nothing, so it has no threads, and a child starts as clean as the parent is.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

IMPORTS = ("drpo.api", "reward_models.api", "eval.comparing.compare", "eval.neurons.analyse")


def completed(
    command: list[str], cwd: Path, env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `[python, script, arguments...]` to its end. Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder, _connection() as connection:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {"argv": command[1:], "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
        connection.settimeout(timeout)
        connection.sendall(json.dumps(request).encode() + b"\n")
        try:
            answer = connection.makefile().readline()
        except TimeoutError:
            raise subprocess.TimeoutExpired(command, timeout, out.read_bytes(), err.read_bytes()) from None
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
        return subprocess.CompletedProcess(command, int(answer), *texts)


@functools.cache
def _address() -> str:
    """Where the parent listens; it is started at the first call and ends with this process."""
    folder = tempfile.mkdtemp()
    address = os.path.join(folder, "socket")
    parent = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE, text=True)
    atexit.register(parent.kill)
    assert parent.stdout.readline() == "ready\n", "the parent of the tests' processes did not start"
    return address


def _connection() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_address())
    return connection


# --- the parent -------------------------------------------------------------------------------------------


def _serve(address: str) -> None:
    for module in IMPORTS:
        __import__(module)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                request = json.loads(connection.makefile().readline())
                child = os.fork()
                if child == 0:
                    server.close()
                    connection.close()
                    _become(**request)
                connection.sendall(f"{_exit_code(child, connection)}\n".encode())


def _exit_code(child: int, connection: socket.socket) -> int:
    """Wait for the child; kill it when whoever asked for it has given up."""
    import select

    pidfd = os.pidfd_open(child)
    readable, _, _ = select.select([pidfd, connection], [], [])
    if pidfd not in readable:
        os.kill(child, signal.SIGKILL)
    os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(argv: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Turn this forked process into a run of the script, and leave."""
    code = 1
    try:
        os.setsid()
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = argv
        sys.path[0] = os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
