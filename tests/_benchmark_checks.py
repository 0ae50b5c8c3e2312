"""A small share of the benchmarks as checks: ratios with wide margins, never absolute times.

Each check is shown to be able to fail: the same measurement of something slower goes past the same
limit. `test_benchmarks.py` runs this file in a process of its own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from _releases import needs_torch
from torch.distributed import checkpoint as dcp

ROOT = Path(__file__).resolve().parents[1]
# At the end: the package under test is the installed one.
sys.path.append(str(ROOT))

from benchmarks import finding, measure, memory, plots, report, stepping  # noqa: E402
from benchmarks.calm import Calm  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    Section,
    Settings,
    Table,
    UnavailableError,
    interleave,
    median,
    timed,
)
from benchmarks.peer import saver  # noqa: E402
from benchmarks.peers import ASYNC, LOADING, SYNC, Ours, opened  # noqa: E402
from benchmarks.peers_torch import TorchSave  # noqa: E402
from benchmarks.saving import RAW  # noqa: E402
from benchmarks.stalls import COPY  # noqa: E402
from benchmarks.states import State  # noqa: E402
from benchmarks.stepping import hooks_microseconds  # noqa: E402
from lightning_sbckpt import Checkpointer  # noqa: E402

MEGABYTES = 24


def slowed(act: Callable, factor: float) -> Callable:
    @functools.wraps(act)
    def slow(*args, **kwargs):
        start = time.perf_counter()
        result = act(*args, **kwargs)
        time.sleep((factor - 1) * (time.perf_counter() - start))
        return result

    return slow


def ratio(of: Callable[[], float], against: Callable[[], float], warmup: int = 1) -> float:
    values = interleave({"of": of, "against": against}, rounds=3, warmup=warmup)
    return median(a / b for a, b in zip(values["of"], values["against"], strict=True))


def save_ratio(folder: Path, mode: str) -> float:
    state = State(MEGABYTES)
    ours, plain = Ours(mode), TorchSave()
    ours.open(state, folder / "ours")
    plain.open(state, folder / "plain")

    try:
        return ratio(saver(ours, state), saver(plain, state))
    finally:
        ours.close()


# ---------------------------------------------------------------------- the ratios

SAVE_LIMITS = {"sync": 1.5, "async": 0.8, "overlap": 0.8}


@needs_torch("2.6", "torch.serialization.skip_data, by which a save needs no pickling,")
@pytest.mark.parametrize("mode", SAVE_LIMITS)
def test_a_save_keeps_its_distance_to_torch_save(tmp_path, mode):
    """A durable save is not slower than `torch.save` and fsync; one in the background returns
    sooner.
    """
    assert save_ratio(tmp_path, mode) < SAVE_LIMITS[mode]


@pytest.mark.parametrize("mode", SAVE_LIMITS)
def test_a_slower_save_is_noticed(tmp_path, monkeypatch, mode):
    """The same check fails for saves that take several times as long."""
    slow = slowed(Checkpointer.save_checkpoint, 8)
    monkeypatch.setattr(Checkpointer, "save_checkpoint", slow)
    assert save_ratio(tmp_path, mode) > SAVE_LIMITS[mode]


LOAD_LIMIT = 1.2


def load_ratio(folder: Path) -> float:
    state, target = State(MEGABYTES), State(MEGABYTES, seed=1)
    ours, plain = Ours("sync"), TorchSave()
    for peer, name in ((ours, "ours"), (plain, "plain")):
        peer.open(state, folder / name)
        peer.save()
    try:
        return ratio(
            lambda: timed(lambda: ours.load(target)), lambda: timed(lambda: plain.load(target))
        )
    finally:
        ours.close()


def test_loading_keeps_its_distance_to_torch_load(tmp_path):
    """Loading into a live state, verified, takes no longer than `torch.load` and
    `load_state_dict`.
    """
    assert load_ratio(tmp_path) < LOAD_LIMIT


def test_slower_loading_is_noticed(tmp_path, monkeypatch):
    """The same check fails for loading that takes several times as long."""
    monkeypatch.setattr(
        Checkpointer, "recover_if_possible", slowed(Checkpointer.recover_if_possible, 8)
    )
    assert load_ratio(tmp_path) > LOAD_LIMIT


FIND_LIMIT = 0.7
AGAIN_LIMIT = 0.5


def find_ratios(folder: Path) -> tuple[float, float]:
    finding.make_checkpoints(folder, 300)
    # Written in the last moments, the metas could still change unseen, and are read again.
    time.sleep(0.2)

    def read_all() -> float:
        return timed(lambda: [yaml.safe_load(p.read_text()) for p in folder.glob("*/CKPT.yaml")])

    def find() -> float:
        finding.forget_index(folder)
        return timed(lambda: Checkpointer(folder).find_checkpoint(min_key="loss"))

    asked = Checkpointer(folder)

    def again() -> float:
        # The other one has removed the index and written it.
        for _ in range(4):
            asked.find_checkpoint(min_key="loss")
        return timed(lambda: asked.find_checkpoint(min_key="loss"))

    return ratio(find, read_all), ratio(again, find)


def test_finding_keeps_its_distance_to_reading_every_meta(tmp_path):
    """Finding the best without an index is quicker than PyYAML reads all meta; asked again and
    again, it is quicker than at first.
    """
    first, again = find_ratios(tmp_path)
    assert (first < FIND_LIMIT, again < AGAIN_LIMIT) == (True, True), (first, again)


def test_slower_finding_is_noticed(tmp_path, monkeypatch):
    """The same checks fail if every checkpoint is read by PyYAML, at every call."""

    def read_with_pyyaml(self, *, min_key):
        metas = [yaml.safe_load(p.read_text()) for p in self.checkpoints_dir.glob("*/CKPT.yaml")]
        return min(metas, key=lambda meta: meta[min_key])

    monkeypatch.setattr(Checkpointer, "find_checkpoint", read_with_pyyaml)
    first, again = find_ratios(tmp_path)
    assert (first > FIND_LIMIT, again > AGAIN_LIMIT) == (True, True), (first, again)


# The steps of a Trainer cost hundreds of such operations.
IDLE_LIMIT = 20


def tensor_operation_microseconds() -> float:
    number = torch.zeros(1)
    start = time.thread_time_ns()
    for _ in range(5000):
        number.add_(1)
    return (time.thread_time_ns() - start) / 5000 / 1e3


def test_a_step_without_a_save_costs_few_operations(tmp_path):
    """What the callback does when nothing is due costs no more than some operations on a tensor
    of one number.
    """
    cost = ratio(
        lambda: hooks_microseconds("sync", tmp_path), tensor_operation_microseconds, warmup=0
    )
    assert cost < IDLE_LIMIT


def test_a_callback_that_works_at_every_step_is_noticed(tmp_path):
    """The same check fails if the callback looks at the disk at every step."""

    def look() -> None:
        for _ in range(40):
            os.listdir(tmp_path)

    cost = ratio(
        lambda: hooks_microseconds("sync", tmp_path, slower=look),
        tensor_operation_microseconds,
        warmup=0,
    )
    assert cost > IDLE_LIMIT


IMPORT_LIMIT = 0.4


@pytest.fixture(scope="module")
def import_seconds() -> dict[str, float]:
    modules = ("torch", "lightning_sbckpt", "lightning.pytorch")
    # Processor time, and the lesser of two: other programs on the machine must not count. Lightning
    # is large enough to be seen in one.
    runs: dict[str, list[float]] = {module: [] for module in modules}
    for some in (modules, modules[:2]):
        code = "import time\n" + "".join(
            f"start = time.process_time()\n{statement}\nprint(time.process_time() - start)\n"
            for statement in (
                stepping.PACKAGE if m == "lightning_sbckpt" else f"import {m}" for m in some
            )
        )
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        for module, seconds in zip(some, done.stdout.split(), strict=True):
            runs[module].append(float(seconds))
    return {module: min(seconds) for module, seconds in runs.items()}


def test_the_import_adds_little_to_that_of_torch(import_seconds):
    """The package is imported in a fraction of the time that torch takes."""
    assert import_seconds["lightning_sbckpt"] < IMPORT_LIMIT * import_seconds["torch"]


def test_an_import_of_lightning_is_noticed(import_seconds):
    """The same check fails if Lightning comes along."""
    together = import_seconds["lightning_sbckpt"] + import_seconds["lightning.pytorch"]
    assert together > IMPORT_LIMIT * import_seconds["torch"]


MEMORY_LIMIT = 0.6


def test_a_synchronous_save_and_a_load_make_no_second_copy_in_memory(tmp_path):
    """The memory that saving and loading take beyond the state is a fraction of it."""
    extra = memory.peak_of("lightning-sbckpt, sync", 60, tmp_path)
    assert extra["save"] < MEMORY_LIMIT * 60e6
    assert extra["load"] < MEMORY_LIMIT * 60e6


def test_a_second_copy_in_memory_is_noticed(tmp_path):
    """The same measurement sees the copies that Lightning makes when it saves, and those that
    `torch.load` makes.
    """
    extra = memory.peak_of("Lightning + fsync", 60, tmp_path)
    assert extra["save"] > MEMORY_LIMIT * 60e6
    assert extra["load"] > MEMORY_LIMIT * 60e6


# ---------------------------------------------------------------------- the benchmarks themselves


@pytest.mark.skipif(
    "no_dist" not in signature(dcp.async_save).parameters,
    reason="torch's own asynchronous save needs a process group in this release",
)
def test_every_peer_saves_and_loads_the_whole_state(tmp_path):
    """What is timed is real: after a save and a load the other state has the same bits."""
    state = State(0.2)
    failures: dict[str, str] = {}
    everyone = {**SYNC, **ASYNC, **LOADING}
    # It starts a process that imports torch; seconds that this one need not cost.
    del everyone["torch_checkpointing async + fsync"]
    with opened(everyone, state, tmp_path, failures) as peers:
        for name, peer in peers.items():
            state.change()
            peer.save()
            peer.wait()
            target = State(0.2, seed=1)
            assert not target.equals(state)
            peer.load(target)
            assert target.equals(state), name
            peer.clear()
            left = {path.name for path in peer.folder.iterdir() if not path.name.startswith(".")}
            assert left <= {"HISTORY.jsonl"}, name
    # Without these, nothing was compared.
    required = [
        name for name in everyone if "safetensors" not in name and "checkpointing" not in name
    ]
    assert [name for name in required if name in failures] == []


def test_a_subject_that_fails_is_left_out_with_its_reason():
    """One peer's failure costs its own row, and the others keep their rounds."""
    failures: dict[str, str] = {}

    def fail() -> float:
        raise UnavailableError("not on this machine")

    values = interleave({"works": lambda: 1.0, "fails": fail}, rounds=3, failures=failures)
    assert values == {"works": [1.0, 1.0, 1.0]}
    assert failures == {"fails": "not on this machine"}


