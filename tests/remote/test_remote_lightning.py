"""A Lightning run on a URL: killed on one machine, it goes on on another to the same bits."""

from __future__ import annotations

from pathlib import Path

import _logged
import lightning as L
import pytest
import torch
from _python import python
from torch.utils.data import DataLoader

from lightning_sbckpt import Checkpointer, SBCheckpoint
from remote._lightning_run import Net, data
from remote._machines import environment, find_by_environment

BUCKET = "fits"
RUN = Path(__file__).with_name("_lightning_run.py")


@pytest.fixture
def bucket(server, request):
    name = f"fit-{abs(hash(request.node.nodeid)) % 10**9}"
    server.bucket(name)
    return server.url(name)


@pytest.fixture
def here(server, tmp_path, monkeypatch):
    """Let this process find the server as a user's does: by the environment."""
    find_by_environment(server, tmp_path / "cache-here", monkeypatch)


def fit(server, cache, url, out, *args, code=0):
    done = python(RUN, url, out, *map(str, args), env=environment(server, cache), timeout=200)
    assert done.returncode == code, done.stderr
    return torch.load(out, weights_only=True) if code == 0 else None


def flat(value, place=""):
    """Give every number and tensor of a state with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{place}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from flat(item, f"{place}/{index}")
    else:
        yield place, value


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("mode", "kill_at"), [("sync", 14), pytest.param("async", 20, marks=pytest.mark.slow)]
)
def test_a_fit_killed_on_one_machine_ends_on_another_with_the_same_bits(
    mode, kill_at, server, bucket, tmp_path
):
    """Weights, optimizer, logged metrics and the next random number; only the URL is shared."""
    whole = fit(server, tmp_path / "one", f"{bucket}/whole", tmp_path / "whole.pt", mode)
    url = f"{bucket}/killed"
    fit(server, tmp_path / "two", url, tmp_path / "no.pt", mode, kill_at, code=-9)
    resumed = fit(server, tmp_path / "three", url, tmp_path / "resumed.pt", mode)
    assert whole["resumed_at"] is None
    # A save every three steps; in the background the last one may have died with the process.
    assert resumed["resumed_at"] in ([12] if mode == "sync" else [15, 18])
    assert resumed["best"]
    for state in (whole, resumed):
        del state["resumed_at"], state["best"]
    expected, found = dict(flat(whole)), dict(flat(resumed))
    assert expected.keys() == found.keys()
    different = [
        name
        for name, value in expected.items()
        if not (
            torch.equal(value, found[name])
            if isinstance(value, torch.Tensor)
            else value == found[name]
        )
    ]
    assert different == []


def trainer(*callbacks, epochs=1):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )


def loader():
    return DataLoader(data(), batch_size=8)


def test_log_goes_on_on_another_machine(server, here, bucket, monkeypatch, tmp_path):
    """What a checkpoint in a store notes of the loggers is read before they are opened."""
    _logged.fit(tmp_path / "whole", ["csv"], where=f"{bucket}/whole")
    with pytest.raises(ConnectionAbortedError):
        _logged.fit(tmp_path / "cut", ["csv"], [Stop()], where=f"{bucket}/cut")
    find_by_environment(server, tmp_path / "cache-there", monkeypatch)
    _logged.fit(tmp_path / "cut", ["csv"], where=f"{bucket}/cut")
    assert _logged.held("csv", tmp_path / "cut") == _logged.held("csv", tmp_path / "whole")


class Stop(L.Callback):
    """Ends a fit in the middle of an epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 17:
            raise ConnectionAbortedError


def test_urls_go_where_paths_of_checkpoints_go(here, bucket, monkeypatch, tmp_path):
    """`fit(ckpt_path=...)`, `test(ckpt_path=...)`, `load_from_checkpoint`, and "best"."""
    url = f"{bucket}/run"
    callback = SBCheckpoint(url, min_key="val_loss")
    module = Net()
    first = trainer(callback)
    first.fit(module, loader(), loader())
    assert callback.dirpath == url
    # A path that can be loaded; the URL is said in messages.
    assert Path(callback.best_model_path).is_dir()
    name = Path(callback.last_model_path).name

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-cache"))
    for word in (name, "best", "newest"):
        loaded = Net.load_from_checkpoint(f"{url}/{word}")
        for key, value in module.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key

    again = SBCheckpoint(tmp_path / "elsewhere")
    going_on = trainer(again, epochs=2)
    going_on.fit(Net(), loader(), loader(), ckpt_path=f"{url}/newest")
    assert again.resume_report.meta["global_step"] == 5
    assert going_on.global_step == 10

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third-cache"))
    Net.test_step = Net.validation_step
    try:
        tested = trainer(SBCheckpoint(tmp_path / "x")).test(
            Net(), loader(), ckpt_path=f"{url}/best", verbose=False
        )
    finally:
        del Net.test_step
    assert tested[0]["val_loss"] == pytest.approx(float(first.callback_metrics["val_loss"]))


def test_a_url_that_is_no_checkpoint_of_ours_goes_to_lightning(here):
    """No store is asked about it by us."""
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.ckpt"):
        Net.load_from_checkpoint("memory://files/elsewhere.ckpt")


def test_the_best_weights_are_restored_from_the_store(here, bucket, monkeypatch):
    """Although their file is not on this machine any more, when the newest is another one."""
    callback = SBCheckpoint(f"{bucket}/run", min_key="val_loss", num_to_keep=1)
    losses = iter([0.1, 0.9, 0.8])

    def scripted(self):
        self.log("val_loss", next(losses))

    monkeypatch.setattr(Net, "validation_step", lambda self, batch, batch_idx: None)
    monkeypatch.setattr(Net, "on_validation_epoch_end", scripted)
    seen = []

    class Note(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(pl_module.net[0].weight.detach().clone())

    module = Net()
    trainer(callback, Note(), epochs=3).fit(module, loader(), loader())
    assert torch.equal(module.net[0].weight, seen[0])
    other = Checkpointer(f"{bucket}/run", access="read")
    assert [ckpt.meta["val_loss"] for ckpt in other.list_checkpoints()] == [
        pytest.approx(0.1),
        pytest.approx(0.8),
    ]
