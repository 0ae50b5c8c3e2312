"""Every private name of Lightning that this package touches, and why.

Lightning offers no public way to resume without `ckpt_path`, to save between two batches, or to
read what it has logged so far. Each function here names what it touches and the releases in which
that was seen to work (2.4.0, 2.5.0, 2.5.6 and 2.6.6 unless said otherwise). Nothing else in
the package may.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial, wraps
from typing import Any, NoReturn, cast

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core import saving
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torchmetrics import Metric

Undo = Callable[[], None]


def wrap(obj: object, name: str, wrapper: Callable[..., Any]) -> Undo:
    """Replace a method on one instance by `wrapper(original, *args, **kwargs)`; return the undo.

    Wrapping the instance leaves the class, and so every other Trainer of the process, alone.
    """
    original = getattr(obj, name)

    @wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(obj, name, replacement)

    def undo() -> None:
        if vars(obj).get(name) is replacement:
            delattr(obj, name)
            # A wrapper that was there before us lived on the instance, too.
            if getattr(obj, name) != original:
                setattr(obj, name, original)

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


def loaded_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return what Lightning is restoring from at the moment, or an empty dictionary.

    `_CheckpointConnector._loaded_checkpoint` is kept from the first phase of a restore to the last.
    """
    return trainer._checkpoint_connector._loaded_checkpoint


def let_load_from_checkpoint_read(
    is_folder: Callable[[object], bool], read: Callable[..., dict[str, Any]]
) -> None:
    """Have `LightningModule.load_from_checkpoint` take checkpoint folders.

    It reads by `lightning.pytorch.core.saving.pl_load` and has no other place to join in. Files
    and URLs go to Lightning's own function, as before.
    """
    # By name: it is an import of that module, not one of its exports.
    original = vars(saving)["pl_load"]
    if getattr(original, "_reads_folders", False):
        return

    @wraps(original)
    def pl_load(path_or_url: Any, *args: Any, **kwargs: Any) -> Any:
        if is_folder(path_or_url):
            return read(path_or_url, weights_only=kwargs.get("weights_only"))
        return original(path_or_url, *args, **kwargs)

    pl_load._reads_folders = True  # type: ignore[attr-defined]
    vars(saving)["pl_load"] = pl_load


def has_own_checkpoint_format(strategy: Strategy) -> bool:
    """Return whether a strategy writes checkpoints in a way of its own (FSDP, DeepSpeed, ...)."""
    return type(strategy).save_checkpoint is not Strategy.save_checkpoint


# ---------------------------------------------------------------------- saving


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return Lightning's checkpoint as a dictionary; every `on_save_checkpoint` hook has run.

    `_CheckpointConnector.dump_checkpoint` is what `Trainer.save_checkpoint` hands to the strategy,
    which writes it to one file; there is no public way to get it without the file.
    """
    return cast("dict[str, Any]", trainer._checkpoint_connector.dump_checkpoint(weights_only=False))


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
    launched = isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
    own = isinstance(cluster_environment(trainer), LightningEnvironment)
    return launched and own and trainer.local_rank != 0


def end_at_once(trainer: Trainer, code: int) -> NoReturn:
    """End this process, and the ranks that it has started, whatever they are in the middle of.

    `os._exit` is the one way out of a process whose main thread may never come back from the disk
    or from a collective.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
    os._exit(code)


def hpc_checkpoint(trainer: Trainer) -> str | None:
    """Return the file that Lightning resumes a requeued SLURM job from, if it does so here.

    `_CheckpointConnector._hpc_resume_path` is the newest `hpc_ckpt_*.ckpt` in the default root.
    """
    if not SLURMEnvironment.detect():
        return None
    return cast("str | None", cast("Any", trainer._checkpoint_connector)._hpc_resume_path)


# ---------------------------------------------------------------------- what was logged


def metrics_just_computed(trainer: Trainer) -> dict[str, Any]:
    """Return the epoch-level metrics of the loop that is ending now, and no older ones.

    `trainer.callback_metrics` also holds what earlier loops left there.
    """
    return dict(trainer._logger_connector.metrics["callback"])


def logged_state(trainer: Trainer) -> dict[str, object]:
    """Return what has been logged in this epoch so far and is not yet a metric.

    These are the entries of the training loop's `_ResultCollection` and three dictionaries of the
    logger connector, none of which Lightning saves.
    """
    connector = trainer._logger_connector
    results = trainer.fit_loop.epoch_loop._results
    return {
        "results": {key: _result_state(metric) for key, metric in results.items()},
        "callback_metrics": dict(connector._callback_metrics),
        "logged_metrics": dict(connector._logged_metrics),
        "progress_bar_metrics": dict(connector._progress_bar_metrics),
        "first_loop_iter": connector._first_loop_iter,
        "current_fx": connector._current_fx,
    }


