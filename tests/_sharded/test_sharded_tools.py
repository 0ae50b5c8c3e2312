"""What is in pieces is put together by one process, and every tool says what it makes of pieces."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from _python import python
from _releases import needs_torch
from _sharded_ranks import make, plain_model, run, same, train, whole

from lightning_sbckpt import Checkpointer, average_checkpoints
from lightning_sbckpt._layout.manifest import find_damage, read_manifest
from lightning_sbckpt._layout.publish import read_checkpoint
from lightning_sbckpt._save.request import SaveRequest
from lightning_sbckpt._sharded.states import ShardedState
from lightning_sbckpt.consolidation import consolidate
from lightning_sbckpt.difference import diff
from lightning_sbckpt.errors import ConfigurationError, DamagedCheckpointError, MismatchError
from lightning_sbckpt.export import to_safetensors
from lightning_sbckpt.verify import verify

pytestmark = needs_torch("2.6", "torch.distributed.fsdp.fully_shard")


def save(folder, rank):
    checkpointer, model, optimizer = make(folder)
    train(model, optimizer, 3)
    checkpointer.add_recoverable("scheduler", torch.optim.lr_scheduler.StepLR(optimizer, 2))
    extra_files = {"hparams.yaml": "width: 7\n"}
    checkpointer.save(
        SaveRequest(checkpointer.recoverables, {"loss": 0.5}, name="a", extra_files=extra_files)
    )
    state = whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    if rank == 0:
        torch.save(state, folder.parent / "expected.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What two ranks have saved, and what it has to be as a whole."""
    folder = tmp_path_factory.mktemp("saved")
    run(save, folder)
    return read_checkpoint(folder / "run" / "CKPT+a"), torch.load(folder / "expected.pt")


def test_plain_torch_reads_what_was_put_together(saved, tmp_path):
    """The model's state_dict, and the optimizer's in the ordinary form."""
    source, expected = saved
    found = consolidate(source, tmp_path)
    assert found.path.name == "CKPT+a+whole"
    for name in ("model", "optimizer"):
        state = torch.load(found.paramfiles[name], weights_only=True)
        assert found.paramfiles[name].name == f"{name}.ckpt"
        assert same(state, expected[name]), name
    optimizer = torch.optim.AdamW(plain_model().parameters())
    optimizer.load_state_dict(torch.load(found.paramfiles["optimizer"], weights_only=True))


def test_the_rest_is_copied_and_it_says_where_it_comes_from(saved, tmp_path):
    """Files, meta and documents; it is whole, pinned, and the older of the two."""
    source, _ = saved
    found = consolidate(source, tmp_path, name="put-together")
    assert sorted(found.paramfiles) == sorted(source.paramfiles)
    assert found.paramfiles["scheduler"].read_bytes() == source.paramfiles["scheduler"].read_bytes()
    assert (found.path / "hparams.yaml").read_text() == "width: 7\n"
    assert find_damage(found.path) == []
    lineage = read_manifest(found.path).lineage
    assert lineage["consolidated-from"] == "CKPT+a"
    assert "run" not in lineage
    assert found.meta["loss"] == 0.5
    assert found.meta["unixtime"] < source.meta["unixtime"]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.delete_checkpoints(num_to_keep=0)
        assert [ckpt.path for ckpt in checkpointer.list_checkpoints()] == [found.path]
    assert [name for name in os.listdir(tmp_path) if name.startswith("tmp")] == []


def test_it_is_loaded_in_one_process(saved, tmp_path):
    """Into a plain model and optimizer."""
    source, expected = saved
    model = plain_model(7)
    optimizer = torch.optim.AdamW(model.parameters())
    found = consolidate(source, tmp_path)
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}) as checkpointer:
        checkpointer.load_checkpoint(found)
    assert same(dict(model.state_dict()), expected["model"])
    assert same(optimizer.state_dict(), expected["optimizer"])


