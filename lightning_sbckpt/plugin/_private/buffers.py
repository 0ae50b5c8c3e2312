"""Buffers that are left out of `state_dict`, and that training changes all the same.

A memory bank, a queue of negatives, a moving center: modules register them with `persistent=False`,
and the next step depends on them. Masks and tables are registered so, too, and never change; these
are not saved.

torch keeps the names in `Module._non_persistent_buffers_set`, and offers no other way to ask (seen
in 2.4 to 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash

from lightning_sbckpt._sharded.names import plain_name

__all__ = ["NonPersistentBuffers", "digest", "persistent_buffers"]

_Mark = tuple[object, ...]


class NonPersistentBuffers:
    """Knows which non-persistent buffers of a module have changed since it was made.

    Args:
        module: Where it is to be trained: moving it would change all its buffers.

    Example:
        >>> module = torch.nn.Linear(1, 1)
        >>> module.register_buffer("bank", torch.zeros(2), persistent=False)
        >>> module.register_buffer("mask", torch.ones(2), persistent=False)
        >>> buffers = NonPersistentBuffers(module)
        >>> _ = module.bank.add_(1)
        >>> state = buffers.state()
        >>> list(state)
        ['bank']

        In a new process:

        >>> module.bank = torch.zeros(2)
        >>> restore(module, state)
        []
        >>> module.bank
        tensor([1., 1.])
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._made: dict[str, tuple[_Mark, list[int]]] = {
            name: (_mark(buffer), list(buffer.shape)) for name, _, _, buffer in _buffers(module)
        }

    def __bool__(self) -> bool:
        """Return whether the module has such buffers at all."""
        return bool(self._made) or any(True for _ in _buffers(self._module))

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the buffers that have changed, and the shape with which each was made."""
        found = {}
        for name, _, _, buffer in _buffers(self._module):
            mark, shape = self._made.get(name, ((), None))
            if mark != _mark(buffer):
                found[name] = {"value": buffer.detach(), "made": shape}
        return found


def restore(module: torch.nn.Module, state: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Put back what `NonPersistentBuffers.state` returned. Return what could not be, in words."""
    here = {name: (owner, key, buffer) for name, owner, key, buffer in _buffers(module)}
    problems = []
    for name, saved in state.items():
        value = saved["value"]
        if name not in here:
            problems.append(f"the non-persistent buffer {name!r}: the module has it no more")
            continue
        owner, key, buffer = here[name]
        if buffer.shape == value.shape:
            with torch.no_grad():
                buffer.copy_(value)
        elif list(buffer.shape) == saved["made"]:
            # Made empty, and of this shape since the first batch.
            setattr(owner, key, value.to(buffer.device, copy=True))
        else:
            problems.append(
                f"the non-persistent buffer {name!r}: it had the shape {tuple(value.shape)} and has "
                f"{tuple(buffer.shape)}, so it begins anew"
            )
    return problems


def digest(state: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a text that tells states apart, to find out whether all ranks have the same."""
    whole = xxhash.xxh3_128()
    for name, saved in state.items():
        value = saved["value"].detach().cpu().contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the other buffers, those that a `state_dict` has, each with its name."""
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                yield plain_name(f"{prefix}.{key}" if prefix else key), buffer


def _buffers(
    module: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for key in sorted(owner._non_persistent_buffers_set):
            buffer = owner._buffers.get(key)
            # What is no ordinary tensor belongs to whoever has made it so.
            if type(buffer) is not torch.Tensor or buffer.layout is not torch.strided:
                continue
            if buffer.is_meta or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            yield plain_name(f"{prefix}.{key}" if prefix else key), owner, key, buffer


def _mark(buffer: torch.Tensor) -> _Mark:
    # The version counts changes in place, but not those through `.data`.
    version = None if buffer.is_inference() else buffer._version
    return buffer.data_ptr(), version, tuple(buffer.shape), _total(buffer)


def _total(buffer: torch.Tensor) -> int:
    flat = buffer.detach().contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words = flat[:whole].view(torch.int64) if flat.storage_offset() % 8 == 0 else flat[:whole]
    return int(words.sum()) + int(flat[whole:].sum())
