"""What ranks that Lightning has forked or spawned hand back to the process that called `fit`.

Of a callback they hand back `best_model_path`, by name, and nothing else; none of a callback's
hooks runs in that process. The launcher has a pair of methods for more, `get_extra_results` in rank
zero and `update_main_process_results` in the parent, which Lightning itself uses for the logged
metrics. They are no private names, but their class is (the same in 2.4.0, 2.5.6 and 2.6.6). They
are wrapped on the class, since no callback sees the parent's launcher before it launches.
"""

from __future__ import annotations

import pickle
from functools import wraps
from importlib import import_module
from typing import Any

from lightning_sbckpt.plugin._private.trainer import callbacks_of
from lightning_sbckpt.plugin.packages import Callback, Trainer

_KEY = "lightning_sbckpt"


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
    launcher = import_module(f"{package}.strategies.launchers")._MultiProcessingLauncher
    get, update = launcher.get_extra_results, launcher.update_main_process_results

    def only(trainer: Trainer) -> Any:
        # A fit refuses a second one.
        return next((each for each in callbacks_of(trainer) if isinstance(each, kind)), None)

    @wraps(get)
    def get_extra_results(self: Any, trainer: Trainer) -> dict[str, Any]:
        results = dict(get(self, trainer))
        callback = only(trainer)
        if callback is not None:
            # As bytes: a tensor would travel as shared memory, which ends with the rank.
            results[_KEY] = pickle.dumps({name: getattr(callback, name) for name in _ATTRIBUTES})
        return results

    @wraps(update)
    def update_main_process_results(self: Any, trainer: Trainer, extra: dict[str, Any]) -> None:
        mine = extra.pop(_KEY, None)
        update(self, trainer, extra)
        if mine is not None:
            # From a rank of this very run.
            for name, value in pickle.loads(mine).items():  # noqa: S301
                setattr(only(trainer), name, value)

    launcher.get_extra_results = get_extra_results
    launcher.update_main_process_results = update_main_process_results