def restore_logged_state(trainer: Trainer, state: Mapping[str, Any]) -> list[str]:
    """Put back what `logged_state` returned; return what could not be, a sentence each."""
    from lightning.pytorch.trainer.connectors.logger_connector.result import (
        _Metadata,
        _ResultMetric,
        _Sync,
    )

    connector = trainer._logger_connector
    module = trainer.lightning_module
    results = trainer.fit_loop.epoch_loop._results
    problems: list[str] = []
    for key, saved in state["results"].items():
        meta = _Metadata(**saved["meta"])
        sync = dict(saved["sync"])
        meta.sync = _Sync(
            fn=trainer.strategy.reduce,
            _should=sync["should"],
            rank_zero_only=sync["rank_zero_only"],
            _op=sync["op"],
        )
        metric = _ResultMetric(meta, saved["is_tensor"])
        if saved["is_tensor"]:
            for name, value in saved["values"].items():
                setattr(metric, name, _to(value, trainer.strategy.root_device))
        else:
            attribute = saved["meta"]["metric_attribute"]
            found = _attribute(module, attribute)
            if not isinstance(found, Metric):
                problems.append(
                    f"the value logged as {meta.name!r} so far: the module has no metric {attribute!r}"
                )
                continue
            metric.value = found
        metric._forward_cache = _to(saved["forward_cache"], trainer.strategy.root_device)
        metric._update_count = saved["update_count"]
        metric.has_reset = saved["has_reset"]
        results[key] = metric
    for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        setattr(connector, f"_{name}", dict(state[name]))
    connector._first_loop_iter = state["first_loop_iter"]
    connector._current_fx = state["current_fx"]
    return problems


def _result_state(metric: Any) -> dict[str, object]:
    meta, sync = metric.meta, metric.meta.sync
    names = ("value", "cumulated_batch_size") if metric.is_tensor else ()
    return {
        "is_tensor": metric.is_tensor,
        "has_reset": metric.has_reset,
        "update_count": metric._update_count,
        "forward_cache": metric._forward_cache if torch.is_tensor(metric._forward_cache) else None,
        "values": {name: getattr(metric, name) for name in names if hasattr(metric, name)},
        "meta": {
            "fx": meta.fx,
            "name": meta.name,
            "prog_bar": meta.prog_bar,
            "logger": meta.logger,
            "on_step": meta.on_step,
            "on_epoch": meta.on_epoch,
            "reduce_fx": meta.reduce_fx.__name__,
            "enable_graph": meta.enable_graph,
            "add_dataloader_idx": meta.add_dataloader_idx,
            "dataloader_idx": meta.dataloader_idx,
            "metric_attribute": meta.metric_attribute,
        },
        "sync": {"should": sync._should, "rank_zero_only": sync.rank_zero_only, "op": sync._op},
    }


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _attribute(module: LightningModule, name: str | None) -> object:
    found: object = module
    for part in (name or "").split("."):
        found = getattr(found, part, None) if found is not None else None
    return found


# ---------------------------------------------------------------------- the loops


def loop_state(trainer: Trainer) -> dict[str, object]:
    """Return what the loops need beyond what Lightning saves of them."""
    fit_loop = trainer.fit_loop
    combined = fit_loop._combined_loader
    iterator = getattr(combined, "_iterator", None)
    return {
        "should_stop": trainer.should_stop,
        "train_reload_epoch": _finite(fit_loop._last_train_dl_reload_epoch),
        "val_reload_epoch": _finite(fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch),
        "fetched": getattr(fit_loop._data_fetcher, "fetched", 0),
        "combined_index": getattr(iterator, "_idx", 0),
        "combined_consumed": list(getattr(iterator, "_consumed", ())),
    }


def _finite(number: float) -> float | None:
    return None if number == float("-inf") else number


