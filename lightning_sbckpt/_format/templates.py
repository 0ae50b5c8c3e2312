"""Templates that are kept from save to save.

Pickling a state takes about 20 microseconds a tensor, twice, and a training run saves states of the
same form again and again. So a template is kept with a description of the state that it was made
from: its containers, keys and plain values, and of each tensor what torch pickles of it. A state of
the same description has the same file but for the bytes of its storages, and for the values of its
floats (a learning rate, say), which have a fixed length and are put in their places in `data.pkl`.

A state with anything in it that is not described here gets its template made anew each time.
"""

from __future__ import annotations

import pickletools
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import cast

import torch

from lightning_sbckpt._format.image import (
    LARGE,
    LOCAL_HEADER,
    Image,
    Template,
    image_of,
    make_template,
)

_CONTAINERS = (dict, OrderedDict, list, tuple)
_CPU = torch.device("cpu")
_PLAIN = (int, str, bool, type(None))
_LONG = 2**63
_AGAIN = "again"
_FLOAT = struct.Struct(">d")
_INDEX_ENTRY_SIZE = 46


class _NotDescribedError(Exception):
    """Something that a description doesn't cover."""


@dataclass
class Description:
    """What two states share that have the same file, but for bytes of storages and floats."""

    form: list[object] = field(default_factory=list)
    floats: list[bytes] = field(default_factory=list)
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)
    large: list[torch.Tensor] = field(default_factory=list)
    tensors: dict[int, int] = field(default_factory=dict)
    containers: dict[int, int | None] = field(default_factory=dict)

    def add(self, value: object) -> None:
        """Describe a value and what is in it."""
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            self._add_tensor(cast("torch.Tensor", value))
        elif kind is float:
            self.form.append(float)
            self.floats.append(_FLOAT.pack(cast("float", value)))
        elif kind in _PLAIN:
            if kind is int and not -_LONG <= cast("int", value) < _LONG:
                raise _NotDescribedError
            if kind is str and not _is_unicode(cast("str", value)):
                raise _NotDescribedError
            # With the type: to Python, True equals 1.
            self.form += (kind, value)
        elif kind in _CONTAINERS:
            self._add_container(value)
        else:
            raise _NotDescribedError

    def _add_container(self, value: object) -> None:
        kind = type(value)
        identity = id(value)
        if identity in self.containers:
            # The same object twice is pickled as one. (The groups of an optimizer share tuples.)
            seen = self.containers[identity]
            if seen is None:
                raise _NotDescribedError  # It contains itself.
            self.form += (kind, _AGAIN, seen)
            return
        number = len(self.containers)
        self.containers[identity] = None
        self._add_members(kind, value)
        self.containers[identity] = number

    def _add_members(self, kind: type, value: object) -> None:
        self.form.append(kind)
        if kind is dict or kind is OrderedDict:
            items = cast("dict[object, object]", value)
            self.form.append(len(items))
            form = self.form
            for key, item in items.items():
                # Nearly all of them are such, and there are thousands.
                if type(key) is str and key.isascii():
                    form += (str, key)
                else:
                    self.add(key)
                if type(item) is torch.Tensor:
                    self._add_tensor(item)
                else:
                    self.add(item)
            if kind is OrderedDict:
                # The versions of a module's layers are an attribute of its state_dict.
                attributes = value.__dict__
                self.form.append(bool(attributes))
                if attributes:
                    self.add(attributes)
        else:
            members = cast("list[object]", value)
            self.form.append(len(members))
            for item in members:
                self.add(item)

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        # Every line of this is run for thousands of tensors while training waits.
        device = tensor.device
        if device != _CPU and device.type != "cuda":
            raise _NotDescribedError
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise _NotDescribedError
        if tensor.is_conj() or tensor.is_neg():
            raise _NotDescribedError
        if tensor.__dict__ or tensor._backward_hooks:  # noqa: SLF001 - torch pickles them
            raise _NotDescribedError
        storage = tensor.untyped_storage()
        identity = storage._cdata  # noqa: SLF001 - by which torch tells storages apart
        size = storage.nbytes()
        number = self.numbers.get(identity)
        if number is None:
            number = self.numbers[identity] = len(self.numbers)
            if size:
                self.storages[identity] = storage
        if size >= LARGE:
            self.large.append(tensor)
        self.form += (
            type(tensor),
            self.tensors.setdefault(id(tensor), len(self.tensors)),
            number,
            size,
            tensor.dtype,
            device,
            tensor.requires_grad,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )


