"""The private names of Lightning that this package touches, and why.

Lightning offers no public way to resume without `ckpt_path`, to save between two batches, or to
read what it has logged so far. Each function here names what it touches and the releases in which
that was seen to work (2.4.0, 2.5.0, 2.5.6 and 2.6.6 unless said otherwise). No other file of
the package may.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import update_wrapper, wraps
from importlib import import_module
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn, cast

from lightning_sbckpt.errors import MixedPackagesError
from lightning_sbckpt.plugin.packages import (
    Callback,
    LightningDataModule,
    LightningEnvironment,
    LightningModule,
    SLURMEnvironment,
    Strategy,
    Trainer,
    fabric_of,
    package_of,
)

Undo = Callable[[], None]
Place = tuple[int, int]
"""Where a run is: the optimizer steps taken and the batches seen."""


class _Replacement:
    """Stands on an instance in place of one of its methods; copied and pickled as that method.

    A copy of the instance has nobody who would ever put the method back.
    """

    def __init__(self, obj: object, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(obj, name)
        # First: it takes over attributes, and the original may itself be a replacement.
        update_wrapper(self, original)
        self._obj, self._name, self._wrapper, self._original = obj, name, wrapper, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(self._original, *args, **kwargs)

    def __reduce__(self) -> tuple[object, ...]:
        # Read before the copy has its attributes: it is the method of its class.
        return getattr, (self._obj, self._name)


def wrap(obj: object, name: str, wrapper: Callable[..., Any]) -> Undo:
    """Replace a method on one instance by `wrapper(original, *args, **kwargs)`; return the undo.

    Wrapping the instance leaves the class, and so every other Trainer of the process, alone.
    """
    # A wrapper that was there before us lives on the instance, too.
    before = vars(obj).get(name)
    replacement = _Replacement(obj, name, wrapper)
    setattr(obj, name, replacement)

    def undo() -> None:
        if vars(obj).get(name) is not replacement:
            return
        if before is None:
            delattr(obj, name)
        else:
            setattr(obj, name, before)

    return undo


# ---------------------------------------------------------------------- resuming


def provide_resume_path(
    trainer: Trainer, provide: Callable[[object], object], adapt: Callable[[dict[str, Any]], None]
) -> Undo:
    """Have `provide(path)` say what Lightning restores from; `path` is what the user gave, or None.

    What was loaded goes through `adapt` before Lightning restores anything from it.

    `_CheckpointConnector.resume_start` is where every restore begins. `Trainer.fit` has settled the
    path before any callback runs, and `_run` holds it as its own argument, so neither can be
    changed from a callback. (It takes `weights_only` as well since 2.6.)
    """

    def resume_start(
        original: Callable[..., Any], checkpoint_path: Any = None, *a: Any, **k: Any
    ) -> Any:
        original(provide(checkpoint_path), *a, **k)
        if loaded := loaded_checkpoint(trainer):
            adapt(loaded)

    return wrap(trainer._checkpoint_connector, "resume_start", resume_start)


def after_restore(trainer: Trainer, act: Callable[[], None]) -> Undo:
    """Have `act()` called when all is restored that Lightning restores, before it trains.

    `_CheckpointConnector.resume_end` is where every restore ends, also one of nothing.
    """

    def resume_end(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        act()

    return wrap(trainer._checkpoint_connector, "resume_end", resume_end)


def loaded_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return what Lightning is restoring from at the moment, or an empty dictionary.

    `_CheckpointConnector._loaded_checkpoint` is kept from the first phase of a restore to the last.
    """
    return trainer._checkpoint_connector._loaded_checkpoint


