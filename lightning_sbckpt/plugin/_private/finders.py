"""Lightning's finders of a learning rate and of a batch size, whose trials are no part of a run.

A finder trains for some steps within a fit, with its module, optimizers and loops, takes the other
callbacks away meanwhile, and puts everything back from a file of its own. `Tuner` has one do so in
a fit that ends there; one among the callbacks of a Trainer does it whenever a fit begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_sbckpt.plugin._private.trainer import Undo, callbacks_of, is_dev_run, wrap
from lightning_sbckpt.plugin.packages import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    LightningModule,
    Trainer,
    package_of,
)

_FINDERS = (LearningRateFinder, BatchSizeFinder)


def is_no_run(trainer: Trainer) -> bool:
    """Return whether a fit is a `fast_dev_run`, or one of `Tuner`'s.

    `_early_exit` is set in the finder that `Tuner` puts before the other callbacks.
    """
    is_trial = any(getattr(callback, "_early_exit", False) for callback in callbacks_of(trainer))
    return is_dev_run(trainer) or is_trial


def outside_trials(
    callback: Callback, trainer: Trainer, act: Callable[[Trainer], None]
) -> Callable[[], None]:
    """Return a function that calls `act(trainer)` unless a finder is at work.

    It leaves no callback among those of the Trainer then, but one of its own.
    """

    def act_outside() -> None:
        if callback in callbacks_of(trainer):
            act(trainer)

    return act_outside


def is_of_a_finder(path: object) -> bool:
    """Return whether a file is what a finder puts everything back from, by the name it gives it."""
    return Path(str(path)).name.startswith((".lr_find_", ".scale_batch_size_"))


def found_values(trainer: Trainer) -> dict[str, float]:
    """Return what finders have set, or will, in module or datamodule, by the attribute's name."""
    module, parsing = trainer.lightning_module, package_of(trainer, "utilities.parsing")
    names = [_attribute(callback, module) for callback in callbacks_of(trainer)]
    values = {name: parsing.lightning_getattr(module, name) for name in names if name is not None}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def search_no_more(
    trainer: Trainer, found: Mapping[str, float], note: Callable[[str], object]
) -> list[Undo]:
    """Set what was found before the save, and keep finders from searching when this fit begins.

    Their trial would be the first steps of the run that goes on.

    Args:
        trainer: About to go on from a checkpoint.
        found: What `found_values` returned when it was saved.
        note: Is told of each finder.
    """
    module = trainer.lightning_module
    undo = []
    for callback in callbacks_of(trainer):
        if not isinstance(callback, _FINDERS):
            continue
        name = _attribute(callback, module)
        taken = ""
        if name is not None and name in found:
            package_of(trainer, "utilities.parsing").lightning_setattr(module, name, found[name])
            taken = f": {name} is {found[name]:g}, as it was when the checkpoint was saved"
        note(f"{type(callback).__name__} does not search again as a run goes on{taken}")
        undo.append(wrap(callback, "on_fit_start", _do_nothing))
    return undo


def _do_nothing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Stand in for a hook."""


def _attribute(callback: Callback, module: LightningModule) -> str | None:
    """Return the name of what a finder sets, `_attr_name` and `_batch_arg_name` of theirs.

    Without a name the finder of a learning rate takes the first of these two that there is.
    """
    names: tuple[str, ...] = ()
    if isinstance(callback, LearningRateFinder) and callback._update_attr:
        names = (callback._attr_name,) if callback._attr_name else ("lr", "learning_rate")
    elif isinstance(callback, BatchSizeFinder):
        names = (callback._batch_arg_name,)
    has = package_of(module, "utilities.parsing").lightning_hasattr
    return next((name for name in names if has(module, name)), None)
