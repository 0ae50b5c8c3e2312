"""The hooks that need no registration: torch's and torchmetrics' objects, and anything stateful."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch

from lightning_sbckpt._format.encode import save_state
from lightning_sbckpt._format.load import load_live_state, load_state
from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.hooks import speechbrain
from lightning_sbckpt.hooks.registry import HookRegistry, default_registry
from lightning_sbckpt.typing import Stateful

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

__all__ = [
    "metric_state",
    "set_metric_state",
    "torch_parameter_transfer",
    "torch_recovery",
    "torch_save",
]

logger = logging.getLogger("lightning_sbckpt")


def torch_save(obj: Stateful, path: str | Path) -> None:
    """Save the `state_dict()` of an object to a file of torch's format.

    Args:
        obj: A module, optimizer, scheduler, scaler or anything else with a `state_dict`.
        path: The file to write.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "model.ckpt"
        >>> torch_save(torch.nn.Linear(1, 1), file)
        >>> sorted(torch.load(file, weights_only=True))
        ['bias', 'weight']
    """
    state = _state_dict_of(obj)
    warn_if_empty(state, type(obj).__name__, Path(path).name)
    save_state(state, Path(path))


def warn_if_empty(state: object, kind: str, filename: str) -> None:
    """Warn of a state without anything in it: what was to be saved is probably elsewhere.

    Where it is known to be elsewhere, `save_jobs` has refused it before.
    """
    if isinstance(state, Mapping) and not state:
        logger.warning("the state_dict of %s, saved in %s, is empty", kind, filename)


def _state_dict_of(obj: Stateful) -> Mapping[str, object]:
    if isinstance(obj, torch.nn.Module):
        _warn_of_numbers(obj)
    return obj.state_dict()


def _warn_of_numbers(module: torch.nn.Module) -> None:
    """Warn once of numbers that training changes and that the `state_dict` of a module leaves out.

    No error: SpeechBrain saves such a module so, and the number may be worth nothing, as that of a cache.
    """
    note_numbers(module)
    for path, part in module.named_modules():
        changed = changed_numbers(part)
        if changed and default_registry.saver(part) is not torch_save:
            continue
        for name in changed:
            where = ".".join(filter(None, (type(module).__name__, path, name)))
            logger.warning(
                "%s (%s when it was added, %s now) is not in its state_dict, so a resume begins "
                "with the value that it is made with. If that matters, keep it in a buffer or "
                "return it from get_extra_state",
                where,
                _numbers[part].pop(name),
                getattr(part, name),
            )


def torch_recovery(obj: Stateful, path: str | Path, end_of_epoch: bool) -> None:
    """Load what `torch_save` saved into a live object; every key has to fit.

    Args:
        obj: A module, optimizer, scheduler, scaler or anything else with a `load_state_dict`.
        path: The file to read; nothing but tensors and plain values is loaded from it.
        end_of_epoch: Unused; the signature is that of every load hook.

    Raises:
        MismatchError: The state doesn't fit the object; the message is torch's, with the path.
        UntrustedPickleError: The file holds more than tensors and plain values.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "model.ckpt"
        >>> torch_save(torch.nn.Linear(2, 1), file)
        >>> torch_recovery(torch.nn.Linear(2, 1), file, end_of_epoch=True)
        >>> torch_recovery(torch.nn.Linear(3, 1), file, end_of_epoch=True)
        Traceback (most recent call last):
        lightning_sbckpt.errors.MismatchError: the state in ...
    """
    del end_of_epoch
    path = Path(path)
    apply_state(obj, _state_for(obj, path), path)


def _state_for(obj: Stateful, path: Path) -> Mapping[str, object]:
    state: object = load_live_state(obj, path)
    if not isinstance(state, dict):
        return cast("Mapping[str, object]", state)
    return speechbrain.renamed(state, obj.state_dict)


def apply_state(obj: Stateful, state: Mapping[str, object], path: Path) -> None:
    """Hand a state to `load_state_dict`, naming the file where it doesn't fit.

    Raises:
        MismatchError: The object refused the state.
    """
    live: Any = obj
    groups = live.param_groups if isinstance(live, torch.optim.Optimizer) else []
    before = [dict(group) for group in groups]
    try:
        obj.load_state_dict(state)
        if before:
            _keep_tensors(before, live.param_groups)
    except Exception as error:
        raise MismatchError(
            f"the state in {path} does not fit the {type(obj).__name__} it is loaded into: {error}"
        ) from error


def _keep_tensors(old: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Have values of groups stay where they were: a captured step reads its learning rate there."""
    given: dict[int, torch.Tensor] = {}
    for one, group in zip(old, groups, strict=False):
        for key, tensor in one.items():
            new = group.get(key)
            if not (isinstance(tensor, torch.Tensor) and isinstance(new, torch.Tensor)):
                continue
            # Several groups may have had one tensor, and have others in the file.
            if tensor.shape == new.shape and torch.equal(given.setdefault(id(tensor), new), new):
                group[key] = tensor.copy_(new)


