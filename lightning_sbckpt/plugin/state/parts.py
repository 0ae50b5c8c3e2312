"""From a Trainer to named recoverables, and from a checkpoint folder back to Lightning's dictionary.

Lightning gathers its checkpoint in one dictionary, and its strategies, plugins and hooks all have
their say in it. So that dictionary is what is divided here into one file per object, and
what is put together again when Lightning restores.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning_sbckpt._format.load import (
    load_own_state,
    load_state,
    pickle_is_trusted,
    refuse_untrusted,
    trusting_pickle,
)
from lightning_sbckpt._io.digests import Verified
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt._layout.publish import (
    CKPT_PREFIX,
    PARAMFILE_EXT,
    SHARDED_EXT,
    check_name,
    is_checkpoint,
    read_checkpoint,
)
from lightning_sbckpt._load.module_state import versions_below, versions_in, with_versions
from lightning_sbckpt._remote.places import resolve_local
from lightning_sbckpt._remote.urls import is_url
from lightning_sbckpt._save.items import TakenState
from lightning_sbckpt._sharded.states import ShardedState
from lightning_sbckpt._sharded.states import numbered as in_numbers
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DamagedCheckpointError,
    MismatchError,
    SBCheckpointError,
    UntrustedPickleError,
)
from lightning_sbckpt.meta import AVERAGED_FROM, Checkpoint
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.loading import FolderDump
from lightning_sbckpt.plugin.packages import LightningModule, Trainer, some_package
from lightning_sbckpt.plugin.state.gradients import read_gradients
from lightning_sbckpt.plugin.state.hyperparameters import HPARAMS_KEYS, LoadedFolder, names_calls
from lightning_sbckpt.plugin.state.sharded import ShardReader

MODEL = "model"
OPTIMIZER = "optimizer"
SCHEDULER = "lr_scheduler"
LOOPS = "loops"
CALLBACKS = "callbacks"
PRECISION = "precision"
DATAMODULE = "datamodule"
HPARAMS = "hparams"
EXTRAS = "extras"
RNG = "rng"
LOADERS = "loaders"
METRICS = "metrics"
GRADIENTS = "gradients"
NONPERSISTENT = "nonpersistent"
RANK_BUFFERS = "rank_buffers"
COMM_HOOKS = "comm_hooks"

RESERVED = frozenset(
    {MODEL, OPTIMIZER, SCHEDULER, LOOPS, CALLBACKS, PRECISION, DATAMODULE, HPARAMS, EXTRAS}
    | {RNG, LOADERS, METRICS, GRADIENTS, NONPERSISTENT, RANK_BUFFERS, COMM_HOOKS}
)
"""The names that recoverables of the user can't have; nor those that `_numbered` makes."""

_PROGRESS_KEYS = ("epoch", "global_step", "pytorch-lightning_version", "loops")
_OURS = "lightning_sbckpt"


def divide(
    dump: Mapping[str, Any],
    trainer: Trainer | None,
    submodules: Iterable[str],
    position: object,
    *,
    in_pieces: bool = False,
) -> dict[str, TakenState | ShardedState]:
    """Divide Lightning's dictionary into parts, by the name of their file.

    Args:
        dump: What Lightning's `dump_checkpoint` returned.
        trainer: Whose checkpoint it is; None if that is not known.
        submodules: Dotted names of submodules that get a file of their own.
        position: What is needed to go on at this very place; goes with the loops.
        in_pieces: Whether each rank has its own pieces of the model and the optimizers.
    """
    rest = dict(dump)
    parts: dict[str, Mapping[str, object]] = {}
    submodules = tuple(submodules)
    parts.update(divide_model(rest.pop("state_dict"), submodules))
    for name, states in (
        (OPTIMIZER, rest.pop("optimizer_states", [])),
        (SCHEDULER, rest.pop("lr_schedulers", [])),
    ):
        for index, state in enumerate(states):
            parts[numbered(name, index)] = state
    sharded = {name for name in parts if in_pieces and not name.startswith(SCHEDULER)}
    progress = {key: rest.pop(key) for key in _PROGRESS_KEYS if key in rest}
    parts[LOOPS] = {**progress, _OURS: {"position": position, "submodules": list(submodules)}}
    parts[CALLBACKS] = rest.pop("callbacks", {})
    parts[HPARAMS] = {key: rest.pop(key) for key in HPARAMS_KEYS if key in rest}
    # Lightning files these under the name of their class, which an `on_save_checkpoint` may use.
    owners: dict[str, object] = {}
    if trainer is not None:
        owners[PRECISION] = trainer.precision_plugin
        owners[DATAMODULE] = _private.trainer.datamodule_of(trainer)
    for name, owner in owners.items():
        key = type(owner).__qualname__
        if owner is not None and key in rest:
            parts[name] = {key: rest.pop(key)}
    parts[EXTRAS] = rest
    # Those of a live run only: what was read from elsewhere is not ours.
    ours = {HPARAMS} if trainer is not None and names_calls(parts[HPARAMS]) else set()
    return {
        name: ShardedState(state)
        if name in sharded
        else TakenState(state, authenticated=name in ours)
        for name, state in parts.items()
        if state or name == MODEL
    }


