"""What torch's DDP knows that decides the bits of a step, and that no state_dict has.

DDP adds up gradients in buckets. It fills the first ones in the order in which parameters were
registered, and makes new ones after its first backward, in the order in which gradients arrived. The
place of an element in a bucket decides in which order the numbers of the ranks are added: with two
ranks a + b is b + a, with three and more the last bits differ. A new process would begin with the
first buckets again, so the order is saved, and a resumed process gets a reducer that has it.

(Private names of `DistributedDataParallel` and its reducer; seen in torch 2.4.1 and 2.13.)
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt.plugin._private.trainer import wrap
from lightning_sbckpt.plugin.packages import Strategy, Trainer
from lightning_sbckpt.rng import generator_state, set_generator_state
from lightning_sbckpt.rng.generators import generator_kinds
from lightning_sbckpt.rng.walk import slots
from lightning_sbckpt.typing import Stateful

__all__ = ["Reductions", "give_state", "kept_state"]

_NUMBERS = (bool, int, float, str)


class Reductions:
    """How the DDP modules of a strategy reduce gradients: noted, saved, and given back.

    Args:
        strategy: Its `setup` makes the DDP modules.

    Attributes:
        undo: Leaves the strategy as it was.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._found: list[_Reduction] = []
        self.undo = wrap(strategy, "setup", self._setup)

    def _setup(self, original: Callable[..., Any], trainer: Trainer) -> None:
        original(trainer)
        model = trainer.strategy.model
        self._found = [
            _Reduction(module)
            for module in (() if model is None else model.modules())
            # Without a reducer all gradients are reduced by the user, or by compiled code.
            if isinstance(module, DistributedDataParallel)
            and hasattr(module, "reducer")
            and not module._use_python_reducer
        ]

    def state(self) -> list[dict[str, object]]:
        """Return what `restore` takes; draws no random number and talks to no other rank."""
        return [reduction.state() for reduction in self._found]

    def restore(self, saved: Sequence[Mapping[str, Any]] | None) -> list[str]:
        """Go on as when the state was taken, gradients being in place; every rank calls this.

        Args:
            saved: By as many ranks as there are.

        Returns:
            What could not be given back, a sentence each.
        """
        if saved is not None and len(saved) == len(self._found):
            states: list[Mapping[str, Any]] = list(saved)
        else:
            states = [{"parameters": None}] * len(self._found)
        notes = [
            note
            for reduction, state in zip(self._found, states, strict=True)
            if (note := reduction.restore(state))
        ]
        # The order of two numbers makes no difference to their sum.
        return notes if dist.is_initialized() and dist.get_world_size() > 2 else []

    def broadcast_buffers(self) -> set[int]:
        """Return the ids of the buffers that rank zero is about to give to the other ranks."""
        return {
            id(buffer)
            for reduction in self._found
            if reduction.module.will_sync_module_buffers()
            for buffer in reduction.module.modules_buffers
        }

    def hook_states(self) -> list[object]:
        """Return the states of communication hooks on this rank, as far as they can be kept."""
        states = [kept_state(state) for _, state in self._hooks()]
        return states if any(state is not None for state in states) else []

    def restore_hooks(self, saved: Sequence[object]) -> list[str]:
        """Give communication hooks the states that `hook_states` returned; return what they lack."""
        hooks = self._hooks()
        if len(saved) != len(hooks):
            note = (
                f"the checkpoint has {len(saved)} states of DDP's communication hooks and this run "
                f"has {len(hooks)}, which begin anew: the run goes on, but not bit for bit"
            )
            return [note] if any(_keeps_state(state) for _, state in hooks) else []
        for (_, state), kept in zip(hooks, saved, strict=True):
            if kept is not None:
                give_state(state, kept)
        return []

    def _hooks(self) -> list[tuple[Any, object]]:
        return [pair for found in self._found for pair in found.module._comm_hooks]

    def nondeterminism_warnings(self) -> list[str]:
        """Return what of the reduction keeps a resumed run from being exact, a sentence each."""
        return [
            f"the communication hook {hook.__qualname__} of DDP keeps a state "
            f"({type(state).__name__}) that no checkpoint has: a resumed run begins with a new one, "
            "so it goes on, but not bit for bit; give the state state_dict and load_state_dict"
            for hook, state in self._hooks()
            if _keeps_state(state) and kept_state(state) is None
        ] + [
            "with PostLocalSGDState each rank trains weights of its own between two averages, and a "
            "checkpoint has those of rank zero: a resumed run goes on, but not bit for bit"
            for _, state in self._hooks()
            if type(state).__name__ == "PostLocalSGDState"
        ]


