"""What a torch file holds without its tensors' bytes: read in milliseconds, nothing executed.

A torch file is a zip archive, stored without compression: `data.pkl`, a pickle in which a tensor
names its storage by a key, and a record `data/<key>` with the bytes of each storage (described at
`torch.save`). The pickle of a `state_dict` uses a few of the opcodes that `pickletools` documents;
those are followed here, and no name in the pickle is ever looked up: the few that torch writes for
tensors stand for themselves. Whatever else a file holds there is no outline of it, and `torch.load`
has to read it.

torch's own way to the same, `torch.load(..., mmap=True)`, takes three times as long, and gives
tensors that a file cut off meanwhile turns into the death of the process. (Python's unpickler in C
would be fast, too, but a few hostile bytes make it ask for gigabytes.)
"""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from lightning_sbckpt._format.screening import (
    MAX_EXPANSION,
    STORAGE_DTYPES,
    expansion,
    require_light,
)
from lightning_sbckpt._io.open_regular import open_to_read

_LOCAL_HEADER = struct.Struct("<26xHH")
_INT = struct.Struct("<i").unpack_from
_SIZE = struct.Struct("<I").unpack_from
_SHORT = struct.Struct("<H").unpack_from
_FLOAT = struct.Struct(">d").unpack_from
_PROTOCOL = b"\x80\x02"
_TENSOR = b"torch._utils\n_rebuild_tensor_v2"
_NEW_TENSOR = b"torch._utils\n_rebuild_tensor_v3"
_PARAMETER = b"torch._utils\n_rebuild_parameter"
_SHAPE = b"torch\nSize"
_ORDERED = b"collections\nOrderedDict"

_STORAGE_DTYPES = {
    f"{module}\n{name}".encode(): dtype
    for name, dtype in STORAGE_DTYPES.items()
    for module in (("torch", "torch.storage") if dtype is None else ("torch",))
}

Identity = tuple[int, int, int, int]


class Stored(NamedTuple):
    """A tensor in a file: where the bytes of its storage lie, and which of them are its own."""

    begin: int
    nbytes: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    # Where in the file its first element lies, and how many bytes there are from it to the last.
    place: int
    span: int


class _Name(NamedTuple):
    """A name in a pickle, of something that is never looked up."""

    name: bytes


class _Storage(NamedTuple):
    """The bytes that tensors refer to, and of what type they are, if they say so themselves."""

    begin: int
    nbytes: int
    dtype: torch.dtype | None


class FileIndex(NamedTuple):
    """The state in a file, its tensors made by whoever asked, and the file as it was then."""

    state: object
    identity: Identity


class _UnknownError(Exception):
    """Something that only torch knows how to read."""


