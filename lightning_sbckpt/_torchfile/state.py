"""State as a file that `torch.load(..., weights_only=True)` reads, and what can't be in one.

A state (what `state_dict()` returns, say) is written as it is wherever torch's tensors-only
unpickler takes it. numpy arrays, numpy scalars, paths and empty bytes are written as small dictionaries of plain
things and become themselves again when read here. Whatever is left only pickle can hold: it goes
into a file of its own beside the first, `<name>+pickled.ckpt`, which is read only under
`trusting_pickle`.
"""

from __future__ import annotations

import io
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import cast

import torch

from lightning_sbckpt._torchfile.reading import TAG, Where, pickled_path

logger = logging.getLogger("lightning_sbckpt")

_warned: set[tuple[str, str]] = set()


def save_state(state: object, path: Path) -> None:
    """Write a state to `path`, and what only pickle can hold beside it, saying so once.

    Args:
        state: Anything; dictionaries, lists and tuples are looked into.
        path: The file to write.
    """
    encoded, pickled = encode(state)
    torch.save(encoded, path)
    if pickled:
        torch.save(pickled, pickled_path(path))
        say_what_is_pickled(path, pickled)


def say_what_is_pickled(path: Path, pickled: Mapping[Where, object]) -> None:
    """Warn of what will be read back only when the user trusts it."""
    for where, value in pickled.items():
        # Once per place and process: a warning at every save would hide the others.
        seen = (path.name, _spell(where))
        if seen not in _warned:
            _warned.add(seen)
            logger.warning(
                "%s: %s is a %s, which only pickle can hold; it is saved in %s and will be "
                "read back only with trust_pickle=True",
                path.stem,
                _spell(where),
                type(value).__qualname__,
                pickled_path(path).name,
            )


def _is_plain(skeleton: object) -> bool:
    """Ask torch's own unpickler, since what it takes differs from release to release."""
    buffer = io.BytesIO()
    try:
        torch.save(skeleton, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:
        return False
    return True


def encode(state: object) -> tuple[object, dict[Where, object]]:
    """Return what tensors-only loading takes, with None for what it doesn't, and that by place."""
    pickled: dict[Where, object] = {}
    encoded = _rewrite(state)
    if not _is_plain(_skeleton(encoded)):
        encoded = _extract(encoded, (), pickled)
    return encoded, pickled


def _rewrite(value: object) -> object:
    """Return `value` with numpy things and paths as plain dictionaries; containers are new."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        items = cast("dict[object, object]", value).items()
        # Keys stay: what they would become can't be one.
        rewritten = kind((key, _rewrite(item)) for key, item in items)
        if kind is OrderedDict:
            # A module's state_dict carries the versions of its layers as an attribute.
            rewritten.__dict__.update(value.__dict__)
        return rewritten
    if kind in (list, tuple):
        return kind(_rewrite(item) for item in cast("list[object]", value))
    if kind.__module__ == "numpy":
        return _rewrite_numpy(value)
    if kind is bytes and not value:
        # Pickled as a call of `bytes`, which torch doesn't take.
        return {TAG: "no bytes"}
    if isinstance(value, PurePath):
        return {TAG: "path", "path": str(value)}
    return value


def _rewrite_numpy(value: object) -> object:
    import numpy as np

    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcmMSU":
        array = np.ascontiguousarray(value)
        # As bytes: torch has no type for some of numpy's, and the byte order is part of the type.
        buffer = bytearray(array.tobytes())
        data = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0).byte()
        tag = "ndarray" if isinstance(value, np.ndarray) else "scalar"
        return {TAG: tag, "dtype": value.dtype.str, "shape": list(value.shape), "data": data}
    return value


def _skeleton(value: object) -> object:
    """Return `value` without the tensors' data, so that it can be tried in microseconds."""
    kind = type(value)
    if kind in (torch.Tensor, torch.nn.Parameter) and not vars(value):
        return None
    if kind in (dict, OrderedDict):
        items = cast("dict[object, object]", value).items()
        return kind((key, _skeleton(item)) for key, item in items)
    if kind in (list, tuple):
        return kind(_skeleton(item) for item in cast("list[object]", value))
    return value


def _extract(value: object, where: Where, pickled: dict[Where, object]) -> object:
    if _is_plain(_skeleton(value)):
        return value
    kind = type(value)
    if kind in (dict, OrderedDict):
        mapping = cast("dict[object, object]", value)
        if all(_is_plain(key) for key in mapping):
            items = mapping.items()
            return kind((key, _extract(item, (*where, key), pickled)) for key, item in items)
    if kind in (list, tuple):
        numbered = enumerate(cast("list[object]", value))
        return kind(_extract(item, (*where, index), pickled) for index, item in numbered)
    pickled[where] = value
    return None


def _spell(where: Where) -> str:
    return "".join(f"[{step!r}]" for step in where) or "its whole state"
