"""The second half of a save, by rank zero alone: written, described, published.

At once, or in the background while training goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning_sbckpt._io.open_regular import NotRegularError
from lightning_sbckpt._io.storage import FileDigest, LocalStorage, digest_bytes
from lightning_sbckpt._layout.manifest import MANIFEST_NAME, MARK, Manifest, dump_manifest
from lightning_sbckpt._layout.publish import folder_for, folder_names, publish, read_checkpoint
from lightning_sbckpt._save.stage import SaverState, Staged
from lightning_sbckpt._sharded.states import require_all_pieces
from lightning_sbckpt.errors import SaveError, SBCheckpointError
from lightning_sbckpt.meta import META_NAME, Checkpoint, dump_meta

logger = logging.getLogger("lightning_sbckpt")


class ChangedMeanwhileError(SaveError):
    """What was to be saved changed before it was copied."""


def commit(staged: Staged, state: SaverState, remove: Callable[[Path], object]) -> Checkpoint:
    """Write the states, describe and publish; only rank zero does.

    Args:
        staged: The checkpoint, as `stage` returned it.
        state: What is kept from save to save.
        remove: Takes away a folder that is no checkpoint any more; an error in it is no error of the
            save.

    Raises:
        SaveError: Something could not be written; nothing of the checkpoint is visible.
    """
    assert staged.folder is not None
    request, storage = staged.request, state.storage
    with staged.discarded_on_error():
        try:
            files = _write(staged, staged.folder, state)
            size = sum(found.size for found in files.values())
            # The meta comes last: its presence is what makes a folder a checkpoint for every reader.
            meta = MARK + dump_meta(request.meta)
            manifest = Manifest({**files, META_NAME: digest_bytes(meta)}, request.lineage)
            storage.write(staged.folder / MANIFEST_NAME, dump_manifest(manifest))
            storage.write(staged.folder / META_NAME, meta)
            target = _publish(staged, staged.folder, state, remove)
            state.links.published(target, files)
            checkpoint = read_checkpoint(target)._replace(meta=dict(request.meta))
        except SBCheckpointError:
            raise
        except Exception as error:
            raise staged.failure("can't finish the checkpoint", error) from error
    staged.published()
    seconds = time.perf_counter() - staged.started
    state.history.saved(checkpoint, request.lineage, size, seconds)
    logger.log(
        request.verbosity,
        "saved %s (%s): %d files, %.1f MB in %.2f s",
        checkpoint.path,
        "end of epoch" if request.meta["end-of-epoch"] else "within an epoch",
        len(checkpoint.paramfiles),
        size / 1e6,
        seconds,
    )
    return checkpoint


def _write(staged: Staged, folder: Path, state: SaverState) -> dict[str, FileDigest]:
    """Write all files but manifest and meta, flushed; return what they are, by name."""
    storage, late_copy = state.storage, staged.late_copy
    # First, whatever becomes of the rest: the others can't do it without this rank.
    files = {**staged.written, **staged.shards.write()}
    if late_copy is not None:
        late_copy.wait()
    if late_copy is not None and late_copy.known_changed:
        raise _changed_meanwhile()
    require_all_pieces(folder, files)
    for name, contents in staged.contents.items():
        files[name] = contents.write(folder / name, storage, state.links)
    staged.contents = {}
    # Now, since whatever wrote to a tensor while it was copied has ended while all was written.
    if late_copy is not None and late_copy.changed():
        raise _changed_meanwhile()
    files.update(_flush_written_by_hooks(folder, files, storage))
    for name, text in staged.request.extra_files.items():
        # For people, who can't read what is not Unicode anyway.
        data = text.encode(errors="backslashreplace")
        storage.write(folder / name, data)
        files[name] = digest_bytes(data)
    return files


def _flush_written_by_hooks(
    folder: Path, known: Mapping[str, FileDigest], storage: LocalStorage
) -> dict[str, FileDigest]:
    try:
        return storage.seal_tree(folder, known)
    except NotRegularError as error:
        raise SaveError(
            f"a save hook left {error.filename} in the checkpoint: {error.strerror}, and nothing else "
            "can be part of it. Nothing of this checkpoint is kept; write a copy in the hook"
        ) from error


def _publish(
    staged: Staged, folder: Path, state: SaverState, remove: Callable[[Path], object]
) -> Path:
    name, stem = staged.request.name, staged.request.stem
    unixtime = float(str(staged.request.meta["unixtime"]))
    while True:
        if stem is not None:
            state.used.update(folder_names(state.root))
        target = folder_for(state.root, name, unixtime, state.last, stem=stem, used=state.used)
        try:
            replaced = publish(folder, target, state.storage, replace=name is not None)
        except FileExistsError:
            # Another process published under the name of this second first; it keeps it.
            if name is not None:
                raise
        else:
            state.last = target
            if replaced is not None:
                remove(replaced)
            return target


def _changed_meanwhile() -> ChangedMeanwhileError:
    return ChangedMeanwhileError(
        "tensors were written to while they were copied, before the optimizer's step"
    )
