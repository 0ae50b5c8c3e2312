"""Following a pickle without making anything of it, before an unpickler gets it.

An unpickler that calls nothing dangerous can still be killed, or kept busy for ever, by a small file:
a key that is a tuple nested a million deep overflows the stack when it is hashed, a tuple of two
halves that are each the same tuple takes 2**n steps, a memo index of four billion takes 64 GB. Here
the opcodes that `pickletools` documents are followed with stand-ins for all values, in time and
memory proportional to the size of the pickle, and such files are refused.

Two more things are refused that releases of torch before 2.10 do not check themselves (CVE-2026-24747):
items set in what is no dictionary, and storages that are larger than their record in the file.
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, BinaryIO

import torch

MAX_KEY_WEIGHT = 1_000
"""How many values a tuple that is a key may hold, counted again wherever they are repeated."""

MAX_EXPANSION = 4 * 2**30
"""How many bytes the tensors of one file may have beyond those that are stored, as expanded ones do."""

STORAGE_DTYPES = {
    "UntypedStorage": None,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
"""The types of the elements of torch's storage classes."""

_MAX_DEPTH = 200
_MAX_EMPTY = 2**31
# Magic number, protocol, system, the state, the keys of the storages.
_LEGACY_PICKLES = 5
_HASHING = {"set", "frozenset", "dict", "OrderedDict", "Counter", "defaultdict"}
_MAPPINGS = {"dict", "OrderedDict", "Counter", "defaultdict"}
_ENCODINGS = {"latin1", "latin-1", "utf-8", "utf8", "ascii"}


class ScreeningError(ValueError):
    """A pickle that no unpickler should be given."""


class _Tuple:
    """A tuple: how deep it nests tuples, and how many values it holds if nothing were shared."""

    __slots__ = ("depth", "items", "weight")

    def __init__(self, items: list[Any]) -> None:
        nested: list[_Tuple] = [item for item in items if type(item) is _Tuple]
        self.items = items
        self.depth: int = 1 + max((item.depth for item in nested), default=0)
        self.weight: int = 1 + len(items) + sum(item.weight for item in nested)
        if self.depth > _MAX_DEPTH:
            raise ScreeningError(f"it nests tuples more than {_MAX_DEPTH} deep")


class _Name:
    """A class or function that the pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: object) -> None:
        self.name = str(name)


class _Made:
    """Any other object, of which only the kind is known."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Stored:
    """A storage, and how many bytes its record has."""

    __slots__ = ("itemsize", "nbytes")

    def __init__(self, nbytes: int, itemsize: int) -> None:
        self.nbytes, self.itemsize = nbytes, itemsize


def screen(
    pickled: bytes | IO[bytes], records: Mapping[str, int] | None = None, *, longest: int
) -> None:
    r"""Refuse a pickle that would kill an unpickler or keep it busy out of all proportion.

    Args:
        pickled: The pickle; of a stream, what comes up to the end of the pickle.
        records: The size of each record of a torch file in bytes, by its key; None if there are none.
        longest: A bound for the indices of its memo, the size of the pickle in bytes, say.

    Raises:
        ScreeningError: It must not be read; the message says why.

    Example:
        >>> import pickle
        >>> screen(pickle.dumps({("a", 1): [2.0]}), longest=100)
        >>> screen(b"\x80\x02}" + b")" + b"\x85" * 300 + b"Ns.", longest=400)
        Traceback (most recent call last):
        lightning_sbckpt._format.screening.ScreeningError: it nests tuples more than 200 deep
    """
    try:
        _Screen(records, longest).follow(_opcodes(pickled))
    except ScreeningError:
        raise
    except Exception as error:
        raise ScreeningError(f"it is no pickle: {type(error).__name__}") from error


