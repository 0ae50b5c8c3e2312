"""Lightning's loops, whose places have no public interface: taken, and gone back to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, cast

from lightning_sbckpt.plugin._private.trainer import Undo, wrap
from lightning_sbckpt.plugin.packages import Trainer, fabric_of, package_of


def loop_state(trainer: Trainer) -> dict[str, object]:
    """Return what the loops need beyond what Lightning saves of them."""
    fit_loop = trainer.fit_loop
    combined = fit_loop._combined_loader
    iterator = getattr(combined, "_iterator", None)
    return {
        "should_stop": trainer.should_stop,
        "train_reload_epoch": _finite(fit_loop._last_train_dl_reload_epoch),
        "val_reload_epoch": _finite(fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch),
        "batches": None if fit_loop.max_batches == float("inf") else int(fit_loop.max_batches),
        "fetched": getattr(fit_loop._data_fetcher, "fetched", 0),
        "combined_index": getattr(iterator, "_idx", 0),
        "combined_consumed": list(getattr(iterator, "_consumed", ())),
    }


def _finite(number: float) -> float | None:
    return None if number == float("-inf") else number


def may_stop(trainer: Trainer) -> bool:
    """Return whether `should_stop` ends the fit here: the least number of steps and epochs is reached.

    `_FitLoop._can_stop_early` (2.4.0 to 2.6.6) is what Lightning itself asks.
    """
    return bool(trainer.fit_loop._can_stop_early)


def epochs_over(trainer: Trainer) -> int:
    """Return how many epochs the fit loop takes for finished, as restored."""
    return int(cast("Any", trainer.fit_loop.epoch_progress.current).processed)


def lower_epoch_count(dump: Mapping[str, Any], limit: int) -> None:
    """Let a checkpoint of more epochs than are asked for be restored: there is nothing to train.

    `_CheckpointConnector.restore_loops` raises if `completed` is above `max_epochs`; the fit loop
    ends by `processed`, and sets the other to it.
    """
    current = dump["loops"]["fit_loop"]["epoch_progress"]["current"]
    current["completed"] = min(current["completed"], limit)


class LoaderStage:
    """Knows whose loaders are being made, those of training or of validation, and is called to say.

    `trainer.training` doesn't tell: a finder of batch sizes has both made while it is true.

    Args:
        trainer: Its loops make loaders in their `setup_data`.

    Attributes:
        begins: Called with the stage before those of a stage are made anew, if they are.
        undo: Leaves the loops as they were.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.begins: Callable[[str], object] | None = None
        self._stage = ""
        fit_loop = trainer.fit_loop
        self.undo = [
            wrap(loop, "setup_data", partial(self._make, stage))
            for loop, stage in (
                (fit_loop, "train"),
                (fit_loop.epoch_loop.val_loop, "validate"),
            )
        ]

    def __call__(self) -> str:
        """Return `"train"` or `"validate"`; nothing if neither are being made."""
        return self._stage

    def _make(self, stage: str, original: Callable[..., Any]) -> None:
        before, self._stage = self._stage, stage
        if self.begins is not None:
            self.begins(stage)
        try:
            original()
        finally:
            self._stage = before


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
        count: Given the batches that the epoch had, those that it has now, and how many of them
            each rank had trained on, returns how many these are now.
        before_batches: Called when the loaders have to be positioned, within an epoch only.
        finish: Called last, just before training goes on.

    Attributes:
        max_steps: The limit of this run, which the Trainer does not show until training goes on.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        within_epoch: bool,
        progress: Mapping[str, Any],
        extra: Mapping[str, Any],
        count: Callable[[int | None, int | None, int], int],
        before_batches: Callable[[], None],
        finish: Callable[[], None],
    ) -> None:
        self._trainer = trainer
        self._within_epoch = within_epoch
        self._progress = dict(progress)
        self._extra = extra
        self._count = count
        self._before_batches = before_batches
        self._finish = finish
        self._undo: list[Undo] = []
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self.max_steps = epoch_loop.max_steps
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
            self._undo.append(wrap(fit_loop, "on_advance_start", self._start_next_epoch))

    def stop(self) -> None:
        """Train nothing: the run has come to its end, and what asked for it still does."""
        fit_loop = self._trainer.fit_loop
        fit_loop.epoch_loop.max_steps = self.max_steps
        if self._within_epoch:
            # The hooks of its end have run.
            fit_loop.epoch_progress.increment_processed()
            fit_loop.epoch_progress.increment_completed()

    def go_on(self, *, should_stop: bool) -> None:
        """Train, told to stop or not."""
        self._extra = {**self._extra, "should_stop": should_stop}
        # Within an epoch it would end the fit before the epoch's own end; it is set there.
        self._trainer.should_stop = should_stop and not self._within_epoch

    def cancel(self) -> None:
        """Leave the loops as Lightning made them."""
        self._trainer.fit_loop.epoch_loop.max_steps = self.max_steps
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
        fit_loop.epoch_loop.max_steps = self.max_steps
        self._restore_progress()
        self._count_batches()
        set_epoch = fabric_of(self._trainer, "utilities.data")._set_sampler_epoch
        for loader in fit_loop._combined_loader.flattened:
            set_epoch(loader, fit_loop.epoch_progress.current.processed)

    def _count_batches(self) -> None:
        """Count the batches of the epoch as this run divides it."""
        fit_loop = cast("Any", self._trainer.fit_loop)
        progress = fit_loop.epoch_loop.batch_progress
        done = progress.current.ready
        length = None if fit_loop.max_batches == float("inf") else int(fit_loop.max_batches)
        now = self._count(self._extra.get("batches"), length, done)
        if now == done:
            return
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, now)
        progress.is_last_batch = length is not None and now >= length
        # The data goes on from another batch, too, and none of several loaders has come to its end.
        self._extra = {
            **self._extra,
            "fetched": now,
            "combined_index": now,
            "combined_consumed": [],
        }

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
            take = package_of(self._trainer, "loops.fetchers")._DataFetcher.__next__
            with suppress(StopIteration):
                data_fetcher.batches += [take(data_fetcher) for _ in range(ahead)]
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
