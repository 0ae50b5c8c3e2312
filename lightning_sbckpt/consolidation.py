"""Putting together what many ranks wrote in pieces: a checkpoint of plain files from a sharded one."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import torch

from lightning_sbckpt._display.wording import printable
from lightning_sbckpt._io.open_regular import open_below
from lightning_sbckpt._io.progress import Progress, Tally
from lightning_sbckpt._layout.copies import copy_paramfile
from lightning_sbckpt._layout.manifest import MANIFEST_NAME, read_manifest
from lightning_sbckpt._layout.publish import (
    CKPT_PREFIX,
    SHARDED_EXT,
    check_name,
    folder_for,
    read_checkpoint,
)
from lightning_sbckpt._load.load import bytes_of, bytes_to_check, require_sound
from lightning_sbckpt._save.items import TakenState
from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt._sharded.contents import SavedTensor
from lightning_sbckpt._sharded.states import numbered
from lightning_sbckpt._world.world import SingleProcess
from lightning_sbckpt.checkpointer import Checkpointer
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.meta import META_NAME, Checkpoint, ckpt_recency, read_meta
from lightning_sbckpt.run_paths import folder_of

__all__ = ["CONSOLIDATED_FROM", "consolidate"]

CONSOLIDATED_FROM = "consolidated-from"
"""The key, in the lineage, of the name of the checkpoint that a consolidated one was made from."""

Source: TypeAlias = "Checkpoint | str | os.PathLike[str]"

_ALIGNED = 64
_LONGEST_DOCUMENT = 2**20
# A little before, and still another number as a count of seconds.
_TICK = 1e-5


def consolidate(
    checkpoint: Source,
    to: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    on_progress: Progress | None = None,
) -> Checkpoint:
    """Save what ranks have written in pieces as a checkpoint of plain files.

    Each sharded state becomes one file of whole tensors, which `torch.load(..., weights_only=True)`
    reads: that of a module its `state_dict`, that of an optimizer the ordinary one, its parameters
    by number in the order of its groups. All other files are copied. So the new checkpoint is loaded
    and resumed from like any other, in one process or in many.

    The tensors go through a file that has no name, beside the new checkpoint: as much room as they
    take is needed there twice, and in memory no more than a piece at a time that the system could
    not put back. One process calls this, not each rank; it needs no process group.

    The new checkpoint has the meta of the old one, metrics too, since its weights are the same. It
    says where it comes from under `consolidated-from` in the lineage of its manifest, belongs to no
    run, and is pinned; of the two, the old one is the newer, which searches prefer.

    Args:
        checkpoint: The checkpoint, or its folder.
        to: The folder that the new one goes to; by default the one that the old one is in.
        name: Its own name; by default that of the old one and `+whole`.
        on_progress: Called now and then with the bytes read and written so far and all bytes that
            there are to read and to write.

    Returns:
        The new checkpoint.

    Raises:
        ConfigurationError: Nothing in it is sharded, or there is a checkpoint of that name.
        DamagedCheckpointError: A file is not the one that was written.
        UntrustedPickleError: Only pickle can read a file of it.
        SaveError: It could not be written; nothing of it is visible.

    Example:
        >>> from lightning_sbckpt._sharded.states import ShardedState
        >>> run = Path(tempfile.mkdtemp())
        >>> pieces = ShardedState(torch.nn.Linear(2, 1).state_dict())
        >>> with Checkpointer(run, {"model": pieces}) as checkpointer:
        ...     saved = checkpointer.save_checkpoint(name="a")
        >>> saved.paramfiles["model"].name, consolidate(saved).paramfiles["model"].name
        ('model.dcp', 'model.ckpt')
    """
    given = folder_of(checkpoint)
    source = read_checkpoint(given)
    sharded = [part for part, path in source.paramfiles.items() if path.suffix == SHARDED_EXT]
    if not sharded:
        raise ConfigurationError(
            f"{source.path} has nothing to consolidate: no state in it is sharded (a folder that "
            f"ends in {SHARDED_EXT}); it has {', '.join(source.paramfiles) or 'no recoverables'}"
        )
    checking = bytes_to_check(source, ())
    # What is in pieces is read and written; what is copied is written, and read for its checksum.
    saving = 2 * bytes_of(source, source.paramfiles)
    tally = Tally(on_progress, checking + saving)
    with tally.part(checking):
        require_sound(source, ())
    root = source.path.parent if to is None else Path(to)
    source_name = printable(source.path.name)
    name = name or f"{source_name.removeprefix(CKPT_PREFIX).removeprefix('+')}+whole"
    target = folder_for(root, check_name(name, "checkpoint"), 0.0)
    if target.exists():
        raise ConfigurationError(
            f"{source.path} was not consolidated: {target} exists already. Give it another name"
        )
    with ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(root, world=SingleProcess()))
        checkpointer.claim()
        for part, path in source.paramfiles.items():
            if part in sharded:
                scratch = stack.enter_context(tempfile.TemporaryFile(dir=root))
                whole = TakenState(partial(_whole, path, cast("BinaryIO", scratch)))
                checkpointer.add_recoverable(part, whole)
            else:
                checkpointer.add_recoverable(part, path, custom_save_hook=copy_paramfile)
        meta = read_meta(source.path / META_NAME)
        # So that it is never the newest of the two.
        earlier = {"unixtime": ckpt_recency(source) - _TICK} if ckpt_recency(source) > 0 else {}
        request = SaveRequest(
            checkpointer.recoverables,
            {**meta, **earlier},
            bool(meta.get("end-of-epoch", True)),
            name,
            {CONSOLIDATED_FROM: source_name, "reason": "consolidated"},
            _documents(source),
        )
        with tally.part(saving):
            saved = checkpointer.save(request).checkpoint
        assert saved is not None  # There is one process, and no background.
        checkpointer.pin(saved, f"consolidated from {source_name}")
    return read_checkpoint(saved.path)


def _whole(path: Path, scratch: BinaryIO) -> Mapping[str, Any]:
    """Return a sharded state as a whole, in a file that is mapped into memory.

    Args:
        path: The folder of the state; an optimizer's comes in its ordinary form.
        scratch: An empty file, open for writing.
    """
    from lightning_sbckpt._sharded.reading import SavedShards

    shards = SavedShards(path)
    tensors = shards.contents.tensors
    starts: dict[str, int] = {}
    length = 0
    for name, saved in tensors.items():
        starts[name] = length
        length += -(-_bytes_of(saved) // _ALIGNED) * _ALIGNED
    scratch.truncate(max(length, 1))
    mapped = mmap.mmap(scratch.fileno(), max(length, 1))

    def allocate(name: str, saved: SavedTensor) -> torch.Tensor:
        count = math.prod(saved.size)
        if not count:
            return torch.empty(saved.size, dtype=saved.dtype, device="cpu")
        flat = torch.frombuffer(mapped, dtype=saved.dtype, count=count, offset=starts[name])
        return flat.view(saved.size)

    state = shards.state(allocate)
    return numbered(state) if "param_groups" in state else state


def _bytes_of(saved: SavedTensor) -> int:
    return math.prod(saved.size) * saved.dtype.itemsize


def _text(folder: Path, name: str) -> str:
    with open_below(folder, name) as stream:
        return stream.read(_LONGEST_DOCUMENT).decode()


def _documents(source: Checkpoint) -> dict[str, str]:
    """Return the small texts that a checkpoint has for people, such as hyperparameters."""
    manifest = read_manifest(source.path)
    files = {} if manifest is None else manifest.files
    taken = {META_NAME, MANIFEST_NAME}
    return {
        name: _text(source.path, name)
        for name, found in files.items()
        if name.endswith(".yaml") and name not in taken and found.size < _LONGEST_DOCUMENT
    }