def torch_parameter_transfer(obj: torch.nn.Module, path: str | Path) -> None:
    """Load the parameters that a module and a file share by name; warn about every other.

    Args:
        obj: The module that takes the parameters.
        path: A file with a `state_dict`.

    Raises:
        MismatchError: A shared parameter has another shape; every such one is listed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "model.ckpt"
        >>> torch_save(torch.nn.Linear(1, 1, bias=True), file)
        >>> torch_parameter_transfer(torch.nn.Linear(1, 1, bias=False), file)
    """
    path = Path(path)
    state = _state_for(obj, path)
    name = type(obj).__name__
    try:
        keys = obj.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise MismatchError(
            f"the parameters in {path} can't be transferred to the {name}: {error}"
        ) from error
    for key in keys.missing_keys:
        logger.warning("transfer to %s: %s has no parameters for the key %s", name, path, key)
    for key in keys.unexpected_keys:
        logger.warning("transfer to %s: no use for the key %s of %s", name, key, path)


def save_generator(generator: torch.Generator, path: Path) -> None:
    """Save the state of a `torch.Generator`."""
    torch.save(generator.get_state(), path)


def _generator_state(generator: torch.Generator) -> torch.Tensor:
    return generator.get_state()


def load_generator(generator: torch.Generator, path: Path, end_of_epoch: bool) -> None:
    """Load the state of a `torch.Generator`."""
    del end_of_epoch
    generator.set_state(cast("torch.Tensor", load_state(path)))


def metric_state(metric: Metric | MetricCollection) -> dict[str, object]:
    """Return the live state of a metric, which its `state_dict` leaves out.

    Args:
        metric: A metric, or a collection: then the states of its metrics, by name.

    Returns:
        The tensors and lists of tensors that it has gathered since its last reset, as they are (not
        copied), and how many updates went into them; nested metrics likewise.
    """
    if _is_collection(metric):
        # Asking for the items makes the members of a compute group share their leader's state.
        items = cast("Any", metric).items(keep_base=True, copy_state=False)
        return {str(name): metric_state(member) for name, member in items}
    single = cast("Any", metric)
    state: dict[str, object] = {
        "update_count": single._update_count,
        "states": {name: getattr(single, name) for name in single._defaults},
    }
    extra = {name: getattr(single, name) for name in _extra_states(single)}
    if extra:
        state["extra"] = extra
    children = {name: metric_state(child) for name, child in _metrics_below(single)}
    if children:
        state["children"] = children
    return state


def set_metric_state(metric: Metric | MetricCollection, state: Mapping[str, object]) -> None:
    """Put back what `metric_state` returned.

    Raises:
        MismatchError: The metric has other states or members than those saved.
    """
    if _is_collection(metric):
        members = dict(cast("Any", metric).items(keep_base=True, copy_state=False))
        _require_same(metric, set(members), set(state))
        for name, member in members.items():
            set_metric_state(member, cast("Mapping[str, object]", state[name]))
        return
    single = cast("Any", metric)
    states = cast("Mapping[str, object]", state["states"])
    _require_same(metric, set(single._defaults), set(states))
    for name, value in states.items():
        setattr(single, name, _on_device(value, single.device))
    single._update_count = state["update_count"]
    single._computed = None
    for name, value in cast("Mapping[str, object]", state.get("extra", {})).items():
        setattr(single, name, _on_device(value, single.device))
    saved = cast("Mapping[str, Mapping[str, object]]", state.get("children", {}))
    children = dict(_metrics_below(single))
    _require_same(metric, set(children), set(saved))
    for name, child in children.items():
        set_metric_state(child, saved[name])


