"""A run of saves, replacements and deletions, and what must be found of it at any instant.

Every checkpoint holds one number in many places: a module, an optimizer, a folder written by a hook
of its own, state that only pickle can hold, and the meta. Whoever finds two numbers in one
checkpoint has found a torn one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_sbckpt import Checkpointer, ckpt_recency
from lightning_sbckpt._catalog.index import INDEX_NAME
from lightning_sbckpt._layout.history import HISTORY_NAME
from lightning_sbckpt._layout.lock import LOCK_NAME
from lightning_sbckpt._layout.manifest import find_damage

# A new save mode takes part in every test once it is in this list.
SAVE_MODES = ["sync", "async", "overlap"]

# What may lie in the folder of a run beside its checkpoints.
FURNITURE = {LOCK_NAME, INDEX_NAME, HISTORY_NAME}

# Left by processes that died: two to be cleared, and a replaced checkpoint to be brought back.
BROUGHT_BACK = 90


class Odd:
    """What only pickle can hold."""

    def __init__(self, number: int) -> None:
        self.number = number


class Mixed:
    """A stateful object of which a part goes into the pickled file beside."""

    def __init__(self) -> None:
        self.number = 0
        self.odd = Odd(0)

    def state_dict(self) -> dict[str, object]:
        """Return both parts."""
        return {"number": self.number, "odd": self.odd}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take both parts."""
        self.number, self.odd = state["number"], state["odd"]


class Table:
    """An object whose hook writes a folder with a folder in it."""

    def __init__(self) -> None:
        self.number = 0


def save_table(table: Table, path: Path) -> None:
    """Write three files."""
    (path / "inner").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "inner/c.txt"):
        (path / name).write_text(f"{table.number}\n" * 300)


def load_table(table: Table, path: Path, end_of_epoch: bool) -> None:
    """Read three files, which must agree in full."""
    found = {(path / name).read_text() for name in ("a.txt", "b.txt", "inner/c.txt")}
    (text,) = found
    table.number = int(text.split("\n")[0])
    assert text == f"{table.number}\n" * 300


def checkpointer_of(root: Path, **arguments: object) -> Checkpointer:
    """Return a checkpointer of four recoverables."""
    # Large enough to be linked to, and the same in every save: what checkpoints share must be as
    # safe as what they don't.
    frozen = torch.nn.Linear(130, 130)
    torch.nn.init.constant_(frozen.weight, 0.5)
    torch.nn.init.constant_(frozen.bias, 0.5)
    model = torch.nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    checkpointer = Checkpointer(
        root,
        {"model": model, "frozen": frozen, "optimizer": optimizer, "mixed": Mixed()},
        trust_pickle=True,
        **arguments,
    )
    checkpointer.add_recoverable("table", Table(), load_table, save_table)
    return checkpointer


def set_number(checkpointer: Checkpointer, number: int) -> None:
    """Put a number everywhere."""
    objects = checkpointer.recoverables
    with torch.no_grad():
        for parameter in objects["model"].parameters():
            parameter.fill_(number)
            objects["optimizer"].state[parameter]["momentum_buffer"].fill_(number)
    objects["mixed"].number, objects["mixed"].odd = number, Odd(number)
    objects["table"].number = number


def get_number(checkpointer: Checkpointer) -> int:
    """Return the number that is everywhere."""
    objects = checkpointer.recoverables
    numbers = {objects["mixed"].number, objects["mixed"].odd.number, objects["table"].number}
    for parameter in objects["model"].parameters():
        numbers |= set(parameter.flatten().tolist())
        state = objects["optimizer"].state[parameter]
        numbers |= set(state["momentum_buffer"].flatten().tolist())
    assert bool((objects["frozen"].weight == 0.5).all())
    (number,) = numbers
    return int(number)


def loss_of(number: int) -> float:
    """Return the loss of the checkpoint with a number: the second is the best for long."""
    return 0.5 if number == 2 else 10.0 - 0.1 * number


@dataclass(frozen=True)
class Step:
    """One call, the number that it saves (or 0), and those that are gone after it."""

    saves: int
    removes: frozenset[int]
    call: Callable[[Checkpointer], object]

    def start(self, checkpointer: Checkpointer) -> None:
        """Make the call."""
        # What an optimizer's step would call before it changes anything.
        checkpointer.before_update()
        if self.saves:
            set_number(checkpointer, self.saves)
        self.call(checkpointer)

    def run(self, checkpointer: Checkpointer) -> None:
        """Make the call and wait until it is durable."""
        self.start(checkpointer)
        checkpointer.wait()


def _save(number: int, name: str | None, removes: Iterable[int] = ()) -> Step:
    def call(checkpointer: Checkpointer) -> None:
        checkpointer.save_checkpoint({"number": number, "loss": loss_of(number)}, name=name)

    return Step(number, frozenset(removes), call)


def _save_and_keep(number: int, name: str | None, keep: int, removes: Iterable[int]) -> Step:
    def call(checkpointer: Checkpointer) -> None:
        checkpointer.save_and_keep_only(
            {"number": number, "loss": loss_of(number)},
            name=name,
            num_to_keep=keep,
            min_keys=["loss"],
        )

    return Step(number, frozenset(removes), call)


