"""Parameter transfer: files collected from folders and stores, loaded into chosen objects.

Files from a hub or a web server are to be downloaded with the tools made for it, and the folder is
then the source. Where the program has loaded SpeechBrain, its `fetch` is such a tool, and is called.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

from lightning_sbckpt._layout.publish import PARAMFILE_EXT, check_name
from lightning_sbckpt._remote.places import bring_file
from lightning_sbckpt._remote.urls import local_path, normal_url
from lightning_sbckpt.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    HookError,
    SBCheckpointError,
)
from lightning_sbckpt.hooks import check_signature, default_registry, speechbrain
from lightning_sbckpt.hooks.builtin import has_state, torch_parameter_transfer, torch_recovery
from lightning_sbckpt.run_paths import resolved
from lightning_sbckpt.typing import TransferHook

__all__ = ["Pretrainer", "torch_parameter_transfer"]

logger = logging.getLogger("lightning_sbckpt")

PathLike: TypeAlias = "str | os.PathLike[str]"
Condition: TypeAlias = "bool | Callable[[], bool]"

# What is behind these has versions, redirections and tokens of its own.
_NOT_STORES = ("http", "https", "hf")
_STRATEGIES = ("SYMLINK", "COPY", "COPY_SKIP_CACHE", "NO_LINK")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class _Sources(NamedTuple):
    """Where the files are, by name: on this machine, in stores, and where SpeechBrain fetches them."""

    here: dict[str, Path]
    urls: dict[str, str]
    fetched: dict[str, tuple[object, str]]


class Pretrainer:
    """Collects parameter files and loads each into its object, before training begins.

    What loads an object is decided in this order: the custom hook of its name, the transfer hook
    of its class, the load hook of its class (told that it is not the end of an epoch), and its
    `load_state_dict`.

    Args:
        collect_in: The folder to collect the files in, as `<name>.ckpt`; None loads them from
            where they are, which files of a store can't be.
        loadables: From names to the objects to load.
        paths: From names to files, here or in a store (`s3://bucket/run/CKPT+x/model.ckpt`). A name without one is looked for as `<name>.ckpt` in the
            default source of `collect_files`.
        custom_hooks: From names to hooks `(obj, path)` that take precedence.
        conditions: From names to whether the object is to be loaded: a value, or a function
            without arguments that is asked each time.
        storage_options: How the stores of URLs are opened, as for a `Checkpointer`.

    Example:
        >>> import tempfile, torch
        >>> source = Path(tempfile.mkdtemp())
        >>> torch.save({"weight": torch.tensor([[5.0]])}, source / "model.ckpt")
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> pretrainer = Pretrainer(loadables={"model": model})
        >>> collected = pretrainer.collect_files(default_source=source)
        >>> pretrainer.load_collected()
        >>> model.weight.item()
        5.0
    """

    def __init__(
        self,
        collect_in: PathLike | None = None,
        loadables: Mapping[str, object] | None = None,
        paths: Mapping[str, PathLike] | None = None,
        custom_hooks: Mapping[str, TransferHook] | None = None,
        conditions: Mapping[str, Condition] | None = None,
        *,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self._storage_options = storage_options
        self.loadables: dict[str, object] = {}
        self.paths: dict[str, PathLike] = {}
        self.custom_hooks: dict[str, TransferHook] = {}
        self.conditions: dict[str, Condition] = {}
        self._collected: dict[str, Path] = {}
        self.set_collect_in(collect_in)
        self.add_loadables(loadables or {})
        self.add_paths(paths or {})
        self.add_custom_hooks(custom_hooks or {})
        self.add_conditions(conditions or {})

    def set_collect_in(self, path: PathLike | None) -> None:
        """Choose the folder to collect files in; None loads them from where they are.

        Example:
            >>> Pretrainer().set_collect_in("pretrained")
        """
        self.collect_in = None if path is None else Path(path)

    def add_loadables(self, loadables: Mapping[str, object]) -> None:
        """Add objects to load, by name.

        Raises:
            CheckpointNameError: A name could not be that of a file.

        Example:
            >>> Pretrainer().add_loadables({"options": {}})
        """
        for name, obj in loadables.items():
            self.loadables[check_name(name, "loadable")] = obj

    def add_paths(self, paths: Mapping[str, PathLike]) -> None:
        """Add files to load from, by name; they take precedence over the default source.

        Example:
            >>> Pretrainer().add_paths({"model": "pretrained/encoder.ckpt"})
        """
        self.paths.update(paths)

    def add_custom_hooks(self, custom_hooks: Mapping[str, TransferHook]) -> None:
        """Add hooks `(obj, path)`, by name; they take precedence over those of classes.

        Raises:
            HookSignatureError: A hook cannot be called as `hook(obj, path)`.

        Example:
            >>> Pretrainer().add_custom_hooks({"vocab": lambda obj, path: obj.update()})
        """
        for name, hook in custom_hooks.items():
            check_signature("transfer", hook, repr(name))
            self.custom_hooks[name] = hook

    def add_conditions(self, conditions: Mapping[str, Condition]) -> None:
        """Add conditions on which objects are loaded, by name.

        Example:
            >>> Pretrainer().add_conditions({"model": False, "vocab": lambda: True})
        """
        self.conditions.update(conditions)

    @staticmethod
    def split_path(path: Any) -> tuple[Any, str]:
        """Return the source and the name of the file; without a source, the current folder.

        Args:
            path: A path, a URL, or a `FetchSource` of SpeechBrain's, whose source is one again.

        Example:
            >>> Pretrainer.split_path("pretrained/encoder.ckpt")
            ('pretrained', 'encoder.ckpt')
            >>> Pretrainer.split_path("encoder.ckpt")
            ('./', 'encoder.ckpt')
        """
        if _is_fetch_source(path):
            source, filename = Pretrainer.split_path(path.path)
            return path._replace(path=source), filename
        text = os.fspath(path)
        if "/" not in text:
            return "./", text
        source, _, filename = text.rpartition("/")
        return source or "/", filename

    def is_loadable(self, name: str) -> bool:
        """Return whether the object of this name is to be loaded: its condition, if it has one.

        Example:
            >>> Pretrainer(conditions={"model": lambda: False}).is_loadable("model")
            False
        """
        condition = self.conditions.get(name, True)
        return bool(condition() if callable(condition) else condition)

    def collect_files(
        self,
        default_source: PathLike | None = None,
        local_strategy: object = None,
        fetch_config: object = None,
        *,
        use_auth_token: bool = False,
        internal_ddp_handling: bool = False,
    ) -> dict[str, Path]:
        """Find the file of every object, and bring them together if `collect_in` is set.

        A collected file is a hard link where the file system allows one, and else a copy, never a
        symbolic link, so that the folder can be moved; it is for reading, since writing into a
        hard link changes the source. A file that is in its place stays as it is; one of a store is
        brought anew at each call. Every process of a distributed run may collect into the same
        folder; from a store, let one collect and the others call `load_collected` after it.

        Args:
            default_source: The folder of the files `<name>.ckpt` for names without a path, here or
                in a store; may be a checkpoint. With SpeechBrain loaded also a repository on the hub,
                a URL of the web, or a `FetchSource`.
            local_strategy: SpeechBrain's `LocalStrategy`, or the name of one: `COPY` makes copies
                where links are possible, too, and `NO_LINK` leaves files of this machine where they
                are. `SYMLINK` makes no symbolic link, see above.
            fetch_config: SpeechBrain's `FetchConfig`, for what it fetches.
            use_auth_token: The same for SpeechBrain 1.0.
            internal_ddp_handling: Of no effect, since every process may collect; a parameter of
                SpeechBrain 1.0.

        Returns:
            From names to the files that will be loaded.

        Raises:
            ConfigurationError: An object has neither a path nor a default source, or there is no such
                strategy.
            CheckpointNotFoundError: Files are not there, or their sources can't be used; the message
                lists all that are here, or all of stores, and nothing has been collected.
            RemoteError: A store can't be asked; nothing has been collected.

        Example:
            >>> Pretrainer(loadables={"model": {}}).collect_files()
            Traceback (most recent call last):
            lightning_sbckpt.errors.ConfigurationError: No file to load 'model' from: ...
        """
        names = [name for name in self.loadables if self.is_loadable(name)]
        homeless = [repr(name) for name in names if name not in self.paths]
        if default_source is None and homeless:
            raise ConfigurationError(
                f"No file to load {', '.join(homeless)} from: neither a path nor a default_source "
                "was given. Add a path with add_paths, or call "
                "collect_files(default_source=<folder>)."
            )
        del internal_ddp_handling
        strategy = str(getattr(local_strategy, "name", local_strategy or "SYMLINK"))
        if strategy not in _STRATEGIES:
            raise ConfigurationError(
                f"local_strategy is {local_strategy!r}, expected one of {', '.join(_STRATEGIES)}"
            )
        sources = self._find_sources(names, default_source)
        found = dict(sources.here)
        if self.collect_in is not None:
            self.collect_in.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=".collecting-", dir=self.collect_in) as staged:
                brought = self._bring_urls(sources.urls, Path(staged))
                local = {} if strategy == "NO_LINK" else sources.here
                for name, source in (local | brought).items():
                    target = self.collect_in / (name + PARAMFILE_EXT)
                    _bring(
                        source, target, may_link=name in brought or not strategy.startswith("COPY")
                    )
                    found[name] = target
        options = _fetch_options(local_strategy, fetch_config, use_auth_token=use_auth_token)
        for name, (place, filename) in sources.fetched.items():
            found[name] = _fetch(filename, place, self.collect_in, name, options)
        collected = {name: found[name] for name in names}
        self._collected.update(collected)
        return collected

    def _find_sources(self, names: Sequence[str], default_source: object) -> _Sources:
        sources = _Sources({}, {}, {})
        problems: list[str] = []
        for name in names:
            folder: Any = default_source
            filename = name + PARAMFILE_EXT
            if name in self.paths:
                folder, filename = self.split_path(self.paths[name])
            if _is_fetch_source(folder) and folder.FetchFrom.name == "LOCAL":
                folder = folder.path
            if _is_for_speechbrain(folder):
                sources.fetched[name] = folder, filename
                continue
            folder = os.fspath(resolved(folder))
            here: Path | None = local_path(folder)
            if here is None:
                sources.urls[name] = f"{folder}/{filename}"
                problem = _unusable_url(folder, self.collect_in)
            else:
                sources.here[name] = here / filename
                problem = _unusable(str(here), sources.here[name])
            if problem is not None:
                problems.append(f"{name!r}: {problem}")
        _raise_all(problems)
        return sources

    def _bring_urls(self, urls: Mapping[str, str], folder: Path) -> dict[str, Path]:
        brought: dict[str, Path] = {}
        problems: list[str] = []
        for name, url in urls.items():
            brought[name] = folder / (name + PARAMFILE_EXT)
            try:
                bring_file(url, brought[name], self._storage_options)
            except CheckpointNotFoundError:
                problems.append(f"{name!r}: there is no file {normal_url(url)}")
        _raise_all(problems)
        return brought

    def load_collected(self) -> None:
        """Load every object from its collected file.

        Raises:
            ConfigurationError: Files have not been collected.
            CheckpointNotFoundError: Collected files are not there any more, or not yet.
            HookError: An object has no hook, or its hook failed.

        Example:
            >>> Pretrainer(loadables={"model": {}}).load_collected()
            Traceback (most recent call last):
            lightning_sbckpt.errors.ConfigurationError: Cannot load 'model': ...
        """
        names = [name for name in self.loadables if self.is_loadable(name)]
        # All files and hooks are found before any object is changed.
        files = {name: self._collected.get(name) or self._expected(name) for name in names}
        never = [repr(name) for name, file in files.items() if file is None]
        if never:
            raise ConfigurationError(
                f"Cannot load {', '.join(never)}: their files have not been collected. Call "
                "collect_files first."
            )
        found = {name: file for name, file in files.items() if file is not None}
        missing = [f"{name!r}: {file}" for name, file in found.items() if not file.is_file()]
        if missing:
            raise CheckpointNotFoundError(
                "Cannot load what is not there:\n  "
                + "\n  ".join(missing)
                + "\nCall collect_files first."
            )
        hooks = {name: self._hook(name, self.loadables[name]) for name in names}
        for name, file in found.items():
            try:
                hooks[name](self.loadables[name], file)
            except SBCheckpointError:
                raise
            except Exception as error:
                raise HookError(
                    f"Cannot load {name!r}, a {type(self.loadables[name]).__name__}, from {file}: "
                    f"its hook raised {type(error).__name__}: {error}"
                ) from error
            logger.info("loaded %s from %s", name, file)

    def _expected(self, name: str) -> Path | None:
        # Another process, or an earlier run, may have collected into the same folder.
        return None if self.collect_in is None else self.collect_in / (name + PARAMFILE_EXT)

    def _hook(self, name: str, obj: object) -> TransferHook:
        if name in self.custom_hooks:
            return self.custom_hooks[name]
        transfer = default_registry.transferrer(obj)
        if transfer is not None:
            return transfer
        load = default_registry.loader(obj) or (torch_recovery if has_state(obj) else None)
        if load is None:
            raise HookError(
                f"Cannot load {name!r}: no hook is known for a {type(obj).__name__}, and it has no "
                "load_state_dict. Give one in custom_hooks, or mark a method of the class with "
                "mark_as_transfer and decorate the class with register_checkpoint_hooks."
            )
        loader = load
        return lambda obj, path: loader(obj, path, False)


def _is_fetch_source(source: object) -> bool:
    return isinstance(source, tuple) and hasattr(source, "FetchFrom")


def _is_for_speechbrain(source: Any) -> bool:
    """Return whether SpeechBrain's `fetch` is there, and knows this source while we don't."""
    if speechbrain.loaded("fetching") is None:
        return False
    if _is_fetch_source(source):
        return True
    folder = os.fspath(source)
    if folder.startswith(("http:", "https:")):
        return True
    return _REPOSITORY.fullmatch(folder) is not None and not Path(folder).exists()


def _fetch_options(
    local_strategy: object, fetch_config: object, *, use_auth_token: bool
) -> dict[str, object]:
    """Return what SpeechBrain's `fetch` is called with beyond the places; 1.0 knows no config."""
    fetching: Any = speechbrain.loaded("fetching")
    options: dict[str, object] = {}
    strategies = getattr(fetching, "LocalStrategy", None)
    if strategies is not None:
        # A copy, unless somebody wants something else: the folder may be moved.
        name = getattr(local_strategy, "name", local_strategy) or "COPY"
        options["local_strategy"] = strategies[str(name)]
    if fetch_config is not None:
        options["fetch_config"] = fetch_config
    elif use_auth_token and hasattr(fetching, "FetchConfig"):
        options["fetch_config"] = fetching.FetchConfig(token=True)
    elif use_auth_token:
        options["use_auth_token"] = True
    return options