def test_rounds_end_when_their_time_is_over():
    """A slow machine takes fewer rounds, not more time; the least that was asked for stays."""
    counted = interleave({"a": lambda: timed(lambda: time.sleep(0.05))}, rounds=100, seconds=0.3)
    assert 2 <= len(counted["a"]) < 10
    counted = interleave({"a": lambda: timed(lambda: time.sleep(0.02))}, rounds=9, seconds=0.001)
    assert len(counted["a"]) == 2


def test_a_measurement_waits_for_a_quieter_machine_for_a_while(monkeypatch):
    calm = Calm()
    times = iter([0.01] * 30 + [0.015] * 3 + [0.013] * 3 + [0.015] * 1_000)
    monkeypatch.setattr(calm, "_copy", lambda *_: _best_of(calm, next(times)))
    assert 0.1 <= calm.wait(60) < 60
    assert (calm.begun, calm.disturbed) == (1, 0)
    assert 0.3 <= calm.wait(0.3) < 60
    assert (calm.begun, calm.disturbed) == (2, 1)
    found = list(calm.describe().values())
    assert found[1] == "1 of 2 measurements"


def _best_of(calm, taken):
    calm._best = min(calm._best, taken)
    return taken


def test_only_who_is_patient_waits(monkeypatch):
    asked = []
    monkeypatch.setattr(measure.MACHINE, "wait", lambda left: asked.append(left) or left)
    subjects = {"a": lambda: 1.0, "b": lambda: 2.0}
    interleave(subjects, rounds=2, seconds=10)
    assert asked == []
    measured = interleave(subjects, rounds=3, seconds=10, patience=0.2, warmup=0)
    # A tenth of what there is for each, until nothing is left.
    assert asked == pytest.approx([0.2] * 6)
    assert measured == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_ratios_are_taken_within_the_rounds():
    """Drift of the machine that hits both subjects of a round does not change their ratio."""
    table = Table("t", "s", "a", {("a", "x"): [1.0, 10.0], ("b", "x"): [2.0, 20.0]})
    assert table.ratio("b", "x") == [2.0, 2.0]