def _delete(keep: int, removes: Iterable[int]) -> Step:
    def call(checkpointer: Checkpointer) -> None:
        # What is deleted by the call itself is only what is there by then.
        checkpointer.wait()
        checkpointer.delete_checkpoints(num_to_keep=keep, importance_keys=[ckpt_recency])

    return Step(0, frozenset(removes), call)


STEPS = (
    _save(1, "first"),
    _save(2, None),
    _save_and_keep(3, None, 2, removes=[1, BROUGHT_BACK]),
    _save(4, "named"),
    _save(5, "named", removes=[4]),
    _save_and_keep(6, "named", 1, removes=[3, 5]),
    _delete(1, removes=[2]),
    _save_and_keep(7, None, 1, removes=[6]),
)


def prepare(root: Path, scratch: Path) -> None:
    """Make the folder of a run in which processes died in the middle of three things."""
    other = checkpointer_of(scratch)
    for number, name in ((BROUGHT_BACK, "replaced"), (91, "removed"), (92, "staged")):
        set_number(other, number)
        other.save_checkpoint({"number": number, "loss": 20.0}, name=name)
    other.close()
    root.mkdir(parents=True)
    (scratch / "CKPT+replaced").rename(root / f".replaced+{'0' * 32}+CKPT+replaced")
    (scratch / "CKPT+removed").rename(root / f".removed+{'0' * 32}+CKPT+removed")
    (root / f".removed+{'0' * 32}+CKPT+removed" / "CKPT.yaml").unlink()
    (scratch / "CKPT+staged").rename(root / f".staging+{'0' * 32}")


def warm_up(scratch: Path) -> None:
    """Import what saving and loading import when first used, so that forked processes have it.

    No thread is started, since none would live on in them.
    """
    torch.set_num_threads(1)
    prepare(scratch / "run", scratch / "other")
    look(scratch / "run")


def numbers_after(steps: Iterable[Step]) -> set[int]:
    """Return the numbers of the checkpoints that are there after some steps."""
    numbers = {BROUGHT_BACK}
    for step in steps:
        numbers = (numbers - step.removes) | ({step.saves} - {0})
    return numbers


def look(root: Path, mode: str = "sync", known: dict[object, int] | None = None) -> set[int]:
    """Be the next process: find every checkpoint whole, load best and newest, clear up.

    Args:
        root: The folder of the run.
        mode: The save mode of that process.
        known: The numbers of checkpoints that were read before, by all of their bytes: they are
            not read again.

    Returns:
        The numbers of all checkpoints.
    """
    checkpointer = checkpointer_of(root, save_mode=mode)
    known = {} if known is None else known
    names = set(os.listdir(root))
    visible = {name for name in names if name.startswith("CKPT")}
    assert names - visible <= FURNITURE, "leftovers were not cleared"
    found = {}
    for ckpt in checkpointer.list_checkpoints():
        content = _content(ckpt.path)
        if content not in known:
            assert find_damage(ckpt.path) == []
            checkpointer.load_checkpoint(ckpt)
            known[content] = get_number(checkpointer)
            assert ckpt.meta["number"] == known[content]
            for key in (None, "loss"):
                # As if it was the newest, and the best.
                only = {"ckpt_predicate": lambda other, path=ckpt.path: other.path == path}
                assert checkpointer.recover_if_possible(min_key=key, **only) == ckpt
        found[ckpt.path] = known[content]
    assert {path.name for path in found} == visible, "something looks like a checkpoint and is none"
    numbers = set(found.values())
    assert len(numbers) == len(found)
    if not numbers:
        assert checkpointer.recover_if_possible() is None
        return numbers
    newest = checkpointer.find_checkpoint()
    assert found[newest.path] == max(numbers, key=lambda n: (n != BROUGHT_BACK, n))
    best = checkpointer.find_checkpoint(min_key="loss")
    losses = {number: 20.0 if number == BROUGHT_BACK else loss_of(number) for number in numbers}
    assert found[best.path] == min(losses, key=lambda n: (losses[n], -n))
    return numbers


def _content(folder: Path) -> object:
    return frozenset(
        (path.relative_to(folder), path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    )


def assert_nothing_lost(numbers: set[int], confirmed: int, started: int) -> None:
    """Compare what was found with what may be there.

    Args:
        numbers: What the next process found.
        confirmed: How many steps were reported done.
        started: How many steps had begun.
    """
    certain = numbers_after(STEPS[:confirmed])
    under_way = STEPS[confirmed:started]
    may_go = frozenset().union(*(step.removes for step in under_way))
    may_come = {step.saves for step in under_way} - {0}
    assert certain - may_go <= numbers, f"lost {certain - may_go - numbers}"
    assert numbers <= certain | may_come, f"not expected: {numbers - certain - may_come}"
    # The new one is durable before an old one goes: of what is gone, what it went for is there.
    for gone in certain - numbers:
        remover = next(step for step in under_way if gone in step.removes)
        newer = {number for number in numbers if number != BROUGHT_BACK}
        assert max(newer, default=0) >= remover.saves, f"{gone} went, {remover.saves} did not come"
