"""Parts of a module that `torch.compile` has compiled, and how."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_sbckpt._sharded.names import plain_module_name

_TRIES_OUT = ("max_autotune", "coordinate_descent_tuning")


def autotuned(module: nn.Module) -> list[str]:
    """Return the names of the parts whose kernels the compiler chooses by trying them out.

    The module itself is named by its class.
    """
    return [
        plain_module_name(name).strip(".") or type(part).__name__
        for name, part in module.named_modules()
        if any(config.get(option) for config in _configs(part) for option in _TRIES_OUT)
    ]


def _configs(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the options of the compiler for a part; other compilers than torch's own have none."""
    contexts = [getattr(part, "dynamo_ctx", None)]
    # Lightning unpacks a compiled LightningModule and notes this of it.
    contexts.append((getattr(part, "_compiler_ctx", None) or {}).get("dynamo_ctx"))
    # `module.compile()` leaves a function, which alone knows the context (seen in torch 2.13).
    compiled = getattr(part, "_compiled_call_impl", None)
    contexts += [each.cell_contents for each in getattr(compiled, "__closure__", None) or ()]
    for context in contexts:
        config = getattr(context, "compiler_config", None)
        if isinstance(config, dict):
            yield config