def let_load_from_checkpoint_read(
    package: str,
    is_folder: Callable[[object], bool],
    read: Callable[..., dict[str, Any]],
    check: Callable[[type, object, Collection[str]], None],
    prepare: Callable[[Any], Any],
) -> None:
    """Have `LightningModule.load_from_checkpoint` take checkpoint folders.

    It reads by `core.saving.pl_load` of the package and has no other place to join in. Files
    and URLs go to Lightning's own function, as before. What was read reaches `_load_state` of that
    module, with the hyperparameters that the caller added, and nothing is imported or called before.

    Args:
        package: Whose modules.
        is_folder: Says what is read by `read`.
        read: Returns Lightning's dictionary.
        check: Is called with the class, the dictionary, and the names of the hyperparameters that
            the caller passed; it raises if they must not be used.
        prepare: Returns what is to take the dictionary's place then.
    """
    saving: Any = import_module(f"{package}.core.saving")
    original_load, original_state = saving.pl_load, saving._load_state

    @wraps(original_load)
    def pl_load(path_or_url: Any, *args: Any, **kwargs: Any) -> Any:
        if is_folder(path_or_url):
            return read(path_or_url, weights_only=kwargs.get("weights_only"))
        return original_load(path_or_url, *args, **kwargs)

    @wraps(original_state)
    def load_state(cls: type, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        check(cls, checkpoint, kwargs)
        return original_state(cls, prepare(checkpoint), *args, **kwargs)

    saving.pl_load = pl_load
    saving._load_state = load_state


def let_every_trainer_read(
    package: str,
    is_ours: Callable[[object], bool],
    reading: Callable[[Trainer, object], AbstractContextManager[object]],
) -> None:
    """Have every Trainer of this process take paths that are ours.

    A Trainer without our callback gives no other occasion. `_CheckpointConnector.resume_start` is
    where every restore begins, of a fit or an evaluation.

    Args:
        package: Whose Trainers.
        is_ours: Says for which paths `reading` is asked.
        reading: Gives what to read in the place of such a path, and has the Trainer able to.
    """
    connectors: Any = import_module(f"{package}.trainer.connectors.checkpoint_connector")
    original = connectors._CheckpointConnector.resume_start

    @wraps(original)
    def resume_start(self: Any, checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
        if not is_ours(checkpoint_path):
            original(self, checkpoint_path, *args, **kwargs)
            return
        with reading(self.trainer, checkpoint_path) as path:
            original(self, path, *args, **kwargs)

    connectors._CheckpointConnector.resume_start = resume_start


def let_words_be_paths(package: str, path_of: Callable[[Trainer, object, str], object]) -> None:
    """Have `path_of(trainer, given, method)` say what a `ckpt_path` stands for, `"best"` say.

    `_CheckpointConnector._parse_ckpt_path` turns these words into paths, before a callback has a say.

    Args:
        package: Whose Trainers.
        path_of: Returns a path, or what was given; the method is `"fit"`, `"test"` or their like.
    """
    connectors: Any = import_module(f"{package}.trainer.connectors.checkpoint_connector")
    original = connectors._CheckpointConnector._parse_ckpt_path

    @wraps(original)
    def parse(self: Any, state_fn: str, ckpt_path: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, state_fn, path_of(self.trainer, ckpt_path, state_fn), *args, **kwargs)

    connectors._CheckpointConnector._parse_ckpt_path = parse


def when_loggers_are_given(package: str, act: Callable[[Trainer], None]) -> None:
    """Have `act(trainer)` called when a Trainer has been given its loggers.

    `_LoggerConnector.on_trainer_init` is the last but a few steps of making one; its callbacks are there.

    Args:
        package: Whose Trainers.
        act: What is called.
    """
    connectors: Any = import_module(
        f"{package}.trainer.connectors.logger_connector.logger_connector"
    )
    original = connectors._LoggerConnector.on_trainer_init

    @wraps(original)
    def on_trainer_init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        act(self.trainer)

    connectors._LoggerConnector.on_trainer_init = on_trainer_init


def tell_of_checkpointing_off(package: str, kind: type) -> None:
    """Have `Trainer(enable_checkpointing=False)` name a callback that it refuses, and what to write.

    Lightning speaks of a `ModelCheckpoint`, in `_CallbackConnector._configure_checkpoint_callbacks`.

    Args:
        package: Whose Trainers.
        kind: The class of the callback.
    """
    connectors: Any = import_module(f"{package}.trainer.connectors.callback_connector")
    original = connectors._CallbackConnector._configure_checkpoint_callbacks

    @wraps(original)
    def configure(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except Exception as error:
            if any(isinstance(callback, kind) for callback in callbacks_of(self.trainer)):
                told = (
                    f"{error} What it found is {kind.__name__}, which saves checkpoints: leave out "
                    "that, or enable_checkpointing=False"
                )
                error.args = (told,)
            raise

    connectors._CallbackConnector._configure_checkpoint_callbacks = configure


def name_mixed_packages(package: str) -> None:
    """Have a package's Trainers name both packages when they are given a module of the other one.

    Lightning says that a `LightningModule` must be a `LightningModule`, or "Expected a parent". Every
    method of a Trainer has `_maybe_unwrap_optimized` look at the module and `_DataConnector.attach_data`
    at the data before anything else.

    Args:
        package: Whose Trainers.
    """
    trainers: Any = import_module(f"{package}.trainer.trainer")
    connectors: Any = import_module(f"{package}.trainer.connectors.data_connector")
    kinds = {"LightningModule": LightningModule, "LightningDataModule": LightningDataModule}
    own = tuple(getattr(import_module(package), name) for name in kinds)

    def checked(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def check(*args: Any, **kwargs: Any) -> Any:
            for given in (*args, *kwargs.values()):
                for name, kind in kinds.items():
                    if isinstance(given, kind) and not isinstance(given, own):
                        raise MixedPackagesError(
                            f"{type(given).__qualname__} is a {name} of {package_of(given).__name__}, and "
                            f"the Trainer is one of {package}: these are two packages, and no Trainer of "
                            "one takes what is of the other. Import both from one of them, as in "
                            f"`from {package} import {name}, Trainer`"
                        )
            return original(*args, **kwargs)

        return check

    trainers._maybe_unwrap_optimized = checked(trainers._maybe_unwrap_optimized)
    connectors._DataConnector.attach_data = checked(connectors._DataConnector.attach_data)


def has_own_checkpoint_format(strategy: Strategy) -> bool:
    """Return whether a strategy writes checkpoints in a way of its own (FSDP, DeepSpeed, ...)."""
    lightnings = package_of(strategy, "strategies").Strategy.save_checkpoint
    return type(strategy).save_checkpoint is not lightnings


# ---------------------------------------------------------------------- saving


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return Lightning's checkpoint as a dictionary; every `on_save_checkpoint` hook has run.

    `_CheckpointConnector.dump_checkpoint` is what `Trainer.save_checkpoint` hands to the strategy,
    which writes it to one file; there is no public way to get it without the file.
    """
    return cast("dict[str, Any]", trainer._checkpoint_connector.dump_checkpoint(weights_only=False))


def complete_dumps(trainer: Trainer, complete: Callable[[dict[str, Any]], None]) -> Undo:
    """Have `complete(dump)` change what `Trainer.save_checkpoint` saves, see `dump_checkpoint`."""

    def dump_checkpoint(original: Callable[..., dict[str, Any]], *a: Any, **k: Any) -> Any:
        dump = original(*a, **k)
        complete(dump)
        return dump

    return wrap(trainer._checkpoint_connector, "dump_checkpoint", dump_checkpoint)


def between_batches(trainer: Trainer, act: Callable[[], None]) -> Undo:
    """Have `act()` called after each training batch, when Lightning is wholly done with it.

    In `on_train_batch_end` Lightning has yet to validate, to step schedulers and to log; after
    `_TrainingEpochLoop.on_advance_end` nothing of the batch is left to do.
    """

    def on_advance_end(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        act()

    return wrap(trainer.fit_loop.epoch_loop, "on_advance_end", on_advance_end)


def between_epochs(trainer: Trainer, act: Callable[[], None]) -> Undo:
    """Have `act()` called after each training epoch, when Lightning is wholly done with it.

    In `on_train_epoch_end` it has yet to step schedulers, to log and to count the epoch; after
    `_FitLoop.on_advance_end` it has.
    """

    def on_advance_end(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        act()

    return wrap(trainer.fit_loop, "on_advance_end", on_advance_end)


def batches_seen(trainer: Trainer) -> int:
    """Return how many training batches this run has seen, over all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


def place_of(trainer: Trainer) -> Place:
    """Return where a run is."""
    return trainer.global_step, batches_seen(trainer)


def epoch_is_over(trainer: Trainer) -> bool:
    """Return whether the batch that just ended was the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether gradients of earlier batches wait for the next optimizer step."""
    return bool(trainer.fit_loop._should_accumulate())


def epochs_done(trainer: Trainer) -> int:
    """Return how many epochs are over, the one that is just ending included."""
    return int(cast("Any", trainer.fit_loop.epoch_progress.current).processed)


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """Return the datamodule; the attribute is public, but a release types it as missing."""
    return cast("LightningDataModule | None", cast("Any", trainer).datamodule)


def given_loaders(trainer: Trainer) -> dict[str, object]:
    """Return the loaders that were given to `fit`, by their stage; none if hooks make them.

    `_DataLoaderSource.instance` of the loops is a loader, a collection of loaders, or the module or
    datamodule whose hook is called.
    """
    loops = {"train": trainer.fit_loop, "validate": trainer.fit_loop.epoch_loop.val_loop}
    sources = {stage: cast("Any", loop)._data_source for stage, loop in loops.items()}
    return {
        stage: source.instance
        for stage, source in sources.items()
        if source.instance is not None and not source.is_module()
    }


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks; the attribute is public, but a release types it as missing."""
    return cast("list[Callback]", cast("Any", trainer).callbacks)


def is_dev_run(trainer: Trainer) -> bool:
    """Return whether this is a `fast_dev_run`; public, but a release types it as missing."""
    return bool(cast("Any", trainer).fast_dev_run)


def prefetched_batches(trainer: Trainer) -> int:
    """Return how many batches were fetched that training has not seen yet.

    `_PrefetchDataFetcher` keeps one of a loader without length, to know which batch is the last.
    """
    return len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))


# ---------------------------------------------------------------------- signals and processes


def after_signal_handlers(trainer: Trainer, act: Callable[[], None]) -> Undo:
    """Have `act()` called when Lightning has put its signal handlers in place.

    `_SignalConnector.register_signal_handlers` does it after every hook that a callback has before
    training, and there is no setting that keeps it from taking SIGTERM.
    """

    def register(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        act()

    return wrap(trainer._signal_connector, "register_signal_handlers", register)


def replace_remembered_handler(trainer: Trainer, number: int, one: object, other: object) -> None:
    """Have Lightning put back `other` where it would put back `one`.

    When a fit fails, `_SignalConnector.teardown` puts back its `_original_handlers` after the last
    hook of a callback, ours among them.
    """
    remembered = cast("Any", trainer._signal_connector)._original_handlers
    if remembered.get(number) == one:
        remembered[number] = other


def requeue_signal(trainer: Trainer) -> int:
    """Return the signal at which Lightning would requeue a SLURM job, or 0."""
    environment = cluster_environment(trainer)
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
        return 0
    return int(environment.requeue_signal or 0)


def cluster_environment(trainer: Trainer) -> object:
    """Return the cluster environment; `_AcceleratorConnector` has it for every strategy."""
    return cast("Any", trainer)._accelerator_connector.cluster_environment


def is_child_of_launcher(trainer: Trainer) -> bool:
    """Return whether Lightning's own launcher has started this process and watches it.

    `_ChildProcessObserver` kills every process of a node as soon as one that it started ends by
    another exit code than 0. With other launchers the environment is another one.
    """
    launched = _script_launcher(trainer) is not None
    own = isinstance(cluster_environment(trainer), LightningEnvironment)
    return launched and own and trainer.local_rank != 0


def is_ending_process(frame: FrameType | None) -> bool:
    """Return whether a function, by its frame, is called as nobody has caught an exception.

    The interpreter drops such an exception when no frame is left, and `BaseProcess._bootstrap`,
    which runs every process that `multiprocessing` has started, does it itself.
    """
    caller = frame and frame.f_back
    return caller is None or caller.f_code is cast("Any", BaseProcess)._bootstrap.__code__


def end_at_once(trainer: Trainer, code: int) -> NoReturn:
    """End this process, and the ranks that it has started, whatever they are in the middle of.

    `os._exit` is the one way out of a process whose main thread may never come back from the disk
    or from a collective.
    """
    if launcher := _script_launcher(trainer):
        launcher.kill(signal.SIGKILL)
    os._exit(code)


def _script_launcher(trainer: Trainer) -> Any:
    """Return what has started the ranks of a node as processes of the same script, or None."""
    launcher = trainer.strategy.launcher
    kind = package_of(trainer, "strategies.launchers")._SubprocessScriptLauncher
    return launcher if isinstance(launcher, kind) else None


def hpc_checkpoint(trainer: Trainer) -> str | None:
    """Return the file that Lightning resumes a requeued SLURM job from, if it does so here.

    `_CheckpointConnector._hpc_resume_path` is the newest `hpc_ckpt_*.ckpt` in the default root.
    """
    environments = fabric_of(trainer, "plugins.environments")
    if not environments.SLURMEnvironment.detect():
        return None
    return cast("str | None", cast("Any", trainer._checkpoint_connector)._hpc_resume_path)
