"""Whether a fit may go on from a checkpoint: the same experiment, a changed one, or another."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin import _private, identity
from lightning_sbckpt.plugin.identity import Change
from lightning_sbckpt.plugin.packages import Trainer

_KNOWN_EARLY = (
    identity.MODULE,
    identity.DATAMODULE,
    identity.HPARAMS,
    identity.DATA_HPARAMS,
    identity.PARAMETERS,
    identity.DATA,
    identity.CONTENT,
)
_OF_CODE = (identity.MODULE, identity.PARAMETERS)
_OF_DATA = (identity.DATA, identity.CONTENT, identity.DATA_HPARAMS, identity.DATAMODULE)
# How data is loaded, which makes no other data of it.
_OF_LOADERS = ("batch_size", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor")


@dataclass(frozen=True)
class _Fit:
    """What took part in a fit of this process; nothing is kept alive by it."""

    callback: Callable[[], object]
    module: Callable[[], object]
    datasets: tuple[Callable[[], object], ...]


_fits: dict[str, _Fit] = {}
"""The last fit of this process in each folder: a second one there is no restart of the first."""


class Experiment:
    """The experiment of a fit, beside that of the checkpoint which it goes on from.

    What is read, compared and decided here concerns rank zero only; the caller tells the others.

    Args:
        trainer: About to fit.
        callback: Whose fit it is.
        folder: Where its checkpoints are.
        on_change: What a difference does; None to warn, but to refuse what is another experiment.
        edited: Whether an option says that the module was edited, and so perhaps its class renamed.
        keep_lr: Whether learning rates are to be those of this run.

    Attributes:
        in_force: The hyperparameters that are not what was asked for, with what they are.
    """

    def __init__(
        self,
        trainer: Trainer,
        callback: object,
        folder: str,
        *,
        on_change: str | None,
        edited: bool,
        keep_lr: bool,
    ) -> None:
        self.in_force: dict[str, object] = {}
        self._trainer, self._callback, self._folder = trainer, callback, folder
        self._on_change, self._edited, self._keep_lr = on_change, edited, keep_lr
        self._own: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}
        self._changes: list[Change] = []
        self._earlier: _Fit | None = None
        self._explicit = False
        self._undo = _private.trainer.wrap(
            trainer.strategy, "setup_optimizers", self._note_optimizers
        )

    def leave(self) -> None:
        """Leave the strategy as it was."""
        self._undo()

    def begin(self) -> None:
        """Describe what is known before anything is restored, and note the fit."""
        self._own.update(identity.describe_fit(self._trainer))
        self._earlier = _fits.get(self._folder)
        _fits[self._folder] = _Fit(
            weakref.ref(self._callback),
            weakref.ref(self._trainer.lightning_module),
            tuple(_reference(each) for each in identity.datasets_of(self._trainer)),
        )

    def _note_optimizers(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        # A finder makes them again, with other rates.
        if identity.OPTIMIZERS not in self._own:
            self._own.update(identity.describe_optimizers(self._trainer))

    # ------------------------------------------------------------------ the three moments

    def judge(self, checkpoint: Path, *, explicit: bool) -> str:
        """Compare with a checkpoint before anything of it is restored.

        Args:
            checkpoint: The folder.
            explicit: Whether the user named it, and so wants to go on from it.

        Returns:
            Nothing if the fit is to go on from it; else why the run begins anew, a line for the log.

        Raises:
            ConfigurationError: It is another experiment, or differs and `on_change` is `"raise"`.
        """
        self._explicit = explicit
        self._saved = identity.read_description(checkpoint) or {}
        self._changes = self._relevant(identity.compare(self._saved, self._own, _KNOWN_EARLY))
        refused = [] if explicit or self._on_change == "warn" else self._foreign()
        if self._on_change == "restart" and not explicit and (refused or self._changes):
            differences = "; ".join(refused or [c.difference for c in self._changes])
            return (
                f"{checkpoint} is of another experiment ({differences}). As on_change='restart' "
                "asks for, this run begins anew; the older checkpoints stay as they are"
            )
        if self._on_change == "raise":
            refused += [c.difference for c in self._changes if c.difference not in refused]
        if refused:
            raise self._refusal(checkpoint, refused)
        return ""

    def settle(self, checkpoint: Path, complete: str, found: Mapping[str, float]) -> list[str]:
        """Compare once more when optimizers are there and restored, before training goes on.

        Args:
            checkpoint: The folder.
            complete: Why nothing is trained, or nothing.
            found: What finders had set before the save.

        Returns:
            What differs, a line each.

        Raises:
            ConfigurationError: As `judge`; or the run is complete, and it is another's.
        """
        sections = (identity.OPTIMIZERS, identity.SCHEDULERS)
        late = [
            change
            for change in identity.compare(self._saved, self._own, sections)
            if change.asked not in found.values()
        ]
        live = identity.describe_optimizers(self._trainer)
        self._changes = identity.settle_in_force([*self._changes, *late], live, self._keep_lr)
        lines = [str(change) for change in self._changes]
        strict = self._on_change == "raise" or (self._on_change == "restart" and not self._explicit)
        differences = [change.difference for change in self._changes]
        changed = {change.section for change in self._changes}
        # Other parameters that could be loaded are those of an edited module.
        edited = self._edited or identity.PARAMETERS in changed
        foreign = not edited and identity.MODULE in changed
        told = bool(changed.difference(_OF_CODE))
        # Nothing would be trained, and the result of one experiment be given for another's.
        others = (
            complete and self._on_change is None and (foreign or (told and self._is_other_module()))
        )
        if (strict and late) or (others and not self._explicit):
            raise self._refusal(checkpoint, [*([complete] if complete else []), *differences])
        self._note_in_force(late, live)
        return lines

    def compare_data(self, checkpoint: Path | None) -> list[str]:
        """Describe the loaders that hooks have made, and return how they differ, a line each.

        Args:
            checkpoint: The folder that the fit goes on from; None if it began anew.

        Raises:
            ConfigurationError: They differ and `on_change` doesn't let them.
        """
        known = self._own.get(identity.DATA, {})
        made = {"train": self._trainer.train_dataloader, "validate": self._trainer.val_dataloaders}
        new = {
            stage: described
            for stage, loaders in made.items()
            if stage not in known and (described := identity.describe_loaders(loaders))
        }
        self._own[identity.DATA] = {**known, **new}
        if checkpoint is None:
            return []
        changes = identity.compare(self._saved, {identity.DATA: new}, [identity.DATA])
        lines = [str(change) for change in changes]
        strict = self._on_change in ("raise", "restart")
        if lines and strict and not (self._explicit and self._on_change == "restart"):
            raise self._refusal(checkpoint, [change.difference for change in changes])
        return lines

    def extra_files(self) -> dict[str, str]:
        """Return the description of what is in force, as a file of a checkpoint."""
        return {identity.EXPERIMENT_YAML: identity.text_of(self._own)} if self._own else {}

    # ------------------------------------------------------------------ what another experiment is

    def _relevant(self, changes: Sequence[Change]) -> list[Change]:
        """Leave out what an earlier fit of this process has changed in the same objects."""
        earlier, dropped = self._earlier, set()
        if earlier is not None:
            if earlier.module() is self._trainer.lightning_module:
                dropped.add(identity.PARAMETERS)
            datasets = identity.datasets_of(self._trainer)
            before = [ref() for ref in earlier.datasets]
            if len(before) == len(datasets) and all(map(operator.is_, before, datasets)):
                dropped.add(identity.CONTENT)
        return [change for change in changes if change.section not in dropped]

    def _is_other_module(self) -> bool:
        earlier = self._earlier
        return earlier is not None and earlier.module() is not self._trainer.lightning_module

    def _foreign(self) -> list[str]:
        """Return why this is no start of the checkpoint's experiment, in words."""
        earlier = self._earlier
        classes = (identity.MODULE, identity.DATAMODULE)
        related = {each for each in classes if identity.is_related(each, self._saved, self._own)}
        unrelated = [change for change in self._changes if change.section not in related]
        found = [
            change.difference
            for change in unrelated
            if change.section == identity.MODULE and not self._edited
        ]
        # A module that is fitted again goes on, with other data too, as it does in Lightning.
        if earlier is None or not self._is_other_module():
            return found
        if earlier.callback() is self._callback:
            name = type(self._trainer.lightning_module).__name__
            before = earlier.module()
            was = "one that is gone" if before is None else type(before).__name__
            found.append(
                f"this SBCheckpoint has trained another module in this process ({was}), and is now to "
                f"train a new {name}"
            )
        found += [
            change.difference
            for change in unrelated
            if change.section in _OF_DATA and not change.name.endswith(_OF_LOADERS)
        ]
        return found

    def _refusal(self, checkpoint: Path, reasons: Sequence[str]) -> ConfigurationError:
        return ConfigurationError(
            f"{checkpoint} is of another experiment than the one that is started:\n  "
            + "\n  ".join(reasons)
            + "\nNothing was trained. Use a new folder for a new experiment, "
            f"SBCheckpoint({self._folder + '-2'!r}) say, or one for each fold, trial or seed. To begin "
            "anew in this folder pass on_change='restart': its checkpoints stay. To go on from the "
            "checkpoint nevertheless pass on_change='warn'"
        )

    # ------------------------------------------------------------------ what is in force

    def _note_in_force(self, late: Sequence[Change], live: Mapping[str, Any]) -> None:
        for section in {change.section for change in late}:
            now = [c for c in self._changes if c.section == section]
            kept = all(change.in_force == change.saved for change in now)
            self._own[section] = self._saved[section] if kept else live[section]
        hparams = self._own.get(identity.HPARAMS, {})
        for change in self._changes:
            if change.section == identity.HPARAMS and change.in_force != change.asked:
                self.in_force[change.name] = change.in_force
                if change.name in hparams:
                    hparams[change.name] = change.in_force


def _reference(obj: object) -> Callable[[], object]:
    try:
        return weakref.ref(obj)
    except TypeError:
        return lambda: None
