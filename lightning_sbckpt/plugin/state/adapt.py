"""Resuming after a change: what the objects make of a checkpoint, and one error for all that does not fit.

Between two starts of a run its code may change: a parameter is renamed or added, another optimizer
is used, the learning rate is new, the module is compiled. The objects are asked first: hooks of the
user's and their own loading may take what names and shapes don't tell. What they refuse is either
bridged by an option, or listed, with everything else that does not fit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_sbckpt._load.module_state import (
    LAZY,
    as_it_was_if_refused,
    versions_in,
    with_versions,
)
from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.plugin.state.names import renamed_state
from lightning_sbckpt.plugin.state.parts import numbered

_EXTRA_STATE = "_extra_state"
# What torch's own loading and that of others raise for a state that they don't take.
REFUSALS = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


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

    def skips(self, name: str, index: int = 0) -> bool:
        """Return whether a file, or one of several optimizers or schedulers, is not restored."""
        return name in self.skip or numbered(name, index) in self.skip

    def load_model(
        self,
        state: Mapping[str, Any],
        module: nn.Module,
        own: Callable[[], Mapping[str, Any]],
        load: Callable[[Mapping[str, Any]], object],
        path: object,
        *,
        strict: bool,
    ) -> list[str]:
        """Have a module load a state, as far as the options go; return what stays out, in words.

        Args:
            state: What was saved.
            module: The module.
            own: Returns its state of this moment.
            load: Has it load a state its own way; raises if it refuses.
            path: The checkpoint, for the message.
            strict: Whether all names must be the same.

        Raises:
            MismatchError: The module refuses the state. Every mismatch is listed with both shapes,
                and parameters, buffers and extra states are what they were.
        """
        saved = renamed_state(state, own(), self.key_map, module)
        try:
            with as_it_was_if_refused(module, may_fail=bool(mismatches(saved, own(), strict=True))):
                load(saved)
        except REFUSALS as error:
            problems = mismatches(saved, own(), strict=strict)
            if not problems:
                # The object's own words say more than ours could.
                raise
            if not self.partial:
                raise MismatchError(
                    f"the model saved in {path} does not fit the module:\n  "
                    + "\n  ".join(problems)
                    + "\nNothing was loaded. If parameters were renamed, pass key_map={'old.': "
                    "'new.'}; to load what fits and leave the rest as it is, pass partial=True; to "
                    "begin with new weights, pass skip=['model']"
                ) from error
            load(_fitting(saved, own()))
            return problems
        if strict:
            return []
        lacking = [key for key in own() if key not in saved]
        if not lacking:
            return []
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        sentence = (
            f"{', '.join(lacking[:3])}{more}: only in the module, and as they were there "
            "(strict_loading=False)"
        )
        return [sentence]


def mismatches(saved: Mapping[str, Any], own: Mapping[str, Any], *, strict: bool) -> list[str]:
    """Return what differs between a saved state and that of a module, in words.

    Args:
        saved: What was saved, by the names of the module.
        own: The state of the module.
        strict: Whether names that only one of them has count.

    Example:
        >>> mismatches({"a": torch.ones(2)}, {"a": torch.ones(3), "b": torch.ones(1)}, strict=True)
        ['a: (2,) in the checkpoint, (3,) in the module', 'b: only in the module']
    """
    wrong = [
        f"{key}: {_shape(saved[key])} in the checkpoint, {_shape(value)} in the module"
        for key, value in own.items()
        if key in saved and not _fits(key, saved[key], value)
    ]
    lacking = [f"{key}: only in the module" for key in own if key not in saved and strict]
    unused = [f"{key}: only in the checkpoint" for key in saved if key not in own and strict]
    return wrong + lacking + unused


def _fitting(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    fitting: OrderedDict[str, Any] = OrderedDict(
        (key, saved[key] if key in saved and _fits(key, saved[key], value) else value)
        for key, value in own.items()
    )
    return with_versions(fitting, versions_in(saved))


def _fits(key: str, saved: object, own: object) -> bool:
    if key.rpartition(".")[2] == _EXTRA_STATE or isinstance(own, LAZY):
        # A module takes whatever extra state it gave, and lazy ones take any shape.
        return True
    return _shape(saved) == _shape(own)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
