"""SpeechBrain's own tests and recipes, with the names that the two packages share replaced by ours.

Its wheel has no tests, so a checkout of its repository is needed:

    git clone --depth 1 https://github.com/speechbrain/speechbrain
    python tests/speechbrain/_speechbrain_suite.py units speechbrain      # its tests and examples
    python tests/speechbrain/_speechbrain_suite.py recipes speechbrain    # its integration recipes

`units` runs what touches checkpoints with SpeechBrain's names and with ours, and prints what differs.
`recipes` trains each recipe, interrupts it, in the middle of an epoch too, and resumes it in four
directions: either `Checkpointer` and `EpochCounter` saves, either resumes. All must end with the losses
and the weights with which SpeechBrain ends on its own.

    python tests/speechbrain/_speechbrain_suite.py recipes speechbrain LM_RNN --moment batch --utterances 2

trains one recipe, with the two shortest utterances of each set, and interrupts it only in an epoch.
`--write` puts the results into `docs/speechbrain.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "speechbrain.md"
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
# How many utterances of each set a recipe is trained with if not all, and then their first second alone:
# the recurrent layers of SpeechBrain step through the frames in Python.
RECIPES = {
    "ASR_CTC": 2,
    "ASR_ConformerTransducer_streaming": 2,
    "ASR_Transducer": 2,
    "ASR_alignment_forward": 2,
    "ASR_alignment_viterbi": 2,
    "ASR_seq2seq": 2,
    "G2P": None,
    "LM_RNN": None,
    "VAD": None,
    "autoencoder": None,
    "enhance_GAN": None,
    "separation": None,
    "speaker_id": None,
}
SAMPLES = 16_000
EPOCHS = 2
BATCHES_TO_INTERRUPT = 1
INTERRUPTED = 75
MOMENTS = ("epoch", "batch")
DIRECTIONS = [(saver, resumer) for saver in ("theirs", "ours") for resumer in ("theirs", "ours")]

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
            module.__test__ = {{}}  # Its own examples are tried with what replaces it.
            for shared in lightning_sbckpt.__all__:
                if hasattr(module, shared):
                    replaced = getattr(module, shared)
                    own = vars(replaced) if isinstance(replaced, type) else {{}}
                    for name, each in {{"": replaced, **own}}.items():
                        is_its = getattr(each, "__module__", None) == module.__name__
                        if is_its and isinstance(each.__doc__, str):
                            where = shared + (name and "." + name)
                            module.__test__[where] = each.__doc__
                    setattr(module, shared, getattr(lightning_sbckpt, shared))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Replacing())
"""


def stand_in(folder):
    """Return what to import torchaudio from where its library is none for the torch in use."""
    try:
        importlib.import_module("torchaudio")
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        there, standin = importlib.util.find_spec("torchaudio"), folder / "standin" / "torchaudio"
        if not standin.exists():
            if there is not None:
                # What SpeechBrain calls of it is written in Python, and works without the library.
                shutil.copytree(
                    Path(there.origin).parent, standin, ignore=shutil.ignore_patterns("lib")
                )
            else:
                standin.mkdir(parents=True)
                (standin / "__init__.py").touch()
        return [str(standin.parent)]
    return []


def environment(folder, *, replaced=False):
    """Return the environment of a process that can import SpeechBrain and this package."""
    paths = [str(ROOT), *stand_in(folder)]
    if replaced:
        (folder / "replaced").mkdir(exist_ok=True)
        names = {f"speechbrain.utils.{name}" for name in SHARED}
        (folder / "replaced" / "sitecustomize.py").write_text(REPLACE.format(names=names))
        paths.append(str(folder / "replaced"))
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------------- tests and examples


def units(checkout, folder, _):
    """Run SpeechBrain's tests and examples with its names and with ours; yield what differs."""
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
                    outcomes[name.partition(" - ")[0].replace("__test__.", "")] = outcome
        found[who] = outcomes
        print(f"{who}: {passed(outcomes)}", flush=True)
        print(*(name for name in outcomes if outcomes[name] != "PASSED"), flush=True)
    differing = {
        name: found["ours"].get(name, "not run")
        for name in sorted(found["theirs"])
        if found["ours"].get(name) != found["theirs"][name]
    }
    rows = {"SpeechBrain's": {"passed": passed(found["theirs"])}}
    rows["ours"] = {
        "passed": passed(found["ours"]),
        "differing": ", ".join(name.rpartition("::")[2] for name in differing) or "none",
    }
    yield (
        rows,
        [
            f"{name}: {found['theirs'][name]} with its names, {outcome} with ours"
            for name, outcome in differing.items()
        ],
    )


