"""States as images of torch files: what to write, without writing it.

torch's file format is a zip archive, stored without compression: `data.pkl` (the pickled state, in
which a tensor names its storage by a number), then one record `data/<number>` for the bytes of each
storage, in the order in which pickling meets them, each aligned to 64 bytes.
Under `torch.serialization.skip_data` torch writes everything but the bytes of the storages, over
which it seeks. An `Image` is what it writes plus, for every such hole, the live storage
that fills it. So nothing here knows how torch pickles a tensor or pads a record, and
`torch.load(..., weights_only=True, mmap=True)` reads the result.

Which storage belongs to which hole is found by pickling the state a second time and numbering the
storages in the order they are met, as torch does; the record around a hole says its number (not
every release of torch writes the records in that order). Numbers and sizes have to match. Where they
don't, or where torch has no `skip_data` (before 2.6), there is no image, and torch's own writer has
to do.

The checksums that zip keeps for the records of storages are left at zero: torch doesn't look at
them, and the manifest has one of the whole file.
"""

from __future__ import annotations

import bisect
import ctypes
import io
import itertools
import operator
import pickle
import struct
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import torch
import xxhash

from lightning_sbckpt._io.devices import GAP, Begun, Part, begin_copies, bytes_of, device_of

with suppress(ImportError):  # It came with torch 2.6.
    # `torch.save` imports it in a first save, and an exception of a signal handler in there would leave
    # Python's import lock held for good.
    import_module("torch.utils.serialization.config")


# Bytes from which on copying by several threads, and without the interpreter's lock, pays.
LARGE = 2**18
# Of a record in a zip archive: how long its name and the extra field behind the name are.
LOCAL_HEADER = struct.Struct("<26xHH")
_CPU = torch.device("cpu")
_SAMPLE = 64
_QUESTIONS = 8


@dataclass(frozen=True)
class Template:
    """A torch file with holes.

    Attributes:
        size: Bytes of the whole file.
        fixed: Where bytes that are not of storages lie, and which, in order.
        holes: Where the bytes of each storage belong, and how many, in the order in which pickling
            meets the storages; empty ones have no hole.
    """

    size: int
    fixed: Sequence[tuple[int, bytes]]
    holes: Sequence[tuple[int, int]]