def test_the_report_tells_targets_that_are_met_missed_and_not_measured(tmp_path):
    """The first table has each target with what was measured and a plain word."""
    column = "100 MB"
    rows = {RAW: [1.0, 1.0], "lightning-sbckpt, sync": [1.2, 1.4], "torch.save + fsync": [2.6, 2.6]}
    table = Table("Saving", "s", RAW, {(row, column): values for row, values in rows.items()})
    section = Section("save", "Save", "How.", {"save": table}, {"DCP": "not installed"})
    path = tmp_path / "RESULTS.md"
    ours = "lightning-sbckpt, async"
    rows = {
        (COPY, "training"): [1.0, 1.0],
        (ours, "training"): [1.0, 1.4],
        (COPY, "Python-bound"): [1.0] * 3,
        (ours, "Python-bound"): [1.2, -1.6, 1.3],
        (COPY, "compute-bound"): [1.0] * 3,
        (ours, "compute-bound"): [1.2, -1.4, 1.3],
    }
    lost = Table("Lost", "s", COPY, rows, columns_are="loop")
    sections = [section, Section("lost", "Lost", "How.", {"lost": lost}, {})]
    report.write(sections, Settings(tmp_path, (100,), 1.0), {"kernel": "Linux"}, path)
    text = path.read_text()
    assert (
        "| durable sync save, against the raw write | within 1.5x | 1.30x (1.20 to 1.40) | met |"
        in text
    )
    missed = "2.0x faster (1.9 to 2.2); the raw write of these bytes alone: 2.6x"
    assert f"| 3x faster | {missed} | **not met** |" in text
    assert (
        "| import lightning_sbckpt, against import torch | within 1.15x | - | not measured |"
        in text
    )
    assert "- DCP: not installed" in text
    assert (
        "within 1.5x | 1.20x (1.00 to 1.40) in 2 of the 3 rounds that a verdict takes | not" in text
    )
    # A save can't make a loop faster: what says so by more than the target tells nothing.
    assert "within 1.5x | 1.20x (-1.60 to 1.30): noise | not measured |" in text
    assert "within 1.5x | 1.20x (-1.40 to 1.30) | met |" in text
    assert "1.30 s [1.20, 1.40] **1.30x**" in text
    assert str(tmp_path) not in text


def test_no_two_lines_of_a_drawing_look_alike():
    """Each peer has a color or a marker that no other has with it, however many there are."""
    table = Table("t", "s", "a", {(row, "x"): [1.0] for row in "abcdefghijklm"})
    looks = [(style["color"], style["marker"]) for style in plots._style(table).values()]
    assert len(looks) == 13
    assert len(set(looks)) == 13
