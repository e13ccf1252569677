"""Run scripts as fresh processes that need not import torch: forked from one process that has imported it.

Everything else is as in a process of its own: arguments, environment, folder, output, exit code; variables that a
library reads when it is imported excepted. The parent has computed nothing, and a child starts as clean as it is.
`accelerate launch` runs so too, and the processes that it starts: they are forked from the same parent, with the
environment that it gives them.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

IMPORTS = (
    "accelerate.commands.launch",
    "deepspeed",
    "drpo.api",
    "eval.comparing.compare",
    "eval.neurons.analyse",
    "reward_models.api",
    "reward_models.sources",
    "torch.distributed.run",
    "transformers.models.gpt_neox.modeling_gpt_neox",
)
STACKS_AFTER = 120
"Seconds after which a process that still runs writes where it is to a file."


def completed(
    command: list[str], cwd: Path, env: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `[python, script or -m module, arguments...]` to its end. Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("wb") as out_file, err.open("wb") as err_file:
            place = {"address": _address(), "stacks": folder}
            process = WarmProcess(command, str(cwd), env, out_file.fileno(), err_file.fileno(), place)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            for file in sorted(Path(folder).iterdir()):  # pytest shows them
                print(f"--- {file.name}", file.read_text(errors="replace"), sep="\n")
            raise
        finally:
            process.leave()
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
        return subprocess.CompletedProcess(command, code, *texts)


def started(
    command: list[str], cwd: Path, env: dict[str, str], out: IO | None, err: IO | int | None
) -> WarmProcess:
    """Start `[python, script or -m module, arguments...]`, which ends with its `WarmProcess` at the latest.

    Args:
        command: the process.
        cwd: its folder.
        env: its environment.
        out: the file of its output; None: a pipe, `stdout`.
        err: the file of its errors; None: a pipe, `stderr`; subprocess.STDOUT: where the output goes.
    """
    stacks = tempfile.TemporaryDirectory()
    pipes = [os.pipe() if file is None else None for file in (out, err)]
    numbers = [pipes[0][1] if pipes[0] else out.fileno()]
    if err == subprocess.STDOUT:
        numbers += numbers
    else:
        numbers.append(pipes[1][1] if pipes[1] else err.fileno())
    try:
        process = WarmProcess(
            command, str(cwd), env, *numbers, {"address": _address(), "stacks": stacks.name}
        )
    finally:
        for pipe in filter(None, pipes):
            os.close(pipe[1])
    process.folder = stacks  # removed with the process
    process.stdout, process.stderr = (open(pipe[0]) if pipe else None for pipe in pipes)
    return process


class WarmProcess:
    """A process forked from the parent, with what is used of `subprocess.Popen`; it ends with its user.

    `place` holds the `address` of the parent and the folder of the `stacks` of processes that hang.
    """

    stdout: IO[str] | None = None
    stderr: IO[str] | None = None
    folder: tempfile.TemporaryDirectory | None = None

    def __init__(
        self, command: list[str], cwd: str, env: dict[str, str], out: int, err: int, place: dict[str, str]
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(place["address"])
        request = {"argv": command[1:], "cwd": cwd, "env": env, "place": place}
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"], [out, err])
        self._answers = b""
        self.args, self.returncode = command, None
        self.pid = int(self._line(None))

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises TimeoutExpired."""
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Read what is left to be read, and wait for the end. Raises TimeoutExpired."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(file.read) if file else None for file in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            finally:
                self.leave()  # what still runs is killed, so that the files have an end
        return tuple(text.result() if text else None for text in texts)

    def leave(self) -> None:
        """Kill the process if it still runs."""
        self._connection.close()

    def _line(self, timeout: float | None) -> bytes:
        while b"\n" not in self._answers:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            received = self._connection.recv(100)
            assert received, "the parent of the tests' processes has ended"
            self._answers += received
        line, _, self._answers = self._answers.partition(b"\n")
        return line


def _address() -> str:
    """Return where the parent listens."""
    with _STARTING:
        return _parent()


_STARTING = threading.Lock()


@functools.cache
def _parent() -> str:
    """Start the parent, which ends with this process, and return where it listens."""
    folder = tempfile.mkdtemp()
    address = os.path.join(folder, "socket")
    parent = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE, text=True)
    atexit.register(parent.kill)
    assert "ready\n" in parent.stdout, "the parent of the tests' processes did not start"
    return address


# --- the parent -------------------------------------------------------------------------------------------


def _serve(address: str) -> None:
    for module in IMPORTS:
        importlib.import_module(module)
    _fill_caches()
    gc.freeze()  # children need not look through what is here, nor copy it
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps those that have answered
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
            connection.close()


def _fill_caches() -> None:
    """Compute what depends on the code alone: types and defaults of recipes, and transformers' old names of weights."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from drpo.api import OnlineRecipe, PreferenceRecipe, SFTRecipe
    from drpo.config import load_recipe
    from reward_models.api import RewardModelRecipe

    for recipe in (OnlineRecipe, PreferenceRecipe, RewardModelRecipe, SFTRecipe):
        load_recipe(recipe, None, [])
    get_checkpoint_conversion_mapping("gpt_neox")


def _answer(connection: socket.socket) -> None:
    """Fork the process that is asked for, send its id and its exit code, and leave; kill it if its user has left."""
    request, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not request.endswith(b"\n"):
        request += connection.recv(1 << 20)
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        connection.close()
        os.setsid()
        os.close(started)
        _become(**json.loads(request), files=files)
    os.close(started)
    os.read(ready, 1)  # ends when the child leads a process group, which a kill is sent to
    pidfd = os.pidfd_open(child)
    connection.sendall(f"{child}\n".encode())
    readable, _, _ = select.select([pidfd, connection], [], [])
    if pidfd not in readable:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _become(argv: list[str], cwd: str, env: dict[str, str], place: dict[str, str], files: list[int]) -> None:
    """Turn this forked process into a run of the script or module, and leave."""
    code = 1
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        for file, number in zip(files, (1, 2), strict=True):
            os.dup2(file, number)
            os.close(file)
        if env.get("PYTHONUNBUFFERED"):
            sys.stdout.reconfigure(write_through=True)
        sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stacks = Path(place["stacks"], f"stacks of {os.getpid()}").open("w")
        faulthandler.dump_traceback_later(STACKS_AFTER, file=stacks)
        _launch_warm(place)
        if argv[0] == "-m":
            sys.argv, sys.path[0] = argv[1:], cwd
            sys.modules.pop(argv[1], None)  # runpy warns of a module that is there already
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
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


def _launch_warm(place: dict[str, str]) -> None:
    """Let the launcher of this process start its workers from the same parent, too."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def start(handler: SubprocessHandler, args: tuple, env: dict[str, str]) -> WarmProcess:
        out, err = (
            file.fileno() if file else number for file, number in ((handler._stdout, 1), (handler._stderr, 2))
        )
        python = [word for word in args if word != "-u"]
        return WarmProcess(python, os.getcwd(), env, out, err, place)

    SubprocessHandler._popen = start


if __name__ == "__main__":
    _serve(sys.argv[1])
