"""Reading the files of states: tensors and plain values only, unless pickle is trusted.

`state` says what is in such a file; this undoes it.
"""

from __future__ import annotations

import ast
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from lightning_sbckpt._format.containers import rebuild
from lightning_sbckpt._format.load_in_place import live_state
from lightning_sbckpt._format.marks import TRUST, Judgement, judge, root_of
from lightning_sbckpt._format.names import PICKLED_SUFFIX, pickled_path
from lightning_sbckpt._format.plain import from_plain
from lightning_sbckpt._format.read_tensors import read_owned
from lightning_sbckpt._format.screening import screen_file
from lightning_sbckpt._io.open_regular import NotRegularError, open_to_read
from lightning_sbckpt._io.records import bring_file
from lightning_sbckpt.errors import DamagedCheckpointError, MismatchError, UntrustedPickleError

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


def load_state(path: Path, *, left_out: list[str] | None = None, grouped: bool = False) -> object:
    """Return the state in `path`, its tensors on the CPU.

    What only pickle can hold is read if this user's own runs wrote it, or if pickle is trusted.

    Args:
        path: A file written by `save_state` or by `torch.save`.
        left_out: If given, what can't be read is taken out of the state, and named in this list;
            otherwise such a state is refused.
        grouped: The tensors will be kept or dropped together, see `Memory`.

    Returns:
        The state.

    Raises:
        UntrustedPickleError: The file holds, or has beside it, pickled objects that are neither this
            user's own nor trusted.
        DamagedCheckpointError: The file can't be read at all.
        MismatchError: It is no file, but a folder that ranks have written; or what it holds needs
            classes that this program doesn't have.
    """
    path = Path(path)
    _refuse_pieces(path)
    bring_file(path, pickled_path(path))
    read = read_owned(path, grouped=grouped)
    state = read[0] if read else _torch_load(path, trust=_trusted.get())
    return _completed(state, path, left_out, trusted=_trusted.get())


def load_own_state(path: Path, *, left_out: list[str] | None = None) -> tuple[object, bool]:
    """Return the state in `path`, and whether this user's own runs wrote the file.

    The very bytes that are read are those that are judged.

    Args:
        path: See `load_state`.
        left_out: See `load_state`.

    Raises:
        UntrustedPickleError: See `load_state`.
        DamagedCheckpointError: See `load_state`.
        MismatchError: See `load_state`.
    """
    path = Path(path)
    bring_file(path, pickled_path(path))
    data = _bytes(path)
    authentic = judge(data, path.name, root_of(path)).authentic
    state = _torch_load(path, trust=_trusted.get(), data=data)
    return _completed(state, path, left_out, trusted=_trusted.get() or authentic), authentic


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


def open_state(path: Path, *, pickled: bool = True) -> object:
    """Return the state in `path`, its tensors parts of a private mapping of the file.

    A file that can't be mapped is read in full.

    Args:
        path: See `load_state`.
        pickled: False leaves None in the place of what only pickle can hold.

    Raises:
        UntrustedPickleError: See `load_state`.
        DamagedCheckpointError: See `load_state`.
        MismatchError: See `load_state`.
    """
    path = Path(path)
    _refuse_pieces(path)
    bring_file(path, pickled_path(path))
    try:
        with _buffered(path) as stream:
            screen_file(stream)
            # Of a sparse tensor torch believes that its indices lie inside, unless it is told to look.
            with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
                state = torch.load(
                    _by_descriptor(stream, path), map_location="cpu", weights_only=True, mmap=True
                )
    except Exception:
        # Whatever it is, reading it in full will say it, or will do.
        state = _torch_load(path, trust=False)
    return _completed(state, path, None, trusted=_trusted.get(), pickled=pickled)


def _refuse_pieces(path: Path) -> None:
    if path.suffix == ".dcp" and path.is_dir():
        raise MismatchError(
            f"{path} is a state that ranks have written in pieces, expected one file. Put it "
            f"together first: lightning-sbckpt consolidate {path.parent}"
        )


def _completed(
    state: object,
    path: Path,
    left_out: list[str] | None,
    *,
    trusted: bool,
    pickled: bool = True,
) -> object:
    """Return a state with what lies beside it in place, and with every value what it was."""
    beside = pickled_path(path)
    if pickled and os.path.lexists(beside):
        data = _bytes(beside)
        found = judge(data, beside.name, root_of(path))
        if _trusted.get() or found.authentic:
            parts = _torch_load(beside, trust=True, data=data)
            state = _grafted(state, parts, beside)
        elif left_out is None or not _without(state, found.holds):
            refuse_untrusted([path])
        else:
            left_out.append(_told(path, found))
    return decoded(state, trusted=trusted)


