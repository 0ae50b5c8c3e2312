"""What Lightning leaves out of a checkpoint and an exact resume needs.

Between two batches, or two epochs, these are: the random states, the position of the data, what
was logged in this epoch so far, the live state of torchmetrics, and, inside a
gradient-accumulation window, the gradients. Each rank has its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
import xxhash
from lightning_utilities.core.rank_zero import rank_zero_warn
from torchmetrics import Metric, MetricCollection

from lightning_sbckpt._save.items import TakenState
from lightning_sbckpt._sharded.names import plain_module_name, plain_name
from lightning_sbckpt._sharded.states import is_sharded_tensor
from lightning_sbckpt._world.world import gather_tensors
from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.hooks.builtin import (
    grow_tracker,
    is_metric,
    is_tracker,
    metric_state,
    set_metric_state,
)
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.data.tracker import LoaderTracker
from lightning_sbckpt.plugin.packages import LightningModule, Trainer
from lightning_sbckpt.plugin.state.gradients import put_gradients
from lightning_sbckpt.plugin.state.hardware import (
    changes,
    describe,
    warnings_of_device,
    warnings_of_parts,
)
from lightning_sbckpt.plugin.state.parts import (
    GRADIENTS,
    LOADERS,
    METRICS,
    NONPERSISTENT,
    RANK_BUFFERS,
    RNG,
)
from lightning_sbckpt.plugin.state.per_rank import pack, stack_ranks
from lightning_sbckpt.rng import capture_rng, generator_state, restore_rng, set_generator_state
from lightning_sbckpt.rng.generators import Generator, generator_kinds, with_state
from lightning_sbckpt.typing import World

_HELD = "held"
_HARDWARE = "hardware"


def capture(trainer: Trainer, tracker: LoaderTracker) -> dict[str, Any]:
    """Return this rank's state, by the name of the file that it goes to."""
    module = trainer.lightning_module
    loaders = tracker.state(_private.trainer.prefetched_batches(trainer))
    for sentence in tracker.news():
        rank_zero_warn(f"SBCheckpoint: {sentence}")
    held = {name: generator_state(generator) for name, generator in _held(trainer).items()}
    hardware = describe(trainer.strategy.root_device)
    return {
        RNG: {**capture_rng(), _HELD: held, **({_HARDWARE: hardware} if hardware else {})},
        LOADERS: loaders,
        METRICS: {
            "logged": _private.logged.logged_state(trainer),
            "torchmetrics": {name: metric_state(metric) for name, metric in metrics_in(module)},
        },
    }


def own_buffers(trainer: Trainer, world: World, broadcast: Collection[int]) -> dict[str, Any]:
    """Return the buffers of this rank that are not rank zero's, by name; every rank calls this.

    A checkpoint has rank zero's. With `broadcast_buffers=False`, between the batches of a window of
    accumulation, and in modules that are sharded, the others' differ: statistics of a
    normalization, queues, codebooks.

    Args:
        trainer: Whose module.
        world: The ranks.
        broadcast: The ids of those that rank zero is about to give to all.
    """
    if world.size == 1:
        return {}
    own = {
        name: buffer.detach()
        for name, buffer in _private.buffers.persistent_buffers(trainer.lightning_module)
        if id(buffer) not in broadcast and not is_sharded_tensor(buffer)
    }
    if not own:
        return {}
    digests = {name: _digest(buffer) for name, buffer in own.items()}
    of_main = world.broadcast(digests)
    return {name: own[name] for name in own if digests[name] != of_main.get(name)}


def _digest(tensor: torch.Tensor) -> str:
    plain = tensor.cpu().reshape(-1).contiguous().view(torch.uint8)
    whole = xxhash.xxh3_128()
    whole.update(cast("Any", plain.numpy()))
    return whole.hexdigest()


def nondeterminism_warnings(trainer: Trainer) -> list[str]:
    """Return what callbacks and hardware keep from being resumed exactly, a sentence each."""
    device = trainer.strategy.root_device
    return [
        *_private.callbacks.nondeterminism_warnings(trainer),
        *warnings_of_device(device),
        *warnings_of_parts(trainer.lightning_module, device),
    ]


def changes_of_hardware(trainer: Trainer, state: Mapping[str, Any]) -> list[str]:
    """Return how the device is another than that of a state, in one sentence, if it is."""
    return changes(state.get(RNG, {}).get(_HARDWARE), describe(trainer.strategy.root_device))


def modes(module: LightningModule) -> dict[str, list[str]]:
    """Return what is frozen, in evaluation mode, or keeps no running statistics, by name.

    Callbacks set these as training goes on (finetuning, above all) and would not do so again for an
    epoch that has begun.
    """
    return {
        "frozen": [plain_name(n) for n, p in module.named_parameters() if not p.requires_grad],
        "eval": [plain_module_name(n) for n, c in module.named_modules() if not c.training],
        "untracked": [
            plain_module_name(name)
            for name, child in module.named_modules()
            if getattr(child, "track_running_stats", None) is False
        ],
    }


def restore_modes(module: LightningModule, saved: Mapping[str, list[str]]) -> None:
    """Put back what `modes` returned."""
    frozen = {plain_name(name) for name in saved["frozen"]}
    evaluating, untracked = (set(map(plain_module_name, saved[k])) for k in ("eval", "untracked"))
    for name, parameter in module.named_parameters():
        parameter.requires_grad = plain_name(name) not in frozen
    for wrapped_name, child in module.named_modules():
        name = plain_module_name(wrapped_name)
        child.training = name not in evaluating
        if hasattr(child, "track_running_stats"):
            child.track_running_stats = name not in untracked


