"""Which experiment a fit is: what it is made of, and how that differs from a checkpoint's.

A description is plain data, `experiment.yaml` in a checkpoint: the classes of module and datamodule,
hyperparameters, optimizers and schedulers with their arguments, the names and shapes of parameters as
a digest, and the data. It is taken when a fit begins, before anything is restored, so that two starts
of one experiment give the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lightning_sbckpt._format.yaml import parse_yaml
from lightning_sbckpt._io.open_regular import NotRegularError, read_regular
from lightning_sbckpt.errors import MetaError
from lightning_sbckpt.meta import dump_meta
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.packages import LightningModule, Trainer
from lightning_sbckpt.plugin.rendering import (
    class_path,
    content_digest,
    digest_of,
    rendered,
    shown,
)

EXPERIMENT_YAML = "experiment.yaml"

MODULE, DATAMODULE, HPARAMS, PARAMETERS = "module", "datamodule", "hyperparameters", "parameters"
BASES, DATA_BASES = "module-bases", "datamodule-bases"
DATA_HPARAMS = "datamodule-hyperparameters"
OPTIMIZERS, SCHEDULERS, DATA, CONTENT = "optimizers", "lr_schedulers", "data", "data-content"

_COMPILED = "_orig_mod."
_NO_BASES = ("lightning.", "pytorch_lightning.", "torch.", "object", "abc.", "typing.")
_MOST_BYTES = 1 << 20
# What a scheduler counts, or has from the optimizer.
_STATE_OF_SCHEDULERS = ("last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter")

Description = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One difference between a checkpoint's experiment and the one that is started.

    Attributes:
        section: The part of the description.
        name: What differs.
        saved: Its value in the checkpoint.
        asked: Its value now.
        in_force: What training goes on with.
        advice: What takes the value that was asked for, if another is in force.
    """

    section: str
    name: str
    saved: object
    asked: object
    in_force: object
    advice: str = ""

    @property
    def difference(self) -> str:
        """What differs, in words."""
        if self.section == CONTENT:
            return f"{self.name}: not that of the checkpoint (the samples differ)"
        return f"{self.name}: {shown(self.saved)} in the checkpoint, {shown(self.asked)} asked for"

    def __str__(self) -> str:
        """Return it in one line, with both values and what is in force."""
        line = self.difference
        if self.section != CONTENT:
            line += f"; training goes on with {shown(self.in_force)}"
        return f"{line}; {self.advice}" if self.advice and self.in_force != self.asked else line


# ---------------------------------------------------------------------- what a fit is made of


def describe_fit(trainer: Trainer) -> dict[str, Any]:
    """Return what is known of an experiment before anything is restored.

    Args:
        trainer: About to fit; its module and its datamodule are set up.
    """
    module, datamodule = trainer.lightning_module, _private.trainer.datamodule_of(trainer)
    shapes = {
        name.replace(_COMPILED, ""): _shape(tensor)
        for named in (module.named_parameters(), module.named_buffers())
        for name, tensor in named
    }
    found: dict[str, Any] = {
        MODULE: class_path(_class_of(module)),
        BASES: _bases_of(module),
        HPARAMS: _hyperparameters(module),
        PARAMETERS: {"tensors": len(shapes), "digest": digest_of(sorted(shapes.items()))},
    }
    if datamodule is not None:
        found[DATAMODULE] = class_path(type(datamodule))
        found[DATA_BASES] = _bases_of(datamodule)
        found[DATA_HPARAMS] = _hyperparameters(datamodule) or _plain_attributes(datamodule)
    given = _private.trainer.given_loaders(trainer)
    if given:
        found[DATA] = {name: describe_loaders(loaders) for name, loaders in given.items()}
        found[CONTENT] = {name: _content_of(loaders) for name, loaders in given.items()}
    return found


def describe_optimizers(trainer: Trainer) -> dict[str, Any]:
    """Return the classes and arguments of optimizers and schedulers, as they are at this moment."""
    return {
        OPTIMIZERS: [
            {
                "class": class_path(type(optimizer)),
                "groups": [_arguments_of_group(group) for group in optimizer.param_groups],
            }
            for optimizer in trainer.optimizers
        ],
        SCHEDULERS: [
            {
                "class": class_path(type(config.scheduler)),
                **_arguments_of_scheduler(config.scheduler),
                "interval": config.interval,
                "frequency": config.frequency,
                "monitor": config.monitor,
            }
            for config in trainer.lr_scheduler_configs
        ],
    }


def describe_loaders(loaders: object) -> list[dict[str, Any]]:
    """Return the class, size and batch size of the data of each loader."""
    return [_describe_loader(loader) for loader in flat_loaders(loaders)]


def flat_loaders(loaders: object) -> list[Any]:
    """Return the loaders in a collection of them, in order."""
    if loaders is None:
        return []
    flattened = getattr(loaders, "flattened", None)
    if isinstance(flattened, list):
        return list(flattened)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [loader for each in loaders for loader in flat_loaders(each)]
    return [loaders]


