"""A run whose model is in pieces on a URL: it goes on on a machine that has only the URL."""

from __future__ import annotations

import pytest
import torch
from _ranks import make, run
from _releases import needs_torch
from _sharded_fits import InPieces, local, strategy
from remote._servers import started

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = started("s3", tmp_path_factory.mktemp("s3") / "store")
    yield server
    server.kill()


def fit(folder, rank, size, url, epochs, options):
    trainer, module, callback, loaders = make(
        url,
        rank,
        size=size,
        module=InPieces,
        trainer={"strategy": strategy(size), "max_epochs": epochs},
        restore_best=False,
        local_dir=folder / "mirror",
        **options,
    )
    trainer.fit(module, **loaders)
    torch.save(local(dict(module.state_dict())), folder / f"final{rank}.pt")
    report = callback.resume_report
    (folder / f"report{rank}.txt").write_text(str(report))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["async", pytest.param("sync", marks=pytest.mark.slow)])
def test_a_run_in_pieces_goes_on_elsewhere_from_its_url(mode, server, tmp_path):
    """Two ranks end with the bits of a run without a seam; one rank goes on, and says from where."""
    server.bucket(f"runs-{mode}")
    options = {"save_mode": mode, "storage_options": server.options}

    def go(where, name, epochs, size=2):
        folder = tmp_path / where
        url = f"s3://runs-{mode}/{name}"
        ended = run(fit, folder, size, url, epochs, options, size=size)
        assert ended.codes == [0] * size, "\n".join(ended.outputs)
        return folder

    go("one", "whole", 2)
    go("two", "parted", 1)
    go("three", "parted", 2)
    for rank in range(2):
        assert "resuming from" in (tmp_path / "three" / f"report{rank}.txt").read_text()
        one, three = (
            torch.load(tmp_path / where / f"final{rank}.pt", weights_only=True)
            for where in ("one", "three")
        )
        assert one.keys() == three.keys()
        assert all(torch.equal(one[name], three[name]) for name in one)
    go("four", "parted", 3, size=1)
    assert "saved by 2 ranks, this run has 1" in (tmp_path / "four" / "report0.txt").read_text()