class LoopResumption:
    """Takes the fit loop to the place it was saved at, once, whatever the release would do.

    Lightning's own restart logic differs from release to release, and is made for saves inside its
    hooks. Here the place is always between two batches or between two epochs, so there is
    nothing to guess: the progress counters are put back as they were, the hooks that ran
    before the save are not run again, and the ones that come after it are.

    Args:
        trainer: About to fit.
        within_epoch: Whether the save was between two batches of an epoch.
        progress: Lightning's own state of the fit loop.
        extra: What `loop_state` returned.
        before_batches: Called when the loaders have to be positioned, within an epoch only.
        finish: Called last, just before training goes on.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        within_epoch: bool,
        progress: Mapping[str, Any],
        extra: Mapping[str, Any],
        before_batches: Callable[[], None],
        finish: Callable[[], None],
    ) -> None:
        self._trainer = trainer
        self._within_epoch = within_epoch
        self._progress = dict(progress)
        self._extra = extra
        self._before_batches = before_batches
        self._finish = finish
        self._undo: list[Undo] = []
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._max_steps = epoch_loop.max_steps
        # Lightning skips the sanity check of a run that resumes within an epoch; between two it
        # would run one, over loaders that are not yet where they were.
        self._sanity_steps = trainer.num_sanity_val_steps
        trainer.num_sanity_val_steps = 0
        for loop, key in (
            (fit_loop, "train_reload_epoch"),
            (epoch_loop.val_loop, "val_reload_epoch"),
        ):
            self._undo.append(wrap(loop, "setup_data", partial(self._make_loaders, key)))
        if within_epoch:
            # An epoch that stopped at max_steps has its end still before it: `_FitLoop.run` must
            # not take the limit as a reason to do nothing at all.
            epoch_loop.max_steps = -1
            self._undo.append(wrap(fit_loop, "on_advance_start", self._enter_epoch))
            self._undo.append(wrap(epoch_loop, "reset", self._keep_progress))
            self._undo.append(wrap(epoch_loop, "on_run_start", self._enter_batches))
        else:
            trainer.should_stop = extra["should_stop"]
            self._undo.append(wrap(fit_loop, "on_advance_start", self._start_next_epoch))

    def cancel(self) -> None:
        """Leave the loops as Lightning made them."""
        self._trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        self._trainer.num_sanity_val_steps = self._sanity_steps
        while self._undo:
            self._undo.pop()()

    def _make_loaders(self, key: str, original: Callable[..., Any]) -> None:
        """Have the loaders made as in the epoch they were made in, which a user's hook may ask."""
        progress = self._trainer.fit_loop.epoch_progress.current
        now, then = progress.completed, self._extra[key]
        progress.completed = now if then is None else then
        try:
            original()
        finally:
            progress.completed = now

    def _start_next_epoch(self, original: Callable[..., Any]) -> None:
        self.cancel()
        self._restore_progress()
        self._finish()
        original()

    def _enter_epoch(self, original: Callable[..., Any]) -> None:
        fit_loop = cast("Any", self._trainer.fit_loop)
        fit_loop.epoch_loop.max_steps = self._max_steps
        self._restore_progress()
        for loader in fit_loop._combined_loader.flattened:
            _set_sampler_epoch(loader, fit_loop.epoch_progress.current.processed)

    def _keep_progress(self, original: Callable[..., Any]) -> None:
        """Do not count the epoch's batches from zero."""

    def _enter_batches(self, original: Callable[..., Any], data_fetcher: Any) -> None:
        fit_loop = cast("Any", self._trainer.fit_loop)
        self.cancel()
        self._before_batches()
        # A fetcher of loaders without length takes a batch at once, but only after several loaders
        # in turn know which of them had already come to their end.
        ahead, data_fetcher.prefetch_batches = getattr(data_fetcher, "prefetch_batches", 0), 0
        iter(data_fetcher)
        data_fetcher.prefetch_batches = ahead
        iterator = fit_loop._combined_loader._iterator
        iterator._idx = self._extra["combined_index"]
        if self._extra["combined_consumed"]:
            iterator._consumed = list(self._extra["combined_consumed"])
        if ahead and data_fetcher.length is None:
            with suppress(StopIteration):
                data_fetcher.batches += [_DataFetcher.__next__(data_fetcher) for _ in range(ahead)]
        # While "restarting", no release makes the loaders' iterators anew in here.
        fit_loop.epoch_loop._restarting = True
        original(data_fetcher)
        data_fetcher.fetched = self._extra["fetched"]
        if data_fetcher.length is not None:
            data_fetcher.done = data_fetcher.fetched >= data_fetcher.length
        self._clear_flags()
        self._trainer.should_stop = self._extra["should_stop"]
        self._finish()

    def _restore_progress(self) -> None:
        fit_loop = self._trainer.fit_loop
        for prefix, loop in _loops(fit_loop, ""):
            loop._load_from_state_dict(self._progress, prefix)
        for owner, name, key in (
            (fit_loop, "_last_train_dl_reload_epoch", "train_reload_epoch"),
            (fit_loop.epoch_loop.val_loop, "_last_val_dl_reload_epoch", "val_reload_epoch"),
        ):
            if self._extra[key] is not None:
                setattr(owner, name, self._extra[key])
        self._clear_flags()

    def _clear_flags(self) -> None:
        for _, loop in _loops(self._trainer.fit_loop, ""):
            loop._restarting = False
            loop._loaded_from_state_dict = False
            loop._resuming_from_checkpoint = False  # since 2.5.3
            if hasattr(loop, "reset_restart_stage"):  # since 2.5.0
                loop.reset_restart_stage()


def _loops(loop: Any, prefix: str) -> list[tuple[str, Any]]:
    """Return a loop and those inside it, each with the prefix of its keys in the state."""
    found = [(prefix, loop)]
    for name, child in vars(loop).items():
        if hasattr(child, "_load_from_state_dict"):
            found += _loops(child, f"{prefix}{name}.")
    return found