def restore(trainer: Trainer, state: Mapping[str, Any]) -> list[str]:
    """Put back all but the loaders; the random states last. Return what could not be, in words."""
    module = trainer.lightning_module
    problems: list[str] = []
    if METRICS in state:
        problems += _private.logged.restore_logged_state(trainer, state[METRICS]["logged"])
        problems += _restore_metrics(module, state[METRICS]["torchmetrics"])
    if RANK_BUFFERS in state:
        problems += _restore_buffers(module, state[RANK_BUFFERS])
    if GRADIENTS in state:
        problems += put_gradients(trainer, state[GRADIENTS])
    if NONPERSISTENT in state:
        problems += _private.buffers.restore(module, state[NONPERSISTENT])
    if RNG in state:
        problems += restore_rng(state[RNG])
        problems += _restore_held(trainer, state[RNG].get(_HELD, {}))
    return problems


def _held(trainer: Trainer) -> dict[str, Generator]:
    """Return the random generators that the module, its parts and the callbacks hold, by name."""
    kinds = generator_kinds()
    owners: dict[str, object] = {
        plain_module_name(name): child for name, child in trainer.lightning_module.named_modules()
    }
    owners.update({each.state_key: each for each in _private.trainer.callbacks_of(trainer)})
    found = {
        f"{owner}.{name}" if owner else name: value
        for owner, obj in owners.items()
        for name, value in vars(obj).items()
        if isinstance(value, kinds)
    }
    return with_state(found)


def _restore_held(trainer: Trainer, states: Mapping[str, Any]) -> list[str]:
    problems = []
    here = _held(trainer) if states else {}
    for name, state in states.items():
        if name not in here:
            problems.append(f"the random generator {name!r}: it is not there any more")
            continue
        try:
            set_generator_state(here[name], state)
        except MismatchError as error:
            problems.append(f"the random generator {name!r}: {error}")
    return problems


def metrics_in(module: LightningModule) -> Iterator[tuple[str, Metric | MetricCollection]]:
    """Yield the metrics of a module by name, without those that are parts of another metric."""
    inside: list[str] = []
    for name, child in module.named_modules():
        if is_metric(child) and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
            yield name, cast("Metric | MetricCollection", child)


def _restore_metrics(module: LightningModule, states: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, child in module.named_modules():
        if is_tracker(child):
            keys = [key.removeprefix(f"{name}.") for key in states if key.startswith(f"{name}.")]
            steps = [int(key) for key in keys if key.isdecimal()]
            grow_tracker(cast("torch.nn.ModuleList", child), max(steps, default=0))
    metrics = dict(metrics_in(module))
    for name, state in states.items():
        subject = f"the values gathered by the metric {name!r}"
        if name not in metrics:
            problems.append(f"{subject}: the module has no such metric any more")
            continue
        try:
            set_metric_state(metrics[name], state)
        except MismatchError as error:
            problems.append(f"{subject}: {error}")
    return problems


def _restore_buffers(module: LightningModule, saved: Mapping[str, torch.Tensor]) -> list[str]:
    buffers = dict(_private.buffers.persistent_buffers(module))
    problems = []
    for name, value in saved.items():
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].copy_(value)
        else:
            problems.append(
                f"the buffer {name!r} of this rank: the module has no such buffer any more"
            )
    return problems


def parts_of_ranks(state: Mapping[str, Any], world: World) -> dict[str, TakenState]:
    """Return the parts that hold every rank's state, by the name of their file; rank zero's only."""
    if world.size == 1:
        return {
            name: TakenState({"ranks": [one]}, volatile=True)
            for name, one in sorted(state.items())
            if one or name not in (NONPERSISTENT, GRADIENTS)
        }
    if NONPERSISTENT in state:
        state = _once_where_equal(state, world)
    # As large as the model on each rank: packed, as the others are, they would be so many times over.
    gradients: list[dict[str, torch.Tensor]] = []
    if GRADIENTS in state:
        gradients = gather_tensors(state[GRADIENTS], world)
        state = {name: one for name, one in state.items() if name != GRADIENTS}
    gathered = world.gather({name: pack(one) for name, one in state.items()}) or []
    names = {name for of_rank in gathered for name in of_rank}
    nothing = pack(None)
    parts: dict[str, dict[str, object]] = {
        name: stack_ranks([of_rank.get(name, nothing) for of_rank in gathered]) for name in names
    }
    if any(gradients):
        parts[GRADIENTS] = {"ranks": gradients}
    return {name: TakenState(part, volatile=True) for name, part in sorted(parts.items())}


def _once_where_equal(state: Mapping[str, Any], world: World) -> Mapping[str, Any]:
    """Leave buffers that all ranks have in common to rank zero: banks are large."""
    digests = world.gather(_private.buffers.digest(state[NONPERSISTENT]))
    equal = world.broadcast(digests is not None and len(set(digests)) == 1)
    if equal and (world.rank or not state[NONPERSISTENT]):
        return {name: one for name, one in state.items() if name != NONPERSISTENT}
    return state
