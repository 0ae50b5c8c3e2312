"""A search by Optuna that may be killed at any time: run the same command again.

    pip install optuna && python examples/configs/optuna_search.py

The study is in a database, and each trial has a folder that is named by its hyperparameters. A trial that was
killed is tried again with the same values, finds its folder, and goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import optuna
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from task import Numbers, Signs

from lightning_sbckpt import SBCheckpoint


def objective(trial: optuna.Trial) -> float:
    """Train with the values of a trial, and return the best validation loss."""
    L.seed_everything(0, verbose=False)
    model = Signs(
        lr=trial.suggest_float("lr", 1e-3, 1e-1, log=True), width=trial.suggest_int("width", 4, 32)
    )
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[SBCheckpoint("runs/optuna/{hash}", min_key="val_loss")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Numbers()
    trainer.fit(model, datamodule=data)
    return trainer.validate(model, datamodule=data, verbose=False)[0]["val_loss"]


def main() -> None:
    """Search until so many trials are complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=4)
    args = parser.parse_args()

    Path("runs/optuna").mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage="sqlite:///runs/optuna/study.db", study_name="signs", load_if_exists=True
    )
    # One process searches here, so what is running by the database was killed.
    for killed in study.get_trials(states=[TrialState.RUNNING]):
        study.enqueue_trial(killed.params)
        study.tell(killed.number, state=TrialState.FAIL)
    # Another seed at each start: with the same, a start would try what the one before it has tried.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    done = MaxTrialsCallback(args.trials, states=(TrialState.COMPLETE,))
    if len(study.get_trials(states=[TrialState.COMPLETE])) < args.trials:
        study.optimize(objective, callbacks=[done])
    print(f"best: {study.best_value:.6f} with {study.best_params}")


if __name__ == "__main__":
    main()
