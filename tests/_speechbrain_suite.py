"""SpeechBrain's own tests and recipes, with the names that the two packages share replaced by ours.

Its wheel has no tests, so a checkout of its repository is needed:

    git clone --depth 1 https://github.com/speechbrain/speechbrain
    python tests/_speechbrain_suite.py units speechbrain      # its tests and examples
    python tests/_speechbrain_suite.py recipes speechbrain    # its integration recipes

`units` runs what touches checkpoints with SpeechBrain's names and with ours, and prints what differs.
`recipes` trains each recipe, interrupts it, in the middle of an epoch too, and resumes it in four
directions: either `Checkpointer` and `EpochCounter` saves, either resumes. All must end with the losses
with which SpeechBrain ends on its own. Recipes by name: `recipes CHECKOUT LM_RNN`, and only
interrupted in an epoch: `--moment batch`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("checkpoints", "epoch_loop", "parameter_transfer")
UNITS = (
    "checkpoints",
    "epoch_loop",
    "pretrainer",
    "repro",
    "core",
    "schedulers",
    "categorical_encoder",
    "dataloader",
    "samplers",
    "input_norm",
)
EXAMPLES = (
    *(f"utils.{name}" for name in SHARED),
    "utils.repro",
    "dataio.dataloader",
    "dataio.sampler",
    "dataio.encoder",
    "core",
    "nnet.schedulers",
    "nnet.adapters",
    "processing.features",
    "alignment.aligner",
)
RECIPES = (
    "ASR_CTC",
    "ASR_Transducer",
    "ASR_alignment_forward",
    "ASR_alignment_viterbi",
    "ASR_seq2seq",
    "G2P",
    "LM_RNN",
    "VAD",
    "autoencoder",
    "enhance_GAN",
    "separation",
    "speaker_id",
)
EPOCHS = 2
BATCHES_TO_INTERRUPT = 1
INTERRUPTED = 75

# As a module of this name it is loaded by every Python that starts, those of `spawn` as well.
REPLACE = """
import importlib.abc, importlib.util, sys


class Replacing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in {names!r}:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            import lightning_sbckpt
            for shared in lightning_sbckpt.__all__:
                if hasattr(module, shared):
                    setattr(module, shared, getattr(lightning_sbckpt, shared))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Replacing())
"""


def environment(folder, *, replaced=False):
    """Return the environment of a process that can import SpeechBrain and this package."""
    paths = [str(ROOT)]
    try:
        importlib.import_module("torchaudio")
    except Exception:
        # Nothing of it is called, and it need not exist for the torch in use.
        (folder / "standin").mkdir(exist_ok=True)
        (folder / "standin" / "torchaudio.py").touch()
        paths.append(str(folder / "standin"))
    if replaced:
        (folder / "replaced").mkdir(exist_ok=True)
        names = {f"speechbrain.utils.{name}" for name in SHARED}
        (folder / "replaced" / "sitecustomize.py").write_text(REPLACE.format(names=names))
        paths.append(str(folder / "replaced"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------------- tests and examples


def units(checkout, folder):
    """Run SpeechBrain's tests and examples with its names and with ours; return what differs."""
    tests = folder / "tests"
    tests.mkdir()
    shutil.copy(checkout / "conftest.py", tests)
    for name in UNITS:
        shutil.copy(checkout / "tests" / "unittests" / f"test_{name}.py", tests)
    found = {}
    for who in ("theirs", "ours"):
        env = environment(folder, replaced=who == "ours")
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "--tb=no"]
        examples = ["--doctest-modules", "--pyargs", *(f"speechbrain.{name}" for name in EXAMPLES)]
        outcomes = {}
        for what in (["."], examples):
            done = subprocess.run(
                [*pytest, *what], cwd=tests, env=env, capture_output=True, text=True, check=False
            )
            for line in done.stdout.splitlines():
                outcome, _, name = line.partition(" ")
                if outcome in ("PASSED", "FAILED", "ERROR"):
                    outcomes[name.partition(" - ")[0]] = outcome
        passed = sum(outcome == "PASSED" for outcome in outcomes.values())
        print(f"{who}: {passed} passed of {len(outcomes)}")
        found[who] = outcomes
    # The examples in what is replaced are not those of this module any more.
    return [
        f"{name}: {found['theirs'][name]} with its names, {outcome} with ours"
        for name, outcome in found["ours"].items()
        if outcome != found["theirs"].get(name, outcome)
    ]


# ---------------------------------------------------------------------- recipes


