"""Programs in Python, started as quickly as a process is forked.

`python` stands in for `subprocess.run([sys.executable, ...])` where what is claimed is not how a
process starts: it has a process of its own, with its own arguments, environment, folder, files and
exit code, and torch, Lightning and this package are loaded (see `_processes.py`). Seconds of
processor time are saved by each. What measures memory, or what is imported, starts Python itself.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import traceback
from multiprocessing import forkserver, reduction, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from _processes import context


class _Files:
    """The first three files of a process, on their way to it."""

    def __init__(self, *files: int) -> None:
        self.files = files

    def __reduce__(self):
        return _Files._received, tuple(map(reduction.DupFd, self.files))

    @classmethod
    def _received(cls, *files):
        return cls(*(file.detach() for file in files))


class _Started:
    """The process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, *args) -> None:
        self._process = context.Process(target=_be, args=args)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        self._process.join(0)
        return self.returncode

    def wait(self, timeout=None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def kill(self) -> None:
        self._process.kill()


def start(arguments, files, *, env=None, cwd=None, terminal=False):
    """Start what `python ARGUMENTS` would, and return the process.

    Args:
        arguments: As after `python`: `-c` and lines, `-m` and a module, or a script; then its own.
        files: The numbers of the files that it has as stdin, stdout and stderr.
        env: Its environment, as a whole; that of this process by default.
        cwd: Its folder.
        terminal: stdin is a terminal, whose Ctrl+C is for it.
    """
    arguments = [os.fspath(argument) for argument in arguments]
    environment = {**(os.environ if env is None else env)}
    return _Started(arguments, _Files(*files), environment, os.fspath(cwd or Path.cwd()), terminal)


def python(*arguments, env=None, cwd=None, timeout=120.0, together=False):
    """Run what `python ARGUMENTS` would, and return its exit code and what it printed.

    Args:
        arguments: As those of `start`.
        env: As there.
        cwd: As there.
        timeout: Seconds; what takes longer is ended and fails the test.
        together: stderr goes where stdout goes.
    """
    with (
        Path(os.devnull).open() as nothing,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        files = (nothing.fileno(), out.fileno(), (out if together else err).fileno())
        process = start(arguments, files, env=env, cwd=cwd)
        late = process.wait(timeout) is None
        if late:
            process.kill()
            process.wait()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace").replace("\r\n", "\n"))
        if late:
            raise subprocess.TimeoutExpired(arguments, timeout, *said)
        return subprocess.CompletedProcess(arguments, process.returncode, *said)


def _be(arguments, files, environment, folder, terminal):
    """In the new process: become the program."""
    if terminal:
        os.setsid()
        fcntl.ioctl(files.files[0], termios.TIOCSCTTY, 0)
    for number, file in enumerate(files.files):
        os.dup2(file, number)
    for file in set(files.files) - {0, 1, 2}:
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # What this one forks from a server of its own comes from the same one.
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running
    _open_again(environment)
    _read_environment_again(environment)
    code = 1
    try:
        _run(arguments)
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        _end(None)
    except BaseException:
        traceback.print_exc()
    _end(code)


def _run(arguments):
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    first = arguments[0]
    if first == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[:0] = ["", *filter(None, paths)]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv = arguments[1:]
        sys.path[:0] = [str(Path.cwd()), *filter(None, paths)]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[:0] = [str(Path(first).resolve().parent), *filter(None, paths)]
        runpy.run_path(first, run_name="__main__")


def _open_again(environment):
    """Open stdin, stdout and stderr as a Python with this environment does."""
    encoding, _, errors = environment.get("PYTHONIOENCODING", "utf-8").partition(":")
    settings = {"encoding": encoding, "closefd": False}
    sys.stdin = os.fdopen(0, **settings)
    for name, number in (("stdout", 1), ("stderr", 2)):
        wrong = "backslashreplace" if number == 2 else errors or "strict"
        lines = number == 2 or os.isatty(number)
        file = os.fdopen(number, "w", buffering=1 if lines else -1, errors=wrong, **settings)
        if environment.get("PYTHONUNBUFFERED"):
            file.reconfigure(write_through=True)
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    sys.__stdin__ = sys.stdin


def _read_environment_again(environment):
    """Let what was read when a library was imported be what this process would read."""
    random.seed()
    for name in ("numpy", "torch", "fsspec.config"):
        assert name in sys.modules, f"{name} is not loaded in the server of _processes.py"
    import fsspec.config
    import numpy as np
    import torch

    np.random.seed()  # noqa: NPY002 - Its state is otherwise that of every other process.
    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf, environment)
    if environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))


def _end(code: int | None) -> NoReturn:
    """End as the interpreter does: wait for threads, then what was registered; None is Ctrl+C."""
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError:
            code = code or 120
    if code is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)