def grow_tracker(tracker: torch.nn.ModuleList, steps: int) -> None:
    """Let a `MetricTracker` have a metric for each step again, as `increment` makes them.

    Args:
        tracker: The tracker.
        steps: How many metrics it had when it was saved.
    """
    # Before them the list has the metric that they are copied from.
    while len(tracker) > 1 + steps:
        delattr(tracker, str(len(tracker) - 1))
    while len(tracker) < 1 + steps:
        cast("Any", tracker).increment()


def is_tracker(obj: object) -> bool:
    """Return whether an object is torchmetrics' `MetricTracker`, which is a list of metrics and none itself."""
    return _TRACKER in _class_names(obj)


def _metrics_below(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, Metric]]:
    """Yield the nearest metrics in a module, also those in its lists of modules."""
    for name, child in module.named_children():
        if is_metric(child):
            yield prefix + name, cast("Metric", child)
        else:
            yield from _metrics_below(child, f"{prefix}{name}.")


def _extra_states(metric: object) -> list[str]:
    return [name for cls in _class_names(metric) for name in _UNDECLARED_STATES.get(cls, ())]


def _on_device(value: object, device: torch.device) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if not isinstance(value, list):
        return value
    return [_on_device(item, device) for item in value]


def _require_same(metric: object, found: set[str], saved: set[str]) -> None:
    if found != saved:
        raise MismatchError(
            f"the {type(metric).__name__} has the states {sorted(found)}, the checkpoint has "
            f"{sorted(saved)}: make the metric with the same arguments as when it was saved"
        )


def is_metric(obj: object) -> bool:
    """Return whether an object is a torchmetrics metric or collection, without importing it."""
    return not {_METRIC, _COLLECTION}.isdisjoint(_class_names(obj))


def _is_collection(obj: object) -> bool:
    return _COLLECTION in _class_names(obj)


def _class_names(obj: object) -> set[str]:
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(obj).__mro__}


def save_metric(metric: Metric | MetricCollection, path: Path) -> None:
    """Save the live state of a metric."""
    save_state(_whole_metric_state(metric), path)


def _whole_metric_state(metric: Metric | MetricCollection) -> dict[str, object]:
    return {"live": metric_state(metric), "state_dict": metric.state_dict()}


def load_metric(metric: Metric | MetricCollection, path: Path, end_of_epoch: bool) -> None:
    """Load the live state of a metric."""
    del end_of_epoch
    state = cast("dict[str, Any]", load_state(path))
    if "live" not in state:  # Written by SpeechBrain, which takes a metric for a plain module.
        apply_state(metric, state, path)
        return
    apply_state(metric, state["state_dict"], path)
    set_metric_state(metric, state["live"])


def save_tracker(tracker: torch.nn.ModuleList, path: Path) -> None:
    """Save the live states of a tracker's metrics."""
    live = [metric_state(cast("Metric", metric)) for metric in tracker]
    save_state({"live": live, "state_dict": tracker.state_dict()}, path)


def load_tracker(tracker: torch.nn.ModuleList, path: Path, end_of_epoch: bool) -> None:
    """Load the live states of a tracker's metrics, of which it gets as many as were saved."""
    del end_of_epoch
    state = cast("dict[str, Any]", load_state(path))
    if "live" not in state:  # Written by SpeechBrain, which takes it for a plain module.
        apply_state(tracker, state, path)
        return
    grow_tracker(tracker, len(state["live"]) - 1)
    apply_state(tracker, state["state_dict"], path)
    for metric, live in zip(tracker, state["live"], strict=True):
        set_metric_state(cast("Metric", metric), live)


_METRIC = "torchmetrics.metric.Metric"
_COLLECTION = "torchmetrics.collections.MetricCollection"
_TRACKER = "torchmetrics.wrappers.tracker.MetricTracker"
# What these classes gather in plain attributes, not in states made by `add_state`.
_UNDECLARED_STATES = {
    "torchmetrics.wrappers.minmax.MinMaxMetric": ("min_val", "max_val"),
    "torchmetrics.wrappers.running.Running": ("_num_vals_seen",),
}


