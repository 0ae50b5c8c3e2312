"""Whether what the user asks of checkpoints is ever logged, told while it can be mended."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import CodeType
from typing import Any, cast

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_sbckpt._world.world import decided_by_main
from lightning_sbckpt.errors import SelectionError
from lightning_sbckpt.expressions import Expression
from lightning_sbckpt.meta import Checkpoint
from lightning_sbckpt.plugin import _private
from lightning_sbckpt.plugin.options import BestBy
from lightning_sbckpt.plugin.packages import Checkpoint as LightningCheckpoint
from lightning_sbckpt.plugin.packages import Trainer
from lightning_sbckpt.retention import Where
from lightning_sbckpt.typing import CheckpointPredicate, ImportanceKey, RetentionRule, World

# What every checkpoint has, and what is added to one later.
_OURS = frozenset({"unixtime", "end-of-epoch", "epoch", "global_step", "ephemeral", "pinned"})
_LIBRARIES = ("builtins", "lightning", "lightning_sbckpt", "pytorch_lightning", "torch")


@dataclass(frozen=True)
class _Wish:
    """One argument, and what it asks the meta of checkpoints for."""

    said: str
    asks: object
    is_best: bool = False

    @property
    def is_function(self) -> bool:
        """Whether it is a function of the user."""
        return callable(self.asks) and not isinstance(self.asks, Expression)

    @property
    def keys(self) -> frozenset[str]:
        """The keys that it names; those that a function asks for are seen when it is called."""
        if isinstance(self.asks, str):
            return frozenset({self.asks})
        if isinstance(self.asks, Expression):
            return self.asks.keys
        several = getattr(self.asks, "keys", ())
        named = [getattr(self.asks, "key", None), *(several if isinstance(several, tuple) else ())]
        return frozenset(name for name in named if isinstance(name, str))

    def missed(self, known: Iterable[str], meta: Mapping[str, object]) -> list[str]:
        """Return the keys that it asks for and nobody has."""
        keys = set(self.keys)
        if self.is_function:
            probe = _Probe(meta)
            # Whatever it makes of a checkpoint: that is asked when it counts.
            with suppress(Exception):
                cast("ImportanceKey", self.asks)(Checkpoint(Path(), probe, {}))
            keys |= probe.missed
        return sorted(keys.difference(known, _OURS))


class _Probe(dict[str, object]):
    """A meta that notes which keys it was asked for and has not."""

    def __init__(self, meta: Mapping[str, object]) -> None:
        super().__init__(meta)
        self.missed: set[str] = set()

    def __missing__(self, key: str) -> object:
        self.missed.add(key)
        raise KeyError(key)


class WantedKeys:
    """What the user asks of the meta of checkpoints, and whether anything logs it.

    Args:
        best_by: Which checkpoint is best.
        rules: Which stay; the first of them may be that for the best.
        predicate: Which may go at all.
    """

    def __init__(
        self,
        best_by: BestBy,
        rules: Sequence[RetentionRule],
        predicate: CheckpointPredicate | None,
    ) -> None:
        self._open = _wishes(best_by, rules, predicate)
        self.named = frozenset[str]().union(*(wish.keys for wish in self._open))

    def check(
        self,
        trainer: Trainer,
        meta: Mapping[str, object],
        world: World,
        *,
        has_validated: bool,
        within_epoch: bool,
        ends: bool,
    ) -> None:
        """Say once what nothing logs; every rank calls this after each save.

        Args:
            trainer: What has logged so far.
            meta: Of the checkpoint that was just saved.
            world: The ranks.
            has_validated: Whether a validation has ended in this fit.
            within_epoch: Whether the training epoch is still to log its own metrics.
            ends: Whether this was the last save: nothing is raised any more.

        Raises:
            SelectionError: Nothing logs the key of the best checkpoint, though a validation has
                ended, and the code doesn't look as if it ever would.
        """
        waits = not has_validated and (within_epoch or trainer.enable_validation)
        if not self._open or waits:
            return

        def judge() -> tuple[list[int], list[str], str]:
            known = {*meta, *_private.logged.logged_names(trainer)}
            found, said, fatal = [], [], ""
            for number, wish in enumerate(self._open):
                missed = wish.missed(known, meta)
                later = any(_may_come(trainer, key, known) for key in missed)
                if missed and within_epoch and (later or not wish.is_best):
                    continue  # The end of the epoch will tell.
                found.append(number)
                if missed and wish.is_best and has_validated and not (later or ends):
                    fatal = _sentence(wish, missed, known)
                elif missed:
                    said.append(_sentence(wish, missed, known))
            return found, said, fatal

        found, said, fatal = decided_by_main(world, judge)
        self._open = [wish for number, wish in enumerate(self._open) if number not in found]
        for sentence in said:
            rank_zero_warn(f"SBCheckpoint: {sentence}")
        if fatal:
            raise SelectionError(
                f"{fatal} Name one of these, or log it. The checkpoint that was just saved stays, and "
                "the run goes on from it when it is started again"
            )


def _wishes(
    best_by: BestBy, rules: Sequence[RetentionRule], predicate: CheckpointPredicate | None
) -> list[_Wish]:
    found: list[_Wish] = []
    for name in ("min_key", "max_key", "importance_key"):
        asks = getattr(best_by, name)
        if asks is not None:
            said = f"{name}={asks!r}" if isinstance(asks, str) else name
            found.append(_Wish(said, asks, is_best=isinstance(asks, str)))
    named = {wish.asks for wish in found if isinstance(wish.asks, str)}
    more = [
        _Wish(f"the rule {rule!r}", rule.predicate if isinstance(rule, Where) else rule)
        for rule in rules
    ]
    if isinstance(predicate, Expression):
        more.append(_Wish(f"ckpt_predicate={predicate.text!r}", predicate))
    # Not the rule that comes of a key above. A function that fails in retention is loud there.
    return [*found, *(wish for wish in more if wish.keys and not wish.keys <= named)]


def _sentence(wish: _Wish, missed: Sequence[str], known: set[str]) -> str:
    logged = sorted(known - _OURS)
    close = [name for key in missed for name in _like(key, logged)]
    meant = f" Did you mean {' or '.join(dict.fromkeys(map(repr, close)))}?" if close else ""
    there = ", ".join(logged) or "nothing"
    return (
        f"{wish.said} asks for {', '.join(map(repr, missed))}, which nothing has logged so far. "
        f"Logged was: {there}.{meant}"
    )


def _like(key: str, names: Sequence[str]) -> list[str]:
    # Lightning adds a suffix for each of several loaders, and for steps and epochs.
    longer = [name for name in names if name.startswith(key)]
    # An expression reads `val/loss` as a division.
    parts = [name for name in names if key in name.replace("/", " ").split()]
    return longer or parts or get_close_matches(key, names, n=2)


def _may_come(trainer: Trainer, key: str, known: Iterable[str]) -> bool:
    """Return whether the code of the user's module or callbacks has a key, and may log it yet."""
    if any(name.startswith(f"{key}/dataloader_idx_") for name in known):
        return False  # It has been logged, by these names.
    callbacks = [
        callback
        for callback in _private.trainer.callbacks_of(trainer)
        if not isinstance(callback, LightningCheckpoint)
    ]
    return any(
        _has(code.co_consts, key)
        for owner in (trainer.lightning_module, *callbacks)
        for code in _code_of(type(owner))
    )


def _code_of(kind: type) -> Iterable[CodeType]:
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] in _LIBRARIES:
            continue
        for member in vars(cls).values():
            function: Any = getattr(member, "__func__", member)
            if callable(function):
                function = inspect.unwrap(function)
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType):
                yield code


def _has(constants: Iterable[object], text: str) -> bool:
    return any(
        constant == text
        if isinstance(constant, str)
        else _has(constant.co_consts if isinstance(constant, CodeType) else constant, text)
        for constant in constants
        if isinstance(constant, (str, tuple, frozenset, CodeType))
    )
