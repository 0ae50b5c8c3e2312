"""Optimizers and schedulers, given back to those of this run.

Each gets its state and says itself whether it takes it. What Lightning would hand over by position goes
by the names of parameters where these are known, and what was refused is listed at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt._sharded.states import is_fsdp1
from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin._private.loading import FolderDump
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.plugin.state.adapt import REFUSALS, Adaptation
from lightning_sbckpt.plugin.state.by_name import Arrangement, Trained, arrange, misfits
from lightning_sbckpt.plugin.state.parts import OPTIMIZER, SCHEDULER, numbered
from lightning_sbckpt.plugin.state.rates import (
    advance,
    as_number,
    put_schedule,
    rates_of,
    reductions_made,
    schedule_in,
)
from lightning_sbckpt.plugin.state.sharded import Misfit


@dataclass(frozen=True)
class Description:
    """What is saved about optimizers and schedulers beside their states.

    Attributes:
        classes: The names of their classes.
        trained: What each optimizer trains; empty if that is not known.
        first_rates: The learning rates of each group when the fit began.
    """

    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    trained: Sequence[Trained] = ()
    first_rates: Sequence[Sequence[float]] = ()

    @classmethod
    def of(cls, trainer: Trainer, first_rates: Sequence[Sequence[float]]) -> Description:
        """Return that of a live Trainer."""
        live = {OPTIMIZER: list(trainer.optimizers), SCHEDULER: _schedulers(trainer)}
        classes = {name: [type(each).__name__ for each in found] for name, found in live.items()}
        module = _private.strategies.module_in_pieces(trainer.strategy)
        if is_fsdp1(module):
            # Its flat parameters have no names of their own; its states go by name all the same.
            return cls(classes, (), first_rates)
        trained = [Trained.by(each, trainer.lightning_module) for each in trainer.optimizers]
        return cls(classes, trained, first_rates)

    @classmethod
    def saved_in(cls, position: Mapping[str, Any]) -> Description:
        """Return what `as_record` was put into, in checkpoints of earlier releases less of it."""
        return cls(
            position.get("classes", {}),
            [Trained.saved_in(record) for record in position.get("parameters", ())],
            position.get("first_rates", ()),
        )

    def as_record(self) -> dict[str, Any]:
        """Return it as plain lists and dictionaries."""
        return {
            "classes": dict(self.classes),
            "parameters": [each.as_record() for each in self.trained],
            "first_rates": [list(each) for each in self.first_rates],
        }


def restore(
    dump: FolderDump,
    trainer: Trainer,
    saved: Description,
    adaptation: Adaptation,
    path: object,
    *,
    not_loaded: Collection[str],
) -> list[str]:
    """Give optimizers and schedulers their states; return what is not as it was, in words.

    Args:
        dump: Lightning's dictionary.
        trainer: Its optimizers and schedulers exist already.
        saved: What was saved about them.
        adaptation: What of a checkpoint is not taken as it is.
        path: The checkpoint, for the message.
        not_loaded: Plain names of parameters that did not get their saved values.

    Raises:
        MismatchError: One refuses its state, or it is the state of something else; all are listed.
    """
    restoring = _Restoring(dump, trainer, saved, adaptation, frozenset(not_loaded))
    restoring.optimizers()
    restoring.schedulers()
    if restoring.problems:
        raise MismatchError(
            f"what was saved in {path} does not fit this run:\n  "
            + "\n  ".join(restoring.problems)
            + "\nFor parameters that were renamed, pass key_map={'old.': 'new.'}; to take the state "
            "of those that fit, partial=True. To go on with new ones, pass those names (before the "
            f"colon) in skip=[...]: skip=['{OPTIMIZER}', '{SCHEDULER}'] for all of them"
        ) from restoring.error
    return restoring.remarks


class _Restoring:
    def __init__(
        self,
        dump: FolderDump,
        trainer: Trainer,
        saved: Description,
        adaptation: Adaptation,
        not_loaded: frozenset[str],
    ) -> None:
        self.problems: list[str] = []
        self.remarks: list[str] = []
        self.error: Exception | None = None
        self._dump = dump
        self._trainer = trainer
        self._saved = saved
        self._adaptation = adaptation
        self._not_loaded = not_loaded
        self._arranged: dict[int, Arrangement] = {}
        # What optimizers keep that get nothing from the checkpoint.
        self._own: dict[int, Mapping[str, Any]] = {}

    # ------------------------------------------------------------------ optimizers

    def optimizers(self) -> None:
        live = list(self._trainer.optimizers)
        states = list(self._dump.get("optimizer_states", []))
        self._count(OPTIMIZER, len(states), len(live))
        given = [
            i < len(states) and not self._adaptation.skips(OPTIMIZER, i) for i in range(len(live))
        ]
        schedules = [schedule_in(optimizer) for optimizer in live]
        wanted = [
            self._wanted(index, optimizer, states[index] if given[index] else None)
            for index, optimizer in enumerate(live)
        ]
        self._load_optimizers(wanted)
        for index, optimizer in enumerate(live):
            if given[index] and self.error is None:
                self._look_at(index, optimizer, states[index])
        if self._adaptation.keep_lr:
            for optimizer, schedule in zip(live, schedules, strict=True):
                put_schedule(optimizer, schedule)
            self.remarks.append("the learning rates (asked for by keep_lr)")

    def _load_optimizers(self, states: Sequence[Mapping[str, Any]]) -> None:
        strategy = self._trainer.strategy
        try:
            if strategy.lightning_restore_optimizer:
                strategy.load_optimizer_state_dict({**self._dump, "optimizer_states": states})
                return
            for optimizer, state in zip(self._trainer.optimizers, states, strict=True):
                if isinstance(state, Misfit):
                    raise state.error
                optimizer.load_state_dict(dict(state))
        except REFUSALS as error:
            self.error = error
            for index, optimizer in enumerate(self._trainer.optimizers):
                if states[index] is not self._own.get(index):
                    self._explain(index, optimizer, self._dump["optimizer_states"][index])
            if not self.problems:
                self.problems.append(f"{OPTIMIZER}: {error}")

    def _wanted(
        self, index: int, optimizer: Optimizer, state: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        """Return what an optimizer is to load."""
        if state is None:
            self._own[index] = dict(optimizer.state_dict())
            return self._own[index]
        saved, own = self._names(index, optimizer)
        if saved is None:
            return state
        module = self._trainer.lightning_module
        arranged = arrange(
            state,
            optimizer,
            saved,
            own,
            not_loaded=self._not_loaded,
            in_module={plain_name(name) for name, _ in module.named_parameters()},
        )
        name = numbered(OPTIMIZER, index)
        if arranged is None:
            self.remarks.append(
                f"{name}: the parameters are others, or in another order, than when it was saved, "
                f"and the state of {type(optimizer).__name__} can't be told apart by parameter, so it "
                "went by position"
            )
            return state
        if arranged.is_as_saved:
            return state
        same_sizes = list(map(len, saved.names)) == list(map(len, own.names))
        incomplete = arranged.begin_anew or arranged.unused
        if incomplete and not (self._adaptation.partial or same_sizes):
            # It may know better; if it doesn't, `_explain` says what is different.
            return state
        self._arranged[index] = arranged
        for parameter in arranged.begin_anew:
            self.remarks.append(f"{name}: {parameter or 'a parameter'} begins anew")
        for parameter in arranged.unused:
            self.remarks.append(f"{name}: the state of {parameter or 'a parameter'} is not used")
        for before, now in arranged.renamed:
            self.remarks.append(f"{name}: {now} has the state of {before}, by its place")
        return arranged.state

    def _names(self, index: int, optimizer: Optimizer) -> tuple[Trained | None, Trained]:
        """Return what was saved and what is trained now, if the state is to be put in order by it."""
        saved, own = self._trained(index, optimizer)
        in_pieces = _private.strategies.shards_the_model(self._trainer.strategy)
        if in_pieces or not self._dump.is_as_read(index):
            # Pieces were read by name; and a hook that has put the state in another order knows why.
            return None, own
        return saved, own

    def _trained(self, index: int, optimizer: Optimizer) -> tuple[Trained | None, Trained]:
        module = self._trainer.lightning_module
        own = Trained.by(optimizer, module)
        if index >= len(self._saved.trained):
            # Of checkpoints of earlier releases.
            return None, own
        return self._saved.trained[index].called_here(module, self._adaptation.key_map), own

    def _look_at(self, index: int, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Say what an optimizer has taken that is not its own, or does not fit its parameters."""
        name = numbered(OPTIMIZER, index)
        difference = self._other_class(
            OPTIMIZER, index, optimizer, torch.optim, set(optimizer.defaults), _saved_options(state)
        )
        if difference is not None:
            self.problems.append(difference)
        saved, own = self._trained(index, optimizer)
        if saved is not None:
            self.problems += [f"{name}: {each}" for each in misfits(optimizer, saved, own)]

    def _explain(self, index: int, optimizer: Optimizer, state: Any) -> None:
        name = numbered(OPTIMIZER, index)
        before, now = self._class_before(OPTIMIZER, index), type(optimizer).__name__
        if before not in (None, now):
            self.problems.append(f"{name}: {before} in the checkpoint, {now} in this run")
            return
        if isinstance(state, Misfit):
            self.problems.append(f"{name}: {state.error}")
            return
        saved, own = self._trained(index, optimizer)
        if saved is not None:
            here = {each for group in own.names for each in group}
            there = {each for group in saved.names for each in group}
            self.problems += [f"{name}: {each}: only in this run" for each in sorted(here - there)]
            self.problems += [
                f"{name}: {each}: only in the checkpoint" for each in sorted(there - here)
            ]
        groups = state.get("param_groups") if isinstance(state, Mapping) else None
        if not isinstance(groups, list):
            return
        saved_sizes = [len(group.get("params", ())) for group in groups]
        own_sizes = [len(group["params"]) for group in optimizer.param_groups]
        if saved_sizes != own_sizes:
            sizes = f"{saved_sizes} parameters in the checkpoint, of {own_sizes} in this run's"
            self.problems.append(f"{name}: groups of {sizes} {now}")

    # ------------------------------------------------------------------ schedulers

    def schedulers(self) -> None:
        if _private.callbacks.brings_its_scheduler(self._trainer):
            return
        live = _schedulers(self._trainer)
        states = list(self._dump.get("lr_schedulers", []))
        self._count(SCHEDULER, len(states), len(live))
        for index, (scheduler, state) in enumerate(zip(live, states, strict=False)):
            if self._adaptation.skips(SCHEDULER, index):
                continue
            name = numbered(SCHEDULER, index)
            try:
                remark = self._load_scheduler(index, scheduler, state)
            except REFUSALS as error:
                self.error = self.error or error
                self.problems.append(f"{name}: {type(scheduler).__name__} refuses it: {error}")
            else:
                self.remarks += [] if remark is None else [f"{name}: {remark}"]

    def _count(self, kind: str, saved: int, live: int) -> None:
        """Say which of several have no counterpart; hooks may have taken states out, too."""
        self.remarks += [
            f"{numbered(kind, i)}: begins anew ({saved} in the checkpoint, {live} in this run)"
            for i in range(saved, live)
            if not self._adaptation.skips(kind, i)
        ]
        self.remarks += [f"{numbered(kind, i)}: only in the checkpoint" for i in range(live, saved)]

    def _load_scheduler(self, index: int, scheduler: Any, state: Mapping[str, Any]) -> str | None:
        optimizers = list(self._trainer.optimizers)
        of = next((i for i, each in enumerate(optimizers) if each is scheduler.optimizer), None)
        if self._adaptation.keep_lr:
            return advance(scheduler, state, self._reductions(of, scheduler, state))
        own_keys = set(scheduler.state_dict())
        arranged = self._arranged.get(-1 if of is None else of)
        scheduler.load_state_dict(_by_groups(state, arranged))
        difference = self._other_class(
            SCHEDULER, index, scheduler, torch.optim.lr_scheduler, own_keys, set(state)
        )
        if difference is not None:
            self.problems.append(difference)
        return None

    def _reductions(self, index: int | None, scheduler: Any, state: Mapping[str, Any]) -> list[int]:
        """Return how often a plateau had lowered each group's rate when it was saved."""
        alone = [
            each for each in _schedulers(self._trainer) if each.optimizer is scheduler.optimizer
        ]
        if index is None or index >= len(self._saved.first_rates) or len(alone) != 1:
            return []
        groups = self._dump["optimizer_states"][index].get("param_groups", [])
        now = [as_number(group.get("lr")) for group in groups]
        factor = float(state.get("factor", 1.0))
        return reductions_made(now, self._saved.first_rates[index], factor)

    # ------------------------------------------------------------------ both

    def _class_before(self, name: str, index: int) -> str | None:
        found = list(self._saved.classes.get(name, ()))
        return found[index] if index < len(found) else None

    def _other_class(
        self,
        kind: str,
        index: int,
        live: object,
        torchs: object,
        own: Collection[str],
        saved: Collection[str],
    ) -> str | None:
        """Return how a state is that of another class and can't serve this one, in words.

        A subclass, or a class of somebody else's that has the same options, has taken it.

        Args:
            kind: Which kind of object it is.
            index: Its number.
            live: The object.
            torchs: Where torch's own classes are.
            own: The names of its options.
            saved: Those in the state.
        """
        before, now = self._class_before(kind, index), type(live).__name__
        if before is None or before in {cls.__name__ for cls in type(live).__mro__}:
            return None
        name = numbered(kind, index)
        known = getattr(torchs, before, None)
        if isinstance(known, type) and issubclass(known, type(live)):
            return None
        difference = f"{name}: {before} in the checkpoint, {now} in this run"
        lacking = sorted(set(own) - set(saved))
        if lacking:
            return f"{difference}, which has {', '.join(map(repr, lacking))} besides"
        if known is not None and getattr(torchs, now, None) is type(live):
            return difference
        self.remarks.append(f"{difference}, which has taken its state")
        return None


