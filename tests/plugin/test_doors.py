"""What the options promise holds at every door that loads: resume, fit end, test, load_from_checkpoint."""

from __future__ import annotations

import warnings

import pytest
import torch
from _runs import make, newest
from _stopped import Net, fit, seeded
from torch import nn
from torch.utils.data import DataLoader

from lightning_sbckpt.errors import MismatchError
from lightning_sbckpt.plugin._private.trainer import wrap


class Scored(Net):
    """Its first epoch is the best one."""

    def __init__(self, losses=(0.5, 3.0, 4.0, 5.0)):
        super().__init__()
        self.losses = losses

    def validation_step(self, batch, index):
        self.log("val_loss", self.losses[self.current_epoch])

    def test_step(self, batch, index):
        self.log("bias", self.bias())

    def bias(self):
        return self.net[2].bias.sum()


class Renamed(Scored):
    """Another name for the net."""

    def __init__(self):
        super().__init__()
        self.body = self.net
        del self.net

    def forward(self, x):
        return self.body(x)

    def bias(self):
        return self.body[2].bias.sum()


class Compiled(Scored):
    """What torch.compile makes of the net, without the compiler."""

    def __init__(self):
        super().__init__()
        self.net = torch._dynamo.OptimizedModule(self.net, torch._dynamo.disable)

    def bias(self):
        return self.net._orig_mod[2].bias.sum()


class Wider(Scored):
    """Another head."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Linear(8, 2)


class Needs(Scored):
    """Wants what older checkpoints lack."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = "abc"

    def on_load_checkpoint(self, checkpoint):
        if self.trainer.state.stage.value != "train" or self.trainer.current_epoch > 1:
            self.vocabulary = checkpoint["vocabulary"]


BEST = {"min_key": "val_loss", "val": True, "num_to_keep": 9}


def begin(tmp_path, module=Scored):
    """Train an epoch, which stays the best, and return its weights."""
    run = fit(tmp_path, seeded(module), epochs=1, **BEST)
    return {key: value.clone() for key, value in run.module.state_dict().items()}


@pytest.mark.parametrize(
    ("module", "options", "prefix"),
    [
        (Renamed, {"key_map": {"net.": "body."}}, "body."),
        (Compiled, {}, "net._orig_mod."),
    ],
    ids=["key_map", "compiled"],
)
def test_the_best_that_is_older_than_a_change_is_restored_by_the_same_options(
    tmp_path, module, options, prefix
):
    """At fit end, as at the resume."""
    best = begin(tmp_path)
    run = fit(tmp_path, seeded(module), epochs=3, **BEST, **options)
    assert run.trainer.global_step == 12
    found = run.module.state_dict()
    assert all(torch.equal(found[prefix + key[4:]], value) for key, value in best.items())
    logged = run.trainer.test(run.module, DataLoader(torch.zeros(1, 1)), "best", verbose=False)
    assert logged[0]["bias"] == pytest.approx(float(best["net.2.bias"].sum()))


def test_the_best_of_a_module_that_is_no_more_compiled_is_restored(tmp_path):
    """The other way round."""
    best = begin(tmp_path, Compiled)
    run = fit(tmp_path, seeded(Scored), epochs=3, **BEST)
    assert torch.equal(run.module.net[2].bias, best["net._orig_mod.2.bias"])


def test_the_best_that_is_older_than_a_wider_layer_is_restored_in_part_with_partial(tmp_path):
    """What fits is the best's; for the rest the last values stay, which is said."""
    best = begin(tmp_path)
    with pytest.warns(UserWarning, match=r"restored in part.*net\.2\.weight: \(1, 8\)"):
        run = fit(tmp_path, seeded(Wider), epochs=3, partial=True, **BEST)
    assert run.trainer.global_step == 12
    assert torch.equal(run.module.net[0].weight, best["net.0.weight"])


