"""Any value as short plain data that is the same from process to process.

What an experiment is told by is compared between two starts of it: a text with an address, the order
of a set, or the values of a large tensor must not make a difference where there is none.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

__all__ = ["class_path", "content_digest", "digest_of", "rendered"]

_LONGEST_TEXT = 200
_LONGEST_VALUE = 1000
_DEEPEST = 6
_MOST_PARTS = 2000
_SAMPLES = 256
_ADDRESS = re.compile(r"\b(at )?0x[0-9a-fA-F]+")
_NUMBERS = (bool, int, float, type(None))
# What is at work inside an object, and no part of what it is.
_MACHINERY = (torch.Generator, np.random.Generator, np.random.RandomState)


def class_path(kind: Any) -> str:
    """Return a class or function by its module and name; that of a script by the script's name.

    Example:
        >>> class_path(dict)
        'dict'
        >>> class_path(torch.nn.Linear)
        'torch.nn.modules.linear.Linear'
    """
    name = getattr(kind, "__qualname__", None) or type(kind).__qualname__
    module = getattr(kind, "__module__", None) or ""
    if module in ("__main__", "__mp_main__"):
        main = sys.modules.get("__main__")
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else "__main__"
    return name if module in ("", "builtins") else f"{module}.{name}"


def digest_of(value: object) -> str:
    """Return a short digest of the text of plain data.

    Example:
        >>> digest_of({"lr": 0.1}) == digest_of({"lr": 0.1})
        True
    """
    return hashlib.blake2b(repr(value).encode(errors="replace"), digest_size=8).hexdigest()


def rendered(value: object) -> Any:
    """Return a value as plain data: short, and equal in every process for equal values.

    Numbers and short texts are as they are, containers hold what is rendered, and the rest is
    described. What would be long is its beginning and a digest.

    Example:
        >>> rendered({"lr": 0.1, "layers": (64, 64), "tags": {"b", "a"}})
        {'lr': 0.1, 'layers': [64, 64], 'tags': ['a', 'b']}
        >>> rendered(torch.nn.ReLU)
        'torch.nn.modules.activation.ReLU'
    """
    plain = _Renderer().render(value, 0)
    text = repr(plain)
    if len(text) > _LONGEST_VALUE:
        return f"{text[:_LONGEST_TEXT]}... ({digest_of(text)})"
    return plain


class _Renderer:
    """Renders one value, of no more parts than can be looked at in no time."""

    def __init__(self) -> None:
        self._parts = 0

    def render(self, value: Any, depth: int) -> Any:
        self._parts += 1
        if depth > _DEEPEST or self._parts > _MOST_PARTS:
            return "..."
        if isinstance(value, enum.Enum):
            return f"{type(value).__name__}.{value.name}"
        if type(value) in _NUMBERS:
            return value
        try:
            return self._render_other(value, depth)
        except Exception:
            # A property or a `__repr__` of the user's that fails here is none of the experiment's.
            return class_path(type(value))

    def _render_other(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return _short(str(value))
        if isinstance(value, (np.generic, bool, int, float)):
            number = value.item() if isinstance(value, np.generic) else value
            return number if type(number) in _NUMBERS else repr(number)
        if isinstance(value, PurePath):
            return value.as_posix()
        if isinstance(value, (bytes, bytearray)):
            return f"{len(value)} bytes {hashlib.blake2b(value, digest_size=8).hexdigest()}"
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return f"{_kind_of_array(value)} {content_digest(value)}"
        if type(value).__module__.startswith("omegaconf"):
            value = sys.modules["omegaconf"].OmegaConf.to_container(value, resolve=False)
        if isinstance(value, functools.partial):
            found = {"partial": value.func, "args": value.args, **value.keywords}
            return self.render(found, depth)
        if isinstance(value, Mapping):
            return {str(key): self.render(each, depth + 1) for key, each in value.items()}
        if isinstance(value, AbstractSet):
            return sorted((self.render(each, depth + 1) for each in value), key=repr)
        if isinstance(value, Sequence):
            return [self.render(each, depth + 1) for each in islice(value, _MOST_PARTS)]
        return self._render_object(value, depth)

    def _render_object(self, value: Any, depth: int) -> Any:
        if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
            return class_path(value)
        kind = class_path(type(value))
        if isinstance(value, torch.nn.Module):
            shapes = [(name, tuple(p.shape)) for name, p in value.named_parameters()]
            return f"{kind} {digest_of(shapes)}"
        if is_dataclass(value):
            state = {field.name: getattr(value, field.name) for field in fields(value)}
        else:
            state = getattr(value, "__dict__", {})
        public = {key: each for key, each in state.items() if not str(key).startswith("_")}
        if public:
            return {"class": kind, **self.render(public, depth)}
        has_text = getattr(type(value), "__repr__", None) is not object.__repr__
        return _short(_ADDRESS.sub("", repr(value))) if has_text else kind


def _short(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}... ({len(text)} characters, {digest_of(text)})"


def _kind_of_array(value: Any) -> str:
    return f"{type(value).__name__} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def content_digest(value: object) -> str:
    """Return a digest of what a dataset or a sampler holds, by samples of it.

    No method of the object is called and no item asked for, which may draw random numbers. Of paths
    only the last part counts, since data may lie elsewhere in every job.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> ones, zeros = TensorDataset(torch.ones(8)), TensorDataset(torch.zeros(8))
        >>> content_digest(ones) == content_digest(TensorDataset(torch.ones(8)))
        True
        >>> content_digest(ones) == content_digest(zeros)
        False
    """
    digest = hashlib.blake2b(digest_size=8)
    for piece in islice(_pieces(value, 0), _MOST_PARTS * 2):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any, depth: int) -> Iterator[bytes]:
    """Yield what is hashed of a value, in an order that is always the same."""
    if isinstance(value, str):
        yield value.rsplit(os.sep, 1)[-1].encode(errors="replace")
    elif isinstance(value, (*_NUMBERS, bytes, np.generic)):
        yield repr(value).encode()[:4096]
    elif isinstance(value, PurePath):
        yield value.name.encode(errors="replace")
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        yield from _pieces_of_array(value, depth)
    else:
        yield class_path(type(value)).encode()
        if depth < _DEEPEST and not isinstance(value, (*_MACHINERY, torch.nn.Module)):
            yield from _pieces_inside(value, depth)


def _pieces_of_array(value: Any, depth: int) -> Iterator[bytes]:
    yield _kind_of_array(value).encode()
    if isinstance(value, torch.Tensor):
        plain = value.layout is torch.strided and value.device.type != "meta"
        if not plain or value.is_quantized or not value.numel():
            return
        flat = value.detach().reshape(-1) if value.is_contiguous() else value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)]
        # Through float64, since numpy has not all of torch's kinds.
        sample = torch.view_as_real(sample) if sample.is_complex() else sample
        yield sample.to("cpu", torch.float64).contiguous().numpy().tobytes()
        return
    sample = value.flat[:: max(1, value.size // _SAMPLES)] if value.size else value
    if value.dtype.hasobject:
        for each in sample:
            yield from _pieces(each, depth + 1)
    else:
        yield np.ascontiguousarray(sample).tobytes()


def _pieces_inside(value: Any, depth: int) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        yield str(len(value)).encode()
        for key in sorted(islice(value, _MOST_PARTS), key=repr)[:_SAMPLES]:
            yield str(key).encode(errors="replace")
            yield from _pieces(value[key], depth + 1)
    elif isinstance(value, (list, tuple, range)):
        yield str(len(value)).encode()
        for each in value[:: max(1, len(value) // _SAMPLES)]:
            yield from _pieces(each, depth + 1)
    elif isinstance(value, AbstractSet):
        yield str(len(value)).encode()
    elif not callable(value) or hasattr(value, "__getitem__"):
        for name, each in sorted(getattr(value, "__dict__", {}).items()):
            # A counter or a cache is no content.
            if not (name.startswith("_") and isinstance(each, (*_NUMBERS, str))):
                yield name.encode()
                yield from _pieces(each, depth + 1)


def shown(value: object) -> str:
    """Return plain data in few characters, for a message.

    Example:
        >>> shown(0.1), shown("adam")
        ('0.1', "'adam'")
    """
    return reprlib.repr(value)