def first_rates(trainer: Trainer) -> list[list[float]]:
    """Return the learning rates with which a fit begins, before anything is restored."""
    return rates_of(trainer.optimizers)


def _schedulers(trainer: Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _saved_options(state: Mapping[str, Any]) -> set[str]:
    groups = state.get("param_groups")
    if not isinstance(groups, list):
        return set()
    return {key for group in groups for key in group}


_OF_EACH_GROUP = (
    "base_lrs",
    "_last_lr",
    "max_lrs",
    "min_lrs",
    "lr_lambdas",
    "base_momentums",
    "max_momentums",
)


def _by_groups(state: Mapping[str, Any], arranged: Arrangement | None) -> dict[str, Any]:
    """Return the state of a scheduler with its lists in the order of the optimizer's groups."""
    by_groups = dict(state)
    groups = [] if arranged is None else [each for each in arranged.groups if each is not None]
    if arranged is None or len(groups) != len(arranged.groups) or groups == sorted(set(groups)):
        return by_groups
    for key in _OF_EACH_GROUP:
        values = state.get(key)
        if isinstance(values, (list, tuple)) and len(values) == len(groups):
            by_groups[key] = [values[group] for group in groups]
    if "_schedulers" in state:
        by_groups["_schedulers"] = [_by_groups(each, arranged) for each in state["_schedulers"]]
    return by_groups
