"""Resuming after a change: what of a checkpoint still fits, and one error for all that does not.

Between two starts of a run its code may change: a parameter is renamed or added, another optimizer
is used, the learning rate is new, the module is compiled. Each such change is either bridged by an
option, or listed, with every other one, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.plugin import _compat_callbacks
from lightning_sbckpt.plugin.collect import MODEL, OPTIMIZER, SCHEDULER, numbered

_COMPILED = "_orig_mod."


@dataclass(frozen=True)
class Adaptation:
    """What to do with a checkpoint that does not fit in every way.

    Attributes:
        skip: Names of files, `"optimizer"` for one, that are not restored.
        key_map: From key prefixes of the saved state_dict to those of the module's.
        partial: Load the parameters that fit, and leave the others as they are.
        keep_lr: Keep this run's learning rates, not the checkpoint's.
    """

    skip: tuple[str, ...] = ()
    key_map: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False
    keep_lr: bool = False

    def adapt_model(
        self, dump: dict[str, Any], own: Mapping[str, Any], path: str, *, strict: bool
    ) -> list[str]:
        """Make the saved state_dict fit the module, in place; return what was left out, in words.

        Args:
            dump: Lightning's dictionary.
            own: The state_dict of the module.
            path: The checkpoint, for the message.
            strict: Whether all names must be the same.

        Raises:
            MismatchError: It doesn't fit; every mismatch is listed with both shapes.
        """
        if MODEL in self.skip:
            dump["state_dict"] = dict(own)
            return []
        saved = self._renamed(dump["state_dict"], own)
        wrong = [
            f"{key}: {_shape(saved[key])} in the checkpoint, {_shape(value)} in the module"
            for key, value in own.items()
            if key in saved and _shape(saved[key]) != _shape(value)
        ]
        lacking = [f"{key}: only in the module" for key in own if key not in saved and strict]
        unused = [f"{key}: only in the checkpoint" for key in saved if key not in own and strict]
        problems = wrong + lacking + unused
        if problems and not self.partial:
            raise MismatchError(
                f"the model saved in {path} does not fit the module:\n  "
                + "\n  ".join(problems)
                + "\nNothing was loaded. If parameters were renamed, pass key_map={'old.': 'new.'};"
                " to load what fits and leave the rest as it is, pass partial=True; to begin with "
                "new weights, pass skip=['model']"
            )
        if self.partial:
            fitting = {
                key: saved[key] if key in saved and _shape(saved[key]) == _shape(value) else value
                for key, value in own.items()
            }
            saved = fitting
        dump["state_dict"] = saved
        return problems

    def adapt_optimizers(
        self,
        dump: dict[str, Any],
        classes: Mapping[str, Sequence[str]],
        trainer: Trainer,
        path: str,
    ) -> list[str]:
        """Make the saved optimizers and schedulers fit those there are, in place.

        Args:
            dump: Lightning's dictionary.
            classes: The names of the classes that were saved, as `classes_of` returned them.
            trainer: Its optimizers exist already.
            path: The checkpoint, for the message.

        Raises:
            MismatchError: They don't fit; every mismatch is listed.
        """
        problems: list[str] = []
        if _compat_callbacks.brings_its_scheduler(trainer):
            dump["lr_schedulers"] = []
        for name, key, live in _live(trainer):
            states = dump.get(key, [])
            wanted = [numbered(name, i) for i in range(len(live)) if not self._skips(name, i)]
            if wanted and len(states) != len(live):
                problems.append(f"{name}: {len(states)} in the checkpoint, {len(live)} in this run")
            merged = []
            for index, obj in enumerate(live):
                if index >= len(states) or self._skips(name, index):
                    merged.append(obj.state_dict())
                    continue
                saved_class = dict(enumerate(classes.get(name, ()))).get(index)
                problems += _problems(numbered(name, index), saved_class, states[index], obj)
                merged.append(states[index])
            dump[key] = merged
        if problems:
            raise MismatchError(
                f"what was saved in {path} does not fit this run:\n  "
                + "\n  ".join(problems)
                + "\nTo go on with new ones, pass those names (before the colon) in skip=[...]: "
                f"skip=['{OPTIMIZER}', '{SCHEDULER}'] for all of them"
            )
        if not self.keep_lr:
            return []
        self._keep_rates(dump, trainer)
        return ["the learning rates (asked for by keep_lr)"]

    def _skips(self, name: str, index: int) -> bool:
        return name in self.skip or numbered(name, index) in self.skip

    def _renamed(self, saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        by_plain_name = {key.replace(_COMPILED, ""): key for key in own}
        renamed = {}
        for key, value in saved.items():
            prefix = next((old for old in self.key_map if key.startswith(old)), None)
            name = key if prefix is None else self.key_map[prefix] + key[len(prefix) :]
            # Compiled or not is no difference to the parameters, only to their names.
            renamed[by_plain_name.get(name.replace(_COMPILED, ""), name)] = value
        return renamed

    def _keep_rates(self, dump: dict[str, Any], trainer: Trainer) -> None:
        (_, optimizer_key, optimizers), (_, scheduler_key, schedulers) = _live(trainer)
        for state, optimizer in zip(dump[optimizer_key], optimizers, strict=True):
            for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
                saved.update({key: own[key] for key in ("lr", "initial_lr") if key in own})
        for state, scheduler in zip(dump[scheduler_key], schedulers, strict=True):
            # Schedulers compute the rates from these, and would bring the old ones back.
            for name in ("base_lrs", "_last_lr", "max_lrs"):
                if name in state and hasattr(scheduler, name):
                    state[name] = list(getattr(scheduler, name))


def classes_of(trainer: Trainer) -> dict[str, list[str]]:
    """Return the names of the classes of optimizers and schedulers, to be saved with them."""
    return {name: [type(obj).__name__ for obj in live] for name, _, live in _live(trainer)}


def _live(trainer: Trainer) -> list[tuple[str, str, list[Any]]]:
    return [
        (OPTIMIZER, "optimizer_states", list(trainer.optimizers)),
        (SCHEDULER, "lr_schedulers", [config.scheduler for config in trainer.lr_scheduler_configs]),
    ]


def _problems(name: str, saved_class: str | None, state: Mapping[str, Any], live: Any) -> list[str]:
    own_class = type(live).__name__
    if saved_class not in (None, own_class):
        return [f"{name}: {saved_class} in the checkpoint, {own_class} in this run"]
    if "param_groups" not in state:
        return []
    saved_sizes = [len(group["params"]) for group in state["param_groups"]]
    own_sizes = [len(group["params"]) for group in live.param_groups]
    if saved_sizes != own_sizes:
        sizes = f"{saved_sizes} parameters in the checkpoint, of {own_sizes} in this run's"
        return [f"{name}: groups of {sizes} {own_class}"]
    parameters = [parameter for group in live.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    return [
        f"{name}: {key} of parameter {number} is {_shape(value)} in the checkpoint, the parameter "
        f"{_shape(parameter)} in this run"
        for number, parameter in zip(numbers, parameters, strict=True)
        for key, value in state["state"].get(number, {}).items()
        # Step counts are scalars, whatever the parameter is.
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape
    ]


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
