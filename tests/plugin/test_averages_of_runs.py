"""An average in the folder of a run is in nobody's way, and Lightning loads it."""

from __future__ import annotations

import pytest
import torch
from _runs import BATCHES, Steps, fit, loader, make, saved
from plain_run import Net, data, trainer

from lightning_sbckpt import SBCheckpoint
from lightning_sbckpt.averaging import save_average
from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.plugin.state.parts import is_resumable


@pytest.mark.parametrize("with_rest", [False, True])
def test_a_run_neither_goes_on_from_an_average_nor_removes_it(tmp_path, with_rest):
    """Even one that has all files of a fit, and is all that is left beside the newest."""
    fit(tmp_path, num_to_keep=3, trainer={"max_epochs": 2})
    average = save_average(tmp_path, saved(tmp_path), with_rest=with_rest)
    assert not is_resumable(average)
    run = fit(tmp_path, num_to_keep=1, trainer={"max_epochs": 4})
    assert run.callback.resume_report.meta["global_step"] == 2 * BATCHES
    assert run.module.steps == 4 * BATCHES
    assert average.path.is_dir()
    assert run.callback.best_model_path != str(average.path)


def test_a_run_begins_anew_if_only_an_average_is_there(tmp_path):
    """Its optimizer would be that of other weights."""
    fit(tmp_path / "run", num_to_keep=3, trainer={"max_epochs": 2})
    save_average(tmp_path / "other", saved(tmp_path / "run"), with_rest=True)
    run = fit(tmp_path / "other", trainer={"max_epochs": 1})
    assert run.callback.resume_report is None
    assert run.module.steps == BATCHES


def test_an_average_does_not_take_the_place_of_a_run_s_own(tmp_path):
    """Of the newest two, both are the run's."""
    fit(tmp_path, num_to_keep=2, trainer={"max_epochs": 2})
    average = save_average(tmp_path, saved(tmp_path))
    fit(tmp_path, num_to_keep=2, trainer={"max_epochs": 4})
    steps = [ckpt.meta["global_step"] for ckpt in saved(tmp_path) if ckpt.path != average.path]
    assert steps == [3 * BATCHES, 4 * BATCHES]


def test_a_fit_that_is_told_to_go_on_from_weights_alone_is_refused(tmp_path):
    """By name, with what to do instead; the module stays as it was."""
    fit(tmp_path, num_to_keep=3, trainer={"max_epochs": 2})
    average = save_average(tmp_path, saved(tmp_path))
    run = make(tmp_path)
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    with pytest.raises(MismatchError, match=r"has weights and not the state of a fit \(no loops"):
        run.trainer.fit(run.module, loader(), ckpt_path=str(average.path))
    for name, value in run.module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_lightning_tests_and_loads_an_average(tmp_path):
    """By `ckpt_path`, and by `load_from_checkpoint` with the hyperparameters of the rest."""
    callback = SBCheckpoint(tmp_path / "run", num_to_keep=3, restore_best=False)
    trainer(2, enable_checkpointing=True, callbacks=[callback]).fit(Net(3), data(), data())
    ckpts = saved(tmp_path / "run")
    average = save_average(tmp_path / "run", ckpts, with_rest=True)
    expected = sum(ckpt.open("model")["layer.weight"] for ckpt in ckpts) / 2
    loaded = Net.load_from_checkpoint(average.path)
    torch.testing.assert_close(loaded.layer.weight.detach(), expected)
    alone = save_average(tmp_path / "run", ckpts)
    torch.testing.assert_close(
        Net.load_from_checkpoint(alone.path, width=3).layer.weight.detach(), expected
    )


def test_an_average_may_be_asked_for_by_name(tmp_path):
    """Whoever says `ckpt_path` means it."""
    fit(tmp_path, num_to_keep=3, trainer={"max_epochs": 2})
    average = save_average(tmp_path, saved(tmp_path))
    run = make(tmp_path)
    (found,) = run.trainer.test(Steps(), loader(1), ckpt_path=average.path)
    assert found["test_steps"] == 1.5 * BATCHES