def datasets_of(trainer: Trainer) -> list[object]:
    """Return the datasets of the loaders that were given to `fit`."""
    given = _private.trainer.given_loaders(trainer).values()
    return [getattr(one, "dataset", one) for loaders in given for one in flat_loaders(loaders)]


def _class_of(module: object) -> type:
    """Return the class that the user wrote, where torch has derived another from it at run time.

    `fully_shard` and parametrizations put a class of theirs in its place.
    """
    kind = type(module)
    if not kind.__module__.startswith("torch."):
        return kind
    written = (base for base in kind.__mro__ if not base.__module__.startswith("torch."))
    return next((base for base in written if issubclass(base, LightningModule)), kind)


def _bases_of(owner: object) -> list[str]:
    """Return the classes of the user's that a module or datamodule derives from."""
    bases = [class_path(base) for base in type(owner).__mro__[1:]]
    return [name for name in bases if not name.startswith(_NO_BASES)]


def _describe_loader(loader: Any) -> dict[str, Any]:
    dataset = getattr(loader, "dataset", None)
    found = {
        "class": class_path(type(loader if dataset is None else dataset)),
        "size": _length(dataset),
        "batch_size": getattr(loader, "batch_size", None),
    }
    return {key: value for key, value in found.items() if isinstance(value, (int, str))}


def _content_of(loaders: object) -> list[str]:
    return [
        digest_of(
            [
                content_digest(getattr(loader, "dataset", loader)),
                content_digest(_indices_of(getattr(loader, "sampler", None))),
            ]
        )
        for loader in flat_loaders(loaders)
    ]


def _indices_of(sampler: Any) -> object:
    """Return what a sampler holds, without the dataset, which may be anywhere in it."""
    return {
        name: value
        for name, value in getattr(sampler, "__dict__", {}).items()
        if name in ("indices", "weights") or (name == "data_source" and isinstance(value, list))
    }


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except Exception:
        # A stream has none, and one of the user's may not know it yet.
        return None


def _shape(tensor: Any) -> object:
    try:
        return tuple(tensor.shape)
    except RuntimeError:
        return "uninitialized"


def hyperparameters_of(owner: object) -> dict[str, Any]:
    """Return the hyperparameters of a module or datamodule, by name."""
    hparams = cast("Mapping[str, object]", getattr(owner, "hparams", None) or {})
    return {str(name): value for name, value in dict(hparams).items()}


def _hyperparameters(owner: object) -> dict[str, Any]:
    return {name: rendered(value) for name, value in hyperparameters_of(owner).items()}


def _plain_attributes(owner: object) -> dict[str, Any]:
    """Return what tells one datamodule without hyperparameters from another: the fold, say."""
    return {
        name: value
        for name, value in vars(owner).items()
        if not name.startswith("_")
        and (isinstance(value, int) or (isinstance(value, str) and "/" not in value))
        and name
        not in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices")
    }


