"""A small share of what docs/scaling.md says: what a save costs does not grow with the ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from _ranks import free_port, run

from lightning_sbckpt._world.world import TorchDistributed
from lightning_sbckpt.plugin.state.per_rank import number_of_ranks, state_of_rank
from lightning_sbckpt.rng import isolated_rng

# The benchmarks are no part of what is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import rank_counts, ranks


def test_eight_ranks_save_and_every_one_finds_its_own_state(tmp_path):
    """By the simulation of the page, which has a time for every phase of every save."""
    took = ranks.simulate(8, tmp_path, 2, ["stacked"])["stacked"]
    assert len(took) == 2
    for phases in took:
        assert set(phases) == set(ranks.PHASES) and min(phases.values()) > 0
        parts = phases["collecting"] + phases["writing"] + phases["agreeing"]
        assert parts == pytest.approx(phases["total"])
    part = torch.load(tmp_path / "stacked" / "CKPT+0" / "rng.ckpt", weights_only=True)
    assert number_of_ranks(part) == 8
    with isolated_rng():
        for rank in range(8):
            ranks.seed(rank)
            assert torch.equal(state_of_rank(part, rank)["torch"], torch.get_rng_state())


def test_a_rank_that_fails_fails_the_simulation(tmp_path):
    """No table is made of half the ranks."""
    (tmp_path / "stacked").write_text("no folder")
    with pytest.raises(RuntimeError, match="2 ranks: a process failed"):
        ranks.simulate(2, tmp_path, 1, ["stacked"])


def test_collectives_and_operations_of_the_disk_do_not_grow_with_the_ranks(tmp_path):
    """Counted in a real fit; and none but rank zero touches or lists the folder in a save."""
    two, four = (rank_counts.counts_of(size, tmp_path, 99) for size in (2, 4))
    for told in (two[0], four[0]):
        # A folder as new as the tick of the disk's clock is listed again when it is looked at.
        assert told["counts"].pop("folder_listing") >= 1
    assert two[0] == four[0]
    counts = two[0]["counts"]
    assert counts["rename"] == 1 and counts["listing"] and counts["gather"] and counts["broadcast"]
    assert counts["create"] == len(two[0]["files"]) > 5
    for told in [*two[1:], *four[1:]]:
        assert set(told["counts"]) <= set(rank_counts.COLLECTIVES)
        assert told["counts"] == {
            name: times for name, times in counts.items() if name in rank_counts.COLLECTIVES
        }


def gather_once(folder: Path, rank: int) -> None:
    """Gather, where handing everything to everybody is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("every rank would receive and unpickle what rank zero alone needs")

    dist.all_gather_object = refuse
    port = (folder / "port").read_text()
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    found = TorchDistributed().gather({"rank": rank, "data": b"x" * (1000 * rank)})
    (folder / f"found{rank}").write_text(
        repr(found and [(f["rank"], len(f["data"])) for f in found])
    )
    dist.destroy_process_group()


def test_what_is_gathered_goes_to_rank_zero_alone(tmp_path):
    """In order, and of whatever size."""
    (tmp_path / "port").write_text(str(free_port()))
    assert run(gather_once, tmp_path, size=3).codes == [0, 0, 0]
    found = [(tmp_path / f"found{rank}").read_text() for rank in range(3)]
    assert found == ["[(0, 0), (1, 1000), (2, 2000)]", "None", "None"]
