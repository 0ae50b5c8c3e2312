"""Lets ckpt-chaos see what it can't see by itself, in the process that it is to end.

It counts audit events of Python and the calls of `open` and `torch.save`. So it misses what is named
relative to an open folder (`dir_fd`, which this package uses everywhere), links, exchanges of two names,
and every single write to a descriptor. Here each of them becomes an event of its own before it happens; a
write can be torn: half of its bytes reach the file, and the process ends. What the program does is
not changed: the same calls go to the kernel, with the same arguments.

In the mode `unsynced`, which takes back what was never flushed, a folder that is renamed takes its files
with it, and a file may be flushed by any descriptor.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from ckpt_chaos import inject

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EXCHANGE = 2
MADE_UP = re.compile(r"[0-9a-f]{32}|\d{4}-\d\d-\d\d\+\d\d-\d\d-\d\d\+\d+")
_real = {
    name: getattr(os, name)
    for name in (
        "open",
        *("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink"),
        *("truncate", "ftruncate", "write", "pwrite", "writev", "pwritev", "fsync"),
    )
    if hasattr(os, name)
}


def _process_of(rank: str) -> Path:
    return Path(inject._state["watch"]).with_name(f"rank{rank}.pid")


def install() -> None:
    """See everything from now on; ckpt-chaos must be armed."""
    _process_of(os.environ.get("RANK", "0")).write_text(str(os.getpid()))
    # In the mode "unsynced" ckpt-chaos has put functions of its own in place of some.
    _real.update({name: getattr(os, name) for name in _real})
    for name in ("mkdir", "rmdir", "unlink", "remove"):
        setattr(os, name, _names_one(name))
    for name in ("rename", "replace", "link"):
        setattr(os, name, _names_two(name))
    for name in ("truncate", "ftruncate"):
        setattr(os, name, _cuts(name))
    for name in ("write", "pwrite", "writev", "pwritev"):
        if name in _real:
            setattr(os, name, _writes(name))
    os.open, os.symlink, os.fsync = _open, _symlink, _fsync
    builtins.open = io.open = _stream_of(builtins.open)
    inject._event = _counted(inject._event)


def see_exchanges(module: object) -> None:
    """See the exchanges of a module that calls `renameat2` by itself."""
    found = module._renameat2()

    def exchange(*arguments: object) -> int:
        one, other = (os.fsdecode(arguments[place]) for place in (1, 3))
        _see("exchange", one)
        result: int = found(*arguments)
        if result == 0 and arguments[4] == _EXCHANGE:
            _move(one, other, and_back=True)
        return result

    if found is not None:
        module._renameat2 = lambda: exchange


def _counted(event: Callable[[str, object, bool], bool]) -> Callable[[str, object, bool], bool]:
    # Files are written and removed in the background, too, and ckpt-chaos counts without a lock.
    lock = threading.RLock()

    def counted(kind: str, path: os.PathLike[str], tornable: bool) -> bool:
        # A name that a run makes up must not make ckpt-chaos doubt that this is the event it planned.
        path = MADE_UP.sub("*", os.fspath(path))
        with lock:
            due = inject._state["crash_at"] == inject._state["n"] + 1
            if due and not inject._state["quiet"] and (victim := os.environ.get("CHAOS_VICTIM")):
                # Another rank ends at this event, and this one goes on.
                inject._state["crash_at"] = None
                os.kill(int(_process_of(victim).read_text()), signal.SIGKILL)
            return event(kind, path, tornable)

    return counted


def _see(kind: str, path: str, *, tornable: bool = False) -> bool:
    """Tell ckpt-chaos; return whether what follows must be torn."""
    return inject._under(path) and inject._event(kind, path, tornable)


def _name_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - of a name, not of a Path


def _full(path: str | os.PathLike[str], folder: int | None) -> str:
    return os.path.join(_name_of(folder), path) if folder is not None else os.fspath(path)  # noqa: PTH118


def _open(
    path: str | os.PathLike[str], flags: int, mode: int = 0o777, *, dir_fd: int | None = None
) -> int:
    if flags & _WRITING:
        full = _full(path, dir_fd)
        if dir_fd is not None:
            _see("open", full)
        if inject._state["unsynced"] and inject._under(full) and not inject._state["quiet"]:
            inject._note_open_for_write(inject._norm(full))
    return _real["open"](path, flags, mode, dir_fd=dir_fd)


def _names_one(name: str) -> Callable[..., None]:
    def call(path: str, *arguments: int, dir_fd: int | None = None, **more: int) -> None:
        if dir_fd is not None:
            kind = "os.remove" if name == "unlink" else f"os.{name}"
            _see(kind, _full(path, dir_fd))
        _real[name](path, *arguments, dir_fd=dir_fd, **more)

    return call


def _names_two(name: str) -> Callable[..., None]:
    def call(
        source: str,
        target: str,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        **more: bool,
    ) -> None:
        before, after = _full(source, src_dir_fd), _full(target, dst_dir_fd)
        # A rename without open folders is one that ckpt-chaos sees.
        if name == "link" or src_dir_fd is not None or dst_dir_fd is not None:
            _see("os.link" if name == "link" else "os.rename", before)
        _real[name](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **more)
        if name != "link":
            _move(before, after)

    return call


def _symlink(source: str, target: str, *arguments: bool, dir_fd: int | None = None) -> None:
    _see("os.symlink", _full(target, dir_fd))
    _real["symlink"](source, target, *arguments, dir_fd=dir_fd)


def _cuts(name: str) -> Callable[..., None]:
    def call(file: int | str, length: int) -> None:
        if not inject._state["quiet"]:
            _see("truncate", _name_of(file) if isinstance(file, int) else os.fspath(file))
        _real[name](file, length)

    return call


def _writes(name: str) -> Callable[..., int]:
    def call(descriptor: int, data: object, *place: int) -> int:
        if _see(name, _name_of(descriptor), tornable=True):
            whole = b"".join(data) if "v" in name else memoryview(data).cast("B")
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            # Half a block is nothing that can be written past the page cache.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
            half = whole[: len(whole) // 2]
            if place:
                _real["pwrite"](descriptor, half, place[0])
            else:
                _real["write"](descriptor, half)
            os._exit(137)
        return _real[name](descriptor, data, *place)

    return call


class _Seen(io.FileIO):
    """A file whose writes are seen."""

    def write(self, data: bytes) -> int:
        """Write, if only the first half."""
        if _see("write", _name_of(self.fileno()), tornable=True):
            super().write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            os._exit(137)
        return super().write(data)


def _stream_of(real: Callable[..., io.IOBase]) -> Callable[..., io.IOBase]:
    def call(file: object, mode: str = "r", *arguments: object, **more: object) -> io.IOBase:
        if not isinstance(file, int) or not set(mode) & set("wax+"):
            return real(file, mode, *arguments, **more)
        # Opened by descriptor: ckpt-chaos looks only at paths.
        names = ("buffering", "encoding", "errors", "newline", "closefd", "opener")
        given = {**dict(zip(names, arguments, strict=False)), **more}
        closefd = bool(given.get("closefd", True))
        raw = _Seen(file, mode.replace("b", "").replace("t", ""), closefd=closefd)
        if given.get("buffering", -1) == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, given.get("encoding"), newline=given.get("newline"))

    return call


def _fsync(descriptor: int) -> None:
    if inject._state["unsynced"]:
        inject._state["fd_path"][descriptor] = inject._norm(_name_of(descriptor))
    _real["fsync"](descriptor)


def _move(source: str, target: str, *, and_back: bool = False) -> None:
    """Let what was not flushed below a name go with it, and lose its bytes."""
    dirty: set[str] = inject._state["dirty"]
    one, other = inject._norm(source), inject._norm(target)
    ways = [(one, other), (other, one)] if and_back else [(one, other)]
    moved = {
        path: there + path[len(here) :]
        for here, there in ways
        for path in dirty
        if path == here or path.startswith(here + os.sep)
    }
    dirty -= set(moved)
    dirty |= set(moved.values())
    inject._state["zero"] |= set(moved.values())