def _is_unicode(text: str) -> bool:
    """Return False for half of a pair, which names of files can have, and torch can't read."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class _Places:
    """Where the floats of a pickle lie, and how long it is."""

    length: int
    floats: tuple[int, ...]


@dataclass(frozen=True)
class _Kept:
    """A template and the state that it was made from."""

    template: Template
    form: list[object]
    floats: list[bytes]
    # Where each float lies in the file; found out when one changes for the first time.
    places: _Places | None = None


class Templates:
    """The templates of the last save, by the name of the file."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def image(self, name: str, state: object, description: Description | None) -> Image | None:
        """Return the image of the file that torch would write of a state; None if unsure.

        Args:
            name: Under which the file was saved before and will be again.
            state: What torch can pickle.
            description: Of the state, if it can be described.
        """
        if description is not None:
            kept = self._kept.get(name)
            if kept is not None and kept.form == description.form:
                kept = _with_floats(kept, description.floats)
                if kept is not None:
                    self._kept[name] = kept
                    return image_of(kept.template, description.storages.values())
        made = make_template(state)
        if made is None:
            return None
        template, storages = made
        if description is not None and [s._cdata for s in storages] == [*description.storages]:  # noqa: SLF001
            self._kept[name] = _Kept(template, description.form, description.floats)
        return image_of(template, storages)


def describe(state: object) -> Description | None:
    """Return the description of a state, or None if there is something special in it.

    What can be described, tensors-only loading takes in every release of torch.
    """
    description = Description()
    try:
        description.add(state)
    except (_NotDescribedError, RuntimeError):
        # A RuntimeError comes of nesting too deep, and of tensors without sizes or storage.
        return None
    return description


def _with_floats(kept: _Kept, floats: list[bytes]) -> _Kept | None:
    """Return the template of the same state with other floats; None if unsure."""
    if floats == kept.floats:
        return kept
    fixed = dict(kept.template.fixed)
    head = bytearray(fixed[0])
    # `data.pkl` is the first record.
    name, extra = LOCAL_HEADER.unpack_from(head)
    start = LOCAL_HEADER.size + name + extra
    places = kept.places or _places_of_floats(bytes(head[start:]), kept.floats)
    if places is None:
        return None
    for place, value in zip(places.floats, floats, strict=True):
        head[start + place : start + place + _FLOAT.size] = value
    fixed[0] = bytes(head)
    stop = start + places.length
    checksum = struct.pack("<I", zlib.crc32(head[start:stop]))
    if not _set_checksum(fixed, bytes(head[LOCAL_HEADER.size :][:name]), stop, checksum):
        return None
    template = replace(kept.template, fixed=sorted(fixed.items()))
    return replace(kept, template=template, floats=floats, places=places)


def _places_of_floats(pickled: bytes, floats: list[bytes]) -> _Places | None:
    found = []
    length = 0
    # It ends at the opcode STOP, whatever follows in `pickled`.
    for opcode, value, position in pickletools.genops(pickled):
        length = cast("int", position) + 1
        if opcode.name == "BINFLOAT":
            found.append((length, _FLOAT.pack(cast("float", value))))
    if [value for _, value in found] != floats:
        return None
    return _Places(length, tuple(place for place, _ in found))


def _set_checksum(fixed: dict[int, bytes], name: bytes, stop: int, checksum: bytes) -> bool:
    """Put the checksum of `data.pkl` where zip has it: behind the record and in the index."""
    last = max(fixed)
    index = bytearray(fixed[last])
    entry = index.rfind(name) - _INDEX_ENTRY_SIZE
    if entry < 0 or index[entry : entry + 4] != b"PK\x01\x02":
        return False
    index[entry + 16 : entry + 20] = checksum
    fixed[last] = bytes(index)
    head = bytearray(fixed[0])
    if head[stop : stop + 4] != b"PK\x07\x08":
        return False
    head[stop + 4 : stop + 8] = checksum
    fixed[0] = bytes(head)
    return True
