"""The two documents that this package was created from run here, with only the import changed.

Their calls are in `tests/speechbrain/seeds/`. `pytest --original` with this file runs them against the real
SpeechBrain.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SEEDS = Path(__file__).parent / "seeds"
IMPORTS = re.compile(r"^(import speechbrain as sb|from speechbrain\.\S+ import .*)$", re.MULTILINE)


def read_cells(document):
    """Return the code of every cell of a document by its heading, without SpeechBrain's imports."""
    text = (SEEDS / document).read_text()
    found = re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    return {heading: IMPORTS.sub("", code) for heading, code in found}


TUTORIAL = read_cells("tutorial.md")
CONDENSED = read_cells("condensed.md")


@pytest.fixture
def names(api, tmp_path, monkeypatch):
    """What the changed import lines give: `sb`, with the access paths in use, and `Checkpointer`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    modules = SimpleNamespace(checkpoints=api, epoch_loop=api, parameter_transfer=api)
    return {
        "sb": SimpleNamespace(utils=modules),
        "torch": torch,
        "Checkpointer": api.Checkpointer,
        "__name__": "__main__",
    }


@pytest.fixture
def run(names, capsys):
    """A function that runs a cell and returns what it printed."""

    def run_cell(code, namespace=names):
        capsys.readouterr()
        exec(compile(code, "<cell>", "exec"), namespace)
        return capsys.readouterr().out

    return run_cell


def run_cells(run, namespace, *, start=None):
    """Run the tutorial's cells in order, from one heading on; return what each printed."""
    headings = list(TUTORIAL)
    chosen = headings[headings.index(start) if start else 0 :]
    return {heading: run(TUTORIAL[heading], namespace) for heading in chosen}


def test_no_cell_is_lost_between_the_documents_and_the_tests():
    """The tutorial has sixteen cells with code, the summary five fragments."""
    assert len(TUTORIAL) == 16
    assert len(CONDENSED) == 5
    assert all("speechbrain" not in code for code in (*TUTORIAL.values(), *CONDENSED.values()))


class TestTheNutshell:
    """The cell that is made to be run again and again."""

    def test_every_run_goes_on_one_epoch_and_the_eleventh_finds_the_best(self, run):
        """Ten runs train an epoch each; then the epoch loop is depleted, again and again."""
        code = TUTORIAL["nutshell"]
        for epoch in range(1, 11):
            printed = run(code)
            assert f"Starting epoch {epoch}.\n" in printed
        for _ in range(3):
            printed = run(code)
            assert "Starting epoch" not in printed
            assert "Epoch loop has finished.\n" in printed
            # By default only the newest is kept, so it is also the best there is.
            assert "Achieved on epoch 10.\n" in printed

    def test_interrupted_training_is_the_training_that_was_not_interrupted(self, run):
        """Model and optimizer go on exactly: the same predictions as in one go."""
        runs = [run(TUTORIAL["nutshell"]) for _ in range(10)]
        interrupted = re.findall(r"prediction=(\S+),", "".join(runs))
        torch.manual_seed(0)
        in_one_go = TUTORIAL["nutshell"].replace("    break\n", "").replace("./nut", "./other_nut")
        assert re.findall(r"prediction=(\S+),", run(in_one_go)) == interrupted
        assert len(interrupted) == 10

    def test_the_reset_starts_anew(self, run):
        """With all checkpoints deleted, the next run is the first one again."""
        run(TUTORIAL["nutshell"])
        run(TUTORIAL["nutshell"])
        run(TUTORIAL["nutshell reset"])
        assert list(Path("nutshell_checkpoints").glob("CKPT*")) == []
        assert "Starting epoch 1.\n" in run(TUTORIAL["nutshell"])


