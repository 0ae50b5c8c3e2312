"""Values that torch's tensors-only unpickler refuses, as small dictionaries of plain things.

Each has the key `TAG`, which says what it is. Only the types listed here are made from what a file
says; no name in a file is ever imported.
"""

from __future__ import annotations

import datetime as dt
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import torch

from lightning_sbckpt._format import omega
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError, SBCheckpointError

TAG = "__lightning_sbckpt__"

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_PURE_PATHS = {"PurePosixPath": PurePosixPath, "PureWindowsPath": PureWindowsPath}
_FACTORIES: dict[str, Callable[[], object]] = {
    each.__name__: each for each in (dict, list, set, tuple, int, float, bool, str)
}
_NUMPY_KINDS = "biufcmMSU"


def to_plain(value: object) -> object:
    """Return a value as a plain dictionary if it is of a type that is known here, else itself.

    What is in the dictionary may need to be made plain in turn.

    Example:
        >>> to_plain(dt.timedelta(hours=1))["seconds"]
        3600
    """
    kind = type(value)
    if kind in _SCALARS:
        # Empty bytes are pickled as a call of `bytes`, which torch doesn't take.
        return value if value != b"" else {TAG: "no bytes"}
    if kind is dict:
        # One that looks like ours.
        fields: Any = value
        return {TAG: "mapping", "items": list(fields.items())} if TAG in fields else value
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(value)
    if isinstance(value, type):
        name = omega.name_of(value)
        return value if name is None else {TAG: "type", "name": name}
    if kind.__module__ == "numpy":
        return _numpy(value)
    if kind.__module__.partition(".")[0] == "omegaconf":
        described = omega.describe(value)
        return value if described is None else {TAG: "omegaconf", **described}
    return value


def from_plain(value: object, *, trusted: bool) -> object:
    """Undo `to_plain` for one dictionary; anything else is returned as it is.

    Args:
        value: The value; what is in it has been read already.
        trusted: Whether values may be made that call functions of the program when they are looked
            at, as OmegaConf's resolvers.

    Raises:
        DamagedCheckpointError: The dictionary does not describe a value.
        MismatchError: It describes one of a type that this release doesn't know.
        UntrustedPickleError: It is not trusted enough.
    """
    if type(value) is not dict or TAG not in value:
        return value
    tag = value[TAG]
    decoder = _DECODERS.get(tag) if isinstance(tag, str) else None
    try:
        if tag == "omegaconf":
            return omega.make(value, trusted=trusted)
        if decoder is not None:
            return decoder(value)
    except SBCheckpointError:
        raise
    except Exception as error:
        raise DamagedCheckpointError(
            f"a value in the file that is said to be a {tag} is none: {error}. The file is damaged; "
            "recover from another checkpoint"
        ) from error
    raise MismatchError(
        f"a value in the file is of a kind that this release doesn't know ({str(tag)[:60]!r}): use the "
        "release of lightning-sbckpt that wrote it, or a newer one"
    )


def _path(value: object) -> object:
    return {TAG: "path", "path": str(value)}


def _pure_path(value: object) -> object:
    return {TAG: "pure path", "kind": type(value).__name__, "path": str(value)}


def _set(value: Any) -> object:
    # Torch knows sets, with what is plain in them.
    return value if all(type(each) in _SCALARS for each in value) else _frozenset(value)


def _frozenset(value: Any) -> object:
    return {TAG: type(value).__name__, "items": list(value)}


def _time(value: Any) -> object:
    return {
        TAG: "time",
        "fields": [value.hour, value.minute, value.second, value.microsecond],
        "fold": value.fold,
        "tzinfo": value.tzinfo,
    }


def _datetime(value: Any) -> object:
    return {**_dict(_time(value)), TAG: "datetime", "date": [value.year, value.month, value.day]}


def _timedelta(value: Any) -> object:
    return {
        TAG: "timedelta",
        "days": value.days,
        "seconds": value.seconds,
        "microseconds": value.microseconds,
    }


def _defaultdict(value: Any) -> object:
    factory = value.default_factory
    name = getattr(factory, "__name__", "")
    if factory is not None and _FACTORIES.get(name) is not factory:
        return value
    return {TAG: "defaultdict", "factory": name, "items": dict(value)}


