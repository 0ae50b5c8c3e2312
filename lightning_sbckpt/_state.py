"""State as a file that `torch.load(..., weights_only=True)` reads, and what can't be in one.

A state (what `state_dict()` returns, say) is written as it is wherever torch's tensors-only
unpickler takes it. numpy arrays, numpy scalars and paths are written as small dictionaries of plain
things and become themselves again when read here. Whatever is left only pickle can hold: it goes
into a file of its own beside the first, `<name>+pickled.ckpt`, which is read only under
`trusting_pickle`.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePath
from typing import cast

import torch

from lightning_sbckpt.errors import DamagedCheckpointError, UntrustedPickleError

logger = logging.getLogger("lightning_sbckpt")

PICKLED_SUFFIX = "+pickled"
_TAG = "__lightning_sbckpt__"
_Where = tuple[object, ...]

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)
_warned: set[tuple[str, str]] = set()


@contextmanager
def trusting_pickle(trust: bool = True) -> Iterator[None]:
    """Read pickled state inside the block: this can run any code that the file's author chose.

    Args:
        trust: False changes nothing: what was trusted outside is trusted inside.

    Example:
        >>> with trusting_pickle():
        ...     pass  # checkpointer.recover_if_possible()
    """
    token = _trusted.set(trust or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def pickled_path(path: Path) -> Path:
    """Return the file beside `path` that holds what only pickle can hold."""
    return path.with_name(f"{path.stem}{PICKLED_SUFFIX}{path.suffix}")


def save_state(state: object, path: Path) -> None:
    """Write a state to `path`, and what only pickle can hold beside it, saying so once.

    Args:
        state: Anything; dictionaries, lists and tuples are looked into.
        path: The file to write.
    """
    pickled: dict[_Where, object] = {}
    torch.save(_encode(state, (), pickled), path)
    if pickled:
        torch.save(pickled, pickled_path(path))
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


def load_state(path: Path, *, missing_pickled: list[str] | None = None) -> object:
    """Return the state in `path`, its tensors on the CPU; no pickle is executed unless trusted.

    Args:
        path: A file written by `save_state` or by `torch.save`.
        missing_pickled: If given, a state with parts that only pickle holds is returned without
            them, and their places are added to this list; otherwise such a state is refused.

    Returns:
        The state.

    Raises:
        UntrustedPickleError: The file holds, or has beside it, pickled objects that are not
            trusted.
        DamagedCheckpointError: The file can't be read at all.
    """
    path = Path(path)
    state = _decode(_torch_load(path, trust=_trusted.get()))
    beside = pickled_path(path)
    if beside.exists():
        if _trusted.get():
            parts = cast("dict[_Where, object]", _torch_load(beside, trust=True))
            for where, value in parts.items():
                state = _graft(state, where, value)
        elif missing_pickled is None:
            raise UntrustedPickleError(
                f"{path} has state that only pickle can hold, in {beside.name}. Reading it can run "
                "any code its author chose: if you trust it, pass trust_pickle=True"
            )
        else:
            missing_pickled.append(f"{path.stem}: what {beside.name} holds")
    return state


def _torch_load(path: Path, *, trust: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise
    except Exception as error:
        if _is_pickle(path) and ("weights_only" in str(error) or "Unsupported" in str(error)):
            raise UntrustedPickleError(
                f"{path} holds objects that only pickle can hold, and was not written by this "
                "package. Reading it can run any code its author chose: if you trust it, pass "
                f"trust_pickle=True. torch says: {str(error).splitlines()[0]}"
            ) from error
        reason = next(iter(str(error).splitlines()), repr(error))
        raise DamagedCheckpointError(
            f"{path} can't be read by torch.load: {reason}. The file is damaged or is not a torch "
            "file; recover from another checkpoint"
        ) from error


def _is_pickle(path: Path) -> bool:
    """Return whether a file is a torch file of today, or a pickle as torch wrote them long ago."""
    with path.open("rb") as stream:
        return stream.read(1) == b"\x80" or zipfile.is_zipfile(path)


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


def _encode(value: object, where: _Where, pickled: dict[_Where, object]) -> object:
    """Return what tensors-only loading takes; put the rest into `pickled`, leaving None for it."""
    encoded = _rewrite(value)
    if not _is_plain(_skeleton(encoded)):
        encoded = _extract(encoded, where, pickled)
    return encoded


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
    if isinstance(value, PurePath):
        return {_TAG: "path", "path": str(value)}
    return value


def _rewrite_numpy(value: object) -> object:
    import numpy as np

    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufcmMSU":
        array = np.ascontiguousarray(value)
        # As bytes: torch has no type for some of numpy's, and the byte order is part of the type.
        buffer = bytearray(array.tobytes())
        data = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0).byte()
        tag = "ndarray" if isinstance(value, np.ndarray) else "scalar"
        return {_TAG: tag, "dtype": value.dtype.str, "shape": list(value.shape), "data": data}
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


def _extract(value: object, where: _Where, pickled: dict[_Where, object]) -> object:
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


def _decode(value: object) -> object:
    kind = type(value)
    if kind is dict:
        fields = cast("dict[str, object]", value)
        if _TAG in fields:
            return _decode_tagged(fields)
        return {key: _decode(item) for key, item in fields.items()}
    if kind is OrderedDict:
        # In place: a module's state_dict carries its metadata as an attribute.
        ordered = cast("OrderedDict[object, object]", value)
        for key, item in ordered.items():
            ordered[key] = _decode(item)
        return ordered
    if kind in (list, tuple):
        return kind(_decode(item) for item in cast("list[object]", value))
    return value


def _decode_tagged(fields: dict[str, object]) -> object:
    if fields[_TAG] == "path":
        return Path(str(fields["path"]))
    import numpy as np

    data = cast("torch.Tensor", fields["data"]).numpy().tobytes()
    array = np.frombuffer(data, dtype=np.dtype(str(fields["dtype"])))
    array = array.reshape(cast("list[int]", fields["shape"])).copy()
    return array if fields[_TAG] == "ndarray" else array[()]


def _graft(state: object, where: _Where, value: object) -> object:
    if not where:
        return value
    first, rest = where[0], where[1:]
    if isinstance(state, tuple):
        index = cast("int", first)
        return (*state[:index], _graft(state[index], rest, value), *state[index + 1 :])
    container = cast("dict[object, object]", state)
    container[first] = _graft(container[first], rest, value)
    return container


def _spell(where: _Where) -> str:
    return "".join(f"[{step!r}]" for step in where) or "its whole state"
