"""How far reading and writing are: told in bytes, up to all there are, by every function that takes long."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial

import pytest
import safetensors.torch
import torch
from _foreign import forget_manifest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._io.progress import Tally, announced, listening, moved
from lightning_sbckpt._io.threads import run_all
from lightning_sbckpt._sharded.states import ShardedState
from lightning_sbckpt.averaging import save_average
from lightning_sbckpt.consolidation import consolidate
from lightning_sbckpt.errors import DamagedCheckpointError
from lightning_sbckpt.export import to_safetensors, to_state_dict
from lightning_sbckpt.plugin.export import to_lightning

# Of a few megabytes, since files are read and written in blocks of about as many.
WIDTH = 1500


@pytest.fixture
def told():
    """What was told, and the function that is told it."""
    calls = []
    inside = threading.Lock()

    def tell(done, total):
        assert inside.acquire(blocking=False), "told by two threads at once"
        calls.append((done, total))
        inside.release()

    tell.calls = calls
    return tell


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, each of a model of 18 MB and a head."""
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    with Checkpointer(tmp_path / "run", {"model": model, "head": torch.nn.Linear(9, 9)}) as there:
        for name in "ab":
            torch.nn.init.normal_(model[0].weight)
            torch.nn.init.normal_(model[1].weight)
            there.save_checkpoint(name=name)
    return tmp_path / "run"


def in_pieces(run):
    state = ShardedState(torch.nn.Sequential(*[torch.nn.Linear(600, 600)] * 5).state_dict())
    optimizer = torch.nn.Linear(900, 900)
    with Checkpointer(run.parent / "pieces", {"model": state, "other": optimizer}) as there:
        return there.save_checkpoint(name="p")


