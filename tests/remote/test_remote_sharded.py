"""A model in pieces on a URL: saved by two ranks, loaded by any number that has an empty mirror."""

from __future__ import annotations

import fsspec
import pytest
from _releases import needs_torch
from _sharded_ranks import make, run, same, train, whole

from lightning_sbckpt import Checkpointer

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")


def states_of(model, optimizer):
    return whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def save_to_url(folder, rank, url, options, mirror, mode):
    checkpointer, model, optimizer = make(
        url, storage_options=options, local_dir=mirror, save_mode=mode
    )
    train(model, optimizer, 2)
    expected = states_of(model, optimizer)
    checkpointer.save_checkpoint(name="a")
    train(model, optimizer, 1)
    checkpointer.wait()
    checkpointer.close()
    return expected


def load_from_url(folder, rank, url, options, mirror):
    checkpointer, model, optimizer = make(url, 9, storage_options=options, local_dir=mirror)
    found = checkpointer.recover_if_possible()
    checkpointer.close()
    return found.path.name, states_of(model, optimizer)


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_pieces_go_to_the_store_and_come_back_to_another_number_of_ranks(mode, s3_server, tmp_path):
    """Every rank's file is there; two ranks and one get the saved bits, by the URL alone."""
    s3_server.bucket(f"pieces-{mode}")
    url, options = f"s3://pieces-{mode}/run", s3_server.options
    expected, _ = run(save_to_url, tmp_path, url, options, tmp_path / "here", mode)
    filesystem, root = fsspec.url_to_fs(url, skip_instance_cache=True, **options)
    objects = {name.rsplit("/", 1)[1] for name in filesystem.find(root) if "model.dcp" in name}
    assert objects == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    for size in (2, 1):
        mirror = tmp_path / f"elsewhere-{size}"
        for name, found in run(load_from_url, tmp_path, url, options, mirror, size=size):
            assert name == "CKPT+a"
            assert same(found, expected)
    reader = Checkpointer(
        url, access="read", storage_options=options, local_dir=tmp_path / "reading"
    )
    assert [checkpoint.path.name for checkpoint in reader.list_checkpoints()] == ["CKPT+a"]
