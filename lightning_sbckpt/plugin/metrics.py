"""Which metrics belong to the weights of a moment."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.trainer import Place, place_of
from lightning_sbckpt.plugin.packages import Trainer


class Metrics:
    """The metrics that were computed last, and for which weights.

    Args:
        asked: Names that the user asks for. What training logs on steps alone is taken for these.

    Attributes:
        has_validated: Whether a validation has ended in this fit.
    """

    def __init__(self, asked: Collection[str]) -> None:
        self.has_validated = False
        self._asked = asked
        self._found: dict[str, Any] = {}
        self._of: Place | None = None
        self._set_by_hand: dict[str, Any] = {}

    def resumed(self, trainer: Trainer) -> None:
        """Tell what was restored from what the user sets from now on."""
        self._set_by_hand = _private.logged.set_by_hand(trainer)

    def validated(self, trainer: Trainer) -> None:
        """Take the metrics of the validation that is ending."""
        self.has_validated = True
        self._found = {**self._other(trainer), **_private.logged.epoch_metrics(trainer)}
        self._of = place_of(trainer)

    def trained(self, trainer: Trainer) -> None:
        """Take the metrics of the training epoch that is ending, beside those of its validation.

        Of a name that both log the validation's value stays.
        """
        validated = self._found if self._of == place_of(trainer) else {}
        logged = {**self._other(trainer), **_private.logged.epoch_metrics(trainer)}
        self._found = {**validated, **logged, **validated}
        self._of = place_of(trainer)

    def at(self, trainer: Trainer) -> dict[str, Any]:
        """Return what was computed for the weights of this moment."""
        if self._of == place_of(trainer):
            return dict(self._found)
        return _private.logged.step_metrics(trainer, self._asked)

    def _other(self, trainer: Trainer) -> dict[str, Any]:
        """Return the metrics of the last batch, and those that were put into `callback_metrics`."""
        before, self._set_by_hand = self._set_by_hand, _private.logged.set_by_hand(trainer)
        new = {
            name: value
            for name, value in self._set_by_hand.items()
            if value is not before.get(name)
        }
        return {**_private.logged.step_metrics(trainer, self._asked), **new}
