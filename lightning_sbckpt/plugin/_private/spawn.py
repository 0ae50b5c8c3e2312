"""What ranks that Lightning has forked or spawned hand back to the process that called `fit`.

Of a callback they hand back `best_model_path`, by name, and nothing else; none of a callback's
hooks runs in that process. The launcher has a pair of methods for more, `get_extra_results` in rank
zero and `update_main_process_results` in the parent, which Lightning itself uses for the logged
metrics. They are no private names, but their class is (the same in 2.4.0, 2.5.6 and 2.6.6). They
are wrapped on the class, since no callback sees the parent's launcher before it launches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from lightning_sbckpt.plugin.packages import Trainer

_KEY = "lightning_sbckpt"


def hand_back(
    package: str, collect: Callable[[Trainer], object], take: Callable[[Trainer, Any], None]
) -> None:
    """Have the parent of spawned ranks `take` what rank zero has `collect`ed when it is done.

    Args:
        package: Whose Trainers.
        collect: Returns what can be pickled and holds no tensor: those would be shared memory.
        take: Is not called if rank zero has handed back nothing.
    """
    launcher = import_module(f"{package}.strategies.launchers")._MultiProcessingLauncher
    get, update = launcher.get_extra_results, launcher.update_main_process_results

    @wraps(get)
    def get_extra_results(self: Any, trainer: Trainer) -> dict[str, Any]:
        return {**get(self, trainer), _KEY: collect(trainer)}

    @wraps(update)
    def update_main_process_results(self: Any, trainer: Trainer, extra: dict[str, Any]) -> None:
        mine = extra.pop(_KEY, None)
        update(self, trainer, extra)
        if mine is not None:
            take(trainer, mine)

    launcher.get_extra_results = get_extra_results
    launcher.update_main_process_results = update_main_process_results
