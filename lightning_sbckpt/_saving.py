"""Writing one checkpoint, by all ranks together: staged, flushed, described, published.

Every rank reaches every collective whatever fails on it: failures are carried to the others as
results, and raised on every rank after the last collective, so that none is left waiting.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning_sbckpt._builtin_hooks import has_state, torch_save
from lightning_sbckpt._layout import (
    META_NAME,
    PARAMFILE_EXT,
    folder_for,
    publish,
    read_checkpoint,
    staging,
)
from lightning_sbckpt._manifest import MANIFEST_NAME, Manifest, dump_manifest
from lightning_sbckpt._storage import FileDigest, LocalStorage, digest, digest_bytes
from lightning_sbckpt._world import portable_error
from lightning_sbckpt.errors import HookError, SaveError, SBCheckpointError
from lightning_sbckpt.hooks import HookRegistry
from lightning_sbckpt.meta import Checkpoint, dump_meta
from lightning_sbckpt.typing import SaveHook, World

logger = logging.getLogger("lightning_sbckpt")


@dataclass(frozen=True)
class SaveJob:
    """One recoverable to save: `write` puts its state into the file it is given."""

    write: Callable[[Path], object]
    on_every_rank: bool


def save_jobs(
    recoverables: Mapping[str, object],
    custom_hooks: Mapping[str, SaveHook],
    registry: HookRegistry,
) -> dict[str, SaveJob]:
    """Return what is to be written, by name.

    Raises:
        HookError: Recoverables have no way to be saved; all are named.
    """
    jobs: dict[str, SaveJob] = {}
    unknown: list[str] = []
    for name, obj in recoverables.items():
        hook = custom_hooks.get(name) or registry.saver(obj)
        if hook is None and has_state(obj):
            hook = torch_save
        if hook is None:
            unknown.append(f"{name!r} ({type(obj).__qualname__})")
            continue
        every_rank = name not in custom_hooks and registry.saves_on_every_rank(obj)
        jobs[name] = SaveJob(partial(hook, obj), every_rank)
    if unknown:
        raise HookError(
            f"Don't know how to save {', '.join(unknown)}: no hook is registered for the type and "
            "it has no state_dict and load_state_dict. Register hooks with "
            "register_checkpoint_hooks, or pass custom_save_hook to add_recoverable"
        )
    return jobs


def write_checkpoint(
    root: Path,
    jobs: Mapping[str, SaveJob],
    *,
    meta: Mapping[str, object],
    name: str | None,
    lineage: Mapping[str, object],
    world: World,
    storage: LocalStorage,
    verbosity: int,
) -> Checkpoint | None:
    """Write one checkpoint and return it on rank zero, None elsewhere.

    Args:
        root: The folder of all checkpoints.
        jobs: What to write, by name.
        meta: Plain meta, see `lightning_sbckpt.meta.plain_meta`.
        name: The checkpoint's own name, or None to name it by time.
        lineage: Where these weights come from, for the manifest.
        world: The ranks that save together.
        storage: The disk.
        verbosity: The level of the log line.

    Raises:
        SaveError: Something could not be written; nothing of the checkpoint is visible.
    """
    main = world.rank == 0
    start = time.perf_counter()
    with ExitStack() as stack:
        # 1. Rank zero makes the folder; every rank learns where, or that there is none.
        staged: Path | Exception | None = None
        if main:
            try:
                staged = stack.enter_context(staging(root, storage))
            except Exception as error:
                staged = _failure(root, "can't create a folder for the checkpoint", error)
        staged = world.broadcast(staged)
        if not isinstance(staged, Path):
            raise staged or SaveError("rank zero did not say where to save")

        # 2. Every rank writes what is its to write; rank zero learns of every failure.
        failure: Exception | None = None
        for recoverable, job in jobs.items():
            if not (main or job.on_every_rank):
                continue
            try:
                _write_paramfile(recoverable, job, staged, main)
            except Exception as error:
                failure = error
                break
        failures = world.gather(
            portable_error(failure, world.rank) if world.size > 1 and not main else failure
        )

        # 3. Rank zero describes and publishes; every rank learns the end of it.
        result: Checkpoint | Exception | None = None
        if failures is not None:
            result = next((error for error in failures if error is not None), None)
            if result is None:
                try:
                    result = _finish(staged, root, name, meta, lineage, storage)
                except SBCheckpointError as error:
                    result = error
                except Exception as error:
                    result = _failure(root, "can't finish the checkpoint", error)
        # A rank that failed itself raises its own exception, with its traceback.
        shared = world.broadcast(portable_error(result) if world.size > 1 else result)
        outcome = failure or (result if main else shared)
        if isinstance(outcome, Exception):
            raise outcome
    if not isinstance(outcome, Checkpoint):
        raise SaveError(f"the checkpoint in {root} was not published")
    if not main:
        return None
    size = sum(file.stat().st_size for file in outcome.paramfiles.values() if file.is_file())
    logger.log(
        verbosity,
        "saved %s (%s): %d files, %.1f MB in %.2f s",
        outcome.path,
        "end of epoch" if meta["end-of-epoch"] else "within an epoch",
        len(outcome.paramfiles),
        size / 1e6,
        time.perf_counter() - start,
    )
    return outcome


def _write_paramfile(name: str, job: SaveJob, staged: Path, main: bool) -> None:
    path = staged / f"{name}{PARAMFILE_EXT}"
    try:
        job.write(path)
    except SBCheckpointError:
        raise
    except Exception as error:
        raise SaveError(
            f"the save hook of {name!r} failed: {type(error).__name__}: {error}. Nothing of this "
            "checkpoint is kept; earlier ones are whole"
        ) from error
    if main and not path.exists():
        raise SaveError(
            f"the save hook of {name!r} wrote nothing to the path it was given, expected a file "
            "there. Nothing of this checkpoint is kept; earlier ones are whole"
        )


def _finish(
    staged: Path,
    root: Path,
    name: str | None,
    meta: Mapping[str, object],
    lineage: Mapping[str, object],
    storage: LocalStorage,
) -> Checkpoint:
    files: dict[str, FileDigest] = {}
    for folder, subfolders, names in os.walk(staged):
        for entry in names:
            path = Path(folder, entry)
            _refuse_link(path)
            storage.flush_file(path)
            files[path.relative_to(staged).as_posix()] = digest(path)
        for entry in subfolders:
            _refuse_link(Path(folder, entry))
            storage.flush_dir(Path(folder, entry))
    # The meta comes last, since its presence is what makes a folder a checkpoint for every reader.
    meta_bytes = dump_meta(meta)
    files[META_NAME] = digest_bytes(meta_bytes)
    storage.write(staged / MANIFEST_NAME, dump_manifest(Manifest(files, lineage)))
    storage.write(staged / META_NAME, meta_bytes)
    target = _publish(staged, root, name, float(str(meta["unixtime"])), storage)
    return read_checkpoint(target)._replace(meta=dict(meta))


def _publish(
    staged: Path, root: Path, name: str | None, unixtime: float, storage: LocalStorage
) -> Path:
    while True:
        target = folder_for(root, name, unixtime)
        try:
            publish(staged, target, storage, replace=name is not None)
        except FileExistsError:
            # Another process published under the name of this second first; it keeps it.
            if name is not None:
                raise
        else:
            return target


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise SaveError(
            f"a save hook made the symbolic link {path.name}: what it points to would not be part "
            "of the checkpoint. Nothing of this checkpoint is kept; write a copy in the hook"
        )


def _failure(root: Path, what: str, error: Exception) -> SaveError:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    failure = SaveError(
        f"{what} in {root}: {reason}. Nothing of it is visible; earlier checkpoints are whole"
    )
    failure.__cause__ = error
    return failure
