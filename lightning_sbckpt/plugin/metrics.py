"""Which metrics belong to the weights of a moment."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_sbckpt.plugin import _compat_logged
from lightning_sbckpt.plugin.schedule import Place, place_of


class Metrics:
    """The metrics that were computed last, and for which weights."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}
        self._of: Place | None = None

    def validated(self, trainer: Trainer) -> None:
        """Take the metrics of the validation that is ending."""
        self._found, self._of = _compat_logged.epoch_metrics(trainer), place_of(trainer)

    def trained(self, trainer: Trainer) -> None:
        """Take the metrics of the training epoch that is ending, beside those of its validation.

        Of a name that both log the validation's value stays.
        """
        validated = self.at(trainer)
        self._found = {**validated, **_compat_logged.epoch_metrics(trainer), **validated}
        self._of = place_of(trainer)

    def at(self, trainer: Trainer) -> dict[str, Any]:
        """Return what was computed for the weights of this moment."""
        return dict(self._found) if self._of == place_of(trainer) else {}
