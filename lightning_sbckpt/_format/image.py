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
from dataclasses import dataclass

import torch
import xxhash

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
        index = max(0, bisect.bisect_right(self._starts, start) - 1)
        for begin, end, address, part in itertools.islice(self._parts, index, None):
            if begin >= stop:
                break
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
            else:
                _copy_here(part, first - begin, out[first - start : last - start])
            done = last
        if done < stop:
            out[done - start :] = bytes(stop - done)

    def fill_small(self, out: memoryview) -> list[tuple[torch.UntypedStorage, int]]:
        """Put everything into `out` but large storages of the processor's memory.

        Returns:
            Those storages, each with where in the file it belongs.
        """
        left = []
        target = ctypes.addressof(ctypes.c_char.from_buffer(out))
        for begin, end, address, part in self._parts:
            if isinstance(part, bytes):
                out[begin:end] = part
            elif not address:
                _copy_here(part, 0, out[begin:end])
            elif end - begin >= LARGE:
                left.append((part, begin))
            else:
                ctypes.memmove(target + begin, address, end - begin)
        return left

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
                hasher.update(bytes(_bytes_of(part)[:_SAMPLE].tolist()))
        return hasher.digest()

    @property
    def devices(self) -> set[torch.device]:
        """The devices on which storages lie, but for the processor."""
        return {
            part.device
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


def _copy_here(storage: torch.UntypedStorage, start: int, out: memoryview) -> None:
    """Copy bytes of a storage that is not in the memory of this processor."""
    source = _bytes_of(storage)[start : start + len(out)]
    target = torch.frombuffer(out, dtype=torch.uint8)
    # Into pinned memory a GPU copies by itself; whoever pinned it waits for the end.
    waits = not target.is_pinned() if source.is_cuda else True
    target.copy_(source, non_blocking=not waits)


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


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a storage as a one-dimensional tensor of bytes that shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def image_of(template: Template, storages: Iterable[torch.UntypedStorage]) -> Image:
    """Return the image of a file."""
    offsets = (offset for offset, _ in template.holes)
    filled = zip(offsets, storages, strict=True)
    return Image(template.size, itertools.chain(template.fixed, filled))


class _StorageRecorder(pickle.Pickler):
    """Notes the storages of a state in the order in which pickling meets them."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=2)
        self.storages: dict[int, torch.UntypedStorage] = {}

    def persistent_id(self, obj: object) -> object:
        """Note a storage; its bytes are not pickled."""
        if isinstance(obj, torch.storage.TypedStorage):
            storage = obj._untyped_storage  # noqa: SLF001 - the accessor that doesn't warn
        elif isinstance(obj, torch.UntypedStorage):
            storage = obj
        else:
            return None
        self.storages.setdefault(storage._cdata, storage)  # noqa: SLF001 - as torch tells them apart
        return ("storage",)


def storages_of(state: object) -> list[torch.UntypedStorage]:
    """Return the storages of all tensors in a state, in the order in which pickling meets them."""
    recorder = _StorageRecorder()
    recorder.dump(state)
    return list(recorder.storages.values())
