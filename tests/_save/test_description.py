"""What a new checkpoint says of itself: the keys of every checkpoint, when somebody sets them."""

from __future__ import annotations

import math

import pytest

from lightning_sbckpt import Checkpointer, SBCheckpointError
from lightning_sbckpt._save.request import time_after
from lightning_sbckpt.errors import MetaError


@pytest.mark.parametrize(
    "meta",
    [
        {"unixtime": "soon"},
        {"unixtime": None},
        {"unixtime": math.nan},
        {"unixtime": math.inf},
        {"end-of-epoch": 1},
        {"end-of-epoch": "yes"},
    ],
)
def test_a_key_of_every_checkpoint_is_not_set_to_what_is_of_no_use(tmp_path, meta):
    """The message has both keys as they were given; nothing is saved."""
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(MetaError, match="'unixtime' must be a number of seconds") as caught:
        checkpointer.save_checkpoint(meta)
    assert isinstance(caught.value, SBCheckpointError)
    assert repr(*meta.values()) in str(caught.value)
    assert checkpointer.list_checkpoints() == []
    assert list(tmp_path.iterdir()) == []


def test_time_and_end_of_epoch_that_are_given_take_the_place_of_those_that_are_known(tmp_path):
    """Whoever saves what was made elsewhere, and earlier, says when that was."""
    checkpointer = Checkpointer(tmp_path)
    saved = checkpointer.save_checkpoint({"unixtime": 12.0, "end-of-epoch": False, "loss": 0.5})
    assert saved.meta == {"unixtime": 12.0, "end-of-epoch": False, "loss": 0.5}
    assert checkpointer.list_checkpoints() == [saved]


def test_a_save_after_one_of_the_future_is_later_still():
    """A clock that was set back does not make the newest checkpoint look older."""
    assert 4e9 < time_after(4e9) < 4e9 + 1


def test_who_only_reads_makes_no_folder(tmp_path):
    """A folder that does not exist yet is one without checkpoints."""
    reader = Checkpointer(tmp_path / "later" / "run", access="read")
    assert reader.list_checkpoints() == []
    assert reader.recover_if_possible() is None
    assert list(tmp_path.iterdir()) == []
