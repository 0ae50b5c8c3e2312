"""Reading the files of states: tensors and plain values only, unless pickle is trusted.

`_state` says what is in such a file; this undoes it.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import BinaryIO, cast

import torch

from lightning_sbckpt._disk.absent import bring_file
from lightning_sbckpt._disk.regular import open_regular
from lightning_sbckpt._torchfile.direct import live_state
from lightning_sbckpt._torchfile.filling import read_owned
from lightning_sbckpt._torchfile.screening import screen_file
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError, UntrustedPickleError

PICKLED_SUFFIX = "+pickled"
MARKED_SUFFIX = "+marked"
TAG = "__lightning_sbckpt__"
Where = tuple[object, ...]

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


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


def pickle_is_trusted() -> bool:
    """Return whether this is inside a block of `trusting_pickle`."""
    return _trusted.get()


def pickled_path(path: Path) -> Path:
    """Return the file beside `path` that holds what only pickle can hold."""
    return path.with_name(f"{path.stem}{PICKLED_SUFFIX}{path.suffix}")


def marked_path(path: Path) -> Path:
    """Return the file beside `path` that a marked method wrote whose class nobody decorated."""
    return path.with_name(f"{path.stem}{MARKED_SUFFIX}{path.suffix}")


def load_state(
    path: Path, *, missing_pickled: list[str] | None = None, grouped: bool = False
) -> object:
    """Return the state in `path`, its tensors on the CPU; no pickle is executed unless trusted.

    Args:
        path: A file written by `save_state` or by `torch.save`.
        missing_pickled: If given, a state with parts that only pickle holds is returned without
            them, and their places are added to this list; otherwise such a state is refused.
        grouped: The tensors will be kept or dropped together, see `Memory`.

    Returns:
        The state.

    Raises:
        UntrustedPickleError: The file holds, or has beside it, pickled objects that are not
            trusted.
        DamagedCheckpointError: The file can't be read at all.
        MismatchError: It is no file, but a folder that ranks have written.
    """
    path = Path(path)
    _refuse_pieces(path)
    bring_file(path, pickled_path(path))
    read = read_owned(path, grouped=grouped)
    state = _decode(read[0] if read else _torch_load(path, trust=_trusted.get()))
    beside = pickled_path(path)
    if beside.exists():
        if _trusted.get():
            parts = cast("dict[Where, object]", _torch_load(beside, trust=True))
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


def load_live_state(obj: object, path: Path) -> Mapping[str, object]:
    """Return the state in `path` to be handed to `obj.load_state_dict`, and to nothing else.

    Where that is safe its values are read into the object's own tensors at once, see `_direct`.

    Raises:
        UntrustedPickleError: See `load_state`.
        DamagedCheckpointError: See `load_state`.
    """
    bring_file(path, pickled_path(path))
    state = None if pickled_path(path).exists() else live_state(obj, path)
    return cast("Mapping[str, object]", load_state(path)) if state is None else state


def open_state(path: Path) -> object:
    """Return the state in `path`, its tensors parts of a private mapping of the file.

    What only pickle can hold is left out, as None. A file that can't be mapped is read in full.

    Raises:
        UntrustedPickleError: See `load_state`.
        DamagedCheckpointError: See `load_state`.
    """
    _refuse_pieces(Path(path))
    bring_file(Path(path))
    try:
        with _buffered(path) as stream:
            screen_file(stream)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        # Whatever it is, reading it in full will say it, or will do.
        state = _torch_load(path, trust=False)
    return _decode(state)


def _refuse_pieces(path: Path) -> None:
    if path.suffix == ".dcp" and path.is_dir():
        raise MismatchError(
            f"{path} is a state that ranks have written in pieces, expected one file. Put it "
            f"together first: lightning-sbckpt consolidate {path.parent}"
        )


def _torch_load(path: Path, *, trust: bool) -> object:
    try:
        with _buffered(path) as stream:
            return load_stream(stream, trust=trust)
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


def _buffered(path: Path) -> BinaryIO:
    return BufferedReader(cast("RawIOBase", open_regular(path)))


def load_stream(stream: BinaryIO, *, trust: bool = False) -> object:
    """Return what `torch.load` reads from a stream, its tensors on the CPU.

    Args:
        stream: At the beginning of the file.
        trust: Let pickle run what it asks for. Otherwise what would kill or hold up torch's own
            reader is refused, too.

    Raises:
        ScreeningError: See `screen_file`.
    """
    if not trust:
        screen_file(stream)
    return torch.load(stream, map_location="cpu", weights_only=not trust)


def _is_pickle(path: Path) -> bool:
    """Return whether a file is a torch file of today, or a pickle as torch wrote them long ago."""
    with path.open("rb") as stream:
        return stream.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _decode(value: object) -> object:
    kind = type(value)
    if kind is dict:
        fields = cast("dict[str, object]", value)
        if TAG in fields:
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
    if fields[TAG] == "no bytes":
        return b""
    if fields[TAG] == "path":
        return Path(str(fields["path"]))
    import numpy as np

    data = cast("torch.Tensor", fields["data"]).numpy().tobytes()
    array = np.frombuffer(data, dtype=np.dtype(str(fields["dtype"])))
    array = array.reshape(cast("list[int]", fields["shape"])).copy()
    return array if fields[TAG] == "ndarray" else array[()]


def _graft(state: object, where: Where, value: object) -> object:
    if not where:
        return value
    first, rest = where[0], where[1:]
    if isinstance(state, tuple):
        index = cast("int", first)
        return (*state[:index], _graft(state[index], rest, value), *state[index + 1 :])
    container = cast("dict[object, object]", state)
    container[first] = _graft(container[first], rest, value)
    return container