def span(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """Return how many bytes lie from the first to the last element of a tensor in its memory."""
    last = 0
    for length, step in zip(size, stride, strict=True):
        if not length:
            return 0
        last += (length - 1) * step
    return (last + 1) * dtype.itemsize


def read_outline(path: Path, make: Callable[[Stored], object]) -> FileIndex | None:
    """Return what a file holds, or None if only `torch.load` can tell.

    Args:
        path: The file.
        make: Is given each tensor; what it returns stands in the state for it.
    """
    if not hasattr(os, "preadv"):
        return None
    try:
        with open_to_read(path) as stream:
            identity = identity_of(stream.fileno())
            pickled, records = _find_records(stream.fileno())
        return FileIndex(_Reader(pickled, records, make).read(), identity)
    except Exception:
        # Whatever it is, torch's own way of reading will say it, or will do.
        return None


def identity_of(descriptor: int) -> Identity:
    """Return by what a file is known to be the same and unchanged."""
    found = os.fstat(descriptor)
    # No ctime: a hard link made meanwhile changes it, and not the bytes.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _find_records(descriptor: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the pickle, and for each key where the bytes of its storage lie, and how many."""
    size = os.fstat(descriptor).st_size
    records: dict[str, tuple[int, int]] = {}
    pickled = b""
    with os.fdopen(os.dup(descriptor), "rb") as stream, zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        if sum(info.file_size for info in infos) > size:
            raise _UnknownError
        for info in infos:
            header = os.pread(descriptor, _LOCAL_HEADER.size, info.header_offset)
            begin = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
            if info.compress_type != zipfile.ZIP_STORED or begin + info.file_size > size:
                raise _UnknownError
            name = info.filename.partition("/")[2]
            if name.startswith("data/"):
                records[name[len("data/") :]] = (begin, info.file_size)
            elif name == "data.pkl":
                pickled = os.pread(descriptor, info.file_size, begin)
            elif name == "byteorder":
                _require_native(os.pread(descriptor, info.file_size, begin))
    return pickled, records


def _require_native(byteorder: bytes) -> None:
    if byteorder != sys.byteorder.encode():
        raise _UnknownError


class _Reader:
    """Follows one pickle; what it doesn't know raises."""

    def __init__(
        self,
        pickled: bytes,
        records: dict[str, tuple[int, int]],
        make: Callable[[Stored], object],
    ) -> None:
        self._pickled = pickled
        self._records = records
        self._make = make
        self._expanded = 0

    def read(self) -> object:
        """Return the object that is pickled; one branch an opcode, the frequent ones first."""
        data = self._pickled
        if not data.startswith(_PROTOCOL):
            raise _UnknownError
        at = len(_PROTOCOL)
        stack: list[Any] = []
        below: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while True:
            code = data[at]
            at += 1
            if code == 0x71:  # BINPUT
                memo[data[at]] = stack[-1]
                at += 1
            elif code == 0x72:  # LONG_BINPUT
                memo[_SIZE(data, at)[0]] = stack[-1]
                at += 4
            elif code == 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            elif code == 0x6A:  # LONG_BINGET
                stack.append(memo[_SIZE(data, at)[0]])
                at += 4
            elif code == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif code == 0x4D:  # BININT2
                stack.append(_SHORT(data, at)[0])
                at += 2
            elif code == 0x4A:  # BININT
                stack.append(_INT(data, at)[0])
                at += 4
            elif code == 0x58:  # BINUNICODE
                end = at + 4 + _SIZE(data, at)[0]
                if end > len(data):
                    raise _UnknownError
                stack.append(data[at + 4 : end].decode("utf-8", "surrogatepass"))
                at = end
            elif code == 0x28:  # MARK
                below.append(stack)
                stack = []
            elif code == 0x74:  # TUPLE
                whole = tuple(stack)
                stack = below.pop()
                stack.append(whole)
            elif code == 0x86:  # TUPLE2
                stack[-2:] = [(stack[-2], stack[-1])]
            elif code == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif code == 0x87:  # TUPLE3
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            elif code == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif code == 0x52:  # REDUCE
                arguments = stack.pop()
                stack[-1] = self._call(stack[-1], arguments)
            elif code == 0x51:  # BINPERSID
                stack[-1] = self._storage(stack[-1])
            elif code == 0x89:  # NEWFALSE
                stack.append(False)
            elif code == 0x88:  # NEWTRUE
                stack.append(True)
            elif code == 0x4E:  # NONE
                stack.append(None)
            elif code == 0x47:  # BINFLOAT
                stack.append(_FLOAT(data, at)[0])
                at += 8
            elif code == 0x8A:  # LONG1
                end = at + 1 + data[at]
                stack.append(int.from_bytes(data[at + 1 : end], "little", signed=True))
                at = end
            elif code == 0x7D:  # EMPTY_DICT
                stack.append({})
            elif code == 0x5D:  # EMPTY_LIST
                stack.append([])
            elif code == 0x75:  # SETITEMS
                items = stack
                stack = below.pop()
                keys = items[::2]
                if tuple in map(type, keys):
                    _require_light(keys)
                _container(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
            elif code == 0x73:  # SETITEM
                value = stack.pop()
                key = stack.pop()
                _require_light((key,))
                _container(stack[-1], dict)[key] = value
            elif code == 0x65:  # APPENDS
                items = stack
                stack = below.pop()
                _container(stack[-1], list).extend(items)
            elif code == 0x61:  # APPEND
                value = stack.pop()
                _container(stack[-1], list).append(value)
            elif code == 0x63:  # GLOBAL
                end = data.index(b"\n", data.index(b"\n", at) + 1)
                stack.append(_named(data[at:end]))
                at = end + 1
            elif code == 0x62:  # BUILD
                attributes = _container(stack.pop(), dict)
                # A module's state_dict carries the versions of its layers as an attribute.
                if type(stack[-1]) is not OrderedDict or list(attributes) != ["_metadata"]:
                    raise _UnknownError
                stack[-1].__dict__.update(attributes)
            elif code == 0x2E:  # STOP
                (state,) = stack
                _require_values(state)
                return state
            else:
                raise _UnknownError

    def _call(self, called: object, arguments: Any) -> object:
        """Return what a function of torch's would return; only these few are known."""
        if type(called) is not _Name:
            raise _UnknownError
        if called.name == _TENSOR:
            # A seventh argument says that the bytes are not the values: conjugated, negated.
            storage, offset, size, stride, requires_grad, hooks = arguments
            return self._tensor(storage, offset, size, stride, requires_grad, hooks, storage.dtype)
        if called.name == _NEW_TENSOR:
            storage, offset, size, stride, requires_grad, hooks, dtype = arguments
            return self._tensor(storage, offset, size, stride, requires_grad, hooks, dtype)
        if called.name == _PARAMETER:
            data, requires_grad, hooks = arguments
            if type(data) is not torch.Tensor or hooks:
                raise _UnknownError
            return torch.nn.Parameter(data, requires_grad)
        if called.name == _SHAPE:
            return torch.Size(*arguments)
        if called.name == _ORDERED and arguments == ():
            return OrderedDict()
        raise _UnknownError

    def _storage(self, reference: Any) -> _Storage:
        """Return what a tensor refers to, checked against the file's index."""
        kind, name, key, _, count = reference
        begin, nbytes = self._records[key]
        dtype = _STORAGE_DTYPES[name.name]
        if kind != "storage" or nbytes != count * (dtype.itemsize if dtype else 1):
            raise _UnknownError
        return _Storage(begin, nbytes, dtype)

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
    ) -> object:
        numbers = (offset, *size, *stride)
        if (
            type(storage) is not _Storage
            or type(dtype) is not torch.dtype
            or storage.dtype not in (None, dtype)
            or type(requires_grad) is not bool
            or hooks
            or len(size) != len(stride)
            or set(map(type, numbers)) != {int}
            or min(numbers) < 0
        ):
            raise _UnknownError
        begin, nbytes, _ = storage
        self._expanded += expansion(size, dtype.itemsize, nbytes)
        if self._expanded > MAX_EXPANSION:
            raise _UnknownError
        size, stride = tuple(size), tuple(stride)
        skipped, spanned = offset * dtype.itemsize, span(size, stride, dtype)
        if skipped + spanned > nbytes:
            raise _UnknownError
        place = begin + skipped
        return self._make(
            Stored(begin, nbytes, offset, size, stride, dtype, requires_grad, place, spanned)
        )


def _container(value: object, kind: type) -> Any:
    if type(value) is not kind and not (kind is dict and type(value) is OrderedDict):
        raise _UnknownError
    return value


def _require_light(keys: Iterable[object]) -> None:
    for key in keys:
        if type(key) is tuple:
            require_light(key)


def _named(name: bytes) -> object:
    """Return a type of numbers as itself; any other name stands for itself."""
    module, _, attribute = name.partition(b"\n")
    dtype = getattr(torch, attribute.decode(), None) if module == b"torch" else None
    return dtype if type(dtype) is torch.dtype else _Name(name)


def _require_values(state: object) -> None:
    """Refuse a state in which a name or a storage stands where a value is expected."""
    seen: set[int] = set()
    waiting = [state]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in (_Name, _Storage):
            raise _UnknownError
        if kind in (dict, OrderedDict, list, tuple) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                waiting += value.keys()
                waiting += value.values()
                waiting += vars(value).values() if kind is OrderedDict else ()
            else:
                waiting += cast("list[object]", value)