def screen_file(stream: BinaryIO) -> None:
    """Refuse a torch file that must not be given to `torch.load`, even with `weights_only=True`.

    The stream stays at its beginning. Files as torch wrote them before its release 1.6 are refused
    where torch is older than 2.6: there they can run code (CVE-2025-32434).

    Raises:
        ScreeningError: It must not be read; the message says why.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> torch.save({"weight": torch.ones(2)}, file)
        >>> screen_file(file)
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if not zipfile.is_zipfile(stream):
        stream.seek(0)
        if not hasattr(torch.serialization, "skip_data"):
            raise ScreeningError(
                "it has the layout of torch before 1.6, which torch before 2.6 reads unsafely"
            )
        for _ in range(_LEGACY_PICKLES):
            if stream.tell() < size:
                screen(stream, longest=size)
        stream.seek(0)
        return
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        if sum(info.file_size for info in infos) > size:
            raise ScreeningError("its records are compressed, or larger than the file together")
        within = [(info, info.filename.partition("/")[2]) for info in infos]
        records = {n[len("data/") :]: i.file_size for i, n in within if n.startswith("data/")}
        for info, name in within:
            if name == "data.pkl":
                screen(archive.read(info), records, longest=info.file_size)
    stream.seek(0)


def expansion(size: Sequence[int], itemsize: int, stored: int) -> int:
    """Return how many bytes a tensor has beyond those of its storage.

    Raises:
        ScreeningError: It has no elements and all the same a shape that nothing could list.

    Example:
        >>> expansion((1000, 1000), 4, stored=4)
        3999996
        >>> expansion((10, 10), 4, stored=400)
        0
    """
    if 0 in size:
        if math.prod(length for length in size if length) > _MAX_EMPTY:
            raise ScreeningError("it has an empty tensor of an enormous shape")
        return 0
    return max(0, math.prod(size) * itemsize - stored)


def require_light(key: object) -> None:
    """Refuse a key whose hash takes longer than its size in the file allows.

    Raises:
        ScreeningError: It is a tuple of too many values.

    Example:
        >>> require_light(("weight", 0))
    """
    waiting, weight = [key], 0
    while waiting:
        value = waiting.pop()
        weight += 1
        if weight > MAX_KEY_WEIGHT:
            raise ScreeningError(f"it has a key of more than {MAX_KEY_WEIGHT:,} values")
        if isinstance(value, tuple):
            waiting += value


def _opcodes(pickled: bytes | IO[bytes]) -> Iterator[tuple[str, Any]]:
    for opcode, argument, _ in pickletools.genops(pickled):
        yield opcode.name, argument


class _Screen:
    def __init__(self, records: Mapping[str, int] | None, longest: int) -> None:
        self._records = records
        self._longest = longest
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._heaviest = 0
        self._expanded = 0

    def follow(self, opcodes: Iterator[tuple[str, Any]]) -> None:
        """Follow a pickle to its end; one branch a kind of opcode."""
        for name, argument in opcodes:
            stack = self._stack
            if name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(self._memo[int(argument)])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                if int(argument) > self._longest:
                    raise ScreeningError(f"it asks for a memo of {int(argument):,} entries")
                self._memo[int(argument)] = stack[-1]
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            elif name == "MARK":
                self._below.append(stack)
                self._stack = []
            elif name == "POP_MARK":
                self._marked()
            elif name == "POP":
                if stack:
                    stack.pop()
                else:
                    self._marked()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "EMPTY_TUPLE":
                stack.append(_Tuple([]))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                number = int(name[-1])
                self._push_tuple(_popped(stack, number))
            elif name == "TUPLE":
                self._push_tuple(self._marked())
            elif name in ("EMPTY_LIST", "LIST"):
                if name == "LIST":
                    self._marked()
                self._stack.append(_Made("list"))
            elif name in ("APPEND", "APPENDS"):
                _ = _popped(stack, 1) if name == "APPEND" else self._marked()
                self._require(self._stack[-1], {"list"})
            elif name == "EMPTY_DICT":
                stack.append(_Made("dict"))
            elif name == "DICT":
                self._check_keys(self._marked()[::2])
                self._stack.append(_Made("dict"))
            elif name in ("SETITEM", "SETITEMS"):
                items = _popped(stack, 2) if name == "SETITEM" else self._marked()
                self._check_keys(items[::2])
                self._require(self._stack[-1], _MAPPINGS)
            elif name == "EMPTY_SET":
                stack.append(_Made("set"))
            elif name in ("ADDITEMS", "FROZENSET"):
                items = self._marked()
                self._check_keys(items)
                if name == "FROZENSET":
                    self._push_tuple(items)
                else:
                    self._require(self._stack[-1], {"set"})
            elif name == "GLOBAL":
                stack.append(_Name(argument.replace(" ", ".")))
            elif name == "STACK_GLOBAL":
                stack.append(_Name(".".join(map(str, _popped(stack, 2)))))
            elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
                called, arguments, *_ = _popped(stack, 3 if name == "NEWOBJ_EX" else 2)
                stack.append(self._called(called, arguments))
            elif name in ("BINPERSID", "PERSID"):
                reference = _popped(stack, 1)[0] if name == "BINPERSID" else argument
                stack.append(self._storage(reference))
            elif name == "BUILD":
                _popped(stack, 1)
                _ = stack[-1]
            elif name in ("PROTO", "FRAME"):
                continue
            elif name == "STOP":
                if len(stack) != 1 or self._below:
                    raise ScreeningError("it leaves more than one value")
                return
            elif name in _VALUES:
                stack.append(argument)
            else:
                raise ScreeningError(f"it has the opcode {name}, which no state needs")

    def _marked(self) -> list[Any]:
        """Return what has come since the last mark."""
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _push_tuple(self, items: list[Any]) -> None:
        made = _Tuple(items)
        self._heaviest = max(self._heaviest, made.weight)
        self._stack.append(made)

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:
            if type(key) is _Tuple and key.weight > MAX_KEY_WEIGHT:
                raise ScreeningError(f"it has a key of more than {MAX_KEY_WEIGHT:,} values")

    def _require(self, target: object, kinds: set[str]) -> None:
        kind = target.kind if type(target) is _Made else type(target).__name__
        if kind not in kinds and self._records is not None:
            raise ScreeningError(
                f"it puts items into an object that is no {'/'.join(sorted(kinds))}"
            )

    def _called(self, called: object, arguments: object) -> object:
        name = called.name if type(called) is _Name else ""
        items = arguments.items if type(arguments) is _Tuple else []
        kind = name.rpartition(".")[2]
        if kind in _HASHING and items and self._heaviest > MAX_KEY_WEIGHT:
            raise ScreeningError(
                f"it makes a {kind} of tuples of more than {MAX_KEY_WEIGHT:,} values"
            )
        if kind in ("bytearray", "bytes") and items and type(items[0]) is int:
            raise ScreeningError(f"it asks for {items[0]:,} bytes of nothing")
        if name == "_codecs.encode" and not (len(items) == 2 and items[1] in _ENCODINGS):
            raise ScreeningError("it encodes text in a way that no state needs")
        if kind in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_tensor"):
            self._check_tensor(items)
        return _Made(kind if kind in _HASHING else "object")

    def _check_tensor(self, items: list[Any]) -> None:
        stored, _, size = items[:3]
        if type(stored) is _Stored and type(size) is _Tuple:
            itemsize = stored.itemsize
            if len(items) > 6 and type(items[6]) is _Name:
                dtype = getattr(torch, items[6].name.rpartition(".")[2], None)
                itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else itemsize
            if all(type(length) is int and length >= 0 for length in size.items):
                self._expanded += expansion(size.items, itemsize, stored.nbytes)
        if self._expanded > MAX_EXPANSION:
            raise ScreeningError("its tensors repeat a few stored bytes into many gigabytes")

    def _storage(self, reference: object) -> object:
        if self._records is None or type(reference) is not _Tuple or len(reference.items) < 5:
            return _Made("object")
        _, kind, key, _, count = reference.items[:5]
        name = kind.name.rpartition(".")[2] if type(kind) is _Name else ""
        dtype = STORAGE_DTYPES.get(name)
        itemsize = dtype.itemsize if dtype else 1
        nbytes = self._records.get(key) if isinstance(key, str) else None
        if type(count) is not int or nbytes is None or not 0 <= count * itemsize <= nbytes:
            raise ScreeningError(
                f"it has a storage that is not in the file as it is described: {key!s:.40}"
            )
        return _Stored(nbytes, itemsize)


_VALUES = {
    opcode.name
    for opcode in pickletools.opcodes
    if not opcode.stack_before
    and opcode.stack_after
    and opcode.name not in ("GLOBAL", "GET", "BINGET", "LONG_BINGET", "PERSID", "INST", "MARK")
    and not opcode.name.startswith(("EXT", "NEXT_BUFFER"))
}


def _popped(stack: list[Any], number: int) -> list[Any]:
    if len(stack) < number:
        raise ScreeningError("it takes values that it does not have")
    items = stack[len(stack) - number :]
    del stack[len(stack) - number :]
    return items