class TestTheTutorial:
    """All the cells in order."""

    def test_every_cell_runs_and_prints_what_the_tutorial_says(self, names, run, caplog):
        """From the first cell to the last."""
        printed = run_cells(run, names)
        assert "The checkpoint directory was: full_example_checkpoints/CKPT+" in printed[
            "full example: saving"
        ].replace("./", "")
        for key in ("mdl", "opt", "epoch"):
            assert re.search(
                rf"with key {key} was saved to: \S+/{key}\.ckpt", printed["full example: saving"]
            )
        assert printed["default hook"].strip() not in ("", "None")
        assert printed["duck"] == "Quack!\nI have already quacked 1 times.\n"
        assert "'validation-type': 'full'" in printed["meta: saving"]
        assert "'loss': 14.4" in printed["meta: recovering by a key"]
        assert "'loss': 15.5" in printed["meta: recovering by a function"]
        assert re.search(r"stored in: \S+/mdl\.ckpt", printed["transfer: finding"])
        before, after = re.findall(r"tensor\(\[(\S+?)\]\)", printed["transfer: into another model"])
        assert before != after
        assert names["finetune_mdl"].weight.item() == pytest.approx(float(after), abs=1e-4)
        assert names["best_ckpt"].meta["loss"] == 13.1
        assert "bias" in caplog.text

    def test_the_folder_holds_what_the_filters_leave(self, names, run):
        """Deletion by predicate and `save_and_keep_only` leave the checkpoints they should."""
        run_cells(run, names)
        left = names["checkpointer"].list_checkpoints()
        assert sorted(
            (ckpt.meta.get("validation-type", ""), ckpt.meta.get("loss", 0)) for ckpt in left
        ) == [("", 0), ("fast", 12.1), ("fast", 15.5), ("full", 13.1), ("full", 14.4)]

    def test_the_whole_tutorial_runs_again_beside_its_own_checkpoints(self, names, run):
        """A second run, as after a restart, finds and goes on with what the first one left."""
        run_cells(run, dict(names))
        again = dict(names)
        printed = run_cells(run, again, start="full example: the folder")
        assert printed["duck"] == "Quack!\nI have already quacked 2 times.\n"
        assert "'loss': 12.1" in printed["meta: recovering by a key"]
        assert again["best_ckpt"].meta["loss"] == 13.1

    def test_a_cell_that_resumes_can_be_run_again(self, names, run):
        """The duck, defined anew each time, remembers how often it has quacked."""
        for times in (1, 2, 3):
            assert f"quacked {times} times" in run(TUTORIAL["duck"])
        namespace = dict(names)
        assert "quacked 4 times" in run(TUTORIAL["duck"], namespace)
        assert len(namespace["duckpointer"].list_checkpoints()) == 4


class TestTheCondensedTutorial:
    """The fragments of the summary, in order."""

    def test_every_fragment_runs(self, names, run):
        """On one folder, as a reader would type them one after the other."""
        names["loss"] = torch.tensor(20.0)
        run(CONDENSED["basic usage"])
        assert names["epoch_counter"].current == 10
        assert len(names["checkpointer"].list_checkpoints()) == 1
        run(CONDENSED["checkpoint structure"])
        run(CONDENSED["meta information"])
        run(CONDENSED["checkpoint management"])
        losses = {ckpt.meta["loss"] for ckpt in names["checkpointer"].list_checkpoints()}
        assert losses == {20.0, 15.5, 13.1}
        # The last fragment looks for a full validation, which no fragment before it has saved.
        full = {"loss": 9.0, "validation-type": "full"}
        names["checkpointer"].save_checkpoint(meta=full)
        names["checkpoint_dir"] = "checkpoint_dir"
        names["new_model"] = torch.nn.Linear(1, 1, False)
        run(CONDENSED["parameter transfer"])
        assert names["best_ckpt"].meta["loss"] == 9.0
        assert torch.equal(names["new_model"].weight, names["model"].weight)

    def test_the_basic_usage_can_be_run_again(self, names, run):
        """The second run recovers, has no epoch left, and saves nothing."""
        names["loss"] = torch.tensor(20.0)
        run(CONDENSED["basic usage"])
        (first,) = names["checkpointer"].list_checkpoints()
        weight = names["model"].weight.detach().clone()
        run(CONDENSED["basic usage"])
        assert names["checkpointer"].list_checkpoints() == [first]
        assert names["epoch_counter"].current == 10
        assert torch.equal(names["model"].weight, weight)