WORKS = {
    "average": lambda run, tell: save_average(
        run, [run / "CKPT+a", run / "CKPT+b"], on_progress=tell
    ),
    "average with rest": lambda run, tell: save_average(
        run,
        [run / "CKPT+a", run / "CKPT+b"],
        recoverables=["head"],
        with_rest=True,
        on_progress=tell,
    ),
    "state-dict": lambda run, tell: to_state_dict(run / "CKPT+a", run / "m.pt", on_progress=tell),
    "safetensors": lambda run, tell: to_safetensors(
        run / "CKPT+a", run / "m.safetensors", on_progress=tell
    ),
    "lightning": lambda run, tell: to_lightning(run / "CKPT+a", run / "m.ckpt", on_progress=tell),
    "consolidate": lambda run, tell: consolidate(in_pieces(run), on_progress=tell),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("work", WORKS)
def test_it_grows_to_all_bytes_in_small_steps(work, run, told):
    """All are known from the first call on, and no step is more than a third of them."""
    WORKS[work](run, told)
    assert len({total for _, total in told.calls}) == 1
    done = [done for done, _ in told.calls]
    assert done[-1] == told.calls[-1][1]
    assert all(before < after for before, after in itertools.pairwise(done))
    steps = [after - before for before, after in itertools.pairwise([0, *done])]
    # What a library writes by itself is looked at a few times in a second.
    share = 0.34 if work == "safetensors" else 0.2
    assert max(steps) < share * done[-1]


def test_what_a_library_writes_is_told_while_it_does(run, told, monkeypatch):
    """Under whatever name, of a file that has its whole size from the start; the mode is as ever."""
    save_file, size = safetensors.torch.save_file, (run / "CKPT+a" / "model.ckpt").stat().st_size
    parts = []

    def in_parts(tensors, path, metadata):
        hidden = path.with_name(".hidden")
        with hidden.open("wb") as file:
            file.truncate(size)
            for _ in range(3):
                before = told.calls[-1][0]
                file.write(b"1" * (size // 4))
                file.flush()
                end = time.monotonic() + 30
                while told.calls[-1][0] < before + size // 5 and time.monotonic() < end:
                    time.sleep(0.01)
                parts.append((told.calls[-1][0] - before) / size)
        hidden.unlink()
        save_file(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", in_parts)
    path = to_safetensors(run / "CKPT+a", run / "m.safetensors", on_progress=told).path
    assert parts == pytest.approx([0.25] * 3, abs=0.06)
    assert told.calls[-1][0] == told.calls[-1][1]
    (run / "other").touch()
    assert path.stat().st_mode == (run / "other").stat().st_mode
    assert list(run.glob(".exporting-*")) == []
    assert len(safetensors.torch.load_file(path)) == 4


def test_the_total_is_what_is_read_and_written(run, told):
    """Of an average: both files to see that they are sound, both once more, and the new one."""
    save_average(run, [run / "CKPT+a", run / "CKPT+b"], name="mean", on_progress=told)
    size = (run / "CKPT+a" / "model.ckpt").stat().st_size
    (total,) = {total for _, total in told.calls}
    assert total == pytest.approx(5 * size, rel=0.001)


def test_what_was_read_just_now_counts_as_read(run, told, monkeypatch):
    """It is not read again, and the bar does not wait for it."""
    save_average(run, [run / "CKPT+a", run / "CKPT+b"], name="one")
    save_average(run, [run / "CKPT+a", run / "CKPT+b"], name="two", on_progress=told)
    assert told.calls[-1][0] == told.calls[-1][1]


def test_checkpoints_that_nobody_described_can_be_averaged_too(run, told):
    """As those of SpeechBrain: what is not compared with anything is not counted."""
    for name in "ab":
        forget_manifest(run / f"CKPT+{name}")
    save_average(run, [run / "CKPT+a", run / "CKPT+b"], on_progress=told)
    size = (run / "CKPT+a" / "model.ckpt").stat().st_size
    assert told.calls[-1] == (3 * size, 3 * size)


def test_a_failure_is_not_told_as_done(run, told):
    """Damage ends the work where it was found."""
    file = run / "CKPT+b" / "model.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpointError):
        save_average(run, [run / "CKPT+a", run / "CKPT+b"], on_progress=told)
    done, total = told.calls[-1]
    assert done < 0.45 * total


class TestTally:
    """The parts of one piece of work."""

    def test_a_part_counts_in_full_and_never_more(self, told):
        """Whatever is counted inside it."""
        tally = Tally(told, 100)
        with tally.part(40):
            moved(30)
            moved(30)
        with tally.part(60):
            moved(10)
        assert told.calls == [(30, 100), (40, 100), (50, 100), (100, 100)]

    def test_a_part_that_fails_counts_what_was_done(self, told):
        """And what is counted afterwards is nobody's."""
        tally = Tally(told, 100)
        with pytest.raises(ValueError, match="no"), tally.part(50):
            moved(20)
            raise ValueError("no")
        moved(20)
        assert told.calls == [(20, 100)]

    def test_threads_that_share_the_work_count_for_it(self, told):
        """One at a time."""
        tally = Tally(told, 400)
        with tally.part(400):
            run_all(lambda _: moved(1), range(400), most=4)
        assert told.calls == [(n, 400) for n in range(1, 401)]

    def test_two_pieces_of_work_at_once_are_not_mixed_up(self):
        """Each thread counts its own."""
        both = threading.Barrier(2)
        results = {}

        def work(name, count):
            calls = []
            with Tally(lambda *call: calls.append(call), count).part(count):
                both.wait(60)
                moved(count - 1)
                both.wait(60)
            results[name] = calls

        threads = [threading.Thread(target=partial(work, name, name)) for name in (10, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {10: [(9, 10), (10, 10)], 20: [(19, 20), (20, 20)]}


def test_what_is_announced_reaches_who_listens_and_nobody_else():
    """Inside the block, and not after it."""
    heard = []

    class Listener:
        def __init__(self, what, total):
            heard.append((what, total))

        def __enter__(self):
            return heard.append

        def __exit__(self, *_):
            heard.append("end")

    with listening(Listener), announced("downloading", 5) as tell:
        tell(3)
    with announced("uploading") as tell:
        tell(4)
    assert heard == [("downloading", 5), 3, "end"]
