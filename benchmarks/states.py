"""What is saved: a model and its Adam moments, some 500 tensors, of a given size in all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

# A weight and a bias each, and for both two moments and a step count: 8 tensors per layer.
_LAYERS = 62
_BYTES_PER_PARAMETER = 12


class State:
    """A live model and optimizer.

    Args:
        megabytes: The size of all tensors together, in millions of bytes.
        seed: Of the weights.
        has_moments: Whether the optimizer has taken a step; a fresh one has no moments yet.
        layers: How many linear layers share the bytes.
    """

    def __init__(
        self,
        megabytes: float,
        *,
        seed: int = 0,
        has_moments: bool = True,
        layers: int = _LAYERS,
    ) -> None:
        torch.manual_seed(seed)
        self.megabytes = megabytes
        self.width = max(4, math.isqrt(int(megabytes * 1e6 / _BYTES_PER_PARAMETER / layers)))
        self.layers = layers
        blocks: list[nn.Module] = []
        for _ in range(layers):
            blocks += [nn.Linear(self.width, self.width), nn.ReLU()]
        self.model = nn.Sequential(*blocks)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-5)
        if has_moments:
            for parameter in self.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is saved."""
        for parameter in self.model.parameters():
            yield parameter
            moments = self.optimizer.state[parameter]
            yield from (moments[name] for name in sorted(moments))

    def as_dict(self) -> dict[str, object]:
        """Return the state as torch's own users save it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @torch.no_grad()
    def change(self) -> None:
        """Change every tensor a little: a checkpoint that equals the last one may cost nothing."""
        for tensor in self.tensors():
            tensor.view(-1)[0] += 1

    @torch.no_grad()
    def settle(self) -> None:
        """Give the moments ordinary memory: what was loaded last may be a mapping of its file."""
        for values in self.optimizer.state.values():
            values.update({name: value.clone() for name, value in values.items()})

    @torch.no_grad()
    def touch(self) -> float:
        """Read one number per page of every tensor, so that what is loaded lazily is loaded."""
        return sum(float(tensor.view(-1)[::1024].sum()) for tensor in self.tensors())

    def train_step(self, guard: AbstractContextManager[object] | None = None) -> None:
        """Take one step: forward, backward, and Adam within a guard."""
        self.optimizer.zero_grad()
        self.model(torch.ones(64, self.width)).mean().backward()
        with guard or nullcontext():
            self.optimizer.step()

    def equals(self, other: State) -> bool:
        """Return whether two states have the same bits."""
        mine, theirs = list(self.tensors()), list(other.tensors())
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


class ReadyCopy:
    """One copy of a state into memory that is there already: the limit of an async save."""

    def __init__(self, state: State) -> None:
        self._pairs = [(torch.zeros_like(each), each.detach()) for each in state.tensors()]

    def __call__(self) -> None:
        """Copy."""
        for target, source in self._pairs:
            target.copy_(source)