def test_the_same_name_twice_and_a_plain_checkpoint_are_refused(saved, tmp_path):
    """Nothing is written over, and there is nothing to do for the other."""
    source, _ = saved
    found = consolidate(source, tmp_path)
    with pytest.raises(ConfigurationError, match=r"exists already\. Give it another name"):
        consolidate(source, tmp_path)
    with pytest.raises(ConfigurationError, match="has nothing to consolidate: no state in it is"):
        consolidate(found, tmp_path, name="again")


def test_a_damaged_piece_is_not_put_together(tmp_path):
    """Nothing is visible of it."""
    pieces = ShardedState({"weight": torch.ones(100)})
    with Checkpointer(tmp_path, {"model": pieces}) as checkpointer:
        found = checkpointer.save_checkpoint(name="a")
    piece = next(found.paramfiles["model"].glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedCheckpointError, match="checksum differs"):
        consolidate(found)
    assert sorted(name for name in os.listdir(tmp_path) if "CKPT" in name) == ["CKPT+a"]


MEASURED = """
import sys
from lightning_sbckpt.consolidation import consolidate
import lightning_sbckpt._sharded.reading
def anonymous():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["RssAnon"].split()[0])
import threading, time
highest, before = 0, anonymous()
done = False
def watch():
    global highest
    while not done:
        highest = max(highest, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
consolidate(sys.argv[1], sys.argv[2])
done = True
thread.join()
print(highest - before)
"""


@pytest.mark.slow
def test_the_whole_is_never_in_memory(tmp_path):
    """256 MB in tensors of 16 MB: beyond a few of them the memory is the file's, not the process's."""
    state = {f"layer{n}": torch.full((2**22,), float(n)) for n in range(16)}
    with Checkpointer(tmp_path / "run", {"model": ShardedState(state)}) as checkpointer:
        found = checkpointer.save_checkpoint(name="a")
    told = subprocess.run(
        [sys.executable, "-c", MEASURED, str(found.path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(told.stdout) * 1024 < 100e6
    loaded = torch.load(tmp_path / "CKPT+a+whole" / "model.ckpt", weights_only=True)
    assert same(loaded, state)


def command(*words):
    return python("-m", "lightning_sbckpt.cli", *words)


def test_the_command_prints_the_path_of_what_it_wrote(saved, tmp_path):
    """And refuses in one line."""
    source, _ = saved
    done = command("consolidate", source.path, "--to", tmp_path, "--name", "b")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'CKPT+b'}\n"), done.stderr
    again = command("consolidate", tmp_path / "CKPT+b")
    assert again.returncode != 0
    assert "has nothing to consolidate" in again.stderr


def test_show_lists_the_tensors_that_are_in_pieces(saved):
    """With the size of the whole; none is read."""
    source, _ = saved
    lines = command("show", source.path, "--keys", "*weight*").stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("  0.weight")] == [
        ["0.weight", "7", "x", "5", "float32"]
    ]
    assert any(line.split()[0] == "state/0.weight/exp_avg" for line in lines)


def test_verify_reads_the_pieces(saved):
    """As it reads every other file."""
    source, _ = saved
    assert [found.status for found in verify(source.path)] == ["sound"]


@pytest.mark.parametrize(
    "use",
    [
        lambda found, folder: found.open("model"),
        lambda found, folder: average_checkpoints([found], "model"),
        lambda found, folder: to_safetensors(found, folder / "model.safetensors"),
    ],
    ids=["open", "average", "export"],
)
def test_what_wants_a_file_says_to_put_it_together_first(saved, tmp_path, use):
    """The message has the command."""
    source, _ = saved
    with pytest.raises(MismatchError, match=r"Put it together first: lightning-sbckpt consolidate"):
        use(source, tmp_path)


def test_a_difference_of_pieces_is_one_of_bytes(saved):
    """A checkpoint is equal to itself."""
    source, _ = saved
    assert diff(source, source).equal
