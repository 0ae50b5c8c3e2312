"""Each rank of a fit is killed at each operation and each collective of a save."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from _counts import count
from _ranks import checkpoints, make, run

from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.manifest import find_damage
from lightning_sbckpt.plugin.world import TrainerWorld

# A broken connection has to end the others, and not torch's time limit of half an hour.
SECONDS = 240
STEPS = 5


def fit_and_die(folder: Path, rank: int, dying: int, at: int, size: int, mode: str) -> None:
    """Fit; one rank dies at the n-th thing it does from its third save on, until the fourth.

    Without one that is to die each rank writes down what it did, and the weights at the end.
    """
    done: list[str] = []
    saves = 0

    def note(what: str) -> None:
        if saves == 3:
            done.append(what)
            if rank == dying and len(done) == at:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_save(*_: object) -> None:
        nonlocal saves
        saves += 1
        note("gives its state")

    def observe(name: str) -> None:
        usual = getattr(TrainerWorld, name)

        def observed(world: TrainerWorld, obj: object) -> object:
            note(name)
            return usual(world, obj)

        setattr(TrainerWorld, name, observed)

    observe("broadcast")
    observe("gather")
    LocalStorage.before = lambda _, operation, path, target=None: note(f"{operation} {path.name}")
    trainer, module, _, loaders = make(
        folder / "checkpoints",
        rank,
        size=size,
        every_n_train_steps=1,
        num_to_keep=2,
        min_key=None,
        save_mode=mode,
        trainer={"max_epochs": -1, "max_steps": STEPS, "limit_val_batches": 0},
    )
    module.on_save_checkpoint = on_save
    trainer.fit(module, **loaders)
    (folder / f"done{rank}.txt").write_text("\n".join(done))
    torch.save(dict(module.state_dict()), folder / f"weights{rank}.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function from ranks and a mode to what each does in the third save, and the last weights."""
    made: dict[tuple[int, str], tuple[list[list[str]], list[dict]]] = {}

    def look(size: int, mode: str):
        if (size, mode) not in made:
            folder = tmp_path_factory.mktemp("whole")
            ended = run(fit_and_die, folder, -1, 0, size, mode, size=size, timeout=SECONDS)
            assert ended.codes == [0] * size, ended.outputs
            done = [(folder / f"done{rank}.txt").read_text().splitlines() for rank in range(size)]
            made[size, mode] = done, weights(folder, size)
        return made[size, mode]

    return look


def weights(folder: Path, size: int) -> list[dict]:
    """Return the weights at the end of a fit, by rank."""
    return [torch.load(folder / f"weights{rank}.pt", weights_only=True) for rank in range(size)]


def kill(folder: Path, whole, size: int, mode: str, dying: int, at: int) -> None:
    """Kill a rank at its n-th operation; nothing is lost, nobody hangs, and a restart is exact."""
    ended = run(fit_and_die, folder, dying, at, size, mode, size=size, alone=True, timeout=SECONDS)
    if ended.codes == [0] * size:
        return  # A thread in the background was not as far by then as the other time.
    assert ended.codes[dying] == -signal.SIGKILL
    assert all(code not in (0, None) for code in ended.codes[:dying] + ended.codes[dying + 1 :])
    left = checkpoints(folder)
    assert [problem for ckpt in left for problem in find_damage(ckpt.path)] == []
    # Two are kept; the third is there or not. In the background the second may not be there yet.
    steps = [ckpt.meta["global_step"] for ckpt in left]
    assert steps in ([1, 2], [1, 2, 3], [2, 3], *([[1]] if mode == "async" else []))
    again = run(fit_and_die, folder, -1, 0, size, mode, size=size, timeout=SECONDS)
    assert again.codes == [0] * size, again.outputs
    assert f"resuming from {left[-1].path}" in again.outputs[0]
    for resumed, unbroken in zip(weights(folder, size), whole(size, mode)[1], strict=True):
        assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    count("ranks killed, each at one operation or collective of a save")


@pytest.mark.sample(1)
@pytest.mark.parametrize(("size", "dying"), [(2, 1), (3, 0)])
def test_rank_killed_in_a_collective_of_a_save_ends_the_others(tmp_path, whole, size, dying):
    """In the last one before anything is published."""
    done = whole(size, "sync")[0][dying]
    at = max(number for number, what in enumerate(done, 1) if what == "gather")
    kill(tmp_path, whole, size, "sync", dying, at)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("size", "dying"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)], ids=str)
def test_rank_killed_at_each_operation_of_a_save(tmp_path, whole, size, dying, mode):
    """Each collective, and each kind of operation on the disk: staging, commit, publishing, retention."""
    done = whole(size, mode)[0][dying]
    seen: set[str] = set()
    for at, what in enumerate(done, 1):
        # Files are written one like the other.
        kind = (
            what if not what.startswith(("create", "write", "flush_file", "remove")) else what[:6]
        )
        if kind in seen and what not in ("broadcast", "gather"):
            continue
        seen.add(kind)
        (tmp_path / f"{at}").mkdir()
        kill(tmp_path / f"{at}", whole, size, mode, dying, at)
