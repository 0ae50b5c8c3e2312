"""What hyperparameters from a folder may have Lightning import and call.

`load_from_checkpoint` calls what `_instantiator` names, and Lightning before 2.6.6 imported whatever
stood there (GHSA-qqmf-gpg7-g8gw). Lightning's own instantiator, which `LightningCLI` asks for, imports
and calls in turn what the hyperparameters name. `hparams_type` is called as well.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, cast

from lightning_sbckpt.errors import MismatchError, UntrustedPickleError
from lightning_sbckpt.plugin.packages import LightningDataModule, LightningModule

_ALLOWED_INSTANTIATORS = frozenset(
    {"lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module"}
)
_OWNERS = (LightningModule, LightningDataModule)
# Lightning still reads the first two, which its first releases wrote.
_KEYS = ("hparams", "module_arguments", "hyper_parameters", "datamodule_hyper_parameters")
_TYPE_KEYS = ("hparams_type", "datamodule_hparams_type")
HPARAMS_KEYS = (*_KEYS[2:], *_TYPE_KEYS, "hparams_name", "datamodule_hparams_name")
"""What hyperparameters are under in Lightning's dictionary, its `CHECKPOINT_HYPER_PARAMS_*`."""
_DOTTED_NAME = re.compile(r"([^\W\d]\w*)(?:\.[^\W\d]\w*)+")


class LoadedFolder(dict[str, Any]):
    """Lightning's dictionary, read from a folder by `load_from_checkpoint`.

    Args:
        dump: The dictionary.
        trusted_keys: Those whose values are trusted.
    """

    def __init__(self, dump: Mapping[str, Any], trusted_keys: Collection[str]) -> None:
        super().__init__(dump)
        self.trusted_keys = frozenset(trusted_keys)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled as an ordinary dictionary, by hooks that keep what they were given."""
        return dict, (dict(self),)


def check_loaded(cls: type, dump: object, given: Collection[str]) -> None:
    """Check the hyperparameters that `load_from_checkpoint` is about to use, if from a folder.

    Args:
        cls: The class that is loaded.
        dump: Lightning's dictionary.
        given: Names of hyperparameters that the caller passed; these are not the folder's.

    Raises:
        UntrustedPickleError: They would have code run that the folder names.
        MismatchError: They are no hyperparameters.
    """
    if isinstance(dump, LoadedFolder):
        refuse_calls(dump, trusted_keys=dump.trusted_keys, given=given, classes=(cls,))


def refuse_calls(
    dump: Mapping[str, Any],
    *,
    trusted_keys: Collection[str] = (),
    given: Collection[str] = (),
    classes: tuple[type, ...] = _OWNERS,
) -> None:
    """Refuse hyperparameters with which Lightning would import or call what a folder names.

    Args:
        dump: Lightning's dictionary, read from a folder.
        trusted_keys: The keys whose values are trusted. Other instantiators than Lightning's own are
            refused even so, as Lightning does since 2.6.6.
        given: Names of hyperparameters that come from elsewhere.
        classes: What may be made: these and their subclasses.

    Raises:
        UntrustedPickleError: There is something to import or to call.
        MismatchError: They are no hyperparameters.

    Example:
        >>> refuse_calls({"hyper_parameters": {"lr": 0.1}})
        >>> refuse_calls({"hyper_parameters": {"_instantiator": "os.system"}})
        Traceback (most recent call last):
        lightning_sbckpt.errors.UntrustedPickleError: the hyperparameters ...
    """
    present = [key for key in _KEYS if dump.get(key) is not None]
    # Lightning puts them all together.
    trusted = all(key in trusted_keys for key in present)
    for key in present:
        found = dump[key]
        if not isinstance(found, Mapping):
            raise MismatchError(
                f"{key!r} of the checkpoint is a {type(found).__qualname__}, expected a mapping of "
                "hyperparameters by name; nothing was made of it"
            )
        plain = _plain(found)
        if "_instantiator" in plain:
            instantiator = plain["_instantiator"]
            if not isinstance(instantiator, str) or instantiator not in _ALLOWED_INSTANTIATORS:
                raise UntrustedPickleError(
                    f"the hyperparameters of the checkpoint ask for the instantiator "
                    f"{_short(instantiator)}, which would be imported and called; only Lightning's "
                    "own is. Make the module yourself and give it the file of its weights"
                )
            if not trusted:
                _refuse_names(plain, given, classes)
    for key in _TYPE_KEYS:
        kind = dump.get(key)
        # Lightning takes any text for its own AttributeDict.
        if not (
            kind is None or isinstance(kind, str) or key in trusted_keys or _is_omegaconf(kind)
        ):
            raise UntrustedPickleError(
                f"{key!r} of the checkpoint is {_short(kind)}, which would be called, expected a "
                f"class of OmegaConf. {_HOW_TO_TRUST}"
            )


def names_calls(hyperparameters: Mapping[str, Any]) -> bool:
    """Return whether Lightning would import or call what hyperparameters of a live run name.

    Args:
        hyperparameters: The part of Lightning's dictionary that holds them.
    """
    found = [hyperparameters.get(key) for key in _KEYS]
    return any(isinstance(each, Mapping) and "_instantiator" in each for each in found)


_HOW_TO_TRUST = (
    "If you trust whoever wrote the checkpoint, load it inside "
    "`with lightning_sbckpt.trusting_pickle():`"
)


def _refuse_names(
    plain: Mapping[Any, Any], given: Collection[str], classes: tuple[type, ...]
) -> None:
    class_path = plain.get("_class_path")
    if class_path is not None and not _is_imported_subclass(class_path, classes):
        raise UntrustedPickleError(
            f"the hyperparameters of the checkpoint ask for the class {_short(class_path)}, which is "
            f"not imported or not a {' or '.join(cls.__name__ for cls in classes)}. Import its module "
            f"first. {_HOW_TO_TRUST}"
        )
    ours = {
        key: value
        for key, value in plain.items()
        if key not in given and key not in ("_instantiator", "_class_path")
    }
    name = next(_importable(ours), None)
    if name is not None:
        raise UntrustedPickleError(
            f"the hyperparameters of the checkpoint, which LightningCLI wrote, name {_short(name)}, "
            f"which would be imported and may be called. {_HOW_TO_TRUST}"
        )


def _is_imported_subclass(class_path: object, classes: tuple[type, ...]) -> bool:
    if not isinstance(class_path, str):
        return False
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and issubclass(found, classes)


def _importable(value: object) -> Iterator[object]:
    """Yield what `instantiate_module` could take for a name to import, wherever it stands."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            name = _DOTTED_NAME.fullmatch(one)
            if name is not None and _exists(name.group(1)):
                yield one
        elif isinstance(one, (Mapping, list, tuple, set, frozenset)) and id(one) not in seen:
            seen.add(id(one))
            if isinstance(one, Mapping):
                if "class_path" in one:
                    yield one["class_path"]
                waiting += [*one.keys(), *one.values()]
            else:
                waiting += one


def _exists(package: str) -> bool:
    """Return whether a package could be imported; nothing is."""
    try:
        return package in sys.modules or find_spec(package) is not None
    except (ImportError, ValueError):
        return True


def _is_omegaconf(kind: object) -> bool:
    return isinstance(kind, type) and kind.__module__.partition(".")[0] == "omegaconf"


def _plain(found: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return hyperparameters without interpolation: to look must not resolve anything."""
    if not _is_omegaconf(type(found)):
        return found
    from omegaconf import OmegaConf

    return cast("Mapping[Any, Any]", OmegaConf.to_container(cast("Any", found), resolve=False))


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, (str, type)) else f"a {type(value).__qualname__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
