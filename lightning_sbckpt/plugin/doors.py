"""Every door at which Lightning loads a checkpoint folder: what comes in there goes the same way.

These are a resume, `trainer.test(ckpt_path=...)` and its like, and the best weights at the end of a fit.
(`load_from_checkpoint` has no Trainer, and so none of our options.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sbckpt._load.module_state import as_it_was_if_refused
from lightning_sbckpt._sharded.names import plain_name
from lightning_sbckpt.plugin._private.loading import FolderDump, load_by
from lightning_sbckpt.plugin._private.trainer import Undo
from lightning_sbckpt.plugin.packages import LightningModule, Trainer
from lightning_sbckpt.plugin.resume import Restore
from lightning_sbckpt.plugin.state.adapt import Adaptation, mismatches
from lightning_sbckpt.plugin.state.names import renamed_state
from lightning_sbckpt.plugin.state.parts import FolderReader
from lightning_sbckpt.plugin.state.training_state import Description, restore


class Doors:
    """Loads what was read from a folder, by the options of a callback.

    Args:
        trainer: The Trainer.
        reader: Reads folders.
        adaptation: The options.
        resumption: Returns the resume that is under way, or None.
    """

    def __init__(
        self,
        trainer: Trainer,
        reader: FolderReader,
        adaptation: Adaptation,
        resumption: Callable[[], Restore | None],
    ) -> None:
        self._trainer = trainer
        self._reader = reader
        self._adaptation = adaptation
        self._resumption = resumption
        self._not_loaded: frozenset[str] = frozenset()

    def open(self) -> list[Undo]:
        """Join in; return what undoes it."""
        return load_by(self._trainer, self._load_model, self._load_training)

    def _load_model(
        self, dump: FolderDump, load: Callable[[Mapping[str, Any]], object], strict: bool
    ) -> None:
        pieces = self._reader.pieces
        if pieces is not None:
            load = lambda state: pieces.load_model(state, strict)  # noqa: E731 - as the other one
        module = self._trainer.lightning_module
        left_out, self._not_loaded = load_adapted(
            dump, module, self._reader, self._adaptation, load, strict=strict
        )
        resumption = self._resumption()
        if resumption is not None:
            resumption.report.skipped += left_out
        elif left_out:
            rank_zero_warn(f"SBCheckpoint: not loaded from {dump.folder}: {'; '.join(left_out)}")

    def _load_training(self, dump: FolderDump) -> None:
        resumption = self._resumption()
        remarks = restore(
            dump,
            self._trainer,
            Description() if resumption is None else resumption.description,
            self._adaptation,
            dump.folder,
            not_loaded=self._not_loaded,
        )
        if resumption is not None:
            resumption.report.skipped += remarks


def load_adapted(
    dump: FolderDump,
    module: LightningModule,
    reader: FolderReader,
    adaptation: Adaptation,
    load: Callable[[Mapping[str, Any]], object],
    *,
    strict: bool,
) -> tuple[list[str], frozenset[str]]:
    """Load weights; return what stays out, in words, and the parameters that it concerns, by name.

    Raises:
        MismatchError: The module refuses them.
    """
    left_out = adaptation.load_model(
        dump["state_dict"],
        module,
        lambda: reader.own_state(module),
        load,
        dump.folder,
        strict=strict,
    )
    if not (left_out and adaptation.partial):
        return left_out, frozenset()
    concerned = {line.partition(":")[0] for line in left_out}
    return left_out, frozenset(map(plain_name, concerned))


def load_weights(
    dump: FolderDump, module: LightningModule, reader: FolderReader, adaptation: Adaptation
) -> list[str]:
    """Put weights in a module that no Trainer loads into; return what stays out, in words.

    Args:
        dump: What `reader` read.
        module: The module, whose `on_load_checkpoint` is asked first, as Lightning does.
        reader: Read it.
        adaptation: The options.

    Raises:
        MismatchError: The module refuses them, and is what it was.
    """
    pieces = reader.pieces
    strict = module.strict_loading

    def load(state: Mapping[str, Any]) -> None:
        if pieces is None:
            module.load_state_dict(state, strict=strict)
        else:
            pieces.load_model(state, strict)

    own = reader.own_state(module)
    saved = renamed_state(dump["state_dict"], own, adaptation.key_map, module)
    # Already now: a hook may change the module before it turns out that the weights don't fit.
    with as_it_was_if_refused(module, may_fail=bool(mismatches(saved, own, strict=True))):
        module.on_load_checkpoint(dump)
        left_out, _ = load_adapted(dump, module, reader, adaptation, load, strict=strict)
    return left_out
