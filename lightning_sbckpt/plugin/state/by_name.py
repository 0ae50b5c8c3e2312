"""The state of an optimizer, given to the parameters of the same names.

`torch.optim` numbers its parameters by their order: a layer that changes place in `__init__` would
get the moments of another one, silently. So the names are saved beside the state, and where they
tell that the order is another one now, the state is put in the new order before the optimizer gets it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sbckpt._load.module_state import LAZY
from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt.plugin.state.names import OwnNames

Groups: TypeAlias = "list[list[str]]"
Shape: TypeAlias = "tuple[int, ...]"
Place: TypeAlias = "tuple[int, int]"


@dataclass(frozen=True)
class Trained:
    """What an optimizer trains.

    Attributes:
        names: The plain names of the parameters in each group; an empty one if the module has no
            such parameter.
        shapes: Their shapes.
    """

    names: Groups
    shapes: list[list[Shape]]

    @classmethod
    def by(cls, optimizer: Optimizer, module: nn.Module) -> Trained:
        """Return what a live optimizer trains of a module."""
        names = {id(each): plain_name(name) for name, each in module.named_parameters()}
        groups = [group["params"] for group in optimizer.param_groups]
        return cls(
            [[names.get(id(each), "") for each in group] for group in groups],
            [[_shape(each) for each in group] for group in groups],
        )

    @classmethod
    def saved_in(cls, record: Mapping[str, Any]) -> Trained:
        """Return what `as_record` returned when it was saved."""
        shapes = [
            [tuple(map(int, filter(None, shape.split(",")))) for shape in text.split("\n")[:-1]]
            for text in record["shapes"]
        ]
        return cls([text.split("\n")[:-1] for text in record["names"]], shapes)

    def as_record(self) -> dict[str, list[str]]:
        r"""Return it as text, a group each: thousands of names are saved as fast as one.

        Example:
            >>> Trained([["net.weight", "net.bias"]], [[(2, 3), (2,)]]).as_record()
            {'names': ['net.weight\nnet.bias\n'], 'shapes': ['2,3\n2\n']}
        """
        return {
            "names": ["".join(f"{name}\n" for name in group) for group in self.names],
            "shapes": [
                "".join(",".join(map(str, shape)) + "\n" for shape in group)
                for group in self.shapes
            ],
        }

    def called_here(self, module: nn.Module, key_map: Mapping[str, str]) -> Trained:
        """Return it by the names that the parameters have in a live module.

        Args:
            module: The module.
            key_map: From prefixes of saved names to those of the module.
        """
        # Tied parameters go by their first name, which may have been another one.
        first = {id(each): name for name, each in module.named_parameters()}
        every = dict(module.named_parameters(remove_duplicate=False))
        own = OwnNames.of(every, key_map)

        def here(name: str) -> str:
            found = own.find(name) if name else ""
            return plain_name(first[id(every[found])] if found in every else found)

        return Trained([[here(name) for name in group] for group in self.names], self.shapes)

    @property
    def places(self) -> dict[Place, str]:
        """The names by group and position."""
        return {(g, i): name for g, group in enumerate(self.names) for i, name in enumerate(group)}

    def shape(self, place: Place) -> Shape:
        """Return the shape of a parameter."""
        return self.shapes[place[0]][place[1]]


@dataclass(frozen=True)
class Arrangement:
    """A saved state in the order of a live optimizer.

    Attributes:
        state: The state.
        groups: For each live group the saved one whose options it has, or None.
        begin_anew: Names of parameters for which there is no state.
        unused: Names of parameters whose state has no place any more.
        renamed: Pairs of names, before and now, that were put together by their order.
        is_as_saved: Whether nothing had to be changed.
    """

    state: Mapping[str, Any]
    groups: list[int | None]
    begin_anew: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    is_as_saved: bool = False


def arrange(
    state: Mapping[str, Any],
    optimizer: Optimizer,
    saved: Trained,
    own: Trained,
    *,
    not_loaded: Collection[str],
    in_module: Collection[str],
) -> Arrangement | None:
    """Put a saved state in the order of a live optimizer; None if its form is not torch's own.

    Args:
        state: What was saved.
        optimizer: The live one.
        saved: What the saved one trained, by the names of this run.
        own: What the live one trains.
        not_loaded: Names of parameters that did not get their saved values.
        in_module: Names of all parameters of the module.
    """
    same = saved.names == own.names
    has_fresh = any(name in not_loaded for name in chain(*own.names))
    if same and not has_fresh:
        return Arrangement(state, list(range(len(own.names))), is_as_saved=True)
    numbers = _numbers(state)
    if numbers is None or list(map(len, numbers)) != list(map(len, saved.names)):
        return None
    if _is_flat(state, saved):
        return None
    pairs = _by_name(saved, own)
    sources = [_source(group, pairs, saved, own) for group in range(len(own.names))]
    renamed = _by_order(saved, own, pairs, sources, not_loaded, in_module)
    pairs.update(renamed)
    fresh = {place for place, name in own.places.items() if name in not_loaded}
    wanted = {place: source for place, source in pairs.items() if place not in fresh}
    taken = set(pairs.values())
    return Arrangement(
        _in_order(state, optimizer, numbers, wanted, sources),
        sources,
        begin_anew=[name for place, name in own.places.items() if place not in wanted],
        unused=[name for place, name in saved.places.items() if place not in taken],
        renamed=[(saved.places[source], own.places[place]) for place, source in renamed.items()],
    )


def _shape(parameter: torch.Tensor) -> Shape:
    # A lazy parameter that no batch has reached yet has none.
    return () if isinstance(parameter, LAZY) else tuple(parameter.shape)


def _by_name(saved: Trained, own: Trained) -> dict[Place, Place]:
    at = {name: place for place, name in saved.places.items() if name}
    return {place: at[name] for place, name in own.places.items() if name in at}


def _source(group: int, pairs: Mapping[Place, Place], saved: Trained, own: Trained) -> int | None:
    """Return the saved group that has most of a live group's parameters; it gives the options."""
    votes = Counter(source[0] for place, source in pairs.items() if place[0] == group)
    if votes:
        most = max(votes.values())
        return min(
            (each for each, count in votes.items() if count == most),
            key=lambda each: (each != group, each),
        )
    return group if len(saved.names) == len(own.names) else None


