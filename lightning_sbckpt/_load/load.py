"""Loading one checkpoint: which one is sound, which hook reads which file, and reading them."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_sbckpt._format.load import trusting_pickle
from lightning_sbckpt._format.names import marked_path, pickled_path
from lightning_sbckpt._io.digests import Verified
from lightning_sbckpt._io.records import fetch, stored_files
from lightning_sbckpt._layout.manifest import find_damage, read_manifest
from lightning_sbckpt._layout.publish import SHARDED_EXT, is_checkpoint
from lightning_sbckpt._sharded.states import is_sharded
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    HookError,
    MetaError,
    MismatchError,
    SBCheckpointError,
)
from lightning_sbckpt.hooks import HookRegistry
from lightning_sbckpt.hooks.builtin import has_state, torch_recovery
from lightning_sbckpt.meta import META_NAME, Checkpoint
from lightning_sbckpt.typing import LoadHook

logger = logging.getLogger("lightning_sbckpt")


@dataclass(frozen=True)
class LoadOptions:
    """How strictly a checkpoint has to have everything, and how it is read."""

    custom_hooks: Mapping[str, LoadHook]
    registry: HookRegistry
    optional: Mapping[str, bool]
    allow_partial: bool
    trust_pickle: bool


def _files_to_check(ckpt: Checkpoint, names: Collection[str]) -> set[str] | None:
    # Without names it will be loaded by other means: every file counts.
    return {META_NAME, *_files_of(ckpt, names)} if names else None


def _files_of(ckpt: Checkpoint, names: Collection[str]) -> set[str]:
    paths = [ckpt.paramfiles[name] for name in names if name in ckpt.paramfiles]
    return {each.name for path in paths for each in _all_of(path)}


def _all_of(path: Path) -> tuple[Path, Path, Path]:
    return path, pickled_path(path), marked_path(path)


def bytes_of(ckpt: Checkpoint, names: Collection[str]) -> int:
    """Return how many bytes the files of these recoverables have, here or in a store."""
    files = _files_of(ckpt, names)
    sizes = _described(ckpt) or {
        **{name: stored.size for name, stored in stored_files(ckpt.path).items()},
        **{
            path.relative_to(ckpt.path).as_posix(): path.stat().st_size
            for path in ckpt.path.rglob("*")
            if path.is_file()
        },
    }
    return sum(size for name, size in sizes.items() if name.partition("/")[0] in files)


def bytes_to_check(ckpt: Checkpoint, names: Collection[str]) -> int:
    """Return how many bytes `require_sound` reads; none of what nobody described."""
    sizes = _described(ckpt)
    files = _files_to_check(ckpt, names)
    return sum(
        size for name, size in sizes.items() if files is None or name.partition("/")[0] in files
    )


def _described(ckpt: Checkpoint) -> dict[str, int]:
    try:
        manifest = read_manifest(ckpt.path)
    except (MetaError, OSError):
        return {}  # Whoever checks it will say so.
    return {} if manifest is None else {n: file.size for n, file in manifest.files.items()}


def require_sound(
    ckpt: Checkpoint, names: Collection[str], verified: Verified | None = None
) -> None:
    """Refuse a damaged checkpoint; files that were found sound just now are not read again.

    Args:
        ckpt: The checkpoint.
        names: The recoverables that will be loaded; none for all.
        verified: What was found sound just now.

    Raises:
        DamagedCheckpointError: A file is not the one that was written.
    """
    read = (verified or Verified()).read_unless_known
    problems = find_damage(ckpt.path, _files_to_check(ckpt, names), read=read)
    if problems:
        raise DamagedCheckpointError(
            f"{ckpt.path} is damaged and nothing was loaded from it: {'; '.join(problems)}. "
            "Recover from another checkpoint"
        )


def first_sound(
    candidates: Iterable[Checkpoint],
    names: Collection[str],
    unreadable: Mapping[Path, str],
    root: Path | str,
    *,
    verified: Verified,
    look_again: bool,
    found: dict[Path, tuple[int | None, str]],
) -> Checkpoint | None:
    """Return the first candidate that is whole, stepping over others with a line each.

    Args:
        candidates: The best first.
        names: The recoverables that will be loaded.
        unreadable: Checkpoints whose meta can't be read, each with the reason.
        root: The folder of all checkpoints.
        verified: Gets what is read.
        look_again: If one was removed meanwhile, take no later one: whoever removed it had published
            a better one before.
        found: Gets what is damaged: the identity of the folder, and the reason.

    Raises:
        CheckpointNotFoundError: Another process removed candidates meanwhile: look again.
        DamagedCheckpointError: There are candidates, or folders that may be one, and none is whole.
    """
    damaged: list[str] = []
    vanished: list[str] = []
    for ckpt in candidates:
        before = identity_of_folder(ckpt.path)
        verified.forget()
        problems = find_damage(ckpt.path, _files_to_check(ckpt, names), read=verified.read)
        if not problems:
            return ckpt
        if before is None or identity_of_folder(ckpt.path) != before:
            # Removed, or replaced by another one of its name, while it was read.
            vanished.append(ckpt.path.name)
            if look_again:
                break
            continue
        found[ckpt.path] = (before, "; ".join(problems))
        damaged.append(f"{ckpt.path.name}: {'; '.join(problems)}")
        logger.warning("skipped a damaged checkpoint, %s", damaged[-1])
    if vanished:
        raise CheckpointNotFoundError(
            f"{', '.join(vanished)} vanished from {root} while it was looked at: another process "
            "prunes there"
        )
    # What can't even be read might be the one asked for.
    damaged += [f"{folder.name}: {problem}" for folder, problem in unreadable.items()]
    if damaged:
        raise DamagedCheckpointError(
            f"every checkpoint to recover from in {root} is damaged: {' | '.join(damaged)}. To "
            "start anew all the same, use another folder"
        )
    return None


def identity_of_folder(folder: Path) -> int | None:
    """Return what is another number for another checkpoint of the same name; None if there is none."""
    try:
        return folder.stat().st_ino if is_checkpoint(folder) else None
    except OSError:
        return None


def load_into(
    recoverables: Mapping[str, object], checkpoint: Checkpoint, options: LoadOptions
) -> None:
    """Load a sound checkpoint into live objects.

    Raises:
        MismatchError: The checkpoint lacks recoverables, or doesn't fit one.
        HookError: A recoverable has no way to be loaded, or its hook failed.
    """
    end_of_epoch = bool(checkpoint.meta.get("end-of-epoch", True))
    hooks = _find_hooks(recoverables, checkpoint, options)
    besides = {
        name: options.registry.beside(recoverables[name], "load")
        for name in hooks
        if name not in options.custom_hooks
    }
    start = time.perf_counter()
    with trusting_pickle(options.trust_pickle):
        for name, hook in hooks.items():
            path = checkpoint.paramfiles[name]
            # Rank zero has looked at those of its own machine.
            fetch(checkpoint.path, [each.name for each in _all_of(path)])
            try:
                if hook is not torch_recovery or not _load_pieces(name, path, recoverables):
                    hook(recoverables[name], path, end_of_epoch)
                beside = besides.get(name)
                if beside is not None and marked_path(path).exists():
                    beside(recoverables[name], marked_path(path), end_of_epoch)
            except SBCheckpointError:
                raise
            except Exception as error:
                raise HookError(
                    f"the load hook of {name!r} failed on {path}: {type(error).__name__}: "
                    f"{error}. What was loaded before it stays loaded"
                ) from error
    logger.info(
        "loaded %s from %s in %.2f s",
        ", ".join(hooks) or "nothing",
        checkpoint.path,
        time.perf_counter() - start,
    )


def _load_pieces(name: str, path: Path, recoverables: Mapping[str, object]) -> bool:
    """Load what is sharded, on the disk or here; return whether it was."""
    obj = recoverables[name]
    if path.suffix != SHARDED_EXT and not is_sharded(obj):
        return False
    from lightning_sbckpt._sharded.loading import load_sharded, load_whole

    if path.suffix != SHARDED_EXT:
        return load_whole(obj, path)
    load_sharded(obj, path, recoverables)
    return True


def _find_hooks(
    recoverables: Mapping[str, object], checkpoint: Checkpoint, options: LoadOptions
) -> dict[str, LoadHook]:
    hooks: dict[str, LoadHook] = {}
    missing: list[str] = []
    unknown: list[str] = []
    for name, obj in recoverables.items():
        if name not in checkpoint.paramfiles:
            # As in SpeechBrain: the position of the data is not worth a failed recovery.
            optional = options.optional.get(name, False) or "dataloader" in name
            if not (optional or options.allow_partial):
                missing.append(repr(name))
            elif not options.allow_partial:
                warnings.warn(
                    f"{checkpoint.path} has no file for {name!r}, which stays as it is",
                    UserWarning,
                    stacklevel=5,
                )
            continue
        hook = options.custom_hooks.get(name) or options.registry.loader(obj)
        if hook is None and has_state(obj):
            hook = torch_recovery
        if hook is None:
            unknown.append(f"{name!r} ({type(obj).__qualname__})")
            continue
        hooks[name] = hook
    if missing:
        found = ", ".join(map(repr, checkpoint.paramfiles)) or "none"
        raise MismatchError(
            f"{checkpoint.path} has no files for the recoverables {', '.join(missing)}; it has: "
            f"{found}. Nothing was loaded. Pass optional_load=True for those that may be missing, "
            "or allow_partial_load=True"
        )
    if unknown:
        raise HookError(
            f"Don't know how to load {', '.join(unknown)}: no hook is registered for the type and "
            "it has no load_state_dict. Nothing was loaded. Register hooks with "
            "register_checkpoint_hooks, or pass custom_load_hook to add_recoverable"
        )
    return hooks