def _arguments_of_group(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {str(key): rendered(value) for key, value in group.items() if key != "params"}
    found.pop("param_names", None)
    if "initial_lr" in found:
        # A scheduler has changed the other already.
        found["lr"] = found.pop("initial_lr")
    return found


def _arguments_of_scheduler(scheduler: Any) -> dict[str, Any]:
    return {
        name: _argument_of_scheduler(value)
        for name, value in getattr(scheduler, "__dict__", {}).items()
        if not name.startswith("_")
        and name not in _STATE_OF_SCHEDULERS
        and not hasattr(value, "param_groups")
        and not callable(value)
    }


def _argument_of_scheduler(value: Any) -> object:
    """Return an argument in plain values; of a scheduler within a scheduler, its arguments only."""
    if isinstance(value, (list, tuple)) and any(hasattr(each, "optimizer") for each in value):
        return [_argument_of_scheduler(each) for each in value]
    if hasattr(value, "optimizer"):
        return {"class": class_path(type(value)), **_arguments_of_scheduler(value)}
    return rendered(value)


# ---------------------------------------------------------------------- on disk


def text_of(description: Description) -> str:
    """Return a description as YAML, with a digest of each of its parts."""
    digests = {name: digest_of(value) for name, value in description.items()}
    return dump_meta({**description, "digests": digests}).decode()


def read_description(folder: Path) -> dict[str, Any] | None:
    """Return the description in a checkpoint, or None if it has none that can be read."""
    try:
        return parse_yaml(read_regular(folder / EXPERIMENT_YAML, _MOST_BYTES), folder)
    except (OSError, NotRegularError, MetaError):
        return None


# ---------------------------------------------------------------------- what differs


def compare(saved: Description, own: Description, sections: Iterable[str]) -> list[Change]:
    """Return how two descriptions differ in some of their sections; those only one has are left out."""
    own = parse_yaml(text_of(own).encode(), Path(EXPERIMENT_YAML))
    changes = []
    for section in sections:
        if section not in saved or section not in own:
            continue
        one, other = cast("Any", saved[section]), cast("Any", own[section])
        if section in (DATA, CONTENT):
            # One of them may not know the loaders of validation yet.
            one, other = _of_stages(one, other), _of_stages(other, one)
        before, now = (dict(_flat(section, each)) for each in (one, other))
        for name in [*before, *(name for name in now if name not in before)]:
            was, is_now = before.get(name, "nothing"), now.get(name, "nothing")
            if repr(was) != repr(is_now) and not _is_same_class(section, was, is_now):
                changes.append(Change(section, name, was, is_now, is_now))
    return _without_digests(changes)


def _of_stages(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {stage: value for stage, value in one.items() if stage in other}


def _flat(section: str, value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield each value in a section with the name that people know it by."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(section, each, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and section in (OPTIMIZERS, SCHEDULERS, DATA, CONTENT):
        singular = len(value) == 1
        for index, each in enumerate(value):
            yield from _flat(section, each, prefix if singular else f"{prefix}[{index}]")
        if not value:
            yield prefix or section, "none"
    else:
        yield _name(section, prefix), value


def _name(section: str, path: str) -> str:
    path = path.replace("groups", "group").replace("group.", "")
    if section == HPARAMS:
        return path
    heads = {
        OPTIMIZERS: "optimizer ",
        SCHEDULERS: "lr_scheduler ",
        DATA: "data of ",
        CONTENT: "data of ",
        DATA_HPARAMS: "datamodule ",
        PARAMETERS: "parameters: ",
    }
    return f"{heads[section]}{path}" if section in heads else section


def _without_digests(changes: list[Change]) -> list[Change]:
    """Say that parameters differ by one line, by their number if that differs."""
    numbers = any(c.section == PARAMETERS and c.name.endswith("tensors") for c in changes)
    return [
        replace(change, name="parameters: names and shapes (as a digest)")
        if change.section == PARAMETERS and change.name.endswith("digest")
        else change
        for change in changes
        if not (numbers and change.section == PARAMETERS and change.name.endswith("digest"))
    ]


def _is_same_class(section: str, saved: object, own: object) -> bool:
    """Return whether two paths are of one class: a script's may be imported, or run by itself."""
    if section not in (MODULE, DATAMODULE):
        return False
    (one, name), (other, own_name) = (str(path).rpartition(".")[::2] for path in (saved, own))
    homes = {one.rpartition(".")[2], other.rpartition(".")[2]}
    return name == own_name and (len(homes) == 1 or "__main__" in homes)


def is_related(section: str, saved: Description, own: Description) -> bool:
    """Return whether one of the classes of two descriptions derives from the other.

    Args:
        section: `MODULE` or `DATAMODULE`.
        saved: One description.
        own: The other.
    """
    bases = BASES if section == MODULE else DATA_BASES
    return saved.get(section) in own.get(bases, ()) or own.get(section) in saved.get(bases, ())


def settle_in_force(changes: Sequence[Change], live: Description, keep_lr: bool) -> list[Change]:
    """Return changes with what is really in force, now that optimizers are restored.

    A hyperparameter whose both values are those of an optimizer's or scheduler's argument is that
    argument, so it is told once.

    Args:
        changes: What differs.
        live: What `describe_optimizers` returns now.
        keep_lr: Whether the user asked for learning rates of this run.
    """
    now = {
        section: dict(_flat(section, live[section]))
        for section in (OPTIMIZERS, SCHEDULERS)
        if section in live
    }
    found = [
        replace(
            change,
            in_force=now[change.section].get(change.name, change.asked),
            advice=_advice(change, keep_lr),
        )
        if change.section in now
        else change
        for change in changes
    ]
    arguments = [change for change in found if change.section in now]
    hparams = [change for change in found if change.section == HPARAMS]
    settled: list[Change] = []
    for change in found:
        twins = [c for c in arguments if _same_values(c, change)]
        if change.section == HPARAMS and twins:
            settled.append(replace(change, in_force=twins[0].in_force, advice=twins[0].advice))
        elif change.section not in now or not any(_same_values(c, change) for c in hparams):
            settled.append(change)
    return settled


def _same_values(one: Change, other: Change) -> bool:
    return (one.saved, one.asked) == (other.saved, other.asked)


def _advice(change: Change, keep_lr: bool) -> str:
    # The rates are the scheduler's, so its arguments go with them.
    of_rates = change.section == SCHEDULERS or "lr" in change.name
    if of_rates and not keep_lr:
        return "keep_lr=True takes yours"
    part = "optimizer" if change.section == OPTIMIZERS else "lr_scheduler"
    return f"skip=[{part!r}] takes yours, with a new state"
