"""To and from Lightning's own `.ckpt`, one file for all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning_sbckpt._format.encode import write_torch
from lightning_sbckpt._format.load import (
    load_state,
    pickle_is_trusted,
    trusting_pickle,
)
from lightning_sbckpt._io.progress import Progress, Tally
from lightning_sbckpt._layout.publish import folder_for, read_checkpoint
from lightning_sbckpt._load.load import bytes_of
from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt.checkpointer import Checkpointer
from lightning_sbckpt.errors import ConfigurationError, MismatchError
from lightning_sbckpt.export import Exported, Source, bytes_to_export, publish_file
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.plugin.state.hyperparameters import refuse_calls
from lightning_sbckpt.plugin.state.parts import (
    COMM_HOOKS,
    GRADIENTS,
    LOADERS,
    LOOPS,
    METRICS,
    MODEL,
    NONPERSISTENT,
    RANK_BUFFERS,
    RNG,
    FolderReader,
    divide,
    is_reserved,
    submodules_in,
)
from lightning_sbckpt.run_paths import folder_of

__all__ = ["from_lightning", "to_lightning"]

_NOT_LIGHTNINGS = {
    RNG: "the random states",
    LOADERS: "the position of the data",
    METRICS: "the metrics of the epoch so far",
    GRADIENTS: "the gradients gathered so far",
    NONPERSISTENT: "the non-persistent buffers",
    RANK_BUFFERS: "the buffers of the other ranks",
    COMM_HOOKS: "the states of communication hooks",
}


def to_lightning(
    checkpoint: Source,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    trust_pickle: bool = False,
    on_progress: Progress | None = None,
) -> Exported:
    """Write a checkpoint of a Lightning run as a `.ckpt`, for which nothing of ours is needed.

    `Trainer.fit(ckpt_path=...)` and `load_from_checkpoint` take it. A run that goes on from it
    does so as Lightning alone would: what that has no place for is named in the remarks.

    Args:
        checkpoint: The checkpoint, or its folder.
        path: The file to write; there or not, never half.
        overwrite: Replace a file that is there.
        trust_pickle: Read state that only pickle can hold, whoever wrote it. Otherwise what this
            user's own runs have not written is left out, and named in the remarks.
        on_progress: Called now and then with the bytes read and written so far and all bytes that
            there are to read and to write.

    Returns:
        The file.

    Raises:
        CheckpointNotFoundError: There is no checkpoint of a Lightning run.
        ConfigurationError: There is such a file, or no folder for it.
        DamagedCheckpointError: A file is not the one that was saved.
        SaveError: The disk refused.
        UntrustedPickleError: The hyperparameters name what Lightning would import and call.

    Example:
        >>> import tempfile, torch
        >>> from lightning_sbckpt import Checkpointer
        >>> folder = Path(tempfile.mkdtemp())
        >>> saved = Checkpointer(folder, {"model": torch.nn.Linear(1, 1)}).save_checkpoint()
        >>> to_lightning(saved, folder / "model.ckpt").remarks
        ('no fit can go on from it: the checkpoint has the weights, and not the state of a fit',)
    """
    folder = folder_of(checkpoint, MODEL)
    reader = FolderReader(trust_pickle=trust_pickle, left_out=[])
    source = read_checkpoint(folder)
    size = bytes_of(source, source.paramfiles)
    total = bytes_to_export(source, source.paramfiles)
    tally = Tally(on_progress, total)
    with tally.part(total - 2 * size):
        dump = reader.read(folder)
    # Who loads the file meets Lightning alone, which may be one that calls what it names.
    trusted = trust_pickle or pickle_is_trusted()
    refuse_calls(dump, trusted_keys=dump if trusted else reader.own_hyperparameters)
    remarks = _left_out(source, reader)
    remarks += [f"left out is {held}, which only pickle can hold" for held in reader.left_out or ()]
    with tally.part(2 * size):
        path = publish_file(path, partial(write_torch, dict(dump)), overwrite=overwrite)
    return Exported(path, tuple(remarks))


def _left_out(checkpoint: Checkpoint, reader: FolderReader) -> list[str]:
    loops = reader.part(checkpoint, LOOPS)
    if loops is None:
        return [
            "no fit can go on from it: the checkpoint has the weights, and not the state of a fit"
        ]
    written = submodules_in(loops)
    inexact = [
        f"{what} ({name})"
        for name, what in _NOT_LIGHTNINGS.items()
        if name in checkpoint.paramfiles
    ]
    others = [
        name for name in checkpoint.paramfiles if not is_reserved(name) and name not in written
    ]
    remarks = [
        f"not in it is the recoverable {name!r}: Lightning has no place for it" for name in others
    ]
    if inexact:
        remarks.append(f"a resume from it is not exact, since not in it are {', '.join(inexact)}")
    return remarks


def from_lightning(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    name: str | None = None,
    meta: Mapping[str, object] | None = None,
    trust_pickle: bool = False,
) -> Checkpoint:
    """Turn Lightning's `.ckpt` into a checkpoint folder.

    `SBCheckpoint` and `load_from_checkpoint` take it as any other. The next run of an `SBCheckpoint`
    on `root` goes on from it if nothing newer is there.

    Args:
        path: The file.
        root: The folder of all checkpoints; made if it is missing.
        name: The checkpoint's own name; by default it is named by time.
        meta: More keys for its meta. The metrics are not in Lightning's file: give them here.
        trust_pickle: Read what only pickle can hold. It can run any code that the author of the
            file chose.

    Returns:
        The checkpoint.

    Raises:
        MismatchError: The file is not Lightning's.
        UntrustedPickleError: Only pickle can read it.
        DamagedCheckpointError: It can't be read at all.
        ConfigurationError: There is a checkpoint of that name.
        SaveError: It could not be written; nothing of it is visible.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> file = {"state_dict": {"weight": torch.ones(1)}, "epoch": 3, "global_step": 40}
        >>> torch.save(file, folder / "last.ckpt")
        >>> from_lightning(folder / "last.ckpt", folder / "run").meta["global_step"]
        40
    """
    path, root = Path(path), Path(root)
    with trusting_pickle(trust_pickle):
        dump = load_state(path)
    if not isinstance(dump, dict) or not isinstance(dump.get("state_dict"), Mapping):
        found = f"the keys {', '.join(map(str, dump))}" if isinstance(dump, dict) else "no keys"
        raise MismatchError(
            f"{path} is not a checkpoint of Lightning: it has {found}, expected 'state_dict' among "
            "them. A plain state_dict needs no import: load it with torch.load"
        )
    if name is not None and folder_for(root, name, 0.0).exists():
        raise ConfigurationError(
            f"{path} was not imported: {folder_for(root, name, 0.0)} exists already. Give it "
            "another name"
        )
    dump = cast("dict[str, Any]", dump)
    parts = divide(dump, None, (), None)
    place = {key: dump[key] for key in ("epoch", "global_step") if isinstance(dump.get(key), int)}
    request = SaveRequest(
        parts, {**place, **(meta or {})}, _is_over(dump), name, {"imported-from": path.name}
    )
    with Checkpointer(root) as checkpointer:
        saved = checkpointer.save(request).checkpoint
    assert saved is not None  # There is no background.
    return read_checkpoint(saved.path)


def _is_over(dump: Mapping[str, Any]) -> bool:
    """Return whether the epoch had ended, as far as the file tells."""
    progress = dump.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(progress.get("is_last_batch", True))
