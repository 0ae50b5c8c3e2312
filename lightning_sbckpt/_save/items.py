"""What the files of a checkpoint will hold: from recoverables and hooks to the contents of files.

A recoverable whose hook just saves a state gives that state, and the file is written by this
package, at the disk's pace and, if wanted, later. Any other hook writes its file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

import torch

from lightning_sbckpt._format.encode import encode, held, pickled_file, torch_bytes, write_torch_to
from lightning_sbckpt._format.image import Image, storages_of
from lightning_sbckpt._format.marks import mark
from lightning_sbckpt._format.names import MARKED_SUFFIX, pickled_path
from lightning_sbckpt._format.templates import Description, Templates, describe
from lightning_sbckpt._io.direct_write import Source
from lightning_sbckpt._io.storage import FileDigest, LocalStorage
from lightning_sbckpt._layout.links import Links
from lightning_sbckpt._layout.publish import PARAMFILE_EXT
from lightning_sbckpt._save.arena import Arena
from lightning_sbckpt._save.late_copy import LateCopy
from lightning_sbckpt._sharded.states import sharded_states
from lightning_sbckpt.errors import HookError, SaveError, SBCheckpointError
from lightning_sbckpt.hooks import HookRegistry
from lightning_sbckpt.hooks.builtin import (
    STATE_OF,
    changed_numbers,
    has_state,
    kept_apart,
    note_numbers,
    torch_save,
    warn_if_empty,
)
from lightning_sbckpt.typing import SaveHook


@dataclass(frozen=True)
class TakenState:
    """A state that is saved as it is: no object of the user, so no hook is looked for.

    Attributes:
        state: The state, or a function that returns it when it is saved.
        volatile: Whether it may change before the next optimizer step, as gradients do.
        authenticated: Whether its file is to be known as one of this user's own.
    """

    state: object
    volatile: bool = False
    authenticated: bool = False

    def take(self) -> object:
        """Return the state."""
        return self.state() if callable(self.state) else self.state


@dataclass(frozen=True)
class SaveItem:
    """One recoverable to save, with its hook.

    Attributes:
        name: Of the recoverable.
        kind: What it is, for messages.
        state: Gives the state to save, or None if the hook writes its file itself.
        write: The hook that writes the file it is given, or None if the state is saved.
        on_every_rank: Whether every rank runs it, not rank zero alone.
        sharded: Whether every rank has its own pieces of the state, and writes them.
        volatile: Whether the state may change before the next optimizer step.
        authenticated: Whether the file is to be known as one of this user's own.
    """

    name: str
    kind: str
    state: Callable[[], object] | None
    write: Callable[[Path], object] | None = None
    on_every_rank: bool = False
    sharded: bool = False
    volatile: bool = False
    authenticated: bool = False

    def take(self) -> object:
        """Return the state.

        Raises:
            SaveError: The object could not give it.
        """
        assert self.state is not None
        try:
            state = self.state()
        except SBCheckpointError:
            raise
        except Exception as error:
            raise self._failure(error) from error
        warn_if_empty(state, self.kind, f"{self.name}{PARAMFILE_EXT}")
        return state

    def run(self, path: Path, *, must_write: bool) -> None:
        """Let the hook write its file.

        Raises:
            SaveError: It failed, or wrote nothing although it must.
        """
        assert self.write is not None
        try:
            self.write(path)
        except SBCheckpointError:
            raise
        except Exception as error:
            raise self._failure(error) from error
        if must_write and not path.exists():
            raise SaveError(
                f"the save hook of {self.name!r} wrote nothing to the path it was given, expected "
                "a file there. Nothing of this checkpoint is kept; earlier ones are whole"
            )

    def _failure(self, error: Exception) -> SaveError:
        return SaveError(
            f"the save hook of {self.name!r} failed: {type(error).__name__}: {error}. Nothing of "
            "this checkpoint is kept; earlier ones are whole"
        )


def save_items(
    asked: Mapping[str, object],
    custom_hooks: Mapping[str, SaveHook],
    registry: HookRegistry,
) -> dict[str, SaveItem]:
    """Return what is to be saved, by name.

    Args:
        asked: Recoverables and taken states, by name.
        custom_hooks: From names to save hooks, before any by type.
        registry: The hooks by type.

    Raises:
        HookError: Recoverables have no way to be saved; all are named.
    """
    items: dict[str, SaveItem] = {}
    recoverables: dict[str, object] = {}
    for name, obj in asked.items():
        if isinstance(obj, TakenState):
            items[name] = SaveItem(
                name,
                "state",
                obj.take,
                volatile=obj.volatile,
                authenticated=obj.authenticated,
            )
        else:
            recoverables[name] = obj
    unknown: list[str] = []
    lost: list[str] = []
    sharded = sharded_states(recoverables)
    for name, obj in recoverables.items():
        hook = custom_hooks.get(name) or registry.saver(obj)
        if hook is None and has_state(obj):
            hook = torch_save
        if hook is None:
            unknown.append(f"{name!r} ({type(obj).__qualname__})")
            continue
        every_rank = name not in custom_hooks and registry.saves_on_every_rank(obj)
        state_of = STATE_OF.get(hook)
        state: Callable[[], object] | None = None if state_of is None else partial(state_of, obj)
        # Who has a hook of his own knows what to do with it.
        in_pieces = hook is torch_save and name in sharded
        if in_pieces:
            state = sharded[name]
        kind = type(obj).__name__
        write = partial(hook, obj) if state is None else None
        items[name] = SaveItem(name, kind, state, write, every_rank, sharded=in_pieces)
        beside = None if name in custom_hooks else registry.beside(obj, "save")
        if beside is not None:
            second = name + MARKED_SUFFIX
            items[second] = SaveItem(second, kind, None, partial(beside, obj), every_rank)
        elif hook is torch_save and isinstance(obj, torch.nn.Module):
            lost += _lost(name, obj, recoverables, registry)
    if lost:
        raise HookError(
            f"state would be lost: {'; '.join(lost)}. Nothing was saved. Make such a module a "
            "recoverable of its own if its class has hooks, else give it some "
            "(register_checkpoint_hooks, or custom_save_hook and custom_load_hook), or keep its "
            "tensors in buffers and its numbers in get_extra_state; one in which these are made "
            "anew each time is no recoverable"
        )
    if unknown:
        raise HookError(
            f"Don't know how to save {', '.join(unknown)}: no hook is registered for the type and "
            "it has no state_dict and load_state_dict. Register hooks with "
            "register_checkpoint_hooks, or pass custom_save_hook to add_recoverable"
        )
    return items


def _lost(
    name: str, module: torch.nn.Module, recoverables: Mapping[str, object], registry: HookRegistry
) -> Iterator[str]:
    """Yield what a module holds that its `state_dict` leaves out although it is needed."""
    # A state that is empty is nobody's choice, if there is something to save.
    is_empty = not any(True for _ in module.parameters()) and not module.state_dict()
    saved = {id(obj) for obj in recoverables.values()}
    note_numbers(module)  # Of one that was put into the dictionary of recoverables directly.
    for path, part in module.named_modules():
        attributes = [*kept_apart(part), *changed_numbers(part)]
        if (part is not module and id(part) in saved) or not attributes:
            continue
        # A part that has hooks of its own would be saved as a recoverable of its own.
        if part is not module and registry.was_given_saver(part):
            needed = not part.state_dict()
        else:
            needed = is_empty and registry.saver(part) is torch_save
        if needed:
            where = f"{name}.{path}" if path else name
            yield (
                f"{where!r} ({type(part).__name__}) keeps {', '.join(attributes)} outside of its "
                "state_dict"
            )


def may_replay(state: object) -> bool:
    """Return whether a state is that of an optimizer whose step may be replayed as a CUDA graph."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    return isinstance(groups, list) and any(group.get("capturable") for group in groups)