def _numpy(value: Any) -> object:
    import numpy as np

    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind not in _NUMPY_KINDS:
        return value
    array = np.ascontiguousarray(value)
    # As bytes: torch has no type for some of numpy's, and the byte order is part of the type.
    buffer = bytearray(array.tobytes())
    none = torch.empty(0, dtype=torch.uint8, device="cpu")
    data = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else none
    tag = "ndarray" if isinstance(value, np.ndarray) else "scalar"
    return {TAG: tag, "dtype": value.dtype.str, "shape": list(value.shape), "data": data}


def _from_numpy(fields: dict[str, Any]) -> object:
    import numpy as np

    array = np.frombuffer(fields["data"].numpy().tobytes(), dtype=np.dtype(str(fields["dtype"])))
    array = array.reshape(fields["shape"]).copy()
    return array if fields[TAG] == "ndarray" else array[()]


def _from_namespace(fields: dict[str, Any]) -> object:
    items = _dict(fields["items"])
    if fields[TAG] == "simple namespace":
        return SimpleNamespace(**items)
    made = Namespace()
    # The dictionary itself: it is not complete yet if it contains the namespace.
    made.__dict__ = items
    return made


def _from_time(fields: dict[str, Any]) -> object:
    more = {"fold": fields["fold"], "tzinfo": fields["tzinfo"]}
    if fields[TAG] == "datetime":
        return dt.datetime(*fields["date"], *fields["fields"], **more)  # noqa: DTZ001
    return dt.time(*fields["fields"], **more)


def _from_timezone(fields: dict[str, Any]) -> object:
    offset, name = fields["offset"], fields["name"]
    return dt.timezone(offset) if name is None else dt.timezone(offset, name)


def _timezone(value: Any) -> object:
    offset, *name = value.__getinitargs__()
    return {TAG: "timezone", "offset": offset, "name": name[0] if name else None}


def _from_defaultdict(fields: dict[str, Any]) -> object:
    name = fields["factory"]
    return defaultdict(_FACTORIES[name] if name else None, _dict(fields["items"]))


def _dict(value: object) -> dict[Any, Any]:
    if type(value) is not dict:
        raise TypeError(f"expected a dictionary, found a {type(value).__qualname__}")
    return value


_ENCODERS: dict[type, Callable[[Any], object]] = {
    type(Path()): _path,
    PurePosixPath: _pure_path,
    PureWindowsPath: _pure_path,
    set: _set,
    frozenset: _frozenset,
    dt.datetime: _datetime,
    dt.time: _time,
    dt.date: lambda value: {TAG: "date", "date": [value.year, value.month, value.day]},
    dt.timedelta: _timedelta,
    dt.timezone: _timezone,
    Namespace: lambda value: {TAG: "namespace", "items": vars(value)},
    SimpleNamespace: lambda value: {TAG: "simple namespace", "items": vars(value)},
    defaultdict: _defaultdict,
    deque: lambda value: {TAG: "deque", "items": list(value), "maxlen": value.maxlen},
    range: lambda value: {TAG: "range", "range": [value.start, value.stop, value.step]},
    slice: lambda value: {TAG: "slice", "slice": [value.start, value.stop, value.step]},
    Decimal: lambda value: {TAG: "decimal", "text": str(value)},
    UUID: lambda value: {TAG: "uuid", "hex": value.hex},
    type(Ellipsis): lambda _: {TAG: "ellipsis"},
}

_DECODERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no bytes": lambda _: b"",
    "mapping": lambda fields: dict(fields["items"]),
    "path": lambda fields: Path(str(fields["path"])),
    "pure path": lambda fields: _PURE_PATHS[fields["kind"]](str(fields["path"])),
    "set": lambda fields: set(fields["items"]),
    "frozenset": lambda fields: frozenset(fields["items"]),
    "datetime": _from_time,
    "time": _from_time,
    "date": lambda fields: dt.date(*fields["date"]),
    "timedelta": lambda fields: dt.timedelta(
        fields["days"], fields["seconds"], fields["microseconds"]
    ),
    "timezone": _from_timezone,
    "namespace": _from_namespace,
    "simple namespace": _from_namespace,
    "defaultdict": _from_defaultdict,
    "deque": lambda fields: deque(fields["items"], fields["maxlen"]),
    "range": lambda fields: range(*fields["range"]),
    "slice": lambda fields: slice(*fields["slice"]),
    "decimal": lambda fields: Decimal(str(fields["text"])),
    "uuid": lambda fields: UUID(hex=fields["hex"]),
    "ellipsis": lambda _: ...,
    "ndarray": _from_numpy,
    "scalar": _from_numpy,
    "type": lambda fields: omega.type_named(fields["name"]),
}