@dataclass
class Left:
    """What is still to be done until a file is whole in memory.

    Attributes:
        out: The memory.
        host: Storages of the processor that nobody copies yet, each with where in the file it belongs.
        hidden: Storages that devices copy, and that must not change meanwhile.
        begun: What devices copy.
        between: Bytes to put in place when they have, and where.
    """

    out: memoryview
    host: Sequence[tuple[torch.UntypedStorage, int]]
    hidden: Sequence[torch.UntypedStorage]
    begun: Sequence[Begun]
    between: Sequence[tuple[int, bytes]]

    def addresses(self) -> list[tuple[torch.UntypedStorage, int]]:
        """Return the storages that nobody copies yet, each with the address that it is copied to."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.out))
        return [(storage, start + place) for storage, place in self.host]

    def finish(self) -> None:
        """Wait for the devices, and put in place what lies between."""
        for begun in self.begun:
            begun.wait()
        for begin, data in self.between:
            self.out[begin : begin + len(data)] = data


class Image:
    """The bytes of a torch file, in parts that lie wherever they are.

    Args:
        size: Bytes of the whole file.
        parts: Where each part begins, and the part. They don't overlap; what is between them is
            zero. Storages are not resized as long as the image is used.
    """

    def __init__(
        self, size: int, parts: Iterable[tuple[int, bytes | torch.UntypedStorage]]
    ) -> None:
        self.size = size
        # What is asked of a storage is asked once: there are thousands, and blocks cut through them.
        self._parts = sorted(itertools.starmap(_placed, parts), key=operator.itemgetter(0))
        self._starts = [part[0] for part in self._parts]

    def fill(self, start: int, out: memoryview) -> None:
        """Put the bytes from `start` on into `out`, as many as it holds."""
        stop = start + len(out)
        target = ctypes.addressof(ctypes.c_char.from_buffer(out)) - start
        done = start
        low = max(0, bisect.bisect_right(self._starts, start) - 1)
        parts = self._parts[low : bisect.bisect_left(self._starts, stop)]
        if self.devices:
            elsewhere = [
                Part(part, max(start - begin, 0), max(begin - start, 0), min(end, stop) - start)
                for begin, end, address, part in parts
                if not address and not isinstance(part, bytes) and end > start
            ]
            # First, since they overwrite what lies between them.
            begin_copies(elsewhere, out).wait()
        for begin, end, address, part in parts:
            first, last = max(begin, start), min(end, stop)
            if first >= last:
                continue
            if first > done:
                out[done - start : first - start] = bytes(first - done)
            if address:
                # Begins in a tenth of the time that torch takes, and gives up the interpreter's lock.
                ctypes.memmove(target + first, address + first - begin, last - first)
            elif isinstance(part, bytes):
                out[first - start : last - start] = part[first - begin : last - begin]
            done = last
        if done < stop:
            out[done - start :] = bytes(stop - done)

    def begin(self, out: memoryview, *, hide: bool) -> Left:
        """Put into `out` what no device has; from devices begin to copy.

        Args:
            out: As many bytes as there are.
            hide: Whether large storages don't change before somebody waits for their copies.
        """
        large, others, host, between = [], [], [], []
        target = ctypes.addressof(ctypes.c_char.from_buffer(out))
        have_devices = bool(self.devices)
        for begin, end, address, part in self._parts:
            size = end - begin
            if not isinstance(part, bytes) and hide and size >= LARGE:
                if address:
                    host.append((part, begin))
                else:
                    large.append(Part(part, 0, begin, end))
            elif not address and not isinstance(part, bytes):
                others.append(Part(part, 0, begin, end))
            elif have_devices and size <= GAP:
                # Copies from a device would overwrite it.
                data = part if isinstance(part, bytes) else ctypes.string_at(address, size)
                between.append((begin, data))
            elif isinstance(part, bytes):
                out[begin:end] = part
            else:
                ctypes.memmove(target + begin, address, size)
        # Those that may change are copied in the order in which the device does its work.
        begun = [begin_copies(others, out)]
        try:
            begun.append(begin_copies(large, out, aside=True))
        except BaseException:
            begun[0].wait()
            raise
        return Left(out, host, [part.storage for part in large], begun, between)

    def view(self) -> memoryview | None:
        """Return None: the parts don't lie together."""
        return None

    @property
    def checksum(self) -> str | None:
        """None: the bytes have not been looked at."""
        return None

    def sample(self) -> object:
        """Return the first bytes of every storage, and a checksum of what is no storage."""
        hasher = xxhash.xxh3_64()
        asked = 0
        for begin, end, address, part in self._parts:
            if isinstance(part, bytes):
                hasher.update(part)
            elif address:
                hasher.update(ctypes.string_at(address, min(_SAMPLE, end - begin)))
            elif asked < _QUESTIONS:
                # Each takes a wait for the GPU.
                asked += 1
                hasher.update(bytes(bytes_of(part)[:_SAMPLE].tolist()))
        return hasher.digest()

    @cached_property
    def devices(self) -> set[torch.device]:
        """The devices on which storages lie, but for the processor."""
        return {
            device_of(part)
            for _, _, address, part in self._parts
            if not address and not isinstance(part, bytes)
        }


def _placed(
    start: int, part: bytes | torch.UntypedStorage
) -> tuple[int, int, int, bytes | torch.UntypedStorage]:
    """Return where a part begins and ends, and its address if it is a storage of the processor."""
    if isinstance(part, bytes):
        return start, start + len(part), 0, part
    address = part.data_ptr() if part.device == _CPU else 0
    return start, start + part.nbytes(), address, part


