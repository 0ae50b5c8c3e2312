"""Values that PyYAML's full dumper wrote: numbers of numpy's and torch's, tuples, ordered dictionaries.

SpeechBrain writes its meta by `yaml.dump`, which tells how such a value is made anew in Python. Here
that is never done. For a short list of names the value is worked out from the bytes and numbers that
are written there, as a plain one; any other name is refused, as it is by the safe loader.

Sources: PyYAML's `representer.py` and `constructor.py`; `__reduce__` of numpy's scalars, arrays and
dtypes; `torch/_utils.py` and the legacy format of `torch/serialization.py`, in which a storage is
pickled.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, cast

import yaml

from lightning_sbckpt._io.lazy import is_tensor, torch

_TAG = "tag:yaml.org,2002:python/"
# Kind and width as numpy writes them, and what the struct module calls the same.
_NUMBERS = {
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}
_COMPLEX = {"c8": "f", "c16": "d"}
_TEXT = re.compile(r"([US])([0-9]{1,7})")
_STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
# The first pickles of a file of torch's legacy format: a magic number, a version, some sizes, the
# storage and the keys of storages. Then come a count and the bytes.
_PICKLES = 5
_STORAGE_AT = 3
_MOST_DIMENSIONS = 32
# Of the code of a dtype, the name of a device, a path.
_LONGEST = 4096


class Part(NamedTuple):
    """What is no value itself, but part of how one is written; a dtype, a storage or a name."""

    what: str
    detail: object = None
    data: bytes = b""


def add_constructors(loader: Any) -> None:
    """Have a safe loader class read such values, too.

    Args:
        loader: The class of the safe loader.
    """
    loader.add_constructor(f"{_TAG}tuple", lambda made, node: tuple(_items(made, node)))
    loader.add_constructor(f"{_TAG}list", _items)
    loader.add_constructor(
        f"{_TAG}dict", lambda made, node: made.construct_mapping(node, deep=True)
    )
    loader.add_constructor(f"{_TAG}none", lambda made, node: made.construct_yaml_null(node))
    loader.add_constructor(f"{_TAG}bool", lambda made, node: made.construct_yaml_bool(node))
    loader.add_constructor(f"{_TAG}int", lambda made, node: made.construct_whole_number(node))
    loader.add_constructor(f"{_TAG}float", lambda made, node: made.construct_yaml_float(node))
    for name in ("complex", "str"):  # A plain value has no complex numbers.
        loader.add_constructor(f"{_TAG}{name}", lambda made, node: made.construct_scalar(node))
    loader.add_multi_constructor(f"{_TAG}name:", _name)
    loader.add_multi_constructor(f"{_TAG}object/apply:", _apply)


def is_long_key(node: yaml.Node) -> bool:
    """Return whether a key is a tuple of more than a few scalars."""
    return node.tag == f"{_TAG}tuple" and (
        len(node.value) > _MOST_DIMENSIONS
        or not all(isinstance(item, yaml.ScalarNode) for item in node.value)
    )


def _items(loader: Any, node: yaml.Node) -> list[object]:
    return cast("list[object]", loader.construct_sequence(node, deep=True))


def _name(_: object, name: str, node: yaml.Node) -> Part:
    return Part("name", f"{name} at {node.start_mark}")


def _apply(loader: Any, name: str, node: yaml.Node) -> object:
    make = _MAKERS.get(name)
    if make is None:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"could not determine a constructor for the tag {node.tag!r}",
            node.start_mark,
        )
    if isinstance(node, yaml.SequenceNode):
        return make(_items(loader, node), {})
    fields = loader.construct_mapping(node, deep=True)
    return make(fields.pop("args", []), fields)


# ---------------------------------------------------------------------- numpy


def _dtype(args: Sequence[object], fields: Mapping[str, object]) -> Part:
    state = fields.get("state", (3, "<"))
    order = cast("Sequence[object]", state)[1]
    return Part("dtype", (_short(args[0]), ">" if order == ">" else "<"))


def _numpy_scalar(args: Sequence[object], _: object) -> object:
    dtype, data = args
    return _numbers(cast("Part", dtype), _bytes(data), 1)[0]


def _numpy_array(_: object, fields: Mapping[str, object]) -> object:
    _, shape, dtype, by_columns, data = cast("Sequence[Any]", fields["state"])
    lengths, count = _shape(shape)
    values = _numbers(dtype, _bytes(data), count)
    if len(values) == 1:
        return values[0]
    if any(isinstance(value, str) for value in values):
        return values if len(lengths) == 1 else [lengths, values]
    tensor = torch.tensor(values, dtype=_dtype_of(dtype), device="cpu")
    if not count:
        return tensor
    if by_columns:
        return tensor.reshape(lengths[::-1]).permute(*reversed(range(len(lengths)))).contiguous()
    return tensor.reshape(lengths)


def _shape(given: object) -> tuple[list[int], int]:
    """Return lengths, and how many elements there are."""
    lengths = _sizes(given)
    return lengths, math.prod(lengths)


def _sizes(given: object) -> list[int]:
    if not isinstance(given, (list, tuple)) or len(given) > _MOST_DIMENSIONS:
        raise ValueError("no value of a meta has that shape")
    # One of no length lets the others be anything, which is then counted through by whoever prints.
    if not all(isinstance(n, int) and 0 <= n < 2**31 for n in given):
        raise ValueError("no value of a meta has that shape")
    return list(given)


def _short(given: object) -> str:
    # What aliases have made long can be made longer by each step that joins it.
    if not isinstance(given, str) or len(given) > _LONGEST:
        raise ValueError("something else stands in the place of a short text")
    return given


def _dtype_of(dtype: Part) -> torch.dtype | None:
    code = str(cast("Sequence[object]", dtype.detail)[0])
    return {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}.get(code)


def _numbers(dtype: Part, data: bytes, count: int) -> list[Any]:
    if dtype.what != "dtype":
        raise ValueError("something else stands in the place of a dtype")
    code, order = cast("tuple[str, str]", dtype.detail)
    text = _TEXT.fullmatch(code)
    width = int(text[2]) * (4 if text[1] == "U" else 1) if text else int(code[1:])
    if width * count != len(data):
        raise ValueError(f"{count} of {code} don't have {len(data)} bytes")
    if text:
        encoding = "latin-1" if text[1] == "S" else f"utf-32-{'be' if order == '>' else 'le'}"
        texts = [data[i * width : (i + 1) * width] for i in range(count)]
        return [part.decode(encoding).rstrip("\0") for part in texts]
    if code in _COMPLEX:
        parts = struct.unpack(f"{order}{2 * count}{_COMPLEX[code]}", data)
        return [str(complex(*pair)) for pair in zip(parts[::2], parts[1::2], strict=True)]
    if code == "f16":
        return [_extended(data[i : i + 16]) for i in range(0, len(data), 16)]
    return list(struct.unpack(f"{order}{count}{_NUMBERS[code]}", data))


def _extended(data: bytes) -> float:
    """Return a number of 80 bits, as x86 has them, as one of 64."""
    mantissa, exponent = struct.unpack("<QH", data[:10])
    sign = -1.0 if exponent & 0x8000 else 1.0
    exponent &= 0x7FFF
    if exponent == 0x7FFF:
        return sign * math.inf if mantissa == 1 << 63 else math.nan
    try:
        return sign * math.ldexp(mantissa, exponent - 16383 - 63)
    except OverflowError:
        return sign * math.inf


def _bytes(data: object) -> bytes:
    if not isinstance(data, bytes):
        raise TypeError("something else stands in the place of bytes")
    return data


# ---------------------------------------------------------------------- torch


def _storage(args: Sequence[object], _: object) -> Part:
    data = _bytes(args[0])
    begin, names = 0, ""
    for number in range(_PICKLES):
        # This takes a pickle apart and runs nothing of it.
        for code, argument, at in pickletools.genops(data[begin:]):
            if number == _STORAGE_AT and code.name == "GLOBAL":
                names = str(argument)
            end = at or 0
        begin += end + 1
    dtype = getattr(torch, _STORAGES[names])
    (count,) = struct.unpack_from("<q", data, begin)
    numbers = data[begin + 8 :]
    if count < 0 or count * dtype.itemsize != len(numbers):
        raise ValueError("a storage has another length than it says")
    return Part("storage", dtype, numbers)


def _tensor(args: Sequence[object], _: object) -> object:
    storage, start, shape, stride = cast("tuple[Part, object, object, object]", args[:4])
    if storage.what != "storage":
        raise ValueError("something else stands in the place of a storage")
    dtype = cast("torch.dtype", storage.detail)
    held = len(storage.data) // dtype.itemsize
    size, count = _shape(shape)
    if not count:
        return torch.zeros(0, dtype=dtype, device="cpu")
    (offset,), steps = _sizes([start]), _sizes(stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, steps, strict=True))
    if count > held or last >= held:
        raise ValueError("a tensor reaches beyond its storage")
    flat = torch.frombuffer(bytearray(storage.data), dtype=dtype)
    tensor = flat.as_strided(size, steps, offset)
    return tensor.item() if count == 1 else tensor.clone()


def _parameter(args: Sequence[object], _: object) -> object:
    if not (is_tensor(args[0]) or isinstance(args[0], (int, float))):
        raise TypeError("something else stands in the place of a tensor")
    return args[0]


def _device(args: Sequence[object], _: object) -> str:
    kind, *index = args
    return ":".join([_short(kind), *(str(number) for number in _sizes(index))])


# ---------------------------------------------------------------------- Python's own


def _mapping(args: Sequence[object], fields: Mapping[str, object]) -> dict[object, object]:
    # The first argument of a defaultdict is what makes a missing value: nothing is to be made.
    given = args[0] if args and not isinstance(args[0], Part) else {}
    pairs = given.items() if isinstance(given, dict) else cast("Any", given)
    if any(isinstance(key, tuple) for key, _ in pairs):
        raise TypeError("a tuple is the key of a value")
    return {**dict(pairs), **cast("Any", fields.get("dictitems", {}))}


def _sequence(args: Sequence[object], fields: Mapping[str, object]) -> list[object]:
    given = fields["listitems"] if "listitems" in fields else args[0] if args else []
    if not isinstance(given, (list, tuple)):
        raise TypeError("something else stands in the place of a list")
    return list(given)


def _path(args: Sequence[object], _: object) -> str:
    return _short(str(PurePosixPath(*map(_short, args))))


_MAKERS: dict[str, Callable[[Sequence[object], Mapping[str, object]], object]] = {
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _sequence,
    "torch.device": _device,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "collections.Counter": _mapping,
    "collections.deque": _sequence,
    "builtins.frozenset": _sequence,
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib._local.PosixPath": _path,
}
