"""Large files in aligned blocks: every size, disks that refuse, disks that fail, little memory."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from textwrap import dedent

import pytest
import torch
import xxhash
from _releases import needs_torch

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io import direct_write as blocks
from lightning_sbckpt._io.direct_write import ALIGNMENT, BLOCK, round_up
from lightning_sbckpt._io.storage import digest
from lightning_sbckpt.errors import SaveError


def write_source(path, source):
    """Write to an empty file."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        return blocks.write_source(descriptor, source)
    finally:
        os.close(descriptor)


# Some blocks, and a last one that is not full.
LARGE = 6 * BLOCK + 5
SIZES = [
    0,
    1,
    ALIGNMENT - 1,
    ALIGNMENT,
    ALIGNMENT + 1,
    blocks._SMALL - 1,
    blocks._SMALL,
    blocks._SMALL + 1,
    BLOCK - ALIGNMENT,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    BLOCK + ALIGNMENT,
    2 * BLOCK,
    blocks._BUFFERS * BLOCK + 1,
    LARGE,
]
random_bytes = random.Random(5).randbytes(LARGE)


class Scattered:
    """A source whose bytes have to be asked for."""

    checksum = None
    devices = ()

    def __init__(self, size=LARGE):
        self.size = size
        self.data = memoryview(random_bytes)[:size]

    def fill(self, start, out):
        out[:] = self.data[start : start + len(out)]

    def view(self):
        return None

    def sample(self):
        return None


class Together(Scattered):
    """A source whose bytes lie together, aligned and padded."""

    def __init__(self, size=LARGE):
        super().__init__(size)
        self.memory = memoryview(mmap.mmap(-1, max(1, round_up(size))))[: round_up(size)]
        self.memory[:size] = self.data

    def view(self):
        return self.memory


KINDS = [Scattered, Together]


class Failing(Scattered):
    """A source that fails at some block."""

    def __init__(self, fail, block=2):
        super().__init__()
        self.fail = fail
        self.block = block

    def fill(self, start, out):
        if start == self.block * BLOCK:
            self.fail()
        super().fill(start, out)


