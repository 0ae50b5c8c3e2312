"""Having Lightning read checkpoint folders where it reads files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_sbckpt.plugin._private.trainer import Undo, wrap
from lightning_sbckpt.plugin.packages import Strategy
from lightning_sbckpt.plugin.state.parts import FolderReader, is_folder


def read_folders(strategy: Strategy, reader: FolderReader) -> Undo:
    """Have a strategy read checkpoint folders; return what undoes it.

    Files go to its `CheckpointIO` as before, which nobody replaces: plugins of the user stay where
    they look for them, and get every argument that Lightning has for them.

    Args:
        strategy: About to load a checkpoint.
        reader: Reads folders.
    """

    def load_checkpoint(original: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        if is_folder(path):
            return reader.read(path, weights_only=kwargs.get("weights_only"))
        return original(path, *args, **kwargs)

    return wrap(strategy, "load_checkpoint", load_checkpoint)
