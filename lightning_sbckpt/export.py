"""Checkpoints as files of other formats: safetensors, and a plain torch file of the model.

(To and from Lightning's own `.ckpt`: `lightning_sbckpt.plugin.export`.)
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch

from lightning_sbckpt._format.encode import write_torch
from lightning_sbckpt._format.load import load_state, trusting_pickle
from lightning_sbckpt._io.progress import Progress, Tally, growth_counted
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.publish import read_checkpoint
from lightning_sbckpt._load.load import bytes_of, bytes_to_check, require_sound
from lightning_sbckpt.errors import (
    ConfigurationError,
    MismatchError,
    MissingDependencyError,
    SaveError,
    SBCheckpointError,
)
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.run_paths import folder_of

__all__ = ["Exported", "bytes_to_export", "publish_file", "to_safetensors", "to_state_dict"]

logger = logging.getLogger("lightning_sbckpt")

Source: TypeAlias = "Checkpoint | str | os.PathLike[str]"


@dataclass(frozen=True)
class Exported:
    """A file that was written from a checkpoint.

    Attributes:
        path: The file.
        remarks: What of the checkpoint is not in it, or is there in another way; a sentence each.

    Example:
        >>> Exported(Path("model.safetensors")).remarks
        ()
    """

    path: Path
    remarks: tuple[str, ...] = ()


def to_state_dict(
    checkpoint: Source,
    path: str | os.PathLike[str],
    name: str = "model",
    *,
    overwrite: bool = False,
    trust_pickle: bool = False,
    on_progress: Progress | None = None,
) -> Exported:
    """Write the state of one recoverable as a torch file, for `torch.load` and nothing else.

    Args:
        checkpoint: The checkpoint, or its folder.
        path: The file to write; there or not, never half.
        name: Which recoverable.
        overwrite: Replace a file that is there.
        trust_pickle: Read state that only pickle can hold.
        on_progress: Called now and then with the bytes read and written so far and all bytes that
            there are to read and to write.

    Returns:
        The file.

    Raises:
        MismatchError: The checkpoint has no such recoverable.
        ConfigurationError: There is such a file, or no folder for it.
        DamagedCheckpointError: The state is not the one that was saved.
        UntrustedPickleError: Only pickle can hold the state.
        SaveError: The disk refused.

    Example:
        >>> import tempfile
        >>> from lightning_sbckpt import Checkpointer
        >>> folder = Path(tempfile.mkdtemp())
        >>> checkpointer = Checkpointer(folder / "run", {"model": torch.nn.Linear(2, 1)})
        >>> exported = to_state_dict(checkpointer.save_checkpoint(), folder / "model.pt")
        >>> torch.load(exported.path, weights_only=True)["weight"].shape
        torch.Size([1, 2])
    """
    source = _source(checkpoint, name)
    size = bytes_of(source, [name])
    tally = Tally(on_progress, bytes_to_export(source, [name]))
    state = _read(source, name, tally, trust_pickle=trust_pickle)
    with tally.part(2 * size):
        path = publish_file(path, partial(write_torch, state), overwrite=overwrite)
    return _said(Exported(path))


def to_safetensors(
    checkpoint: Source,
    path: str | os.PathLike[str],
    name: str = "model",
    keys: str | Sequence[str] | None = None,
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Exported:
    """Write the tensors of one recoverable as a safetensors file.

    That format has no shared tensors: of those that are one (tied weights) the first is written, by
    its name, and the file's metadata has under the names of the others which it is, as
    `safetensors.torch.load_model` expects; those that overlap otherwise are written in full.

    Args:
        checkpoint: The checkpoint, or its folder.
        path: The file to write; there or not, never half.
        name: Which recoverable.
        keys: Write only the tensors whose names fit this pattern, or one of these, such as
            `"encoder.*"`.
        overwrite: Replace a file that is there.
        on_progress: Called now and then with the bytes read and written so far and all bytes that
            there are to read and to write.

    Returns:
        The file, with a remark for each shared tensor.

    Raises:
        MissingDependencyError: The library safetensors is not installed.
        MismatchError: The checkpoint has no such recoverable; or there is something in its state
            that is no tensor, or a tensor of a kind that the format doesn't have.
        ConfigurationError: There is such a file, or no folder for it.
        DamagedCheckpointError: The state is not the one that was saved.
        UntrustedPickleError: Only pickle can hold the state.
        SaveError: The disk refused.

    Example:
        >>> import tempfile
        >>> from lightning_sbckpt import Checkpointer
        >>> folder = Path(tempfile.mkdtemp())
        >>> checkpointer = Checkpointer(folder / "run", {"model": torch.nn.Linear(2, 1)})
        >>> saved = checkpointer.save_checkpoint()
        >>> to_safetensors(saved, folder / "model.safetensors", keys="b*").path.name
        'model.safetensors'
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingDependencyError(
            f"can't write {path}: the library safetensors is not installed. Install it with: "
            "pip install 'lightning-sbckpt[export]'"
        ) from error
    source = _source(checkpoint, name)
    size = bytes_of(source, [name])
    tally = Tally(on_progress, bytes_to_export(source, [name]))
    where = f"{source.path}, recoverable {name!r}"
    tensors = _tensors(_read(source, name, tally), keys, where)
    written, shared, remarks = _without_sharing(tensors)
    metadata = {"format": "pt", **shared}

    def write(target: Path) -> None:
        target.touch()
        mode = target.stat().st_mode
        try:
            # The library does not tell while it writes, and has another name for the file then.
            with TemporaryDirectory(prefix=".exporting-", dir=target.parent) as folder:
                alone = Path(folder, "tensors")
                with growth_counted(alone.parent):
                    save_file(written, alone, metadata)
                # The library makes a file that nobody else may read.
                alone.chmod(mode)
                alone.replace(target)
        except (ValueError, KeyError, TypeError) as error:
            raise MismatchError(
                f"{where}, can't be written as safetensors: {error}. Leave such tensors out with "
                "keys=..., or write a torch file"
            ) from error

    with tally.part(2 * size):
        path = publish_file(path, write, overwrite=overwrite)
    return _said(Exported(path, tuple(remarks)))