@pytest.mark.parametrize("size", [5, LARGE])
def test_a_checksum_that_is_known_is_not_taken_again(tmp_path, monkeypatch, size):
    """Of bytes that were hashed when they were copied."""
    monkeypatch.setattr(blocks.xxhash, "xxh3_128_hexdigest", None)
    monkeypatch.setattr(blocks.xxhash, "xxh3_128", lambda: None)
    source = Together(size)
    source.checksum = "known"
    (tmp_path / "file").touch()
    assert write_source(tmp_path / "file", source) == "known"
    assert (tmp_path / "file").read_bytes() == random_bytes[:size]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Bytes that lie together are written in blocks of the same size, so that there are several."""
    monkeypatch.setattr(blocks, "_LONG_BLOCK", BLOCK)


@pytest.fixture
def path(tmp_path):
    """A file to write: there, and empty."""
    path = tmp_path / "file"
    path.touch()
    return path


@pytest.fixture
def write(path):
    """Write a source to an empty file, and check every byte and the digest."""

    def write(source):
        path.write_bytes(b"")
        checksum = write_source(path, source)
        assert path.stat().st_size == source.size
        assert path.read_bytes() == source.data
        assert checksum == xxhash.xxh3_128_hexdigest(source.data) == digest(path).xxh3_128
        assert digest(path).size == source.size

    return write


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """After each test: no thread, no open file, and all buffers free."""
    gc.collect()  # What the tests before have forgotten to close is not closed meanwhile.
    threads = set(threading.enumerate())
    files = os.listdir("/proc/self/fd")
    yield
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == len(files)
    with blocks._buffers.borrowed() as buffers:
        places = {ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers}
        assert len(places) == blocks._BUFFERS


def takes_direct(folder):
    """Return whether a filesystem takes blocks past the page cache."""
    probe = folder / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def is_direct(descriptor):
    """Return whether a file is open for writing past the page cache."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def each_write(monkeypatch):
    """A function to replace the writing of blocks: `replacement(pwrite, number, fd, data, at)`."""

    def replace(replacement):
        original, calls = os.pwrite, []

        def pwrite(descriptor, data, offset):
            calls.append(is_direct(descriptor))
            return replacement(original, len(calls) - 1, descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        return calls

    return replace


class TestEverySize:
    """Around the boundaries of blocks, alignment and the small ones."""

    @pytest.mark.sample(2)
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_byte_arrives_with_its_digest(self, kind, size, write):
        """On the disk: the file has its true length, and the digest is that of the file."""
        write(kind(size))

    @pytest.mark.sample(3)
    @pytest.mark.parametrize("size", [ALIGNMENT + 1, BLOCK + 1, LARGE])
    @pytest.mark.parametrize("kind", KINDS)
    def test_in_memory_filesystems_get_the_same_bytes(self, kind, size):
        """Shared memory has no pages to go past, or takes the flag and ignores it."""
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        try:
            file = folder / "file"
            file.touch()
            source = kind(size)
            assert write_source(file, source) == digest(file).xxh3_128
            assert file.read_bytes() == source.data
        finally:
            shutil.rmtree(folder)

    @pytest.mark.parametrize("kind", KINDS)
    def test_blocks_go_past_the_page_cache_where_they_can(self, kind, write, tmp_path, each_write):
        """Each has an aligned address, length and place then."""
        blocks = []

        def look(pwrite, number, descriptor, data, offset):
            address = ctypes.addressof(ctypes.c_char.from_buffer(data))
            blocks.append((address % ALIGNMENT, len(data) % ALIGNMENT, offset % ALIGNMENT))
            return pwrite(descriptor, data, offset)

        direct = each_write(look)
        write(kind())
        assert set(direct) == {takes_direct(tmp_path)}
        assert set(blocks) == {(0, 0, 0)} and len(blocks) == 7

    def test_two_files_can_be_written_at_once(self, tmp_path):
        """Each has its own buffers."""
        started = threading.Barrier(2, timeout=30)

        class Meeting(Scattered):
            def fill(self, start, out):
                if start == 0:
                    started.wait()
                super().fill(start, out)

        found = {}

        def run(size):
            file = tmp_path / str(size)
            file.touch()
            found[size] = write_source(file, Meeting(size)) == digest(file).xxh3_128

        threads = [threading.Thread(target=run, args=(size,)) for size in (LARGE, LARGE - BLOCK)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {LARGE: True, LARGE - BLOCK: True}
        assert (tmp_path / str(LARGE)).read_bytes() == random_bytes


@pytest.mark.parametrize("kind", KINDS)
class TestDisksThatRefuse:
    """What doesn't write past the page cache gets the same bytes through it."""

    @pytest.mark.sample(2)
    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
    def test_refused_when_asked_for(self, kind, number, write, each_write, monkeypatch):
        """As by tmpfs in older kernels, and NFS."""
        original = fcntl.fcntl

        def refuse(descriptor, command, value=0):
            if command == fcntl.F_SETFL and value & os.O_DIRECT:
                raise OSError(number, os.strerror(number))
            return original(descriptor, command, value)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
        direct = each_write(lambda pwrite, number, *arguments: pwrite(*arguments))
        write(kind())
        assert set(direct) == {False}

    @pytest.mark.sample(2)
    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
    @pytest.mark.parametrize("first", [0, 3])
    def test_taken_when_asked_for_and_refused_at_a_write(
        self, kind, first, number, write, each_write, tmp_path
    ):
        """As by some overlays: that block and all after it go through the cache."""

        def refuse(pwrite, count, descriptor, data, offset):
            if count >= first and is_direct(descriptor):
                raise OSError(number, os.strerror(number))
            return pwrite(descriptor, data, offset)

        direct = each_write(refuse)
        write(kind())
        if takes_direct(tmp_path):
            assert direct == [True] * (first + 1) + [False] * (7 - first)

    @pytest.mark.sample(2)
    @pytest.mark.parametrize("step", [ALIGNMENT, 1000, 1])
    def test_short_writes_are_gone_on_with(self, kind, step, write, each_write):
        """Also where the rest is not aligned any more."""

        def some(pwrite, count, descriptor, data, offset):
            # The very first write in pieces of `step`; many small ones would take their time.
            return pwrite(descriptor, data[:step] if count == 0 else data, offset)

        calls = each_write(some)
        write(kind())
        assert len(calls) >= 8

    def test_a_disk_that_takes_nothing_is_an_error(self, kind, path, each_write):
        """Not an endless loop."""
        each_write(lambda *_: 0)
        with pytest.raises(OSError, match="took no bytes and gave no error") as caught:
            write_source(path, kind())
        assert caught.value.errno == errno.EIO

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINVAL])
    @pytest.mark.parametrize("at", [0, 3, 6])
    def test_a_disk_that_fails_is_an_error_at_once(
        self, kind, at, number, path, each_write, write, monkeypatch
    ):
        """At the first, a middle and the last block; the next file is written as if nothing was."""

        def fail(pwrite, count, descriptor, data, offset):
            if offset >= at * BLOCK:
                raise OSError(number, os.strerror(number))
            return pwrite(descriptor, data, offset)

        with monkeypatch.context() as patch:
            original = os.pwrite
            patch.setattr(os, "pwrite", lambda *arguments: fail(original, 0, *arguments))
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                write_source(path, kind())
            assert caught.value.errno == number
        write(kind())