def divide_model(
    state: Mapping[str, object], submodules: tuple[str, ...]
) -> dict[str, Mapping[str, object]]:
    """Divide a module's state into those of submodules, by their name, and the rest.

    Raises:
        ConfigurationError: There is nothing under the name of a submodule.
    """
    parts: dict[str, OrderedDict[str, object]] = {name: OrderedDict() for name in submodules}
    parts[MODEL] = OrderedDict()
    versions = versions_in(state)
    if versions is not None:
        for name, part in parts.items():
            with_versions(part, versions if name == MODEL else versions_below(versions, name))
    for key, value in state.items():
        owner = next((name for name in submodules if key.startswith(f"{name}.")), None)
        if owner is None:
            parts[MODEL][key] = value
        else:
            # Without the prefix: the file is the submodule's own state_dict.
            parts[owner][key[len(owner) + 1 :]] = value
    empty = [name for name in submodules if not parts[name]]
    if empty:
        raise ConfigurationError(
            f"split_model names {', '.join(map(repr, empty))}, but the module has no parameters "
            f"or buffers under {'that name' if len(empty) == 1 else 'those names'}. Its top "
            f"level has: {', '.join(sorted({key.partition('.')[0] for key in state}))}"
        )
    return dict(parts)


def numbered(name: str, index: int) -> str:
    """Return the name of the file of one of several optimizers or schedulers."""
    return name if index == 0 else f"{name}_{index}"


def is_reserved(name: str) -> bool:
    """Return whether a part of the run has, or in another run may have, this name."""
    base, _, number = name.rpartition("_")
    return name in RESERVED or (base in (OPTIMIZER, SCHEDULER) and number.isdecimal())


def is_folder(path: object) -> bool:
    """Return whether a path is a checkpoint folder, ours or SpeechBrain's."""
    if not isinstance(path, (str, Path)):
        return False
    if is_url(path):
        # Any other URL is one for Lightning, and no store is asked about it.
        name = str(path).rpartition("/")[2]
        ours = name.startswith(CKPT_PREFIX) and not name.endswith(PARAMFILE_EXT)
        return ours and is_checkpoint(resolve_local(path))
    return is_checkpoint(Path(path))


