"""The record of one checkpoint, and its meta as plain YAML.

Meta is what a person reads and what checkpoints are ranked by: `unixtime`, `end-of-epoch`, then
whatever keys were given at save. It is written as YAML 1.1 that any safe loader reads.

The file format is that of `CKPT.yaml` in SpeechBrain's `speechbrain.utils.checkpoints`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lightning_sbckpt._format.omega import name_of, plain
from lightning_sbckpt._format.yaml import MAX_META_BYTES, TENSOR_MARK, dump_yaml, parse_yaml
from lightning_sbckpt._io.lazy import is_tensor, torch
from lightning_sbckpt._io.open_regular import NotRegularError, read_regular
from lightning_sbckpt.errors import MetaError, MismatchError

__all__ = ["Checkpoint", "ckpt_recency", "dump_meta", "parse_yaml", "plain_meta", "read_meta"]

META_NAME = "CKPT.yaml"
AVERAGED_FROM = "averaged-from"
"""The key, in meta and lineage, of the names of the checkpoints that an average was made from."""
_HEADER = "# yamllint disable\n"
_MAX_DEPTH = 100

END_OF_TIME = 253_402_300_800.0
"""The year 10000, in seconds since the epoch: beyond it there are no dates."""


class Checkpoint(NamedTuple):
    """One saved checkpoint: where it is, what is known about it, and its files.

    Attributes:
        path: The folder of the checkpoint.
        meta: `unixtime` (seconds since the epoch), `end-of-epoch`, and the keys given at save.
        paramfiles: From the name of each recoverable to its file.

    Example:
        >>> ckpt = Checkpoint(Path("run/CKPT+a"), {"unixtime": 1.0, "loss": 0.5}, {})
        >>> ckpt.meta["loss"]
        0.5
        >>> len({ckpt, ckpt})
        1
    """

    path: Path
    meta: dict[str, object]
    paramfiles: dict[str, Path]

    def __hash__(self) -> int:
        """Hash by path, so that checkpoints go into sets although meta is a dictionary."""
        return hash(self.path)

    def open(self, name: str) -> object:
        """Return the saved state of one recoverable, for looking at a few tensors of a large file.

        A tensor's bytes are read when it is looked at, and not before. What is written to it stays
        in memory. Nothing is verified, and while the tensors are in use the file may be removed, but
        not be cut off or written over: copy what is to last.

        Args:
            name: The name of the recoverable.

        Returns:
            What its `state_dict()` returned, its tensors on the CPU.

        Raises:
            MismatchError: The checkpoint has no file of that name.
            UntrustedPickleError: Nothing but pickle can read the file.
            DamagedCheckpointError: The file can't be read at all.

        Example:
            >>> import tempfile
            >>> from lightning_sbckpt import Checkpointer
            >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"model": torch.nn.Linear(2, 1)})
            >>> checkpointer.save_checkpoint().open("model")["weight"].shape
            torch.Size([1, 2])
        """
        # Imported here: to list and to rank checkpoints nothing reads tensors.
        from lightning_sbckpt._format.load import open_state

        if name not in self.paramfiles:
            found = ", ".join(map(repr, self.paramfiles)) or "none"
            raise MismatchError(
                f"{self.path} has no file for the recoverable {name!r}; it has: {found}"
            )
        return open_state(self.paramfiles[name])

    def _repr_html_(self) -> str:
        # Imported here: it is needed in notebooks alone.
        from lightning_sbckpt._display import cards

        return cards.shown("Checkpoint", self.path, lambda: cards.checkpoint_card(self, parse_yaml))


def ckpt_recency(ckpt: Checkpoint) -> float:
    """Return how recent a checkpoint is, the default importance of a checkpoint.

    Example:
        >>> ckpt_recency(Checkpoint(Path("CKPT+a"), {"unixtime": 12.0}, {}))
        12.0
    """
    return usable_time(ckpt.meta.get("unixtime"))


def usable_time(unixtime: object) -> float:
    """Return the `unixtime` of a checkpoint as a number that sorts.

    Example:
        >>> usable_time(12), usable_time("soon")
        (12.0, -inf)
    """
    # A checkpoint from elsewhere may carry no time or one that is not a number: it is then the
    # oldest, so that it is never taken for the newest and never breaks a sort. So does one in
    # milliseconds: every later checkpoint would count as older, and be removed.
    if isinstance(unixtime, bool) or not isinstance(unixtime, (int, float)):
        return -math.inf
    return float(unixtime) if -END_OF_TIME < unixtime < END_OF_TIME else -math.inf


def plain_meta(meta: Mapping[str, object]) -> dict[str, object]:
    """Return `meta` with every number a plain number, so that YAML can hold it.

    One-element tensors, numpy scalars and computed torchmetrics become `int`, `float` or `bool`;
    larger numpy arrays become tensors on the CPU, and OmegaConf's containers plain ones.

    Args:
        meta: The keys and values to write.

    Returns:
        A new dictionary; the values given are not changed.

    Raises:
        MetaError: A key is not a string, or a value is of a kind that YAML can't hold; the message
            lists every such key.

    Example:
        >>> plain_meta({"loss": torch.tensor(0.5), "fold": 3})
        {'loss': 0.5, 'fold': 3}
        >>> plain_meta({"model": object()})
        Traceback (most recent call last):
        lightning_sbckpt.errors.MetaError: meta can't be written as plain YAML: 'model' ...
    """
    problems: list[str] = []
    meta = plain(meta) if name_of(type(meta)) else meta
    found = {key: _plain(value, repr(key), problems) for key, value in meta.items()}
    keys: list[object] = list(meta)
    for key in keys:
        if isinstance(key, str):
            _plain(key, f"the key {key!r}", problems)
        else:
            problems.append(f"{key!r} is a {type(key).__name__}")
    if problems:
        raise MetaError(
            f"meta can't be written as plain YAML: {'; '.join(problems)}. Keys are strings; values "
            "are numbers, strings, None, tensors, and lists and dictionaries of these. Make larger "
            "objects recoverables instead."
        )
    return found


def _plain(value: object, where: str, problems: list[str], depth: int = 0) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            problems.append(f"{where} has a character that is not Unicode: {ascii(value)[:100]}")
        # str subclasses (numpy.str_, str enums) would get a Python tag.
        return str.__str__(value)
    if depth > _MAX_DEPTH:
        problems.append(f"{where[:100]}... is nested more than {_MAX_DEPTH} deep or holds itself")
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if is_tensor(value):
        tensor = value.detach().cpu()
        return tensor.item() if tensor.numel() == 1 and not tensor.is_complex() else tensor.clone()
    if name_of(type(value)) is not None:
        value = plain(value)
    if isinstance(value, Mapping):
        if TENSOR_MARK in value:
            problems.append(f"{where} has the key {TENSOR_MARK!r}, which marks a tensor")
        return {
            _plain(key, f"a key in {where}", problems): _plain(
                item, f"{where}[{key!r}]", problems, depth + 1
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
        return [_plain(item, f"{where}[{i}]", problems, depth + 1) for i, item in items]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        listed = value.tolist()
        if not isinstance(listed, list):
            return _plain(listed, where, problems)
        if not isinstance(listed, type(value)):
            with suppress(TypeError):  # Words, objects: not for a tensor.
                return _plain(torch.as_tensor(value, device="cpu"), where, problems)
    if callable(getattr(value, "compute", None)):
        return _plain(value.compute(), where, problems)  # type: ignore[attr-defined]
    problems.append(f"{where} is a {type(value).__name__}")
    return None


def dump_meta(meta: Mapping[str, object]) -> bytes:
    r"""Return `meta` as the bytes of a `CKPT.yaml`.

    Args:
        meta: Plain meta, see `plain_meta`.

    Returns:
        UTF-8 YAML, keys in the order given.

    Raises:
        MetaError: It could not be read again, for its size, say.

    Example:
        >>> dump_meta({"unixtime": 1.5, "end-of-epoch": True})
        b'# yamllint disable\nunixtime: 1.5\nend-of-epoch: true\n'
    """
    data = (_HEADER + dump_yaml(meta)).encode()
    # What can't be read again must never take the place of what can.
    parse_yaml(data, "what was to be written")
    return data


def read_meta(path: str | Path, folder: int | None = None) -> dict[str, object]:
    """Return the meta in the file `path`.

    Args:
        path: A `CKPT.yaml`, ours or SpeechBrain's.
        folder: A descriptor of the folder that it is in, if that is open.

    Returns:
        The meta.

    Raises:
        MetaError: See `parse_yaml`; or it is no regular file, but a link, a pipe or a device.
        OSError: The file can't be read.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "CKPT.yaml"
        >>> _ = file.write_bytes(dump_meta({"loss": torch.tensor([1.0, 2.0])}))
        >>> read_meta(file)
        {'loss': tensor([1., 2.])}
    """
    try:
        name = path if folder is None else os.path.basename(path)  # noqa: PTH119 - no Path is made
        data = read_regular(name, MAX_META_BYTES, folder)
    except NotRegularError as error:
        raise MetaError(f"{path} can't be read: {error.strerror}") from error
    return parse_yaml(data, path)