@dataclass(frozen=True)
class Contents:
    """What one file will hold.

    Attributes:
        size: Bytes; of a file that torch has to write, those of the tensors.
        source: The bytes, or None if only torch knows how to write them.
        state: What torch would write.
        large: The tensors with large storages; of a state that can't be described, none are known.
        holds: What is in it that only pickle can hold, a few words each.
    """

    size: int
    source: Source | None = None
    state: object = None
    large: Sequence[torch.Tensor] | None = None
    holds: Sequence[str] = ()

    @staticmethod
    def of(item: SaveItem, state: object, templates: Templates, root: Path) -> dict[str, Contents]:
        """Return what the files of a state will hold, by name: one file, rarely two.

        Args:
            item: What is saved.
            state: Its state; what only pickle can hold goes to a second file.
            templates: The forms of the files saved before.
            root: The folder of all checkpoints.

        Raises:
            SaveError: Something in the state can't even be pickled.
        """
        path = Path(f"{item.name}{PARAMFILE_EXT}")
        description = describe(state)
        encoded, pickled = (state, {}) if description else encode(state)
        if item.authenticated:
            data = mark(torch_bytes(encoded), path.name, root)
            contents = {path.name: Contents(len(data), Image(len(data), [(0, data)]))}
        else:
            contents = {path.name: Contents._of_one(path.name, encoded, description, templates)}
        if item.volatile:
            contents[path.name] = replace(contents[path.name], large=None)
        if pickled:
            beside = pickled_path(path).name
            # In memory, since what is marked must be what is written.
            data = pickled_file(pickled, beside, root)
            holds = [f"{item.name}{held(where, value)}" for where, value in pickled.items()]
            contents[beside] = Contents(len(data), Image(len(data), [(0, data)]), holds=holds)
        return contents

    @staticmethod
    def _of_one(
        filename: str, state: object, description: Description | None, templates: Templates
    ) -> Contents:
        image = templates.image(filename, state, description)
        if image is not None:
            return Contents(image.size, image, large=description.large if description else None)
        size = sum(storage.nbytes() for storage in storages_of(state))
        return Contents(size, state=state)

    @staticmethod
    def copied(
        contents: Mapping[str, Contents], arena: Arena, *, later: bool
    ) -> tuple[dict[str, Contents], LateCopy | None]:
        """Return copies that don't change any more.

        Args:
            contents: Of the files, by name.
            arena: Where to copy to.
            later: Copy large tensors in the background, as the second result.
        """
        sources = {name: one.source or _pickled(one.state) for name, one in contents.items()}
        devices = {
            device
            for source in sources.values()
            if isinstance(source, Image)
            for device in source.devices
        }
        hideable = {name for name, one in contents.items() if later and one.large}
        frozen, left = arena.take(sources, hideable, devices=devices)
        copies = {name: Contents(source.size, source) for name, source in frozen.items()}
        parts = [part for each in left for part in each.addresses()]
        if not parts and not (left and devices):
            return copies, None
        tensors = [tensor for name in hideable for tensor in contents[name].large or ()]
        unhashed = [file for file in frozen.values() if file.checksum is None and not devices]
        return copies, LateCopy(parts, tensors, unhashed, left if devices else ())

    def write(self, path: Path, storage: LocalStorage, links: Links) -> FileDigest:
        """Write the file, flushed; or make it a link to a file with these very bytes."""
        if self.source is None:
            return storage.write_stream(path, lambda stream: _by_torch(self.state, stream))
        linked = links.link_if_unchanged(path.name, self.source, path, storage)
        return linked or storage.write_source(path, self.source)


def _by_torch(state: object, stream: IO[bytes]) -> None:
    try:
        write_torch_to(state, stream)
    except RuntimeError as error:
        # Closing its archive, torch hides what the disk has said behind a position.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _pickled(state: object) -> Source:
    data = torch_bytes(state)
    return Image(len(data), [(0, data)])
