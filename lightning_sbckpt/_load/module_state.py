"""What the state of a module has beside its tensors, and a module put back to what it was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

LAZY = (UninitializedParameter, UninitializedBuffer)

_State = TypeVar("_State", bound=MutableMapping[str, Any])


def versions_in(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the versions of layers by module, which their own loading asks for; None if there are none.

    `Module.state_dict` returns them as an attribute of the state.
    """
    return cast("Mapping[str, Any] | None", getattr(state, "_metadata", None))


def with_versions(state: _State, versions: Mapping[str, Any] | None) -> _State:
    """Return a state, which has to be an `OrderedDict`, that has such versions now."""
    if versions is not None:
        cast("Any", state)._metadata = OrderedDict(versions)  # noqa: SLF001 - where torch looks for it
    return state


def versions_below(versions: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the versions of a submodule and its parts, by their names in it.

    Example:
        >>> versions_below({"": 1, "net": 2, "net.0": 3, "nets": 4}, "net")
        {'': 2, '0': 3}
    """
    return {
        part[len(name) + 1 :]: version
        for part, version in versions.items()
        if part == name or part.startswith(f"{name}.")
    }


@contextmanager
def as_it_was_if_refused(module: nn.Module, *, may_fail: bool) -> Iterator[None]:
    """Put parameters, buffers and extra states back if the block raises.

    Args:
        module: The module.
        may_fail: Whether that is to be expected at all; it takes a copy of the module.
    """
    if not may_fail:
        yield
        return
    parts = [
        (part, dict(part._parameters), dict(part._buffers), _extra_state(part))  # noqa: SLF001 - each by its own module
        for part in module.modules()
    ]
    values = {
        id(tensor): (tensor, tensor.detach().clone())
        for _, parameters, buffers, _ in parts
        for tensor in [*parameters.values(), *buffers.values()]
        if tensor is not None and not isinstance(tensor, LAZY)
    }
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for part, parameters, buffers, extra in parts:
                part._parameters.update(parameters)  # noqa: SLF001 - as above
                part._buffers.update(buffers)  # noqa: SLF001 - as above
                if extra is not None:
                    part.set_extra_state(extra)
            for tensor, value in values.values():
                if tensor.shape == value.shape:
                    tensor.copy_(value)
                else:
                    tensor.data = value
        raise


def _extra_state(part: nn.Module) -> Any:
    if type(part).set_extra_state is nn.Module.set_extra_state:
        return None
    return copy.deepcopy(part.get_extra_state())
