"""State as a file that `torch.load(..., weights_only=True)` reads, and what can't be in one.

A state (what `state_dict()` returns, say) is written as it is wherever torch's tensors-only
unpickler takes it. Values of some more types are written as small dictionaries of plain things and
become themselves again when read here, see `plain`. Whatever is left only pickle can hold: it goes
into a file of its own beside the first, `<name>+pickled.ckpt`, marked as this user's own. That is read
back if the mark is valid, or under `trusting_pickle`.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch

# What `torch.load(..., weights_only=True)` reads a pickle with; seen in torch 2.4 to 2.13.
from torch._weights_only_unpickler import Unpickler

from lightning_sbckpt._format.containers import (
    CONTAINERS,
    Where,
    containers_in,
    members_of,
    rebuild,
    where_is,
)
from lightning_sbckpt._format.image import pickled_without_bytes
from lightning_sbckpt._format.keys import SECRET, SECRET_FILE, keys
from lightning_sbckpt._format.load import load_stream
from lightning_sbckpt._format.marks import mark, root_of
from lightning_sbckpt._format.names import pickled_path
from lightning_sbckpt._format.plain import to_plain
from lightning_sbckpt._format.screening import ScreeningError, screen
from lightning_sbckpt._io.progress import moved
from lightning_sbckpt.errors import SaveError

logger = logging.getLogger("lightning_sbckpt")

_warned: set[tuple[str, str]] = set()
# What torch's unpickler takes in every release; of numbers those that it has an opcode for.
_PLAIN = (str, bool, float, type(None))
_LONG = 2**63


def save_state(state: object, path: Path) -> None:
    """Write a state to `path`, and what only pickle can hold beside it.

    Args:
        state: Anything; dictionaries, lists and tuples are looked into.
        path: The file to write.
    """
    encoded, pickled = encode(state)
    torch.save(encoded, path)
    if pickled:
        near = root_of(path)
        pickled_path(path).write_bytes(pickled_file(pickled, pickled_path(path).name, near))
        holds = [f"{path.stem}{held(where, value)}" for where, value in pickled.items()]
        warn_of_trust(holds, near)


def pickled_file(pickled: Mapping[Where, object], name: str, near: Path | None) -> bytes:
    """Return the bytes of the file that holds what only pickle can hold, with a mark.

    Args:
        pickled: By place, as `encode` returns it.
        name: Of the file.
        near: The folder of all checkpoints.

    Raises:
        SaveError: Something in it can't be pickled; all such places are named.
    """
    try:
        data = torch_bytes(dict(pickled))
    except Exception as error:
        wrong = [
            f"{spell(where)} is a {type(value).__qualname__}: {reason}"
            for where, value in pickled.items()
            if (reason := _why_not(value)) is not None
        ]
        raise SaveError(
            f"{name} can't be written, since some of the state can't be pickled:\n  "
            + "\n  ".join(wrong or [f"{type(error).__name__}: {error}"])
            + "\nKeep that out of the state, or give it a form that can be (no lambda, no open file)"
        ) from error
    return mark(data, name, near, [held(where, value) for where, value in pickled.items()])


def held(where: Where, value: object) -> str:
    """Return a few words about something that only pickle can hold."""
    return f"{spell(where)} (a {type(value).__qualname__})"


def warn_of_trust(holds: Sequence[str], near: Path | None) -> None:
    """Say once for all of a save what will need trust, if no secret will tell that it is ours.

    Args:
        holds: What only pickle can hold, a few words each.
        near: The folder of all checkpoints.
    """
    problem = keys(near, create=True).problem if holds else None
    new = [each for each in holds if (str(near), each) not in _warned]
    if problem is None or not new:
        return
    _warned.update((str(near), each) for each in new)
    logger.warning(
        "only pickle can hold %s. It is saved, and another process will read it back only with "
        "trust_pickle=True: %s. Set %s or %s to have this user's own runs read it back",
        "; ".join(new),
        problem,
        SECRET,
        SECRET_FILE,
    )


def torch_bytes(state: object) -> bytes:
    """Return the bytes that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _why_not(value: object) -> str | None:
    try:
        torch_bytes(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _is_plain(value: object) -> bool:
    """Ask those who will read it, since what torch takes differs from release to release.

    They get storages without bytes: those of a quantized tensor, say, would have to come from a GPU.
    """
    try:
        pickled = pickled_without_bytes(value)
        screen(pickled, longest=len(pickled))
        unpickler: Any = Unpickler(io.BytesIO(pickled), encoding="utf-8")
        unpickler.persistent_load = _empty_storage
        unpickler.load()
    except (ScreeningError, pickle.UnpicklingError):
        return False
    except Exception:
        # It looks at its bytes, or it can't be pickled at all.
        try:
            load_stream(io.BytesIO(torch_bytes(value)))
        except Exception:
            return False
    return True


def _empty_storage(reference: tuple[str, torch.dtype, int]) -> torch.storage.TypedStorage:
    _, dtype, nbytes = reference
    storage: Any = torch.UntypedStorage(nbytes, device="meta")  # type: ignore[no-untyped-call]
    typed: Any = torch.storage.TypedStorage
    return cast(
        "torch.storage.TypedStorage", typed(wrap_storage=storage, dtype=dtype, _internal=True)
    )


def encode(state: object) -> tuple[object, dict[Where, object]]:
    """Return what tensors-only loading takes, with None for what it doesn't, and that by place.

    What the state holds twice is once in the result, as `torch.save` keeps it.
    """
    encoded = rebuild(state, to_plain)
    if _is_plain(_skeleton(encoded)):
        return encoded, {}
    pickled: dict[Where, object] = {}
    without: dict[tuple[int, object], object] = {}
    known: dict[int, bool] = {}

    def may_stay(value: object) -> bool:
        if id(value) not in known:
            known[id(value)] = _may_stay(value)
        return known[id(value)]

    if type(encoded) in CONTAINERS and may_stay(encoded):
        for place, container in containers_in(encoded, may_stay):
            for key, value in members_of(container):
                if not may_stay(value):
                    without[id(container), key] = None
                    pickled[where_is((place, key))] = value
        rest = rebuild(encoded, swap=without)
        if _is_plain(_skeleton(rest)):
            return rest, pickled
    return None, {(): encoded}


def _may_stay(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN or (kind is int and -_LONG <= value < _LONG):
        return True
    if kind in CONTAINERS:
        return _has_plain_keys(value)
    return _is_bare_tensor(value) or _is_plain(value)


def _has_plain_keys(container: Any) -> bool:
    return not isinstance(container, dict) or all(
        type(key) in (str, int, bool) or _is_plain(key) for key in container
    )


def _is_bare_tensor(value: object) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and not vars(value)


def _skeleton(value: object) -> object:
    """Return `value` without the tensors' data, so that it can be tried in microseconds."""
    return rebuild(value, lambda each: None if _is_bare_tensor(each) else each)


def spell(where: Where) -> str:
    """Return a place as one would write it in Python."""
    return "".join(f"[{step!r}]" for step in where)


_BLOCK = 8 * 2**20


def write_torch(state: object, path: Path) -> None:
    """Write a state as `torch.save` does."""
    with path.open("wb") as stream:
        write_torch_to(state, stream)


def write_torch_to(state: object, stream: IO[bytes]) -> None:
    """Write a state to an open file as `torch.save` does."""
    torch.save(state, cast("IO[bytes]", _Counted(stream)))


class _Counted:
    """A file that counts what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        """Write bytes, a block at a time: a tensor is handed over whole."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._stream.write(block)
            moved(len(block))
        return len(view)

    def flush(self) -> None:
        """Flush the file."""
        self._stream.flush()
