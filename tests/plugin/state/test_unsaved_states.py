"""An object with a state that nothing saves is named at the first fit."""

from __future__ import annotations

import warnings

import pytest
import torch
from _stopped import Net, fit


class Average:
    """As `torch_ema.ExponentialMovingAverage`: has a state, and is no module."""

    def state_dict(self):
        return {"updates": 1}

    def load_state_dict(self, state):
        pass


class Averaging(Net):
    def __init__(self):
        super().__init__()
        self.average = Average()


class Saving(Averaging):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["average"] = self.average.state_dict()


class Offering(Averaging):
    def configure_recoverables(self):
        return {"average": self.average}


class HoldsClass(Net):
    """Is given the class of its optimizer."""

    def __init__(self):
        super().__init__()
        self.kind = torch.optim.SGD

    def configure_optimizers(self):
        return self.kind(self.parameters(), 0.1)


class ByHand(Averaging):
    """Has an optimizer that Lightning knows, and one that it doesn't."""

    def __init__(self):
        super().__init__()
        del self.average
        self.known = torch.optim.SGD(self.parameters(), 0.1)
        self.other = torch.optim.SGD(self.parameters(), 0.1)

    def configure_optimizers(self):
        return self.known


@pytest.fixture
def told(tmp_path):
    """Fit a module; return what is said."""

    def fit_it(module):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, module, epochs=1, restore_best=False)
        return [str(each.message) for each in caught if "that no checkpoint" in str(each.message)]

    return fit_it


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Averaging, ["Averaging.average (Average)"]),
        (ByHand, ["ByHand.other (SGD)"]),
        (Saving, []),
        (Offering, []),
        (HoldsClass, []),
    ],
)
def test_a_state_of_the_module_that_nothing_saves_is_named(told, module, expected):
    """Averages, scalers, optimizers; not what is saved."""
    found = told(module())
    assert [each.partition(": ")[2].partition(" has a")[0] for each in found] == expected