def publish_file(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, overwrite: bool = False
) -> Path:
    """Let somebody write a file, and give it its name when it is whole and on the disk.

    Args:
        path: The file.
        write: Writes a new file at the path that it is given.
        overwrite: Replace a file that is there.

    Raises:
        ConfigurationError: There is such a file, or no folder for it.
        SaveError: It could not be written; what was there before is there.

    Example:
        >>> import tempfile
        >>> file = publish_file(Path(tempfile.mkdtemp()) / "a", lambda path: path.write_text("b"))
        >>> file.read_text()
        'b'
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        found = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigurationError(f"{path} can't be written: {found}. Name a file in a folder")
    if not overwrite and (path.exists() or path.is_symlink()):
        raise _there(path)
    storage = LocalStorage()
    staged = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.new")
    try:
        storage.write_by(staged, write)
        if overwrite:
            storage.before("rename", staged, path)
            staged.replace(path)
        else:
            _take_free_name(staged, path, storage)
        storage.flush_dir(path.parent)
    except FileExistsError as error:
        raise _there(path) from error
    except SBCheckpointError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise SaveError(
            f"{path} could not be written: {reason}. What was there before is there"
        ) from error
    finally:
        with suppress(OSError):
            storage.remove_file(staged)
    return path


def _take_free_name(staged: Path, path: Path, storage: LocalStorage) -> None:
    try:
        # Unlike a rename, a link never replaces what somebody else has just put there.
        storage.link(staged, path)
    except FileExistsError:
        raise
    except OSError:
        storage.rename(staged, path)  # A filesystem without links.


def _there(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is there already and was left as it is: choose another name, or say that it is "
        "to be replaced (overwrite=True)"
    )


def bytes_to_export(source: Checkpoint, names: Collection[str]) -> int:
    """Return how many bytes are read and written to export recoverables of a checkpoint."""
    # Read, written, and read again to see that it is what was to be written.
    return bytes_to_check(source, names) + 3 * bytes_of(source, names)


def _source(checkpoint: Source, name: str) -> Checkpoint:
    found = read_checkpoint(folder_of(checkpoint, name))
    if name not in found.paramfiles:
        raise MismatchError(
            f"{found.path} has no recoverable {name!r} to export; it has: "
            f"{', '.join(map(repr, found.paramfiles)) or 'none'}"
        )
    return found


def _read(source: Checkpoint, name: str, tally: Tally, *, trust_pickle: bool = False) -> object:
    with tally.part(bytes_to_check(source, [name])):
        require_sound(source, [name])
    with tally.part(bytes_of(source, [name])), trusting_pickle(trust_pickle):
        return load_state(source.paramfiles[name])


def _tensors(
    state: object, keys: str | Sequence[str] | None, where: str
) -> dict[str, torch.Tensor]:
    if not isinstance(state, Mapping):
        raise MismatchError(
            f"{where}, holds a {type(state).__name__}, expected a dictionary of tensors"
        )
    patterns = [keys] if isinstance(keys, str) else keys
    chosen: dict[str, Any] = {}
    for key, value in state.items():
        if patterns is None or any(fnmatchcase(str(key), pattern) for pattern in patterns):
            if str(key) in chosen:
                raise MismatchError(
                    f"{where}, can't be written as safetensors, whose names are texts: it has two "
                    f"tensors of the name {str(key)!r}. Leave them out with keys=..., or write a "
                    "torch file"
                )
            chosen[str(key)] = value
    if not chosen and patterns is not None:
        raise MismatchError(
            f"{where}, has no tensor whose name fits {' or '.join(map(repr, patterns))}; the first "
            f"names are: {', '.join(map(str, list(state)[:5]))}"
        )
    others = [
        f"{key!r} is of type {type(value).__name__}"
        for key, value in chosen.items()
        if not isinstance(value, torch.Tensor)
    ]
    if others:
        raise MismatchError(
            f"{where}, can't be written as safetensors, which holds tensors alone: "
            f"{'; '.join(others)}. Leave them out with keys=..., or write a torch file"
        )
    return chosen


def _without_sharing(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str], list[str]]:
    """Return tensors of which each has its own memory, which were dropped, and what was done."""
    written: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    remarks: list[str] = []
    first: dict[tuple[object, ...], str] = {}
    used: dict[int, str] = {}
    for key, value in tensors.items():
        # The format has no lazy conjugation or negation: it takes the bytes as they are.
        tensor = value.detach().resolve_conj().resolve_neg()
        if tensor.layout is not torch.strided or not tensor.numel():
            written[key] = tensor
            continue
        form = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        storage = tensor.untyped_storage().data_ptr()
        if form in first:
            shared[key] = first[form]
            remarks.append(f"{key} is the same tensor as {first[form]}, which stands for both")
        elif storage in used:
            written[key] = tensor.clone(memory_format=torch.contiguous_format)
            remarks.append(f"{key} shares memory with {used[storage]}, and is written in full")
        else:
            written[key] = tensor.contiguous()
        first.setdefault(form, key)
        used.setdefault(storage, key)
    return written, shared, remarks


def _said(exported: Exported) -> Exported:
    size = exported.path.stat().st_size
    logger.info("exported %s: %.1f MB", exported.path, size / 1e6)
    return exported