class TestWhateverGoesWrong:
    """No thread, no open file, no lost buffer, and nobody waits forever; see the fixture."""

    @pytest.mark.sample(2)
    @pytest.mark.parametrize("block", [0, 2, 5, 6])
    def test_an_interrupt_while_a_block_is_filled(self, block, path, write):
        """Control-C, a real signal, comes out as itself."""
        with pytest.raises(KeyboardInterrupt):
            write_source(path, Failing(lambda: signal.raise_signal(signal.SIGINT), block))
        write(Scattered())

    def test_after_an_interrupt_no_more_is_written(self, path, each_write, monkeypatch):
        """What was filled before it need not reach the disk: the file is of no use."""
        begun, going_on = threading.Event(), threading.Event()

        def wait_first(pwrite, number, *arguments):
            begun.set()
            going_on.wait(30)
            return pwrite(*arguments)

        calls = each_write(wait_first)

        class Queue(SimpleQueue):
            def put(self, item):
                super().put(item)
                # No more will come: the interrupt has been seen.
                if item is None:
                    going_on.set()

        monkeypatch.setattr(blocks, "SimpleQueue", Queue)

        def fail():
            assert begun.wait(30)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_source(path, Failing(fail, block=3))
        assert len(calls) == 1

    def test_a_source_that_fails(self, path, write):
        """Its own error comes out."""

        def fail():
            raise ZeroDivisionError("in fill")

        with pytest.raises(ZeroDivisionError, match="in fill"):
            write_source(path, Failing(fail))
        write(Scattered())

    def test_an_error_that_is_none_of_the_disk(self, path, write, monkeypatch):
        """In the writing thread, where nobody would see it: it is raised in the caller."""

        def fail(*_):
            raise MemoryError("no room to write")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            with pytest.raises(MemoryError, match="no room to write"):
                write_source(path, Scattered())
        write(Scattered())

    @pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
    def test_a_thread_that_can_not_be_started(self, error, path, write, monkeypatch):
        """At the limit of threads, at the interpreter's end, or with an interrupt right then."""

        def fail(self):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(blocks.Thread, "start", fail)
            with pytest.raises(type(error)):
                write_source(path, Scattered())
        write(Scattered())

    def test_an_interrupt_while_the_thread_starts(self, path, write, monkeypatch):
        """It runs already, and ends all the same."""
        original = threading.Thread.start

        def interrupted(self):
            original(self)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(blocks.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_source(path, Scattered())
        write(Scattered())

    @needs_torch("2.6", "torch.serialization.skip_data")
    def test_a_full_disk_is_a_save_error_and_the_next_save_works(self, tmp_path, monkeypatch):
        """Through the checkpointer, in the middle of a large file: nothing of it is visible."""
        checkpointer = Checkpointer(tmp_path, {"model": torch.nn.Linear(1500, 1500)})
        first = checkpointer.save_checkpoint()
        original, calls = os.pwrite, []

        def full(descriptor, data, offset):
            calls.append(offset)
            if offset >= BLOCK:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(descriptor, data, offset)

        with torch.no_grad():
            checkpointer.recoverables["model"].weight.zero_()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(
                SaveError, match=r"No space left on device \(it needs 9,\d{3},\d{3}"
            ):
                checkpointer.save_checkpoint()
        assert calls[:2] == [0, BLOCK]
        assert [ckpt.path for ckpt in checkpointer.list_checkpoints()] == [first.path]
        checkpointer.save_checkpoint()
        assert len(checkpointer.list_checkpoints()) == 2
        checkpointer.close()


class TestMemory:
    """A save to the disk needs a few buffers, whatever the size of the state."""

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("disk", ["direct", "refusing"])
    def test_a_save_of_300_mb_needs_less_than_64_mb_more(self, tmp_path, disk):
        """Measured by the kernel as the peak of a real process, at its second save as well."""
        script = dedent(
            """
            import fcntl, os, resource, sys, torch
            from lightning_sbckpt import Checkpointer

            if sys.argv[2] == "refusing":
                original = fcntl.fcntl
                def refuse(descriptor, command, value=0):
                    if command == fcntl.F_SETFL and value & os.O_DIRECT:
                        raise OSError(22, "Invalid argument")
                    return original(descriptor, command, value)
                fcntl.fcntl = refuse

            model = torch.nn.ParameterList(torch.ones(2_500_000) for _ in range(30))
            checkpointer = Checkpointer(sys.argv[1], {"model": model})
            Checkpointer(sys.argv[1] + "/small", {"a": torch.nn.Linear(1, 1)}).save_checkpoint()
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            before = peak()
            for number in range(2):
                with torch.no_grad():
                    for parameter in model:
                        parameter.add_(1)
                checkpointer.save_and_keep_only()
            checkpointer.wait()
            print(before, peak() - before)
            """
        )
        found = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), disk],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=300,
        )
        before, more = map(float, found.stdout.split())
        [file] = tmp_path.glob("CKPT*/model.ckpt")
        assert file.stat().st_size > 300_000_000 and before > 300
        assert more < 64
        with suppress(OSError):
            file.unlink()