def _fetch(
    filename: str, source: object, folder: Path | None, name: str, options: Mapping[str, object]
) -> Path:
    fetching: Any = speechbrain.loaded("fetching")
    try:
        found = fetching.fetch(
            filename=filename,
            source=source,
            savedir=folder,
            save_filename=name + PARAMFILE_EXT,
            **options,
        )
    except Exception as error:
        raise CheckpointNotFoundError(
            f"Cannot collect {name!r}: SpeechBrain could not fetch {filename} from {source}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Path(found)


def _raise_all(problems: list[str]) -> None:
    if problems:
        raise CheckpointNotFoundError(
            "Cannot collect the files to load:\n  " + "\n  ".join(problems)
        )


def _unusable_url(folder: str, collect_in: Path | None) -> str | None:
    """Return why a file can't be collected from a URL, or None."""
    if normal_url(folder).partition("://")[0] in _NOT_STORES:
        return (
            f"{folder} is a URL of the web or of a hub, expected a folder or a store, such as "
            "s3://. Download the file first and give the folder it is in"
        )
    if collect_in is None:
        return (
            f"{folder} is in a store, and there is no folder here to bring the file to: give "
            "collect_in"
        )
    return None


def _unusable(folder: str, file: Path) -> str | None:
    """Return why a file can't be collected from a folder, or None."""
    if file.is_file():
        return None
    if Path(folder).is_dir():
        return f"there is no file {file}"
    hint = ""
    if _REPOSITORY.fullmatch(folder) and not folder.startswith("."):
        hint = ". If that is the name of a repository on a hub, download it first"
    return f"there is no folder {folder}{hint}"


def _bring(source: Path, target: Path, *, may_link: bool) -> None:
    is_there = target.exists() and not target.is_symlink() and target.samefile(source)
    if is_there and (may_link or target.absolute() == source.absolute()):
        return
    # Through a name of its own: another process must never see a half-copied file. A link to the
    # file itself, since a link to a symbolic link would be one, too.
    source = source.resolve()
    part = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        if not (may_link and _linked(source, part)):
            shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _linked(source: Path, part: Path) -> bool:
    try:
        os.link(source, part)
    except OSError:
        return False
    return True
