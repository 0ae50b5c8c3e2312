"""What the process that called `fit` knows of a run whose ranks were forked or spawned."""

from __future__ import annotations

import pickle
from typing import Any

from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import Callback, Trainer

__all__ = ["hand_back_attributes"]

_ATTRIBUTES = (
    *("dirpath", "_placed"),
    "best_model_path",
    "best_model_score",
    "best_k_models",
    "current_score",
    "last_model_path",
    "resume_report",
)


def hand_back_attributes(package: str, kind: type[Callback]) -> None:
    """Have the parent's callback end with the attributes that rank zero's ends with.

    Args:
        package: Whose Trainers.
        kind: The class of the callback, which has the attributes of `SBCheckpoint`.
    """

    def only(trainer: Trainer) -> Any:
        # A fit refuses a second one.
        found = [each for each in _private.trainer.callbacks_of(trainer) if isinstance(each, kind)]
        return found[0] if found else None

    def collect(trainer: Trainer) -> bytes | None:
        callback = only(trainer)
        if callback is None:
            return None
        # As bytes: a tensor would travel as shared memory, which ends with the rank.
        return pickle.dumps({name: getattr(callback, name) for name in _ATTRIBUTES})

    def take(trainer: Trainer, collected: bytes) -> None:
        # From a rank of this very run.
        for name, value in pickle.loads(collected).items():  # noqa: S301
            setattr(only(trainer), name, value)

    _private.spawn.hand_back(package, collect, take)