def make_template(state: object) -> tuple[Template, list[torch.UntypedStorage]] | None:
    """Return the file that torch would write, and the storages that fill it; None if unsure."""
    skip_data = getattr(torch.serialization, "skip_data", None)
    if skip_data is None:
        return None
    storages = {
        number: storage for number, storage in enumerate(storages_of(state)) if storage.nbytes()
    }
    file = _FileWithHoles()
    try:
        with skip_data(), warnings.catch_warnings():
            # Tensors without bytes need no warning that their bytes are left out.
            warnings.filterwarnings("ignore", "Serializing tensors on the meta device")
            torch.save(state, file)  # type: ignore[arg-type]
    except RuntimeError:
        # Quantized and nested tensors are refused under `skip_data`, and taken without.
        return None
    fixed = file.merged()
    holes = _numbered(file.holes, fixed)
    expected = {number: storage.nbytes() for number, storage in storages.items()}
    if holes is None or {number: size for number, (_, size) in holes.items()} != expected:
        return None
    template = Template(file.position, fixed, [holes[number] for number in storages])
    return template, list(storages.values())


def _numbered(
    holes: Sequence[tuple[int, int]], fixed: Sequence[tuple[int, bytes]]
) -> dict[int, tuple[int, int]] | None:
    """Return the holes by the numbers of their storages; None if a record is not understood."""
    heads = {start + len(data): data for start, data in fixed}
    numbered: dict[int, tuple[int, int]] = {}
    for hole in holes:
        head = heads.get(hole[0], b"")
        # The header of the record is the last thing before the hole.
        start = head.rfind(b"PK\x03\x04")
        if start < 0 or len(head) < start + LOCAL_HEADER.size:
            return None
        name_size, extra_size = LOCAL_HEADER.unpack_from(head, start)
        name = head[start + LOCAL_HEADER.size :][:name_size]
        number = name.rpartition(b"/data/")[2]
        if len(head) != start + LOCAL_HEADER.size + name_size + extra_size or not number.isdigit():
            return None
        numbered[int(number)] = hole
    return numbered if len(numbered) == len(holes) else None


class _FileWithHoles:
    """What torch writes into, remembering where and over how much it seeks."""

    def __init__(self) -> None:
        self.position = 0
        self.holes: list[tuple[int, int]] = []
        self._written: list[tuple[int, bytes]] = []

    def write(self, data: memoryview) -> int:
        """Remember bytes."""
        self._written.append((self.position, bytes(data)))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Remember a hole."""
        if whence != io.SEEK_CUR:
            raise io.UnsupportedOperation("only forward")
        self.holes.append((self.position, offset))
        self.position += offset
        return self.position

    def flush(self) -> None:
        """Do nothing."""

    def merged(self) -> list[tuple[int, bytes]]:
        """Return what was written, one piece between two holes."""
        pieces: list[tuple[int, bytearray]] = []
        for start, data in self._written:
            if pieces and pieces[-1][0] + len(pieces[-1][1]) == start:
                pieces[-1][1].extend(data)
            else:
                pieces.append((start, bytearray(data)))
        return [(start, bytes(data)) for start, data in pieces]


def image_of(template: Template, storages: Iterable[torch.UntypedStorage]) -> Image:
    """Return the image of a file."""
    offsets = (offset for offset, _ in template.holes)
    filled = zip(offsets, storages, strict=True)
    return Image(template.size, itertools.chain(template.fixed, filled))


class _StorageRecorder(pickle.Pickler):
    """Notes the storages of a state in the order in which pickling meets them."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=2)
        self.storages: dict[int, torch.UntypedStorage] = {}

    def persistent_id(self, obj: object) -> object:
        """Note a storage; its bytes are not pickled."""
        dtype = torch.uint8
        if isinstance(obj, torch.storage.TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype  # noqa: SLF001 - it doesn't warn
        elif isinstance(obj, torch.UntypedStorage):
            storage = obj
        else:
            return None
        self.storages.setdefault(storage._cdata, storage)  # noqa: SLF001 - as torch tells them apart
        return ("storage", dtype, storage.nbytes())


def storages_of(state: object) -> list[torch.UntypedStorage]:
    """Return the storages of all tensors in a state, in the order in which pickling meets them."""
    recorder = _StorageRecorder()
    recorder.dump(state)
    return list(recorder.storages.values())


def pickled_without_bytes(state: object) -> bytes:
    """Return a state pickled as torch does, with the type and size of each storage in its place."""
    recorder = _StorageRecorder()
    recorder.dump(state)
    return recorder.file.getvalue()