def passed(outcomes):
    """Say how many of the tests passed."""
    return f"{sum(outcome == 'PASSED' for outcome in outcomes.values())} of {len(outcomes)}"


# ---------------------------------------------------------------------- recipes


def recipes(checkout, folder, options):
    """Interrupt and resume recipes in four directions; yield rows of results and what differs."""
    sys.path[:0] = [str(ROOT), str(folder), *stand_in(folder)]
    for part in ("integration", "samples"):
        shutil.copytree(checkout / "tests" / part, folder / "tests" / part)
    # Once: each training is a process forked from here.
    for module in ("speechbrain", "torch._dynamo"):
        importlib.import_module(module)
    without_numba()
    for name in options.names:
        rows, wrong = {}, []
        utterances = options.utterances or RECIPES[name]
        for script in sorted((folder / "tests" / "integration" / name).glob("example_*.py")):
            label = f"{name}, {script.stem}" if name == "ASR_CTC" else name
            rows[label] = {"utterances": f"{utterances}, 1 s of each" if utterances else "all"}
            for moment in options.moments:
                began = time.monotonic()
                found = four_directions(
                    script, folder / f"{script.stem}-{moment}", moment, utterances
                )
                expected = found["theirs", "theirs"]
                differing = [way for way in DIRECTIONS if found[way] != expected]
                says = "the same in four directions"
                if differing:
                    says = "differs: " + "; ".join(f"{a} saves, {b} resumes" for a, b in differing)
                rows[label][moment] = says
                seconds = time.monotonic() - began
                print(f"{label}, after {moment}: {says}: {expected} ({seconds:.0f} s)", flush=True)
                wrong += [
                    f"{label}, {moment}, {way}: {found[way]}, expected {expected}"
                    for way in differing
                ]
        yield rows, wrong


def four_directions(script, folder, moment, utterances):
    """Interrupt a recipe and resume it; return what each direction ended with."""
    found = {}
    for saver in ("theirs", "ours"):
        saved = folder / saver
        before = train(script, saved, saver, moment, utterances)
        for resumer in ("theirs", "ours"):
            copy = folder / f"{saver}-{resumer}"
            shutil.copytree(saved, copy)
            found[saver, resumer] = {**before, **train(script, copy, resumer, "", utterances)}
    return found


def without_numba():
    """Replace the loss of transducers, which is a kernel for CUDA alone, by a plain one."""
    import torch

    def loss(log_probs, labels, lengths, label_lengths, blank, reduction):
        del reduction
        losses = []
        for probs, label, frames, symbols in zip(
            log_probs, labels, lengths, label_lengths, strict=True
        ):
            row = 0.0
            for t in range(frames):
                if t:
                    row = row + probs[t - 1, : symbols + 1, blank]
                emissions = probs[t, range(symbols), label[:symbols].long()].cumsum(0)
                sums = torch.cat([probs.new_zeros(1), emissions])
                # log(sum over u' <= u of exp(row[u'] + emissions from u' to u)).
                row = torch.logcumsumexp(row - sums, 0) + sums if t else sums
            losses.append(-(row[-1] + probs[frames - 1, symbols, blank]) / frames)
        return torch.stack(losses).mean()

    module = types.ModuleType("speechbrain.integrations.numba.transducer_loss")
    module.Transducer = types.SimpleNamespace(apply=loss)
    sys.modules[module.__name__] = module
    sys.modules["speechbrain.integrations.numba"] = types.ModuleType("numba")
    sys.modules["numba"] = types.ModuleType("numba")  # The recipes ask whether there is one.


def train(script, folder, api, interrupt, utterances):
    """Train a recipe in a process of its own, and return the losses by stage and epoch."""
    folder.mkdir(exist_ok=True, parents=True)
    child = multiprocessing.get_context("fork").Process(
        target=train_here, args=(script, folder, api, interrupt, utterances)
    )
    child.start()
    child.join()
    if child.exitcode != (INTERRUPTED if interrupt else 0):
        said = (folder / "said.txt").read_text()[-3000:]
        raise RuntimeError(f"{script} ended with {child.exitcode}:\n{said}")
    log = folder / "losses.jsonl"
    losses = dict(json.loads(line) for line in log.read_text().splitlines())
    log.unlink()
    return losses