def is_resumable(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint was written by a fit, so that a fit can go on from it.

    An average may have the files of a fit, but its optimizer is that of other weights.
    """
    averaged = AVERAGED_FROM in checkpoint.meta
    return LOOPS in checkpoint.paramfiles and MODEL in checkpoint.paramfiles and not averaged


class FolderReader:
    """Reads checkpoint folders into Lightning's dictionary.

    Args:
        trust_pickle: Read what only pickle can hold, whoever wrote it.
        left_out: If given, what is not trusted is left out of what is read, and named in this list;
            otherwise a folder that has it is refused.
        skip: Names of files to leave out. (The model and the optimizers are not left out here:
            Lightning wants to find something for each.)
        pieces: Reads the model and the optimizers where each rank has its own pieces of them.
        verified: The files that a search has read just now; gets what is read.

    Attributes:
        own_hyperparameters: The keys of the last folder read whose values this user's own runs wrote.
        left_out: As given.
        pieces: As given.
    """

    def __init__(
        self,
        *,
        trust_pickle: bool = False,
        left_out: list[str] | None = None,
        skip: Collection[str] = (),
        pieces: ShardReader | None = None,
        verified: Verified | None = None,
    ) -> None:
        self._trust_pickle = trust_pickle
        self.left_out = left_out
        self.own_hyperparameters: frozenset[str] = frozenset()
        self.pieces = pieces
        self._skip = skip
        self._verified = verified or Verified()

    def read(
        self, folder: str | Path, *, weights_only: bool | None = None, optimizers: bool = True
    ) -> FolderDump:
        """Return Lightning's dictionary from a folder.

        Args:
            folder: The checkpoint folder, or its URL.
            weights_only: Lightning's argument; False is the user's word that pickle is trusted.
            optimizers: Whether the states of optimizers that are in pieces are wanted, too.

        Raises:
            CheckpointNotFoundError: There is no checkpoint, or none that a fit has written.
            DamagedCheckpointError: A file is not the one that was written.
        """
        folder = resolve_local(folder)
        checkpoint = read_checkpoint(folder)
        if MODEL not in checkpoint.paramfiles:
            found = ", ".join(checkpoint.paramfiles) or "nothing"
            raise CheckpointNotFoundError(
                f"{folder} has no {MODEL}{PARAMFILE_EXT}, so it is not from SBCheckpoint; it has "
                f"{found}. Load it with lightning_sbckpt.Checkpointer"
            )
        problems = find_damage(
            folder, self._read_in_full(checkpoint), read=self._verified.read_unless_known
        )
        if problems:
            raise DamagedCheckpointError(
                f"{folder} is damaged and nothing was loaded from it: {'; '.join(problems)}. "
                "Use another checkpoint of the run"
            )
        with trusting_pickle(self._trust_pickle or weights_only is False):
            try:
                return FolderDump(self._assemble(checkpoint, optimizers), checkpoint.path)
            except UntrustedPickleError:
                # Name what is in all files, not in the first one alone.
                wanted = checkpoint.paramfiles.items()
                refuse_untrusted(path for name, path in wanted if name not in self._skip)
                raise

    def part(self, checkpoint: Checkpoint, name: str) -> Any:
        """Return one part of a checkpoint, or None if it has no such file."""
        path = checkpoint.paramfiles.get(name)
        if path is None:
            return None
        with trusting_pickle(self._trust_pickle):
            if name == GRADIENTS:
                return read_gradients(path, self.pieces)
            return self._mapping(path)

    def own_state(self, module: LightningModule) -> dict[str, Any]:
        """Return the state of a live module as it is compared with a saved one."""
        return module.state_dict() if self.pieces is None else self.pieces.own_state()

    def _read_in_full(self, checkpoint: Checkpoint) -> Collection[str] | None:
        if self.pieces is None or self.pieces.reads_every_byte:
            return None
        # What all ranks wrote one rank compares, and the others read what is theirs.
        names = [path.name for path in checkpoint.paramfiles.values()]
        return [name for name in names if not name.endswith(SHARDED_EXT)]

    def _model(self, path: Path, prefix: str) -> dict[str, Any]:
        if self.pieces is not None:
            return self.pieces.model(path, prefix)
        if path.suffix == SHARDED_EXT:
            from lightning_sbckpt._sharded.reading import SavedShards

            return SavedShards(path).state()
        return self._mapping(path)

    def _mapping(self, path: Path) -> dict[str, Any]:
        state = load_state(path, left_out=self.left_out)
        if not isinstance(state, dict):
            raise MismatchError(
                f"{path} holds a {type(state).__name__}, expected a state: a dictionary. It was not "
                "written by SBCheckpoint; use another checkpoint"
            )
        return state

    def _optimizer(self, path: Path, index: int, optimizers: bool) -> object:
        if self.pieces is not None:
            return self.pieces.optimizer(path, index) if optimizers else {}
        if path.suffix == SHARDED_EXT:
            from lightning_sbckpt._sharded.reading import SavedShards

            return in_numbers(SavedShards(path).state())
        # What becomes an optimizer's state is dropped with it.
        return load_state(path, left_out=self.left_out, grouped=True)

    def _assemble(self, checkpoint: Checkpoint, optimizers: bool) -> dict[str, Any]:
        def read(name: str) -> dict[str, Any]:
            left_out = name in self._skip and name not in (MODEL, LOOPS)
            path = None if left_out else checkpoint.paramfiles.get(name)
            return {} if path is None else self._mapping(path)

        # Of weights alone, an average, say. Without these Lightning would take them for those of one
        # of its first releases.
        nowhere = {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": some_package().__version__,
        }
        dump = {**nowhere, **read(LOOPS)}
        submodules = submodules_in(dump)
        dump.pop(_OURS, None)
        state = self._model(checkpoint.paramfiles[MODEL], "")
        for submodule in submodules:
            path = None if submodule in self._skip else checkpoint.paramfiles.get(submodule)
            own = {} if path is None else self._model(path, f"{submodule}.")
            state.update({f"{submodule}.{key}": value for key, value in own.items()})
        dump["state_dict"] = state
        dump["optimizer_states"] = [
            self._optimizer(path, index, optimizers)
            for index, path in enumerate(_numbered(checkpoint, OPTIMIZER))
        ]
        dump["lr_schedulers"] = [
            load_state(path, left_out=self.left_out, grouped=True)
            for path in _numbered(checkpoint, SCHEDULER)
        ]
        dump["callbacks"] = read(CALLBACKS)
        for name in (PRECISION, DATAMODULE, EXTRAS):
            dump.update(read(name))
        # Last, so that what is known to be ours is not replaced by what may not be.
        dump.update(self._hyperparameters(checkpoint))
        return dump

    def _hyperparameters(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        self.own_hyperparameters = frozenset()
        path = checkpoint.paramfiles.get(HPARAMS)
        if path is None or HPARAMS in self._skip:
            return {}
        found, own = load_own_state(path, left_out=self.left_out)
        if not isinstance(found, Mapping):
            raise MismatchError(f"{path} holds a {type(found).__name__}, expected hyperparameters")
        if own:
            self.own_hyperparameters = frozenset(found)
        return found


def _numbered(checkpoint: Checkpoint, name: str) -> list[Path]:
    """Return the files of the optimizers or schedulers, in their order."""
    paths: list[Path] = []
    while (key := numbered(name, len(paths))) in checkpoint.paramfiles:
        paths.append(checkpoint.paramfiles[key])
    return paths


def read_to_load(
    folder: str | Path, *, weights_only: bool | None = None, verified: Verified | None = None
) -> LoadedFolder:
    """Return Lightning's dictionary from a folder for `load_from_checkpoint`.

    Args:
        folder: The checkpoint folder, or its URL.
        weights_only: See `FolderReader.read`.
        verified: See `FolderReader`.
    """
    trusted = weights_only is False or pickle_is_trusted()
    reader = FolderReader(trust_pickle=trusted, verified=verified)
    dump = reader.read(folder)
    return LoadedFolder(dump, dump if trusted else reader.own_hyperparameters)


@contextmanager
def read_as_ours(path: object) -> Iterator[None]:
    """Read what `SBCheckpoint` has written; whatever does not have that form is refused by its path.

    Raises:
        MismatchError: It has another form.
    """
    try:
        yield
    except SBCheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise MismatchError(
            f"{path} has the state of a fit in a form that SBCheckpoint does not write "
            f"({type(error).__name__}: {str(error)[:200]}), and no fit goes on from it. Use another checkpoint"
        ) from error


def position_in(loops: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the exact place that was saved with the loops, or None."""
    return cast("dict[str, Any] | None", loops.get(_OURS, {}).get("position"))


def submodules_in(loops: Mapping[str, Any]) -> list[str]:
    """Return the names of the submodules that have files of their own, saved with the loops."""
    return cast("list[str]", loops.get(_OURS, {}).get("submodules", []))


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse names of recoverables that would be files of ours, or the same file twice.

    Raises:
        ConfigurationError: A name is taken, or given twice.
        CheckpointNameError: A name can't be that of a file.
    """
    taken = sorted({name for name in names if is_reserved(name)})
    if taken:
        raise ConfigurationError(
            f"{where} has the names {', '.join(map(repr, taken))}, which SBCheckpoint uses for its "
            f"own files. Those are: {', '.join(sorted(RESERVED))}, and optimizers and schedulers "
            "with a number"
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"{where} has the names {', '.join(map(repr, twice))} twice; every recoverable needs "
            "one of its own"
        )
    for name in names:
        check_name(name, "recoverable")


def check_disjoint(submodules: Sequence[str]) -> None:
    """Refuse submodules inside one another.

    Raises:
        ConfigurationError: One is.
    """
    inside = [
        f"{inner!r} is inside {outer!r}"
        for outer in submodules
        for inner in submodules
        if inner.startswith(f"{outer}.")
    ]
    if inside:
        raise ConfigurationError(
            f"split_model names submodules of which {', '.join(inside)}: each has a file with its "
            "whole state_dict, so name one of them"
        )
