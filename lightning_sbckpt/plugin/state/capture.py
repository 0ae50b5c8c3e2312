"""What goes into a checkpoint of a Lightning run: its recoverables, and its meta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_sbckpt._save.items import TakenState
from lightning_sbckpt._sharded import fsdp1
from lightning_sbckpt._sharded.states import (
    ShardedState,
    is_fsdp1,
    module_state,
    take_back_to_pieces,
)
from lightning_sbckpt.errors import MetaError
from lightning_sbckpt.meta import dump_meta, plain_meta
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.buffers import NonPersistentBuffers
from lightning_sbckpt.plugin._private.ddp import Reductions
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.packages import LightningModule, LightningOptimizer, Trainer
from lightning_sbckpt.plugin.state import exact
from lightning_sbckpt.plugin.state.gradients import take_gradients
from lightning_sbckpt.plugin.state.parts import (
    COMM_HOOKS,
    GRADIENTS,
    NONPERSISTENT,
    RANK_BUFFERS,
    check_names,
    divide,
    divide_model,
)
from lightning_sbckpt.plugin.state.training_state import Description, first_rates
from lightning_sbckpt.triggers import Due
from lightning_sbckpt.typing import Stateful, World

HPARAMS_YAML = "hparams.yaml"


Recoverables = Mapping[str, object] | Callable[[Trainer, LightningModule], Mapping[str, object]]
# `Any`, since jsonargparse writes what is within an `object` as text.
Meta = Mapping[str, Any] | Callable[[Trainer, LightningModule], Mapping[str, object]]


class Gatherer:
    """Gathers the recoverables and the meta of a run.

    Args:
        recoverables: Of the user, see `SBCheckpoint`.
        meta: Of the user, see `SBCheckpoint`.
        split_model: Submodules that get files of their own.

    """

    def __init__(
        self,
        recoverables: Recoverables | None,
        meta: Meta | None,
        split_model: tuple[str, ...],
    ) -> None:
        self._recoverables = recoverables
        self._meta = meta
        self._buffers: NonPersistentBuffers | None = None
        self._first_rates: list[list[float]] = []
        self.split_model = split_model

    def begin(self, module: LightningModule) -> None:
        """Note what the module is like before its first batch; it is where it is trained."""
        self._buffers = NonPersistentBuffers(module)

    def check(self, trainer: Trainer) -> None:
        """Refuse at once what no checkpoint could be made of; all ranks call this.

        Raises:
            ConfigurationError: A submodule that is to have a file has no state, or the pieces of
                the model can't be had.
        """
        module = _private.strategies.module_in_pieces(trainer.strategy)
        if is_fsdp1(module):
            fsdp1.refuse_what_is_mixed(module)
        if self.split_model:
            own = module_state(module) if is_fsdp1(module) else module.state_dict()
            divide_model(own, self.split_model)

    def take_first_rates(self, trainer: Trainer) -> None:
        """Take the learning rates that this run begins with; nothing has been restored yet."""
        self._first_rates = first_rates(trainer)

    def meta(
        self, trainer: Trainer, metrics: Mapping[str, object], due: Due, *, within_epoch: bool
    ) -> dict[str, object]:
        """Return the meta of a checkpoint of this moment.

        Args:
            trainer: Whose checkpoint it is.
            metrics: What was computed for the weights of this moment.
            due: Why it is saved.
            within_epoch: Whether more batches of the epoch follow.
        """
        meta: dict[str, object] = dict(metrics)
        extra = self._meta
        meta.update(
            extra(trainer, trainer.lightning_module) if callable(extra) else dict(extra or {})
        )
        done = _private.trainer.epochs_done(trainer)
        meta["epoch"] = trainer.current_epoch if within_epoch else done - 1
        meta["global_step"] = trainer.global_step
        if due.ephemeral:
            meta["ephemeral"] = True
        return meta

    def take(
        self,
        trainer: Trainer,
        tracker: LoaderTracker,
        reductions: Reductions,
        *,
        within_epoch: bool,
        validated_this_epoch: bool,
    ) -> tuple[dict[str, Any], dict[str, object]]:
        """Return what of a checkpoint of this moment is each rank's own, and the rest of it.

        Hooks of the user are called here, and may fail on one rank alone: there is no collective here but
        those of the strategy and of the hooks.
        """
        in_pieces = _private.strategies.shards_the_model(trainer.strategy)
        if in_pieces:
            take_back_to_pieces(trainer.lightning_module)
        state = exact.capture(trainer, tracker)
        if hooks := reductions.hook_states():
            state[COMM_HOOKS] = hooks
        position = {
            "within_epoch": within_epoch,
            "loops": _private.loops.loop_state(trainer),
            "validated_this_epoch": validated_this_epoch,
            "modes": exact.modes(trainer.lightning_module),
            **Description.of(trainer, self._first_rates).as_record(),
            "found": _private.finders.found_values(trainer),
            "ranks": trainer.world_size,
            "reductions": reductions.state(),
        }
        with _private.strategies.states_in_pieces(trainer) if in_pieces else nullcontext():
            dump = _private.trainer.dump_checkpoint(trainer)
        found = divide(dump, trainer, self.split_model, position, in_pieces=in_pieces)
        # After the state of the model, with which FSDP takes its parameters back to pieces.
        gradients = take_gradients(trainer) if within_epoch else None
        if gradients and in_pieces:
            found[GRADIENTS] = ShardedState(gradients)
        elif gradients is not None and not in_pieces:
            state[GRADIENTS] = gradients
        if self._buffers:
            state[NONPERSISTENT] = self._buffers.state()
        return state, {**found, **self.of_user(trainer)}

    @staticmethod
    def of_ranks(
        trainer: Trainer, state: Mapping[str, Any], reductions: Reductions, world: World
    ) -> dict[str, TakenState]:
        """Return the parts that hold each rank's own, by the names of their files; all ranks call this."""
        buffers = exact.own_buffers(trainer, world, reductions.broadcast_buffers())
        return exact.parts_of_ranks(
            {**state, **({RANK_BUFFERS: buffers} if buffers else {})}, world
        )

    def extra_files(self, trainer: Trainer, in_force: Mapping[str, object]) -> dict[str, str]:
        """Return the hyperparameters of module and datamodule as a file that people read.

        Args:
            trainer: The Trainer.
            in_force: Values of hyperparameters that are not what was asked for.
        """
        owners = (_private.trainer.datamodule_of(trainer), trainer.lightning_module)
        found: dict[str, object] = {}
        for owner in owners:
            for key, value in getattr(owner, "hparams", {}).items():
                try:
                    found.update(plain_meta({str(key): value}))
                except MetaError:
                    # For people; what is read back is in the file of the hyperparameters.
                    found[str(key)] = repr(value)
        asked = {key: found[key] for key in in_force if key in found}
        text = dump_meta({**found, **in_force}).decode()
        text += "".join(
            f"# {key}: {value!r} was asked for, and is not in force\n"
            for key, value in asked.items()
        )
        return {HPARAMS_YAML: text} if found else {}

    def of_user(self, trainer: Trainer) -> dict[str, object]:
        """Return the recoverables that the user, the module and the datamodule offer.

        Raises:
            ConfigurationError: Two have one name, or a name can't name a file.
        """
        found: dict[str, object] = {}
        module = trainer.lightning_module
        given = self._recoverables
        sources = [given(trainer, module) if callable(given) else given or {}]
        for owner in (module, _private.trainer.datamodule_of(trainer)):
            configure = getattr(owner, "configure_recoverables", None)
            if configure is not None:
                sources.append(configure())
        for source in sources:
            check_names([*self.split_model, *found, *source], "recoverables")
            found.update(source)
        return found

    def unsaved(self, trainer: Trainer) -> list[str]:
        """Return which objects with a state nothing saves, a sentence each: averages of weights, scalers.

        A module or callback that saves anything itself is taken to save them.
        """
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        saved = {id(each) for each in [*trainer.optimizers, *schedulers]}
        owners: list[Any] = [trainer.lightning_module, *_private.trainer.callbacks_of(trainer)]
        held = {
            f"{type(owner).__name__}.{name} ({type(value).__name__})": value
            for owner in owners
            if not _saves_something(owner)
            for name, value in vars(owner).items()
            # A class that is held, of an optimizer for example, has the methods and no state.
            if isinstance(value, Stateful)
            and not isinstance(value, type)
            # Data is followed where it is loaded, and what is Lightning's is saved by it.
            and not isinstance(value, (torch.nn.Module, Iterable, Dataset, LightningOptimizer))
            and id(value) not in saved
        }
        # The user's function is called no more often than it has to be.
        offered = [*self.of_user(trainer).values()] if held else []
        return [
            f"{name} has a state_dict that no checkpoint has: a resumed run begins with a new one; save "
            "it in on_save_checkpoint, or offer it in configure_recoverables"
            for name, value in held.items()
            if not any(value is each for each in offered)
        ]


def _saves_something(owner: object) -> bool:
    own = type(owner)
    bases = [base for base in own.__mro__ if base.__name__ in ("LightningModule", "Callback")]
    base = bases[-1] if bases else object
    names = ("on_save_checkpoint", "state_dict", "get_extra_state")
    return any(getattr(own, name, None) is not getattr(base, name, None) for name in names)
