"""Averages of checkpoints, taken one file at a time."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TypeAlias, TypeVar, overload

from lightning_sbckpt._display.wording import printable
from lightning_sbckpt._format.load import load_state, open_state
from lightning_sbckpt._format.names import pickled_path
from lightning_sbckpt._io.progress import Progress, Tally
from lightning_sbckpt._io.records import bring_file, fetch
from lightning_sbckpt._layout.copies import copy_paramfile
from lightning_sbckpt._layout.publish import PARAMFILE_EXT, folder_for, read_checkpoint
from lightning_sbckpt._load.load import bytes_of, bytes_to_check, require_sound
from lightning_sbckpt._save.items import TakenState
from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt._world.world import SingleProcess
from lightning_sbckpt.averaging.sums import StateDict, average, numbered
from lightning_sbckpt.checkpointer import Checkpointer
from lightning_sbckpt.errors import ConfigurationError, MismatchError
from lightning_sbckpt.hooks import speechbrain
from lightning_sbckpt.meta import AVERAGED_FROM, Checkpoint, ckpt_recency
from lightning_sbckpt.run_paths import folder_of

__all__ = ["average_checkpoints", "average_state_dicts", "save_average"]

T = TypeVar("T")
Source: TypeAlias = "Checkpoint | str | os.PathLike[str]"

# What tells where in the training the sources were; no metric of theirs is one of the average.
_RANGES = (("epoch", "averaged-epochs"), ("global_step", "averaged-steps"))
# A little before, and still another number as a count of seconds.
_TICK = 1e-5


def average_state_dicts(state_dicts: Iterable[StateDict]) -> dict[str, object]:
    """Return the average of state dictionaries, which are left as they are.

    Floating and complex tensors are averaged, those of less than 32 bits in single precision, and
    come back in their own type. Integer and boolean tensors (counts such as `num_batches_tracked`,
    masks, indices) and a module's extra state have no meaningful average: the first dictionary's
    are taken, so give the newest or best first.

    At most two states are in memory at a time if `state_dicts` makes them one by one.

    Args:
        state_dicts: The dictionaries, with the same names and shapes in each.

    Returns:
        A new dictionary with new tensors, on the devices of the first one's.

    Raises:
        MismatchError: Names, shapes or kinds differ; the message lists every difference.
        ConfigurationError: There are no dictionaries to average.

    Example:
        >>> import torch
        >>> first = {"weight": torch.tensor([1.0, 2.0]), "steps": torch.tensor(20)}
        >>> second = {"weight": torch.tensor([3.0, 4.0]), "steps": torch.tensor(10)}
        >>> average_state_dicts([first, second])
        {'weight': tensor([2., 3.]), 'steps': tensor(20)}
    """
    return average(numbered(state_dicts))


@overload
def average_checkpoints(
    checkpoint_list: Iterable[Source],
    recoverable_name: str,
    parameter_loader: Callable[..., StateDict] | None = None,
) -> dict[str, object]: ...


@overload
def average_checkpoints(
    checkpoint_list: Iterable[Source],
    recoverable_name: str,
    parameter_loader: Callable[..., object] | None = None,
    averager: Callable[[Iterator[object]], T] = ...,
) -> T: ...


def average_checkpoints(
    checkpoint_list: Iterable[Source],
    recoverable_name: str,
    parameter_loader: Callable[..., object] | None = None,
    averager: Callable[..., object] = average_state_dicts,
) -> object:
    """Return the average of one recoverable over several checkpoints.

    Args:
        checkpoint_list: Checkpoints, as `Checkpointer.find_checkpoints` returns them, or paths of
            checkpoint folders, in any mixture. Give the newest or best first, see
            `average_state_dicts`.
        recoverable_name: Which recoverable to average.
        parameter_loader: Reads a file, called as `loader(path)`, or as
            `loader(path, map_location="cpu")` if it takes that. By default only tensors and plain
            values are loaded, on the CPU.
        averager: Averages an iterator over what the loader returned.

    Returns:
        What the averager returns; by default a state dictionary for `load_state_dict`.

    Raises:
        MismatchError: A checkpoint lacks the recoverable, or states do not fit each other.
        ConfigurationError: There are no checkpoints.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> ckpts = []
        >>> for value in (1.0, 3.0):
        ...     file = folder / f"{value}.ckpt"
        ...     torch.save({"weight": torch.tensor([value])}, file)
        ...     ckpts.append(Checkpoint(folder, {}, {"model": file}))
        >>> average_checkpoints(ckpts, "model")
        {'weight': tensor([2.])}
    """
    paths = _paramfiles(checkpoint_list, recoverable_name)
    read = _loader(parameter_loader)

    def load(path: Path) -> object:
        state = read(path)
        return speechbrain.renamed(state, dict) if isinstance(state, dict) else state

    if averager is average_state_dicts:
        # Not through `averager`, so that a message names the file.
        return average((str(path), _as_state_dict(path, load(path))) for path in paths)
    return averager(load(path) for path in paths)


def save_average(
    where: Checkpointer | str | os.PathLike[str],
    checkpoints: Iterable[Source],
    *,
    recoverables: Sequence[str] = ("model",),
    name: str | None = None,
    meta: Mapping[str, object] | None = None,
    with_rest: bool = False,
    on_progress: Progress | None = None,
) -> Checkpoint:
    """Save the average of several checkpoints as a checkpoint.

    It says where it comes from, under `averaged-from` in its meta and in the lineage of its
    manifest, and from which epochs and steps. It has no metric of its sources, since a metric is
    one of the weights that it was computed for: attach its own by `annotate`.

    No run goes on from it by itself, and none removes it: its time is just before that of its
    newest source, it belongs to no run, and it is pinned.

    Only the average and one tensor at a time are in memory. One process calls this, not each rank.

    Args:
        where: The folder that it goes to, its URL, or its checkpointer.
        checkpoints: The sources: checkpoints or paths of checkpoint folders. Give the newest or
            best first, see `average_state_dicts`.
        recoverables: Which to average; those that `SBCheckpoint(split_model=...)` has split off, too.
        name: Its own name; by default one with the time.
        meta: More keys for its meta.
        with_rest: Copy the other files of the newest source, the hyperparameters among them.
        on_progress: Called now and then with the bytes read and written so far and all bytes that
            there are to read and to write.

    Returns:
        The new checkpoint.

    Raises:
        MismatchError: See `average_checkpoints`.
        DamagedCheckpointError: A file to average is not the one that was written.
        ConfigurationError: There are no checkpoints, or there is one of that name.
        SaveError: It could not be written; nothing of it is visible.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(1, 1)
        >>> with Checkpointer(tempfile.mkdtemp(), {"model": model}) as checkpointer:
        ...     for name in "ab":
        ...         _ = checkpointer.save_checkpoint({"epoch": ord(name) - 97}, name=name)
        ...     average = save_average(checkpointer, checkpointer.list_checkpoints(), name="ab")
        >>> average.path.name, average.meta["averaged-epochs"]
        ('CKPT+ab', [0, 1])
    """
    sources = [read_checkpoint(folder_of(source)) for source in checkpoints]
    newest = max(sources, key=ckpt_recency, default=None)
    files = () if newest is None or not with_rest else newest.paramfiles
    # Of the newest one everything is read that is copied.
    checked = [
        (source, [*recoverables, *(files if source is newest else ())]) for source in sources
    ]
    sizes = {part: sum(bytes_of(source, [part]) for source in sources) for part in recoverables}
    saving = _bytes_to_save(newest, recoverables, files)
    checking = [bytes_to_check(*each) for each in checked]
    tally = Tally(on_progress, sum(checking) + sum(sizes.values()) + saving)
    for each, size in zip(checked, checking, strict=True):
        with tally.part(size):
            require_sound(*each)
    averages = {}
    for part, size in sizes.items():
        with tally.part(size):
            averages[part] = TakenState(average_checkpoints(sources, part, _open_if_plain))
    if newest is None or not averages:
        raise ConfigurationError(
            "Nothing to average: no checkpoints or no recoverables were given. Check the filter "
            "that chose them."
        )
    if isinstance(where, Checkpointer):
        place, access = where.checkpoints_dir, where.access
    else:
        place, access = Path(where), "exclusive"
    with Checkpointer(place, averages, world=SingleProcess(), access=access) as checkpointer:
        root = checkpointer.checkpoints_dir
        checkpointer.claim()
        own_name = _free_name(root, name)
        for part in files:
            if part not in averages:
                file = newest.paramfiles[part]
                checkpointer.add_recoverable(part, file, custom_save_hook=copy_paramfile)
        request = SaveRequest(
            checkpointer.recoverables,
            {**_where_from(sources, newest), **(meta or {})},
            bool(newest.meta.get("end-of-epoch", True)),
            own_name,
            {AVERAGED_FROM: [printable(source.path.name) for source in sources]},
        )
        with tally.part(saving):
            saved = checkpointer.save(request).checkpoint
        assert saved is not None  # There is one process, and no background.
        checkpointer.pin(saved, f"the average of {len(sources)} checkpoints")
    return read_checkpoint(saved.path)


def _bytes_to_save(
    newest: Checkpoint | None, averaged: Sequence[str], files: Collection[str]
) -> int:
    if newest is None:
        return 0
    # What is copied is written, and read for its checksum.
    copied = [name for name in files if name not in averaged]
    return bytes_of(newest, averaged) + 2 * bytes_of(newest, copied)


def _open_if_plain(path: Path) -> StateDict:
    # Beside it lies what only pickle can hold, which `load_state` refuses or reads.
    read = load_state if pickled_path(path).exists() else open_state
    return _as_state_dict(path, read(path))


def _where_from(sources: Sequence[Checkpoint], newest: Checkpoint) -> dict[str, object]:
    described: dict[str, object] = {"averaged-at": time.time()}
    if ckpt_recency(newest) > 0:
        # So that it is never the newest, from which a run would go on.
        described["unixtime"] = ckpt_recency(newest) - _TICK
    described[AVERAGED_FROM] = [printable(source.path.name) for source in sources]
    for key, target in _RANGES:
        values = [source.meta.get(key) for source in sources]
        numbers = [value for value in values if isinstance(value, (int, float))]
        if numbers:
            described[target] = [min(numbers), max(numbers)]
    return described


def _free_name(root: Path, name: str | None) -> str:
    """Return a name that no checkpoint has."""
    if name is not None:
        folder = folder_for(root, name, 0.0)
        if folder.exists():
            raise ConfigurationError(
                f"the average was not saved: {folder} exists already. Give it another name"
            )
        return name
    stamp = time.strftime("average+%Y-%m-%d+%H-%M-%S")
    names = (f"{stamp}+{number:02d}" for number in count())
    return next(free for free in names if not folder_for(root, free, 0.0).exists())


def _paramfiles(checkpoints: Iterable[Source], name: str) -> list[Path]:
    paths: list[Path] = []
    problems: list[str] = []
    for checkpoint in checkpoints:
        # Any record with these fields will do, SpeechBrain's own among them.
        if isinstance(checkpoint, (str, os.PathLike)):
            folder = folder_of(checkpoint, name)
            fetch(folder)
            found = folder.glob(f"*{PARAMFILE_EXT}")
            files = {file.name.removesuffix(PARAMFILE_EXT): file for file in found}
        else:
            folder, files = checkpoint.path, checkpoint.paramfiles
        if name in files:
            bring_file(Path(files[name]))
            paths.append(Path(files[name]))
        else:
            problems.append(f"{folder} has {', '.join(sorted(files)) or 'no recoverables'}")
    if problems:
        raise MismatchError(
            f"Cannot average {name!r}: not every checkpoint has a recoverable of this name.\n  "
            + "\n  ".join(problems)
            + "\nUse one of the names that all of them have, or leave these checkpoints out with "
            "ckpt_predicate."
        )
    return paths


def _loader(loader: Callable[..., T] | None) -> Callable[[Path], T | object]:
    if loader is None:
        return load_state
    try:
        parameters = inspect.signature(loader).parameters.values()
    except ValueError:  # a builtin tells no signature
        return loader
    if any(p.name == "map_location" or p.kind is p.VAR_KEYWORD for p in parameters):
        return lambda path: loader(path, map_location="cpu")
    return loader


def _as_state_dict(path: Path, state: object) -> StateDict:
    if isinstance(state, Mapping):
        return state
    raise MismatchError(
        f"Cannot average {path}: it holds a {type(state).__name__}, expected a state dictionary. "
        "Give an averager that knows what to do with it."
    )