def recipes(checkout, folder, names, moments):
    """Interrupt and resume recipes in four directions; return what differs."""
    env = environment(folder)
    for part in ("integration", "samples"):
        shutil.copytree(checkout / "tests" / part, folder / "tests" / part)
    env["PYTHONPATH"] += os.pathsep + str(folder)
    wrong = []
    for name, moment in itertools.product(names, moments):
        script = min((folder / "tests" / "integration" / name).glob("example_*.py"))
        found = {}
        for saver in ("theirs", "ours"):
            saved = folder / f"{name}-{moment}-{saver}"
            before = train(script, saved, env, api=saver, interrupt=moment)
            for resumer in ("theirs", "ours"):
                copy = folder / f"{name}-{moment}-{saver}-{resumer}"
                shutil.copytree(saved, copy)
                resumed = train(script, copy, env, api=resumer)
                found[saver, resumer] = {**before, **resumed}
        expected = found["theirs", "theirs"]
        differing = [way for way, losses in found.items() if losses != expected]
        says = "DIFFERENT" if differing else "the same losses in four directions"
        print(f"{name}, interrupted after {moment}: {says}: {expected}", flush=True)
        wrong += [
            f"{name}, {moment}, {way}: {found[way]}, expected {expected}" for way in differing
        ]
    return wrong


def train(script, folder, env, *, api, interrupt=""):
    """Train a recipe in a process of its own, and return the losses by stage and epoch."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "train", str(script), str(folder), api, interrupt]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != (INTERRUPTED if interrupt else 0):
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    log = folder / "losses.jsonl"
    losses = dict(json.loads(line) for line in log.read_text().splitlines())
    log.unlink()
    return losses


def train_here(script, folder, api, interrupt):
    """Train a recipe of SpeechBrain's with a checkpointer; only the import of that is changed."""
    import speechbrain as sb

    if api == "ours":
        import lightning_sbckpt as chosen
    else:
        import speechbrain.utils.checkpoints as chosen

        chosen.EpochCounter = importlib.import_module("speechbrain.utils.epoch_loop").EpochCounter
    theirs = importlib.import_module("speechbrain.utils.checkpoints")
    log = (folder / "losses.jsonl").open("a")
    init, fit, save_in_epoch = sb.Brain.__init__, sb.Brain.fit, sb.Brain._save_intra_epoch_ckpt
    counter = chosen.EpochCounter(EPOCHS)

    def new_init(self, modules=None, opt_class=None, hparams=None, run_opts=None, **options):
        kept = {"counter": counter, "generator": sb.utils.repro.SaveableGenerator()}
        kept.update(modules or {})
        for name, value in (hparams or {}).items():
            # Schedulers, encoders and the like.
            if theirs.get_default_hook(value, theirs.DEFAULT_SAVE_HOOKS) and name not in kept:
                kept[name] = value
        kept = {name: obj for name, obj in kept.items() if has_state(obj)}
        checkpointer = chosen.Checkpointer(folder / "save", kept)
        run_opts = {**(run_opts or {}), "noprogressbar": True}
        if interrupt == "batch":
            run_opts["ckpt_interval_steps"] = 1
        init(self, modules, opt_class, hparams, run_opts, checkpointer=checkpointer, **options)

    def has_state(obj):
        import torch

        hook = theirs.get_default_hook(obj, theirs.DEFAULT_SAVE_HOOKS)
        return (
            hook is not theirs.torch_save
            or not isinstance(obj, torch.nn.Module)
            or bool(obj.state_dict())
        )

    def new_fit(self, epoch_counter, train_set, valid_set=None, **options):
        stage_end = self.on_stage_end

        def on_stage_end(stage, loss, epoch=None):
            stage_end(stage, loss, epoch)
            log.write(json.dumps([f"{stage.name} {epoch}", repr(float(loss))]) + "\n")
            log.flush()
            if stage is not (sb.Stage.TRAIN if valid_set is None else sb.Stage.VALID):
                return
            self.checkpointer.save_and_keep_only({"loss": float(loss)}, min_keys=["loss"])
            if interrupt == "epoch":
                os._exit(INTERRUPTED)

        self.on_stage_end = on_stage_end
        loading = options.get("train_loader_kwargs", {})
        if "batch_size" in loading:
            # More than one of them in an epoch, or there would be no middle.
            options["train_loader_kwargs"] = {
                **loading,
                "batch_size": min(2, max(1, len(train_set) // 2)),
            }
        return fit(self, counter, train_set, valid_set, **options)

    def new_save_in_epoch(self):
        save_in_epoch(self)
        if counter.current == EPOCHS and self.step == BATCHES_TO_INTERRUPT:
            os._exit(INTERRUPTED)

    sb.Brain.__init__, sb.Brain.fit = new_init, new_fit
    sb.Brain._save_intra_epoch_ckpt = new_save_in_epoch
    spec = importlib.util.spec_from_file_location("recipe", script)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    try:
        recipe.main("cpu")
    except AssertionError:
        print("it would have to train for longer")  # What a recipe itself demands at its end.


def main():
    """Do what the command line says."""
    if sys.argv[1] == "train":
        return train_here(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("units", "recipes"))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="*", default=RECIPES, help="of recipes; all by default")
    parser.add_argument("--moment", choices=("epoch", "batch"), help="both by default")
    chosen = parser.parse_args()
    moments = (chosen.moment,) if chosen.moment else ("epoch", "batch")
    with tempfile.TemporaryDirectory() as folder:
        if chosen.what == "units":
            wrong = units(chosen.checkout, Path(folder))
        else:
            wrong = recipes(chosen.checkout, Path(folder), chosen.names, moments)
    print("\n".join(wrong) or "nothing differs")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
