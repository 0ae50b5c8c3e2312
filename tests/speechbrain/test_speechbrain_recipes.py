"""A recipe of SpeechBrain's, with the import changed and nothing else, in four directions.

`python tests/speechbrain/_speechbrain_suite.py` does the same with SpeechBrain's own recipes and tests, of which a
checkout is needed.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import lightning_sbckpt as ours

EPOCHS = 3


class StoppedError(Exception):
    """What ends a run in the middle of an epoch."""


@pytest.fixture(scope="module")
def apis(loaded_speechbrain):
    """Where `Checkpointer` and `EpochCounter` are imported from."""
    utils = loaded_speechbrain.utils
    epoch_loop = importlib.import_module("speechbrain.utils.epoch_loop")
    theirs = SimpleNamespace(
        Checkpointer=utils.checkpoints.Checkpointer, EpochCounter=epoch_loop.EpochCounter
    )
    return {"ours": ours, "theirs": theirs}


@pytest.fixture(scope="module")
def recipe(loaded_speechbrain):
    """A function that makes the recipe's brain, data and counter, and trains."""
    sb = loaded_speechbrain
    encoders = importlib.import_module("speechbrain.dataio.encoder")

    class Recipe(sb.Brain):
        losses: list

        def compute_forward(self, batch, stage):
            features = self.modules.normalize(batch[0], torch.ones(len(batch[0])))
            return self.modules.model(features)

        def compute_objectives(self, predictions, batch, stage):
            return torch.nn.functional.cross_entropy(predictions.mean(1), batch[1])

        def on_fit_batch_end(self, batch, outputs, loss, should_step):
            self.hparams.noam(self.optimizer)
            self.losses.append(loss.item())
            if self.hparams.interrupt == len(self.losses):
                self._save_intra_epoch_ckpt()
                raise StoppedError

        def on_stage_end(self, stage, loss, epoch=None):
            if stage == sb.Stage.VALID:
                rate, _ = self.hparams.newbob(loss)
                self.losses.append((epoch, loss, rate))
                self.checkpointer.save_and_keep_only(
                    {"loss": loss, "rate": rate}, min_keys=["loss"]
                )

    def train(api, folder, *, interrupt=0, **run_opts):
        torch.manual_seed(0)
        inputs = torch.randn(12, 5, 3) * 4 + 1
        labels = encoders.CategoricalEncoder()
        labels.update_from_iterable("abc")
        targets = labels.encode_sequence_torch(list("abc" * 4))
        data = torch.utils.data.TensorDataset(inputs, targets)
        modules = {
            "normalize": sb.processing.features.InputNormalization(),
            "model": torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.25)),
        }
        schedulers = {
            "noam": sb.nnet.schedulers.NoamScheduler(0.1, 4),
            "newbob": sb.nnet.schedulers.NewBobScheduler(0.1),
        }
        counter = api.EpochCounter(EPOCHS)
        checkpointer = api.Checkpointer(
            folder,
            {
                **modules,
                **schedulers,
                "labels": labels,
                "counter": counter,
                "generator": sb.utils.repro.SaveableGenerator(),
            },
        )
        brain = Recipe(
            modules,
            lambda parameters: torch.optim.Adam(parameters, 0.05),
            {**schedulers, "interrupt": interrupt},
            run_opts={"device": "cpu", "noprogressbar": True, **run_opts},
            checkpointer=checkpointer,
        )
        brain.losses = []
        loading = {"batch_size": 3}
        shuffling = {**loading, "shuffle": True}
        try:
            brain.fit(
                counter, data, data, train_loader_kwargs=shuffling, valid_loader_kwargs=loading
            )
            brain.losses.append(brain.evaluate(data, min_key="loss", test_loader_kwargs=loading))
        except StoppedError:
            pass
        getattr(checkpointer, "release", int)()
        return brain

    return train


@pytest.fixture(scope="module")
def expected(recipe, apis, tmp_path_factory):
    """For each moment, what SpeechBrain ends with that has saved and resumed on its own."""
    return {
        moment: interrupted(recipe, apis["theirs"], apis["theirs"], tmp_path_factory, moment)
        for moment in (4, 6)
    }


def interrupted(recipe, saver, resumer, tmp_path_factory, moment):
    """Train until a batch, and on from there; return what was seen on both sides."""
    folder = tmp_path_factory.mktemp("run")
    before = recipe(saver, folder, interrupt=moment).losses
    return before, recipe(resumer, folder).losses


@pytest.mark.parametrize("moment", [4, 6])
@pytest.mark.parametrize(
    ("saver", "resumer"), [("ours", "theirs"), ("theirs", "ours"), ("ours", "ours")]
)
def test_the_losses_are_those_of_speechbrain(
    recipe, apis, expected, tmp_path_factory, saver, resumer, moment
):
    """A brain with normalisation, encoder, loaders, schedulers, counter and generator, bit for bit."""
    found = interrupted(recipe, apis[saver], apis[resumer], tmp_path_factory, moment)
    assert found == expected[moment]
    assert len(found[1]) > 5


def test_a_brain_in_debug_mode_leaves_the_run_alone(recipe, tmp_path, tree_bytes):
    """It puts the checkpointer into a folder of its own; nothing of the real one changes."""
    recipe(ours, tmp_path)
    before = tree_bytes(tmp_path)
    brain = recipe(ours, tmp_path, debug=True)
    assert brain.checkpointer.checkpoints_dir != tmp_path
    assert brain.checkpointer.list_checkpoints()
    assert tree_bytes(tmp_path) == before
    brain.checkpointer.tempdir.cleanup()