def test_the_best_that_does_not_fit_is_named_and_the_last_weights_stay(tmp_path):
    """The fit ends as it would: hours of training are no price for a traceback."""
    begin(tmp_path)
    last = {}

    class Kept(Wider):
        def on_train_end(self):
            last.update({key: value.clone() for key, value in self.state_dict().items()})

    skip = ["model", "optimizer"]
    with pytest.warns(UserWarning, match=r"don't fit this module, so the last weights stay"):
        run = fit(tmp_path, seeded(Kept), epochs=3, skip=skip, **BEST)
    found = run.module.state_dict()
    assert all(torch.equal(found[key], value) for key, value in last.items())


def test_a_hook_that_can_not_read_the_best_does_not_end_the_fit_with_an_error(tmp_path):
    """It wants what was not saved then."""
    begin(tmp_path)
    with pytest.warns(UserWarning, match=r"the last weights stay: KeyError\('vocabulary'\)"):
        run = fit(tmp_path, seeded(Needs), epochs=3, **BEST)
    assert run.trainer.current_epoch == 3


def test_weights_that_fit_are_restored_without_a_warning(tmp_path):
    """Nothing is said of what is in order."""
    best = begin(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*SBCheckpoint")
        run = fit(tmp_path, seeded(Scored), epochs=2, **BEST)
    assert torch.equal(run.module.net[0].weight, best["net.0.weight"])


@pytest.mark.parametrize("door", ["test", "validate", "predict"])
def test_a_folder_is_adapted_wherever_a_trainer_loads_it(tmp_path, door):
    """By the options of the callback."""
    best = begin(tmp_path)
    run = make(tmp_path, module=seeded(Renamed), key_map={"net.": "body."})
    data = DataLoader(torch.zeros(1, 4))
    getattr(run.trainer, door)(run.module, data, ckpt_path=str(newest(tmp_path).path))
    assert torch.equal(run.module.body[0].weight, best["net.0.weight"])


def test_partial_at_another_door_says_what_it_left_out(tmp_path):
    """There is no resume report then."""
    best = begin(tmp_path)
    path, data = str(newest(tmp_path).path), DataLoader(torch.zeros(1, 4))
    run = make(tmp_path, module=seeded(Wider), partial=True)
    with pytest.warns(UserWarning, match=r"not loaded from .*net\.2\.weight"):
        run.trainer.validate(run.module, data, ckpt_path=path)
    assert torch.equal(run.module.net[0].weight, best["net.0.weight"])
    strict = make(tmp_path, module=seeded(Wider))
    with pytest.raises(MismatchError, match=r"net\.2\.weight: \(1, 8\) in the checkpoint"):
        strict.trainer.validate(strict.module, data, ckpt_path=path)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("before", "after"), [(Scored, Compiled), (Compiled, Scored)], ids=["compiled", "no more"]
)
def test_load_from_checkpoint_finds_compiled_names(tmp_path, before, after, strict):
    """That is all that can be known there; with strict=False they would be left out silently."""
    best = begin(tmp_path, before)
    loaded = after.load_from_checkpoint(str(newest(tmp_path).path), strict=strict)
    found = {key.replace("_orig_mod.", ""): value for key, value in loaded.state_dict().items()}
    assert all(
        torch.equal(found[key.replace("_orig_mod.", "")], value) for key, value in best.items()
    )


def test_load_from_checkpoint_asks_the_modules_hook_with_what_was_saved(tmp_path):
    """And takes what the hook leaves."""

    class Migrates(Renamed):
        def on_load_checkpoint(self, checkpoint):
            old = checkpoint["state_dict"]
            checkpoint["state_dict"] = {f"body.{key[4:]}": value for key, value in old.items()}

    best = begin(tmp_path)
    loaded = Migrates.load_from_checkpoint(str(newest(tmp_path).path))
    assert torch.equal(loaded.body[0].weight, best["net.0.weight"])


def test_two_wrappers_on_one_method_both_run_and_come_off_in_turn():
    """Each door wraps what another one may have wrapped before."""

    class Owner:
        def method(self):
            return ["method"]

    owner = Owner()
    undo = [
        wrap(owner, "method", lambda original, name=name: [name, *original()])
        for name in ("inner", "outer")
    ]
    assert owner.method() == ["outer", "inner", "method"]
    undo.pop()()
    assert owner.method() == ["inner", "method"]
    undo.pop()()
    assert owner.method() == ["method"]
