"""torch, imported when it is first used: a listing has no tensors, and the import takes a second.

What has to start at once (the command, its completion) imports nothing that imports torch itself.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

__all__ = ["is_tensor", "torch"]


class _WhenUsed(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if not TYPE_CHECKING:
    torch = _WhenUsed("torch")


def is_tensor(value: object) -> TypeIs[torch.Tensor]:
    """Return whether a value is a tensor; where torch is not imported, nothing is.

    Example:
        >>> is_tensor(0.5), is_tensor(torch.zeros(1))
        (False, True)
    """
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))
