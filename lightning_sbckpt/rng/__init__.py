"""Every random generator a run draws from: captured as plain values, put back, isolated.

Two families. The *global* ones (python's `random`, numpy's legacy state, torch on the CPU and on
each accelerator) are captured together by `capture_rng`. Generators that objects hold for
themselves are found by `generators_in` and captured one by one.

What is captured loads with `torch.load(..., weights_only=True)`: numbers, strings, tuples,
dictionaries, and byte tensors for everything else.
"""

from __future__ import annotations

from lightning_sbckpt.rng.capture import capture_rng, captures_states_of, isolated_rng, restore_rng
from lightning_sbckpt.rng.generators import (
    generator_state,
    generators_in,
    install_generator,
    raw_generator_state,
    set_generator_state,
)

__all__ = [
    "capture_rng",
    "captures_states_of",
    "generator_state",
    "generators_in",
    "install_generator",
    "isolated_rng",
    "raw_generator_state",
    "restore_rng",
    "set_generator_state",
]
