"""The device that a run trains on, as far as its bits depend on it.

Two machines don't give the same bits, and neither do two runs on one machine if kernels are chosen by
their speed or add in any order. Neither is an error: it is told, at the first fit and at a resume.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from torch import nn

from lightning_sbckpt._sharded.names import plain_module_name
from lightning_sbckpt.plugin._private.compiled import autotuned
from lightning_sbckpt.rng import captures_states_of

# With any other value cuBLAS may use several workspaces, as they become free.
_ONE_WORKSPACE = (":4096:8", ":16:8")


def warnings_of_device(device: torch.device) -> list[str]:
    """Return what of the hardware keeps a resumed run from being exact, a sentence each.

    Args:
        device: Where the model trains.

    Example:
        >>> warnings_of_device(torch.device("cpu"))
        []
        >>> warnings_of_device(torch.device("cuda"))
        ['kernels on cuda may be nondeterministic, ...']
    """
    return [] if device.type == "cpu" else list(_warnings_of(device.type))


def _warnings_of(kind: str) -> Iterator[str]:
    if not captures_states_of(kind):
        yield (
            f"the random states of {kind} devices are not saved, since torch gives no access to them: "
            "dropout and the like will draw other numbers after a resume"
        )
    if not torch.are_deterministic_algorithms_enabled():
        yield (
            f"kernels on {kind} may be nondeterministic, so a resumed run may differ in the last "
            "bits, as two runs that were never stopped do: pass Trainer(deterministic=True) if it must "
            "not"
        )
        return
    if torch.is_deterministic_algorithms_warn_only_enabled():
        yield (
            f"kernels on {kind} that have no deterministic form are used all the same, with a warning, so a "
            'resumed run may differ in the last bits: pass Trainer(deterministic=True), not "warn", if '
            "it must not"
        )
    if kind != "cuda":
        return
    if torch.backends.cudnn.benchmark:
        yield (
            "cuDNN chooses algorithms by their speed, in each process anew, so a resumed run may differ in "
            "the last bits: pass Trainer(benchmark=False) if it must not"
        )
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _ONE_WORKSPACE:
        yield (
            "cuBLAS may add in any order, so a resumed run may differ in the last bits: set "
            "CUBLAS_WORKSPACE_CONFIG=:4096:8 before the first use of the GPU if it must not"
        )


def warnings_of_parts(module: nn.Module, device: torch.device) -> list[str]:
    """Return which parts of a module keep a resumed run from being exact on a device.

    Args:
        module: The one that trains.
        device: Where it trains.

    Example:
        >>> warnings_of_parts(nn.LSTM(2, 2, num_layers=2, dropout=0.1), torch.device("cuda"))
        ['the dropout between the layers of LSTM is drawn by cuDNN, ...']
    """
    if device.type == "cpu":
        return []
    found = []
    tuned = autotuned(module)
    if tuned:
        found.append(
            f"the compiler chooses the kernels of {', '.join(tuned)} by their speed, in each process anew "
            "unless its cache is kept, so a resumed run may differ in the last bits: don't compile with "
            'mode="max-autotune" if it must not'
        )
    dropping = [
        f"{plain_module_name(name)} ({type(part).__name__})" if name else type(part).__name__
        for name, part in module.named_modules()
        if isinstance(part, nn.RNNBase) and part.dropout and part.num_layers > 1
    ]
    if dropping and device.type == "cuda":
        found.append(
            f"the dropout between the layers of {', '.join(dropping)} is drawn by cuDNN, whose state is not "
            "to be read: a resumed run drops others. Use layers of one each, with torch.nn.Dropout between "
            "them, if it must not"
        )
    return found


def describe(device: torch.device) -> dict[str, str]:
    """Return what the bits of a run on a device depend on, in words; nothing for the processor.

    Example:
        >>> describe(torch.device("cpu"))
        {}
    """
    if device.type == "cpu":
        return {}
    if device.type != "cuda":
        return {"device": device.type}
    found = {
        "device": torch.cuda.get_device_name(device),
        "CUDA": str(torch.version.cuda or torch.version.hip),
        "cuDNN": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }
    # Torch refuses to tell where a program has set them by its newer names.
    with suppress(RuntimeError):
        found["precision of float32 products"] = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        found["TF32 in cuDNN"] = str(torch.backends.cudnn.allow_tf32)
    return found


def changes(saved: object, now: Mapping[str, str]) -> list[str]:
    """Return how the device is another than that of the checkpoint, in one sentence, if it is.

    Args:
        saved: What `describe` returned for the run that saved, if it did.
        now: What it returns for this one.

    Example:
        >>> changes({"device": "NVIDIA A100"}, {"device": "NVIDIA H100"})
        ['the hardware is not that of the checkpoint (device: NVIDIA A100, now NVIDIA H100): ...']
    """
    if not isinstance(saved, Mapping):
        return []
    absent = "unknown" if now else "the processor"
    names = ["device"] if not now else sorted({*saved, *now}, key=str)
    different = [
        f"{name}: {saved.get(name, 'unknown')}, now {now.get(name, absent)}"
        for name in names
        if saved.get(name) != now.get(name)
    ]
    if not different:
        return []
    sentence = (
        f"the hardware is not that of the checkpoint ({'; '.join(different)}): the run goes on, and may "
        "differ in the last bits"
    )
    return [sentence]