def train_here(script, folder, api, interrupt, utterances):
    """Train a recipe of SpeechBrain's with a checkpointer; only the import of that is changed."""
    import speechbrain as sb

    with (folder / "said.txt").open("w", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    if api == "ours":
        import lightning_sbckpt as chosen
    else:
        import speechbrain.utils.checkpoints as chosen

        chosen.EpochCounter = importlib.import_module("speechbrain.utils.epoch_loop").EpochCounter
    theirs = importlib.import_module("speechbrain.utils.checkpoints")
    if utterances:
        reading = importlib.import_module("speechbrain.dataio.dataio")
        read = reading.read_audio
        reading.read_audio = lambda *args: read(*args)[:SAMPLES]
    log = (folder / "losses.jsonl").open("a")
    init, fit, evaluate = sb.Brain.__init__, sb.Brain.fit, sb.Brain.evaluate
    save_in_epoch = sb.Brain._save_intra_epoch_ckpt
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
        train_set, valid_set = (shorten(each, utterances) for each in (train_set, valid_set))
        loading = options.get("train_loader_kwargs", {})
        # More than one batch in an epoch if that is possible, or there would be no middle.
        batch_size = min(loading.get("batch_size", 1), max(1, len(train_set) // 2))
        options["train_loader_kwargs"] = {**loading, "batch_size": batch_size}
        self.is_fitting = True
        fit(self, counter, train_set, valid_set, **options)
        self.is_fitting = False
        log.write(json.dumps(["weights", digest(self.modules)]) + "\n")
        log.flush()

    def new_evaluate(self, test_set, *args, **options):
        with contextlib.ExitStack() as stack:
            if getattr(self, "is_fitting", False):
                # It would recover the last checkpoint, with the counter, and the epoch begin again.
                stack.callback(setattr, self, "checkpointer", self.checkpointer)
                self.checkpointer = None
            return evaluate(self, shorten(test_set, utterances), *args, **options)

    def new_save_in_epoch(self):
        save_in_epoch(self)
        if counter.current == EPOCHS and self.step == BATCHES_TO_INTERRUPT:
            os._exit(INTERRUPTED)

    sb.Brain.__init__, sb.Brain.fit, sb.Brain.evaluate = new_init, new_fit, new_evaluate
    sb.Brain._save_intra_epoch_ckpt = new_save_in_epoch
    spec = importlib.util.spec_from_file_location("recipe", script)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    with contextlib.suppress(AssertionError):  # It would have to train for longer.
        recipe.main("cpu")


def shorten(data, utterances):
    """Return a set of the shortest utterances of another, in the order in which they were.

    What was prepared with all of them, such as the labels that a recipe counts, stays as it is.
    """
    from speechbrain.dataio.dataset import FilteredSortedDynamicItemDataset

    if utterances is None or not hasattr(data, "data_ids"):
        return data
    shortest = sorted(data.data_ids, key=lambda each: float(data.data[each].get("duration", 0)))
    kept = set(shortest[:utterances])
    return FilteredSortedDynamicItemDataset(data, [each for each in data.data_ids if each in kept])


def digest(module):
    """Return a digest of all weights and buffers."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + value.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


# ---------------------------------------------------------------------- the page


def write(what, columns, rows):
    """Write a table into the page; rows of other recipes, found there, stay."""
    begin, end = f"<!-- {what}: begin -->\n", f"<!-- {what}: end -->"
    head, _, rest = PAGE.read_text().partition(begin)
    before, _, tail = rest.partition(end)
    found = {}
    for line in before.splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", f"| {columns[0]} |")):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[name] = dict(zip(columns[1:], cells, strict=True))
    for name, row in rows.items():
        found[name] = {**found.get(name, {}), **row}
    versions = (f"{name} {version(name)}" for name in ("speechbrain", "torch"))
    lines = [
        f"With Python {platform.python_version()}, {', '.join(versions)}:",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for name, row in sorted(found.items(), key=lambda item: item[0].lower()):
        cells = (str(row.get(column, "")) for column in columns[1:])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    PAGE.write_text("\n".join([f"{head}{begin.rstrip()}", *lines, f"{end}{tail}"]))


def main():
    """Do what the command line says."""
    os.environ["OMP_NUM_THREADS"] = "1"  # Sums over several threads differ from run to run.
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("units", "recipes"))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="*", help="of recipes; all by default")
    parser.add_argument("--moment", choices=MOMENTS, help="both by default")
    parser.add_argument("--utterances", type=int, help="of each set; by default as RECIPES says")
    parser.add_argument("--write", action="store_true", help=f"the results into {PAGE.name}")
    options = parser.parse_args()
    options.names = options.names or list(RECIPES)
    options.moments = (options.moment,) if options.moment else MOMENTS
    columns = ["names", "passed", "differing"]
    if options.what == "recipes":
        columns = ["recipe", "utterances", *MOMENTS]
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        run = units if options.what == "units" else recipes
        for rows, differing in run(options.checkout, Path(folder), options):
            wrong += differing
            if options.write:
                write(options.what, columns, rows)
    print("\n".join(wrong) or "nothing differs")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