def _by_order(
    saved: Trained,
    own: Trained,
    pairs: Mapping[Place, Place],
    sources: Sequence[int | None],
    not_loaded: Collection[str],
    in_module: Collection[str],
) -> dict[Place, Place]:
    """Pair what hooks of the user's have renamed: as many, of the same shapes, in the same order."""
    taken = set(pairs.values())
    found: dict[Place, Place] = {}
    for group, source in enumerate(sources):
        rest = [
            place
            for place, name in own.places.items()
            if place[0] == group and place not in pairs and name not in not_loaded
        ]
        left = [
            place
            for place, name in saved.places.items()
            if place[0] == source and place not in taken and name not in in_module
        ]
        if list(map(own.shape, rest)) == list(map(saved.shape, left)):
            found.update(zip(rest, left, strict=True))
    return found


def _in_order(
    state: Mapping[str, Any],
    optimizer: Optimizer,
    numbers: Sequence[Sequence[Any]],
    pairs: Mapping[Place, Place],
    sources: Sequence[int | None],
) -> dict[str, Any]:
    live = optimizer.state_dict()["param_groups"]
    moments, known = state["state"], set(chain(*numbers))
    # What belongs to no parameter stays.
    arranged = {key: value for key, value in moments.items() if key not in known}
    groups = []
    count = 0
    for index, source in enumerate(sources):
        options = dict(live[index] if source is None else state["param_groups"][source])
        size = len(live[index]["params"])
        options["params"] = list(range(count, count + size))
        options.pop("param_names", None)
        if "param_names" in live[index]:
            options["param_names"] = live[index]["param_names"]
        for position in range(size):
            place = pairs.get((index, position))
            number = None if place is None else numbers[place[0]][place[1]]
            if number in moments:
                arranged[count + position] = moments[number]
        groups.append(options)
        count += size
    return {**state, "state": arranged, "param_groups": groups}


def _numbers(state: Mapping[str, Any]) -> list[list[Any]] | None:
    """Return the numbers of the parameters in each group; None if the form is not torch's own."""
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not isinstance(state.get("state"), Mapping):
        return None
    if not all(isinstance(group, Mapping) and "params" in group for group in groups):
        return None
    return [list(group["params"]) for group in groups]


def _is_flat(state: Mapping[str, Any], saved: Trained) -> bool:
    """Return whether a state has all parameters in one row, as that of LBFGS."""
    sizes = [torch.Size(shape).numel() for shape in chain(*saved.shapes)]
    return len(sizes) > 1 and any(
        tensor.dim() == 1 and tensor.numel() == sum(sizes) != max(sizes)
        for tensor in _tensors(state["state"])
    )


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def misfits(optimizer: Optimizer, saved: Trained, own: Trained) -> Iterable[str]:
    """Yield what of a loaded state has the shape of a parameter as it was, in words.

    Such a state fails at the first step. Any other shape is the optimizer's own affair.

    Args:
        optimizer: Has just loaded the state.
        saved: What the saved one trained, by the names of this run.
        own: What the live one trains.
    """
    shapes = {name: saved.shape(place) for place, name in saved.places.items() if name}
    for (group, index), name in own.places.items():
        parameter = optimizer.param_groups[group]["params"][index]
        before, now = shapes.get(name), _shape(parameter)
        moments = optimizer.state.get(parameter)
        if before is None or before == now or not isinstance(moments, Mapping):
            continue
        for key, value in moments.items():
            if isinstance(value, torch.Tensor) and value.dim() and tuple(value.shape) == before:
                yield f"{key} of {name} is {before} in the checkpoint, the parameter {now} in this run"