class _Reduction:
    """That of one DDP module.

    Parameters are told by their number in the order in which they were registered.

    Args:
        module: A `DistributedDataParallel` that was made a moment ago; its private methods have no
            types.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        # As its constructor has just done: a parameter that is frozen or unfrozen later changes
        # nothing of the reducer.
        self._parameters, self._are_sparse = module._build_params_for_reducer()
        self._names = module._build_debug_param_to_name_mapping(self._parameters)
        # The number of each parameter of the present reducer.
        self._given = list(range(len(self._parameters)))
        self._order: list[int] | None = None

    def state(self) -> dict[str, object]:
        """Return the order of the buckets, and what else is to be as it was."""
        order = self._known_order()
        return {
            "parameters": self._digest(),
            "order": None
            if order is None
            else torch.tensor(order, dtype=torch.int32, device="cpu"),
            "began": self._statistics().get("iteration", 0) > 0,
            "views": [
                number
                for number, parameter in enumerate(self._parameters)
                if self.module.gradient_as_bucket_view
                and parameter.grad is not None
                and parameter.grad._is_view()
            ],
            "broadcasts": self.module.require_forward_param_sync,
        }

    def restore(self, saved: Mapping[str, Any]) -> str | None:
        """Have the buckets that were saved; return what keeps this from being done."""
        if saved["parameters"] is None:
            return (
                "the checkpoint does not say in which order DDP added up gradients: the run goes "
                "on, but with three ranks or more not bit for bit"
            )
        if saved["parameters"] != self._digest():
            return (
                "the parameters that DDP reduces are others than before, or in another order, so "
                "it adds up gradients in another order: the run goes on, but not bit for bit"
            )
        self.module.require_forward_param_sync = saved["broadcasts"]
        order = None if saved["order"] is None else cast("list[int]", saved["order"].tolist())
        if order is not None or saved["views"]:
            self._make_anew(order, saved["views"])
        if order is None and saved["began"] and self.module.static_graph:
            return (
                "the checkpoint is from after the first batch of a static graph, when DDP does not "
                "know yet in which order it will add up gradients: the run goes on, but not bit "
                "for bit; any later checkpoint has it"
            )
        return None

    def _known_order(self) -> list[int] | None:
        """Return the order of the parameters in the buckets; None while it is the first one."""
        if self._order is None:
            found = self._statistics()
            if found.get("has_rebuilt_buckets"):
                # "5 4 3, 2 1 0", a comma after each bucket.
                numbers = str(found["rebuilt_per_bucket_param_indices"]).replace(",", " ").split()
                self._order = [self._given[int(number)] for number in numbers]
            elif arrived := str(found.get("prev_iteration_grad_ready_order_indices", "")):
                return self._next_order([int(number) for number in arrived.split(",")])
        return self._order

    def _next_order(self, arrived: list[int]) -> list[int] | None:
        """Return the order that the next forward will make buckets of.

        Args:
            arrived: The gradients of the first backward, by number.
        """
        if self.module.find_unused_parameters and not self.module.static_graph:
            # These buckets are never made anew.
            return None
        # In a static graph a parameter may have been used more than once, when its last gradient
        # counts, or not at all, when it comes after the others.
        last = list(reversed(dict.fromkeys(reversed(arrived))))
        unused = sorted(set(range(len(self._parameters))).difference(last))
        return [self._given[number] for number in (*last, *unused)]

    def _statistics(self) -> dict[str, Any]:
        found = self.module._get_ddp_logging_data()
        if not found.get("has_rebuilt_buckets"):
            # DDP itself asks at the beginning of each of the first ten forwards only.
            self.module.logger.set_runtime_stats_and_log()
            found = self.module._get_ddp_logging_data()
        return cast("dict[str, Any]", found)

    def _digest(self) -> str:
        described = "\n".join(
            f"{plain_name(self._names[number])} {tuple(parameter.shape)} {parameter.dtype}"
            for number, parameter in enumerate(self._parameters)
        )
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def _make_anew(self, order: list[int] | None, views: Sequence[int]) -> None:
        """Make a reducer that has its parameters in this order, and buckets made of it.

        Nothing is run forward or backward for it.

        Args:
            order: Of the parameters; None for the first one.
            views: The gradients that are to lie in the buckets, as those of a step with
                `gradient_as_bucket_view` that were not set to None do. They are divided by the
                number of ranks there, and others multiplied by its inverse, which rounds otherwise.
        """
        module = self.module
        aside = [parameter.grad for parameter in self._parameters]
        for number, parameter in enumerate(self._parameters):
            if number not in views:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        builtin = None if module._comm_hooks else module._get_ddp_logging_data().get("comm_hook")
        # Its buckets are as large as all gradients: there must not be two of them.
        module.reducer = module.logger = None
        self._given = list(range(len(self._parameters))) if order is None else order
        # As `DistributedDataParallel.__setstate__` makes one.
        module._ddp_init_helper(
            [self._parameters[number] for number in self._given],
            [self._are_sparse[number] for number in self._given],
            {place: self._names[number] for place, number in enumerate(self._given)},
            module.static_graph,
        )
        reducer = module.reducer
        if module.static_graph:
            reducer._set_static_graph()
            module.logger._set_static_graph()
            module._static_graph_delay_allreduce_enqueued = False
        if module.mixed_precision is not None:
            reducer._set_mixed_precision_param_dtype(module.mixed_precision.param_dtype)
        hooks, module._comm_hooks = module._comm_hooks, []
        for hook, state in hooks:
            module.register_comm_hook(state, hook)
        if builtin:
            kind = getattr(vars(dist)["BuiltinCommHookType"], str(builtin).rpartition(".")[2])
            module._register_builtin_comm_hook(kind)
        if order is not None:
            reducer._push_all_rebuilt_params()
            module._has_rebuilt_buckets = reducer._rebuild_buckets()
            self._order = order
        for number, parameter in enumerate(self._parameters):
            if number not in views:
                parameter.grad = aside[number]


def _keeps_state(state: object) -> bool:
    if state is None or isinstance(state, (dist.ProcessGroup, weakref.ref)):
        return False
    # DDP's own, for its mixed precision.
    return type(state).__name__ != "_AllreduceUpcastHookState"


def kept_state(state: Any) -> Any:
    """Return the state of a communication hook as a file holds it; None if it can't be kept.

    An object that offers a `state_dict` is asked. Of any other the attributes, and the items of a
    dictionary, are kept if they are numbers, words, tensors, generators, or containers of these; groups
    of ranks are the run's own. `PowerSGDState` has tensors for each bucket.

    Example:
        >>> kept_state({0: 1.5})
        {'attributes': {}, 'items': [(0, 1.5)]}
    """
    if not _keeps_state(state) or isinstance(state, (FunctionType, MethodType, partial)):
        return None
    if isinstance(state, Stateful):
        return {"state": copy.deepcopy(state.state_dict())}
    own = _attributes(state)
    if own is None:
        return None
    try:
        return {
            "attributes": {
                name: generator_state(cast("Any", value))
                if isinstance(value, generator_kinds())
                else _kept(value)
                for name, value in own.items()
                if not isinstance(value, dist.ProcessGroup)
            },
            "items": _kept(state)["items"] if isinstance(state, dict) else None,
        }
    except TypeError:
        return None


def give_state(state: Any, kept: Any) -> None:
    """Give a hook's state what `kept_state` returned.

    Example:
        >>> errors = {}
        >>> give_state(errors, kept_state({0: 1.5}))
        >>> errors
        {0: 1.5}
    """
    if "state" in kept:
        state.load_state_dict(kept["state"])
        return
    for name, value in kept["attributes"].items():
        current = getattr(state, name, None)
        if isinstance(current, generator_kinds()):
            set_generator_state(cast("Any", current), value)
        elif isinstance(current, dict):
            current.clear()
            current.update(_given(value))
        else:
            setattr(state, name, _given(value))
    if kept["items"] is not None:
        state.clear()
        state.update(_given({"items": kept["items"]}))


def _attributes(state: Any) -> dict[str, Any] | None:
    names = slots(type(state))
    if not names and not hasattr(state, "__dict__"):
        return {} if type(state) is dict else None
    found = {name: getattr(state, name) for name in names if hasattr(state, name)}
    return {**getattr(state, "__dict__", {}), **found}


def _kept(value: Any) -> Any:
    if value is None or type(value) in _NUMBERS:
        return value
    if isinstance(value, torch.Tensor):
        copied = value.detach().clone()
        return copied if value.device.type == "cpu" else {"device": value.device.type, "at": copied}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_kept(item) for item in value]}
    if isinstance(value, dict) and all(map(_is_key, value)):
        return {"items": [(key, _kept(item)) for key, item in value.items()]}
    raise TypeError


def _is_key(key: object) -> bool:
    return type(key) in _NUMBERS or (isinstance(key, tuple) and all(map(_is_key, key)))


def _given(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {key: _given(item) for key, item in value["items"]}
    if "device" in value:
        # The ranks of a machine may have changed places.
        return value["at"].to(value["device"])
    ((kind, items),) = value.items()
    return {"list": list, "tuple": tuple}[kind](map(_given, items))
