"""Where Lightning puts a checkpoint into modules, optimizers and schedulers, and how to join in.

Lightning asks `on_load_checkpoint` first and hands the state to the object's own loading then; so
what adapts a state has its place between the two, and what explains a refusal comes after them.
(Seen in 2.4.0, 2.5.0, 2.5.6 and 2.6.6.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_sbckpt.plugin._private.trainer import Undo, loaded_checkpoint, wrap
from lightning_sbckpt.plugin.packages import Trainer


class FolderDump(dict[str, Any]):
    """Lightning's dictionary, read from a checkpoint folder.

    Attributes:
        folder: The folder.
    """

    def __init__(self, content: Mapping[str, Any], folder: Path) -> None:
        super().__init__(content)
        self.folder = folder
        self._as_read = [_outline(state) for state in self.get("optimizer_states", ())]

    def is_as_read(self, index: int) -> bool:
        """Return whether no hook has changed which parameter of an optimizer has which state."""
        found = [_outline(state) for state in self["optimizer_states"]]
        return found[index : index + 1] == self._as_read[index : index + 1]

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled as an ordinary dictionary, by hooks that keep what they were given."""
        return dict, (dict(self),)


def _outline(state: Any) -> list[object]:
    """Return which parameters the state of an optimizer has, in their groups, and whose moments."""
    if not isinstance(state, Mapping):
        return []
    groups, moments = state.get("param_groups"), state.get("state")
    return [
        [list(group.get("params", ())) for group in groups] if isinstance(groups, list) else None,
        {key: id(value) for key, value in moments.items()}
        if isinstance(moments, Mapping)
        else None,
    ]


def load_by(
    trainer: Trainer,
    load_model: Callable[[FolderDump, Callable[[Mapping[str, Any]], object], bool], object],
    load_training: Callable[[FolderDump], object],
) -> list[Undo]:
    """Have what was read from a folder put in place by two functions; files are left to Lightning.

    `Strategy.load_model_state_dict` is public. `restore_optimizers_and_schedulers` of
    `_CheckpointConnector` is the one place where Lightning restores both.

    Args:
        trainer: The Trainer.
        load_model: Is given the dictionary, what loads a state the strategy's own way, and whether
            all names must be the same.
        load_training: Is given the dictionary when optimizers and schedulers are to be restored.
    """

    def load_model_state_dict(
        original: Callable[..., Any], checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        if isinstance(checkpoint, FolderDump):
            load_model(
                checkpoint,
                lambda state: original({**checkpoint, "state_dict": state}, strict=strict),
                strict,
            )
        else:
            original(checkpoint, strict=strict)

    def restore(original: Callable[..., Any]) -> None:
        checkpoint = loaded_checkpoint(trainer)
        if isinstance(checkpoint, FolderDump):
            load_training(checkpoint)
        else:
            original()

    return [
        wrap(trainer.strategy, "load_model_state_dict", load_model_state_dict),
        wrap(trainer._checkpoint_connector, "restore_optimizers_and_schedulers", restore),
    ]


class ForNewModule(dict[str, Any]):
    """Gives the weights by the names of the module that `load_from_checkpoint` has just made.

    Nothing else knows that module: `saving._load_state` makes it, calls its `on_load_checkpoint` and
    then looks up the weights, for it alone.

    Args:
        content: Lightning's dictionary.
        fit_names: Returns a saved state by the names that a module has.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        fit_names: Callable[[Mapping[str, Any], Any], Mapping[str, Any]],
    ) -> None:
        super().__init__(content)
        self._fit_names = fit_names

    def __getitem__(self, key: str) -> Any:
        """Return an entry."""
        value = super().__getitem__(key)
        caller = sys._getframe(1)
        if key == "state_dict" and caller.f_code.co_name == "_load_state":
            return self._fit_names(value, caller.f_locals["obj"])
        return value
