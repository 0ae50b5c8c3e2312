"""Filesystems that lack what local ones have: a folder, mounted through FUSE, that refuses some operations.

    python tests/harness/_fuse.py FOLDER MOUNTPOINT REFUSED...

REFUSED are of `locks`, `links`, `exchange`, `direct`, `fsyncdir`, `close`.
"""

# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH211

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *refused: str) -> Iterator[Path]:
    """Give a folder in which some operations are refused; skip the test where none can be mounted."""
    try:
        importlib.import_module("mfusepy")
    except (ImportError, OSError) as error:
        pytest.skip(f"needs mfusepy and libfuse: {error}")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse")
    behind, place = folder / "behind", folder / "mounted"
    behind.mkdir(exist_ok=True)
    place.mkdir(exist_ok=True)
    with subprocess.Popen([sys.executable, __file__, behind, place, *refused]) as server:
        try:
            deadline = time.monotonic() + 60
            while not place.is_mount():
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.skip("FUSE can't mount a filesystem here")
                time.sleep(0.02)
            yield place
        finally:
            subprocess.run(["umount", "--lazy", place], check=False)
            server.kill()


def _serve(folder: str, place: str, refused: set[str]) -> None:
    import mfusepy

    def refuse(what: str, number: int) -> None:
        if what in refused:
            raise mfusepy.FuseOSError(number)

    class Files(mfusepy.Operations):
        use_ns = True

        def __init__(self) -> None:
            self.written: set[int] = set()

        def getattr(self, path, fh=None):
            found = os.fstat(fh) if fh is not None else os.lstat(folder + path)
            names = ("mode", "nlink", "uid", "gid", "size", "blocks", "ino")
            times = {
                f"st_{name}": getattr(found, f"st_{name}_ns")
                for name in ("atime", "mtime", "ctime")
            }
            return {**{f"st_{name}": getattr(found, f"st_{name}") for name in names}, **times}

        def readdir(self, path, fh):
            return [".", "..", *os.listdir(folder + path)]

        def open(self, path, flags):
            if flags & os.O_DIRECT:
                refuse("direct", errno.EINVAL)
            return os.open(folder + path, flags & ~os.O_DIRECT)

        def create(self, path, mode, fi=None):
            return os.open(folder + path, os.O_RDWR | os.O_CREAT, mode)

        def read(self, path, size, offset, fh):
            return os.pread(fh, size, offset)

        def write(self, path, data, offset, fh):
            self.written.add(fh)
            return os.pwrite(fh, data, offset)

        def truncate(self, path, length, fh=None):
            os.truncate(folder + path, length)

        def flush(self, path, fh):
            # What a server says of writes that were put off comes when a file is closed.
            if fh in self.written and path.endswith((".ckpt", ".yaml")):
                refuse("close", errno.EIO)

        def release(self, path, fh):
            self.written.discard(fh)
            os.close(fh)

        def fsync(self, path, datasync, fh):
            os.fsync(fh)

        def fsyncdir(self, path, datasync, fh):
            refuse("fsyncdir", errno.EINVAL)

        def unlink(self, path):
            os.unlink(folder + path)

        def mkdir(self, path, mode):
            os.mkdir(folder + path, mode)

        def rmdir(self, path):
            os.rmdir(folder + path)

        def rename(self, old, new):
            os.rename(folder + old, folder + new)

        def link(self, target, source):
            refuse("links", errno.EPERM)
            os.link(folder + source, folder + target)

        def symlink(self, target, source):
            os.symlink(source, folder + target)

        def readlink(self, path):
            return os.readlink(folder + path)

        def chmod(self, path, mode):
            os.chmod(folder + path, mode)

        def chown(self, path, uid, gid):
            os.chown(folder + path, uid, gid)

        def utimens(self, path, times=None):
            os.utime(folder + path, ns=times)

        def statfs(self, path):
            found = os.statvfs(folder + path)
            names = (
                "f_bavail",
                "f_bfree",
                "f_blocks",
                "f_bsize",
                "f_files",
                "f_frsize",
                "f_namemax",
            )
            return {name: getattr(found, name) for name in names}

    if "locks" in refused:
        # Else the kernel keeps them by itself.
        Files.lock = lambda *_: refuse("locks", errno.ENOLCK)
        Files.flock = lambda *_: refuse("locks", errno.ENOLCK)

    class Mount(mfusepy.FUSE):
        def rename_fuse_3(self, old, new, flags):
            # The library drops the flags, and with them what was asked for.
            return -errno.EINVAL if flags else super().rename_fuse_3(old, new, flags)

    Mount(Files(), place, foreground=True, nothreads=True, default_permissions=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], set(sys.argv[3:]))
