"""Checkpoints that are named by their meta, in place of the time."""

from __future__ import annotations

import pytest
from _runs import fit, newest, saved

from lightning_sbckpt import SavePolicy, SBCheckpoint
from lightning_sbckpt.errors import ConfigurationError
from lightning_sbckpt.plugin.dirpath import named


def names(folder):
    return sorted(each.path.name for each in saved(folder))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_template_names_checkpoints(tmp_path, mode):
    """What was not computed within the epoch is `none`; the newest is by time, and found as ever."""
    policy = SavePolicy(mode, name="{epoch:03d}-{val_loss:.3f}")
    run = fit(
        tmp_path, save_mode=policy, num_to_keep=9, every_n_train_steps=2, trainer={"max_epochs": 2}
    )
    assert names(tmp_path) == [
        "CKPT+000-0.200",
        "CKPT+000-none",
        "CKPT+001-0.111",
        "CKPT+001-none",
    ]
    assert run.callback.last_model_path.endswith("CKPT+001-0.111")
    again = fit(tmp_path, save_mode=policy, num_to_keep=9, trainer={"max_epochs": 3})
    assert again.callback.resume_report.meta["global_step"] == 8
    assert newest(tmp_path).path.name == "CKPT+002-0.077"


def test_a_name_that_is_taken_is_followed_by_a_number(tmp_path):
    """One that has been removed is not given again by the same process, to which a reader may hold."""
    fit(
        tmp_path,
        save_mode=SavePolicy(name="at-{epoch}"),
        every_n_train_steps=1,
        trainer={"max_epochs": 1},
    )
    assert names(tmp_path) == ["CKPT+at-0+03"]
    fit(
        tmp_path / "all",
        save_mode=SavePolicy(name="at-{epoch}"),
        every_n_train_steps=2,
        num_to_keep=9,
        trainer={"max_epochs": 1},
    )
    assert names(tmp_path / "all") == ["CKPT+at-0", "CKPT+at-0+01"]


def test_speechbrain_reads_them(tmp_path, speechbrain):
    """It finds the newest by the time in the meta."""
    fit(tmp_path, save_mode=SavePolicy(name="{epoch}/{val_loss}"), num_to_keep=3)
    theirs = speechbrain.utils.checkpoints.Checkpointer(tmp_path)
    assert theirs.find_checkpoint().path.name == newest(tmp_path).path.name
    assert len(theirs.list_checkpoints()) == 3


@pytest.mark.parametrize(
    ("template", "meta", "name"),
    [
        ("{epoch:03d}-{val/acc:.2f}", {"epoch": 3, "val/acc": 0.5}, "003-0.50"),
        ("{val.acc}", {"val.acc": 1.0}, "1.0"),
        ("{a}", {}, "none"),
        ("{a:.3f}", {"a": "text"}, "text"),
        ("{a}", {"a": "../../etc\n"}, "etc"),
        ("../{a}/b", {"a": 1}, ".._1_b"),
        ("{a}", {"a": float("nan")}, "nan"),
        ("{a}", {"a": "ü" * 500}, "_"),
        ("{a}", {"a": "x" * 500}, "x" * 100),
    ],
)
def test_a_name_stays_in_its_folder_and_never_fails(template, meta, name):
    """Whatever the values are."""
    assert named(template, meta) == name


@pytest.mark.parametrize("wrong", ["{", "{}", "best", "{0}{}", 3])
def test_a_template_without_keys_is_refused(wrong):
    """At construction."""
    with pytest.raises(ConfigurationError, match="expected a text with keys of the meta"):
        SavePolicy(name=wrong)


def test_the_argument_of_model_checkpoint_names_it():
    """Where one would write it there."""
    with pytest.raises(ConfigurationError, match=r"filename is .*SavePolicy\(name="):
        SBCheckpoint("run", filename="{epoch}")
