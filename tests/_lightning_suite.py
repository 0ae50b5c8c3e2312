"""Lightning's own tests, with an `SBCheckpoint` added to every Trainer.

Its wheel has no tests, so a checkout of the release that is installed is needed:

    git clone --depth 1 --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning
    python tests/_lightning_suite.py pytorch-lightning                  # all that run on a CPU
    python tests/_lightning_suite.py pytorch-lightning loops trainer    # these folders or files
    python tests/_lightning_suite.py pytorch-lightning --save-mode async

Every test runs without the callback and with it. A test that ends otherwise with it must be in `EXPECTED`,
with the reason and with the error that the reason explains; the exit code is 0 if each is there, and
if each that is there and ran did differ. With `--logs FOLDER` a run may be cut short and started again:
folders of tests that are done aren't run anew. `--write` writes the counts and the reasons into the documentation.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "lightning-tests.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
MODEL_CHECKPOINT = "checkpointing/test_model_checkpoint.py"
OPTIMIZERS = "trainer/optimization/test_optimizers.py"
FOLDERS = (
    "callbacks",
    "checkpointing",
    "core",
    "loggers",
    "loops",
    "models",
    "trainer",
    "tuner",
    "test_cli.py",
)
# They start processes, in which no callback is added, or need what is seldom installed.
LEFT_OUT = "not spawn and not ddp_fork and not onnx and not legacy and not sync_dist"


class Reason(NamedTuple):
    """Why tests end otherwise with the callback."""

    why: str
    error: str
    """A regular expression that is found in the error of each."""
    tests: tuple[str, ...]
    """Names of tests, below `tests_pytorch/`; without brackets all of a parametrized test."""


EXPECTED = (
    Reason(
        "The test replaces `torch.save` by a mock that writes nothing, so this callback refuses an empty file.",
        r"SaveError: can't .* (Buffer size too small \(0 |cannot modify read-only memory)",
        (
            "checkpointing/test_checkpoint_callback_frequency.py::test_default_checkpoint_freq",
            "checkpointing/test_checkpoint_callback_frequency.py::test_top_k",
        ),
    ),
    Reason(
        "The test replaces the clock by one that moves, or ends, when it is read, and this callback reads it, too.",
        r"Expected validation at batches|log_metrics.mock_calls ==|Expected train/time|StopIteration",
        (
            "callbacks/test_throughput_monitor.py::test_throughput_monitor_fit_gradient_accumulation",
            "callbacks/test_throughput_monitor.py::test_throughput_monitor_fit_with_validation",
            "callbacks/test_throughput_monitor.py::test_throughput_monitor_validation_with_many_epochs",
            "trainer/flags/test_val_check_interval.py::test_time_and_epoch_gated_val_check",
        ),
    ),
    Reason(
        "The test compares the whole list of callbacks, which has one more.",
        r"SBCheckpoint\('|tmp\w+'\)",
        (
            "callbacks/test_callbacks.py::test_callbacks_configured_in_model",
            "callbacks/test_callbacks.py::test_configure_callbacks_hook_multiple_calls",
            "checkpointing/test_checkpoint_callback_frequency.py::test_disabled_checkpointing",
            f"{MODEL_CHECKPOINT}::test_configure_model_checkpoint",
            "models/test_restore.py::test_callbacks_references_fit_ckpt_path",
            "trainer/connectors/test_callback_connector.py::test_attach_model_callbacks",
            "trainer/connectors/test_callback_connector.py::test_checkpoint_callbacks_are_last",
            "trainer/connectors/test_callback_connector.py::test_configure_external_callbacks",
        ),
    ),
    Reason(
        "The test lists or counts the hooks that were called. Saving calls those for saving once more.",
        r"diff: \{'name': '(Callback\.)?state_dict'\} != |assert 2 == 1|assert self.state_dict_count ==",
        (
            f"{MODEL_CHECKPOINT}::test_model_checkpoint_no_extraneous_invocations",
            "core/test_datamodules.py::test_datamodule_hooks_are_profiled",
            "models/test_hooks.py::test_trainer_model_hook_system_fit",
            "models/test_hooks.py::test_trainer_model_hook_system_fit_no_val_and_resume_max_epochs",
            "models/test_hooks.py::test_trainer_model_hook_system_fit_no_val_and_resume_max_steps",
            "models/test_hooks.py::test_trainer_datamodule_hook_system",
        ),
    ),
    Reason(
        "The test fits a second, new module with the same Trainer. The same `SBCheckpoint` refuses that, since the folder"
        ' has another experiment; with `on_change="warn"` the test passes.',
        r"ConfigurationError: .* is of another experiment",
        (
            f"{MODEL_CHECKPOINT}::test_ckpt_version_after_rerun_same_trainer",
            "loggers/test_logger.py::test_log_hyperparams_key_collision",
            "models/test_hparams.py::test_hparams_pickle_warning",
            "models/test_restore.py::test_fit_twice",
        ),
    ),
    Reason(
        "The test counts the checkpoints that are uploaded, and those of this callback are, too.",
        r"assert 4 == 2|assert 2 == 1|Called 2 times",
        (
            "loggers/test_mlflow.py::test_mlflow_log_model[True]",
            "loggers/test_mlflow.py::test_mlflow_log_model[all]",
            "loggers/test_wandb.py::test_wandb_log_model",
            "loggers/test_wandb.py::test_wandb_log_model_with_score",
        ),
    ),
    Reason(
        'The test wants an error for `ckpt_path="best"` without a `ModelCheckpoint`. This callback knows the best.',
        r"DID NOT RAISE .*ValueError",
        tuple(
            f"trainer/test_trainer.py::test_tested_checkpoint_path_best[{fn}-False]"
            for fn in ("validate", "test", "predict")
        ),
    ),
    Reason(
        "The test knows when `ModelCheckpoint` saves, which is before a plateau scheduler has stepped. This callback saves after"
        " the last hook of the epoch.",
        r"assert last_epoch == batches",
        (f"{OPTIMIZERS}::test_plateau_scheduler_lr_step_interval_updated_after_saving[False]",),
    ),
)


class Outcome(NamedTuple):
    """How a test ended."""

    result: str
    error: str


# ---------------------------------------------------------------------- in the process of the tests


def pytest_configure():
    """Add the callback to every Trainer: when it is made, as `enable_checkpointing=False` is right."""
    if os.environ["SUITE_WITH"] == "theirs":
        return
    from lightning.pytorch import Trainer

    from lightning_sbckpt import SBCheckpoint

    init = Trainer.__init__

    @functools.wraps(init)
    def new_init(self, *args, **options):
        init(self, *args, **options)
        if not options.get("barebones"):
            folder = tempfile.mkdtemp(dir=os.environ["SUITE_FOLDER"])
            self.callbacks.append(SBCheckpoint(folder, save_mode=os.environ["SUITE_SAVE_MODE"]))

    Trainer.__init__ = new_init


def pytest_runtest_logreport(report):
    """Write down how a test ended, at once: a run that is cut short says what it has."""
    if report.when == "call" or report.outcome != "passed":
        name = report.nodeid.rpartition("tests_pytorch/")[2]
        error = report.longreprtext if report.failed else ""
        with Path(os.environ["SUITE_LOG"]).open("a") as log:
            log.write(json.dumps([name, report.outcome, error]) + "\n")


# ---------------------------------------------------------------------- in the process that compares


def outcomes(checkout, name, who, logs, save_mode):
    """Run a folder or file of tests without the callback or with it; return the outcome of each."""
    done = logs / f"{name.replace('/', '+')}.{who if who == 'theirs' else save_mode}.jsonl"
    if not done.exists():
        log = done.with_suffix(".part")
        log.write_text("")
        tests = checkout / "tests"
        with tempfile.TemporaryDirectory() as folder:
            options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "_lightning_suite"]
            options += ["-o", "addopts=", "--timeout", "300", "-k", LEFT_OUT]
            options += ["--continue-on-collection-errors", f"--basetemp={folder}/tests"]
            subprocess.run(
                [sys.executable, "-m", "pytest", *options, f"tests_pytorch/{name}"],
                cwd=tests,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(
                        [
                            str(ROOT),
                            str(ROOT / "tests"),
                            str(tests),
                            os.environ.get("PYTHONPATH", ""),
                        ]
                    ),
                    "OMP_NUM_THREADS": "1",
                    "SUITE_WITH": who,
                    "SUITE_FOLDER": folder,
                    "SUITE_LOG": str(log),
                    "SUITE_SAVE_MODE": save_mode,
                },
                check=False,
            )
        log.replace(done)
    found = {}
    for line in done.read_text().splitlines():
        test, result, error = json.loads(line)
        if test not in found or result == "failed":
            found[test] = Outcome(result, error)
    return found


def reason_for(test):
    """Return why a test may differ, if that is known."""
    bare = test.partition("[")[0]
    return next((each for each in EXPECTED if {test, bare} & {*each.tests}), None)


def compare(theirs, ours):
    """Return the tests that differ and what is wrong, which is no difference without a reason.

    A test that did not end, because the process did, differs; one that fails on its own says nothing.
    """
    differ, wrong = {}, []
    for test, alone in theirs.items():
        reason, beside = reason_for(test), ours.get(test, Outcome("absent", ""))
        if alone.result in (beside.result, "failed"):
            if reason is not None and alone.result == "passed":
                wrong.append(f"{test} passes, and is expected not to: {reason.why}")
            continue
        differ[test] = reason
        if reason is None:
            wrong.append(f"{test}: {alone.result} alone, {beside.result} with it\n{beside.error}")
        elif not re.search(reason.error, beside.error):
            wrong.append(f"{test} fails, but not with {reason.error!r}:\n{beside.error}")
    return differ, wrong


def page(compared):
    """Return the part of the documentation: counts per folder, and each reason with its tests."""
    lines = ["| tests of | pass alone | the same with it | differ |", "| --- | --- | --- | --- |"]
    found = {}
    for name, (count, differ) in compared.items():
        lines.append(f"| `{name}` | {count} | {count - len(differ)} | {len(differ)} |")
        for test, reason in differ.items():
            found.setdefault(reason.why, []).append(test.rpartition("/")[2])
    lines += ["", "| why they differ | tests |", "| --- | --- |"]
    for why, tests in sorted(found.items(), key=lambda row: -len(row[1])):
        bare = dict.fromkeys(test.partition("[")[0] for test in tests)
        names = (
            f"`{test}` ({sum(each.partition('[')[0] == test for each in tests)})" for test in bare
        )
        lines.append(f"| {why} | {', '.join(names)} |")
    return "\n".join(lines)


def main():
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="*", default=FOLDERS, help="of folders or files")
    parser.add_argument(
        "--save-mode", default="sync", help="of the callback: sync, async or overlap"
    )
    parser.add_argument("--logs", type=Path, help="a folder to keep outcomes in")
    parser.add_argument("--write", action="store_true", help="write the page of the documentation")
    chosen = parser.parse_args()
    compared, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        logs = chosen.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        for name in chosen.names:
            theirs, ours = (
                outcomes(chosen.checkout.resolve(), name, who, logs, chosen.save_mode)
                for who in ("theirs", "ours")
            )
            differ, wrong_here = compare(theirs, ours)
            passed = sum(outcome.result == "passed" for outcome in theirs.values())
            print(
                f"{name}: {passed} pass alone, {len(differ)} differ, {len(wrong_here)} unexplained"
            )
            compared[name] = (passed, differ)
            wrong += wrong_here
    print("\n".join(wrong) or "no difference without a reason")
    if chosen.write and not wrong:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{page(compared)}\n{END}{rest.partition(END)[2]}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