def _register_metric(registry: HookRegistry, cls: type) -> None:
    registry.save[cls] = save_metric
    registry.load[cls] = load_metric


def _register_tracker(registry: HookRegistry, cls: type) -> None:
    registry.save[cls] = save_tracker
    registry.load[cls] = load_tracker


def _register_sentencepiece(registry: HookRegistry, cls: type) -> None:
    registry.transfer[cls] = lambda obj, path: obj.load(str(path))


def _load_steps(scheduler: object, path: Path, end_of_epoch: bool) -> None:
    del end_of_epoch
    cast("Any", scheduler).n_steps = cast("dict[str, int]", load_state(path))["n_steps"]


def _register_inverse_square_root(registry: HookRegistry, cls: type) -> None:
    # The only scheduler of SpeechBrain's that has a save hook and no load hook.
    registry.load[cls] = _load_steps


def _register_builtin_hooks(registry: HookRegistry) -> None:
    for cls in (
        torch.nn.Module,
        torch.optim.Optimizer,
        torch.optim.lr_scheduler.LRScheduler,
        torch.optim.lr_scheduler.ReduceLROnPlateau,
        torch.amp.GradScaler,
    ):
        registry.save[cls] = torch_save
        registry.load[cls] = torch_recovery
    registry.transfer[torch.nn.Module] = torch_parameter_transfer
    registry.save[torch.Generator] = save_generator
    registry.load[torch.Generator] = load_generator
    registry.register_lazily(_METRIC, _register_metric)
    registry.register_lazily(_COLLECTION, _register_metric)
    registry.register_lazily(_TRACKER, _register_tracker)
    registry.register_lazily("sentencepiece.SentencePieceProcessor", _register_sentencepiece)
    registry.register_lazily(
        "speechbrain.nnet.schedulers.InverseSquareRootScheduler", _register_inverse_square_root
    )
    registry.ask_speechbrain()


_register_builtin_hooks(default_registry)


def has_state(obj: object) -> bool:
    """Return whether `torch_save` and `torch_recovery` can serve an object of no known class."""
    return all(callable(getattr(obj, name, None)) for name in ("state_dict", "load_state_dict"))


def kept_apart(module: torch.nn.Module) -> list[str]:
    """Return the attributes of a module that hold tensors and are in no `state_dict`.

    Parameters and buffers are torch's, those that are not persistent included: whoever made them so
    meant it.

    Args:
        module: The module; its submodules are not looked into.
    """
    own = vars(module).items()
    return [name for name, value in own if name not in _OF_TORCH and _holds_numbers(value)]


def note_numbers(obj: object) -> None:
    """Remember the numbers in plain attributes of a module's parts: those that stay are constants."""
    for part in obj.modules() if isinstance(obj, torch.nn.Module) else ():
        if part not in _numbers:
            own = vars(part).items()
            _numbers[part] = {name: value for name, value in own if type(value) in (int, float)}


def changed_numbers(module: torch.nn.Module) -> list[str]:
    """Return the attributes whose numbers have changed since `note_numbers`.

    None of a class that says itself what its state is, nor of torch's own.

    Args:
        module: The module; its submodules are not looked into.
    """
    cls = type(module)
    if cls.__module__.startswith("torch.") or any(
        getattr(cls, name) is not getattr(torch.nn.Module, name) for name in _SAY_STATE
    ):
        return []
    known = _numbers.get(module, {}).items()
    return [name for name, value in known if repr(vars(module).get(name, value)) != repr(value)]


_OF_TORCH = frozenset(vars(torch.nn.Module()))
_SAY_STATE = ("state_dict", "_save_to_state_dict", "get_extra_state")
_numbers: WeakKeyDictionary[torch.nn.Module, dict[str, float]] = WeakKeyDictionary()


def _holds_numbers(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(map(_holds_numbers, value))


STATE_OF: dict[Callable[..., object], Callable[[Any], object]] = {
    torch_save: _state_dict_of,
    save_generator: _generator_state,
    save_metric: _whole_metric_state,
}
"""From save hooks that do nothing but save a state to functions that return it."""
