"""Averages as checkpoints of their own, which know where they come from."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from _python import python

from lightning_sbckpt import Checkpointer
from lightning_sbckpt._layout.manifest import find_damage, read_manifest
from lightning_sbckpt.averaging import save_average
from lightning_sbckpt.errors import (
    ConfigurationError,
    DamagedCheckpointError,
    FolderInUseError,
    MismatchError,
    SaveError,
    UntrustedPickleError,
)


@pytest.fixture
def folder(tmp_path, scale):
    """Three checkpoints of a model, 1, 2 and 6, and a head of the negative."""
    checkpointer = Checkpointer(tmp_path)
    for epoch, value in enumerate((1.0, 2.0, 6.0)):
        checkpointer.recoverables = {"model": scale(value), "head": scale(-value)}
        meta = {"loss": 1 / value, "epoch": epoch, "global_step": 10 * epoch + 10}
        checkpointer.save_checkpoint(meta, name=f"{value:g}", end_of_epoch=epoch != 2)
    checkpointer.close()
    return tmp_path


def sources(folder):
    return sorted(folder.glob("CKPT+[0-9]"))


def param(checkpoint, name="model"):
    return checkpoint.open(name)["param"].item()


def test_the_average_is_a_checkpoint_that_is_whole(folder):
    """With the averaged model and nothing else, a sound manifest, and a name with the time."""
    average = save_average(folder, sources(folder))
    assert param(average) == 3.0
    assert list(average.paramfiles) == ["model"]
    assert average.path.name.startswith("CKPT+average+20")
    assert find_damage(average.path) == []
    assert average.path in {ckpt.path for ckpt in Checkpointer(folder).list_checkpoints()}


def test_it_says_where_it_comes_from(folder):
    """In meta and in the lineage, with the range of epochs and steps, in the order given."""
    average = save_average(folder, reversed(sources(folder)), meta={"note": "swa"})
    names = ["CKPT+6", "CKPT+2", "CKPT+1"]
    assert average.meta["averaged-from"] == names
    assert average.meta["averaged-epochs"] == [0, 2]
    assert average.meta["averaged-steps"] == [10, 30]
    assert average.meta["note"] == "swa"
    assert average.meta["end-of-epoch"] is False
    assert read_manifest(average.path).lineage == {"averaged-from": names}


def test_no_metric_of_the_sources_is_its_own(folder):
    """So it is no candidate for the best, until one is computed for it."""
    average = save_average(folder, sources(folder))
    assert not {"loss", "epoch", "global_step"} & average.meta.keys()
    checkpointer = Checkpointer(folder)
    assert checkpointer.find_checkpoint(min_key="loss").path.name == "CKPT+6"
    checkpointer.annotate(average, {"loss": 0.01})
    assert checkpointer.find_checkpoint(min_key="loss").path == average.path


def test_recovery_does_not_take_it_for_the_newest(folder, scale):
    """It was made last, of weights that are older than the newest ones."""
    average = save_average(folder, sources(folder))
    model = scale()
    recovered = Checkpointer(folder, {"model": model}).recover_if_possible()
    assert recovered.path.name == "CKPT+6"
    assert model.value == 6.0
    assert average.meta["unixtime"] < recovered.meta["unixtime"]


def test_retention_leaves_it_alone(folder, scale):
    """Until somebody unpins it."""
    average = save_average(folder, sources(folder))
    checkpointer = Checkpointer(folder, {"model": scale()})
    checkpointer.save_and_keep_only(num_to_keep=1)
    checkpointer.delete_checkpoints(num_to_keep=0)
    assert [ckpt.path for ckpt in checkpointer.list_checkpoints()] == [average.path]
    assert average.meta["pinned"] == "the average of 3 checkpoints"
    checkpointer.unpin(average)
    checkpointer.delete_checkpoints(num_to_keep=0)
    assert checkpointer.list_checkpoints() == []


def test_several_recoverables_are_averaged(folder):
    """Each over all checkpoints."""
    average = save_average(folder, sources(folder), recoverables=["model", "head"])
    assert (param(average), param(average, "head")) == (3.0, -3.0)


def test_the_rest_is_that_of_the_newest_source(folder, tree_bytes):
    """To the byte, if it is asked for, whatever the order of the sources."""
    average = save_average(folder, reversed(sources(folder)), with_rest=True)
    assert (param(average), param(average, "head")) == (3.0, -6.0)
    assert tree_bytes(average.path)["head.ckpt"] == tree_bytes(folder / "CKPT+6")["head.ckpt"]
    assert find_damage(average.path) == []


def test_a_name_that_is_taken_is_refused(folder, tree_bytes):
    """A source must not be replaced; and two averages of one second have two names."""
    before = tree_bytes(folder / "CKPT+6")
    with pytest.raises(ConfigurationError, match=r"CKPT\+6 exists already. Give it another name"):
        save_average(folder, sources(folder), name="6")
    assert tree_bytes(folder / "CKPT+6") == before
    paths = {save_average(folder, sources(folder)).path for _ in range(3)}
    assert len(paths) == 3
    assert save_average(folder, sources(folder), name="mine").path.name == "CKPT+mine"


def test_it_can_go_to_another_folder(folder, tmp_path):
    """Which is made; the sources are records or paths of any folder."""
    ckpts = Checkpointer(folder).list_checkpoints()
    average = save_average(tmp_path / "averages", [ckpts[0], str(ckpts[1].path), ckpts[2].path])
    assert average.path.parent == tmp_path / "averages"
    assert param(average) == 3.0


def test_a_checkpointer_may_be_given_and_is_left_as_it_was(folder, scale):
    """Its recoverables and lineage are not touched, and it may still save."""
    checkpointer = Checkpointer(folder, {"model": scale(5.0)})
    checkpointer.claim()
    average = save_average(checkpointer, sources(folder))
    assert average.path.parent == folder
    assert list(checkpointer.recoverables) == ["model"]
    assert checkpointer.lineage == {}
    assert param(checkpointer.save_checkpoint()) == 5.0


def test_a_checkpointer_that_only_reads_saves_no_average(folder):
    """Reading only is its promise."""
    with pytest.raises(SaveError, match="open for reading only"):
        save_average(Checkpointer(folder, access="read"), sources(folder))
    assert len(list(folder.glob("CKPT*"))) == 3


def test_a_damaged_source_is_refused(folder):
    """By the name of the file; nothing is saved."""
    file = folder / "CKPT+2" / "model.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"CKPT\+2 is damaged .* model\.ckpt"):
        save_average(folder, sources(folder))
    assert len(list(folder.glob("CKPT*"))) == 3


def test_nothing_to_average_is_an_error(folder):
    """Neither without sources nor without recoverables is there anything to save."""
    for given, recoverables in (([], ["model"]), (sources(folder), [])):
        with pytest.raises(ConfigurationError, match="Nothing to average"):
            save_average(folder, given, recoverables=recoverables)
    with pytest.raises(MismatchError, match="Cannot average 'net'"):
        save_average(folder, sources(folder), recoverables=["net"])


class Plain:
    """What only pickle can hold."""


@pytest.mark.filterwarnings("ignore")
def test_what_only_pickle_can_hold_is_not_dropped_silently(tmp_path, another_user):
    """A model with such a state has no average without trust, but for the user whose run saved it."""

    class Model(torch.nn.Linear):
        def get_extra_state(self):
            return Plain()

        def set_extra_state(self, state):
            pass

    saved = Checkpointer(tmp_path, {"model": Model(1, 1)}).save_checkpoint()
    assert "model+pickled.ckpt" in os.listdir(save_average(tmp_path / "own", [saved]).path)
    another_user()
    with pytest.raises(UntrustedPickleError, match="only pickle can hold"):
        save_average(tmp_path, [saved])


AVERAGE = """
import sys
from lightning_sbckpt.averaging import save_average
save_average(sys.argv[1], sys.argv[2:])
"""


def test_a_folder_that_a_run_is_writing_to_is_left_to_it(folder, tmp_path):
    """An average is refused there, by the name of the process, and may go elsewhere."""
    checkpointer = Checkpointer(folder)
    checkpointer.claim()

    def average(where):
        return python("-c", AVERAGE, where, *sources(folder))

    refused = average(str(folder))
    assert refused.returncode == 1
    assert FolderInUseError.__name__ in refused.stderr
    assert len(list(folder.glob("CKPT*"))) == 3
    assert average(str(tmp_path / "elsewhere")).returncode == 0


MEASURE = """
import sys
from pathlib import Path
from lightning_sbckpt.averaging import save_average
def peak():
    (line,) = [line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
save_average(sys.argv[1], [sys.argv[2]])
before = peak()
save_average(sys.argv[1], sys.argv[3:])
print((peak() - before) / 1e6)
"""


@pytest.mark.long
def test_many_large_checkpoints_take_no_more_memory_than_few(tmp_path):
    """Four states of 80 MB: the average, and not much more than one source, are in memory."""
    paths = []
    for number, count in enumerate((10, *[20_000_000] * 4)):
        layer = torch.nn.Linear(count, 1, bias=False)
        checkpointer = Checkpointer(tmp_path / "run", {"model": layer})
        paths.append(str(checkpointer.save_checkpoint(name=str(number)).path))
        checkpointer.close()
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "out"), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 220