def refuse_untrusted(paths: Iterable[Path]) -> None:
    """Refuse what only pickle can hold beside any of some files, if it is not this user's own.

    Raises:
        UntrustedPickleError: There is such state; all of it is named.
    """
    told, reasons = [], []
    for path in paths:
        beside = pickled_path(path)
        if os.path.lexists(beside):
            found = judge(_bytes(beside), beside.name, root_of(path))
            if not found.authentic:
                told.append(_told(path, found))
                reasons.append(f"{beside.name}: {found.reason}")
                folder = path.parent
    if told:
        raise UntrustedPickleError(
            f"{folder} has state that only pickle can hold: {', '.join(told)}. It was not read. "
            f"{reasons[0]}; {TRUST}"
        )


def _told(path: Path, found: Judgement) -> str:
    """Return what is beside a file, in a few words."""
    beside = pickled_path(path).name
    return ", ".join(f"{path.stem}{held}" for held in found.holds) or f"what {beside} holds"


def decoded(state: object, *, trusted: bool = False) -> object:
    """Return a state with every value what it was, see `plain`.

    Args:
        state: As it was read, with what only pickle can hold in place.
        trusted: Whether values may be made that call functions of the program when they are looked
            at.
    """
    return rebuild(state, leave=partial(from_plain, trusted=trusted or _trusted.get()))


def _bytes(path: Path) -> bytes:
    try:
        with open_to_read(path) as stream:
            return stream.read()
    except NotRegularError as error:
        raise DamagedCheckpointError(f"{path} can't be read: {error.strerror}") from error


def _torch_load(path: Path, *, trust: bool, data: bytes | None = None) -> object:
    try:
        with _buffered(path) if data is None else BytesIO(data) as stream:
            return load_stream(stream, trust=trust)
    except FileNotFoundError:
        raise
    except Exception as error:
        if trust and isinstance(error, (ImportError, AttributeError)):
            raise MismatchError(
                f"{path} holds objects of classes or functions that this program doesn't have: "
                f"{error}. Import or define them where they were when it was saved, or skip what it "
                f"belongs to, {path.stem.removesuffix(PICKLED_SUFFIX)!r}"
            ) from error
        if _is_pickle(path) and ("weights_only" in str(error) or "Unsupported" in str(error)):
            raise UntrustedPickleError(
                f"{path} holds objects that only pickle can hold, and was not written by this "
                f"package. It was not read; {TRUST}. torch says: {str(error).splitlines()[0]}"
            ) from error
        reason = next(iter(str(error).splitlines()), repr(error))
        raise DamagedCheckpointError(
            f"{path} can't be read by torch.load: {reason}. The file is damaged or is not a torch "
            "file; recover from another checkpoint"
        ) from error


def _buffered(path: Path) -> BinaryIO:
    return BufferedReader(cast("RawIOBase", open_to_read(path)))


def _by_descriptor(stream: BinaryIO, path: Path) -> str | Path:
    """Return a path that leads to an open file, whatever has come in its place, where there is one."""
    found = f"/proc/self/fd/{stream.fileno()}"
    return found if os.path.exists(found) else path  # noqa: PTH110 - it is no file of the user's


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
    # As in `open_state`.
    with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
        return torch.load(stream, map_location="cpu", weights_only=not trust)


def _is_pickle(path: Path) -> bool:
    """Return whether a file is a torch file of today, or a pickle as torch wrote them long ago."""
    with open_to_read(path) as stream:
        return stream.read(1) == b"\x80" or zipfile.is_zipfile(stream)


def _grafted(state: object, parts: object, beside: Path) -> object:
    """Return a state with parts put in their places, wherever it holds the same container."""
    if not isinstance(parts, dict):
        raise _not_beside(beside)
    within_tuples: dict[tuple[int, object], object] = {}
    for where, value in parts.items():
        if where == ():
            return value
        try:
            *steps, last = where
            container: Any = state
            for step in steps:
                container = container[step]
            if container[last] is not None:
                raise _not_beside(beside)
            if isinstance(container, tuple):
                within_tuples[id(container), last] = value
            else:
                container[last] = value
        except (LookupError, TypeError) as error:
            raise _not_beside(beside) from error
    return rebuild(state, swap=within_tuples) if within_tuples else state


def _not_beside(beside: Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{beside} does not belong to the file that it lies beside: there are no such places in that. "
        "Recover from another checkpoint"
    )


def _without(state: object, holds: Sequence[str]) -> bool:
    """Take out of a state what could not be read; return whether all of it was found.

    What is in a list or tuple takes with it what that is in.
    """
    found: list[tuple[dict[object, object], object]] = []
    for held in holds:
        container: Any = state
        innermost = None
        for step in _steps(held.rpartition(" (a ")[0]):
            if isinstance(container, dict):
                innermost = (container, step)
            try:
                container = container[step]
            except (LookupError, TypeError):
                return False
        if innermost is None:
            return False
        found.append(innermost)
    for mapping, key in found:
        mapping.pop(key, None)
    return bool(found)


def _steps(spelled: str) -> list[object]:
    """Return the keys and indices of a place as `state.spell` writes it; none if it is no place."""
    steps: list[object] = []
    try:
        node = ast.parse(f"state{spelled}", mode="eval").body
        while isinstance(node, ast.Subscript):
            steps.append(ast.literal_eval(node.slice))
            node = node.value
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return []
    return steps[::-1]
