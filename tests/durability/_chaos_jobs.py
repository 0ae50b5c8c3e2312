"""The trainings that ckpt-chaos ends at every file event: ours, stock Lightning's, SpeechBrain's.

    python tests/durability/_chaos_jobs.py JOB FOLDER [BREAK]

Each goes on from what is in the folder, says `resumed from step N`, and writes the bits of its weights to
`final.txt`. Beside the folder, in `reported`, is a file for each step whose checkpoint was reported saved.
A job may be run with one of the safety measures of this package taken away, to see that ckpt-chaos notices.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from lightning_sbckpt._save.request import SaveRequest, SaveResult

STEPS = 2
WIDTH = 600
"""The weights of a layer take 1.4 MB, which go past the page cache."""
PREEMPTIBLE = Path(__file__).resolve().parents[2] / "examples" / "preemptible" / "train.py"


def fingerprint(module: torch.nn.Module) -> str:
    """Return a hash of every bit of the weights."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def is_main() -> bool:
    """Return whether this is rank zero."""
    return os.environ.get("RANK", "0") == "0"


def say_resumed(step: object) -> None:
    """Say where this run goes on, as ckpt-chaos is told to look for it."""
    print("resumed from step", step, flush=True)


def reported(out: Path, step: object) -> None:
    """Note, where ckpt-chaos doesn't look for events, that a checkpoint was reported saved."""
    if is_main():
        folder = out.parent / "reported"
        folder.mkdir(exist_ok=True)
        (folder / f"step={step}").touch()


def done(out: Path, result: str) -> None:
    """Write what the run has come to."""
    if is_main():
        (out / "final.txt").write_text(result)


# ---------------------------------------------------------------------- plain loops


def network() -> torch.nn.Sequential:
    """Return the same new network each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Train a step, together with the other ranks."""
    seed = torch.Generator().manual_seed(10 * step + int(os.environ.get("RANK", "0")))
    model(torch.randn(4, WIDTH, generator=seed)).square().mean().backward()
    if dist.is_initialized():
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def ranks() -> Iterable[None]:
    """Have a process group if there are several ranks."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def plain(api: Any, out: Path, *, prune: bool = False, **options: Any) -> None:
    """Train with a `Checkpointer`, ours or SpeechBrain's.

    Args:
        api: Where its names are.
        out: The folder.
        prune: Keep only the newest; the first two have the same name.
        **options: For the `Checkpointer`.
    """
    with ranks():
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        epochs = api.EpochCounter(STEPS + prune)
        parts = {"model": model, "optimizer": optimizer, "epochs": epochs}
        checkpointer = api.Checkpointer(out / "run", parts, **options)
        found = checkpointer.recover_if_possible()
        say_resumed(found.meta["step"] if found else 0)
        for step in epochs:
            train(model, optimizer, step)
            meta = {"step": step}
            if prune:
                name = "same" if step <= STEPS else None
                checkpointer.save_and_keep_only(meta, name=name, num_to_keep=1)
            else:
                checkpointer.save_checkpoint(meta, name=f"step={step}")
            if options.get("save_mode", "sync") == "sync":
                reported(out, step)
        if options:
            checkpointer.wait()
        done(out, fingerprint(model))


def ours(out: Path, **options: Any) -> None:
    """Train with our `Checkpointer`."""
    import lightning_sbckpt

    plain(lightning_sbckpt, out, **options)


def speechbrain(out: Path) -> None:
    """Train with SpeechBrain's `Checkpointer`."""
    # It imports torchaudio, which need not exist for the torch in use, and calls nothing of it here.
    from importlib.machinery import ModuleSpec

    standin = ModuleType("torchaudio")
    standin.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = standin
    from speechbrain.utils.checkpoints import Checkpointer
    from speechbrain.utils.epoch_loop import EpochCounter

    api = ModuleType("api")
    api.Checkpointer, api.EpochCounter = Checkpointer, EpochCounter
    plain(api, out)


# ---------------------------------------------------------------------- Lightning


def lightning(out: Path, callbacks: Callable[[Path], list[Any]], ckpt_path: str | None) -> None:
    """Fit a network whose data are the same in every epoch, so that Lightning's own resume is exact."""
    import lightning as L
    from lightning.pytorch.utilities.types import STEP_OUTPUT
    from torch.utils.data import DataLoader, TensorDataset

    class Regression(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> STEP_OUTPUT:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    class Resumed(L.Callback):
        def on_load_checkpoint(self, trainer: object, module: object, checkpoint: Any) -> None:
            say_resumed(checkpoint["global_step"])

    L.seed_everything(0, verbose=False)
    model = Regression()
    trainer = L.Trainer(
        max_epochs=STEPS,
        accelerator="cpu",
        strategy="ddp" if "RANK" in os.environ else "auto",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        callbacks=[*callbacks(out), Resumed()],
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)))
    trainer.fit(model, DataLoader(data, 4), ckpt_path=ckpt_path)
    done(out, fingerprint(model))


def stock_lightning(out: Path) -> None:
    """Fit with Lightning's own `ModelCheckpoint`, and go on by `ckpt_path="last"`."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def callbacks(out: Path) -> list[Any]:
        return [ModelCheckpoint(out / "run", filename="{step}", save_top_k=-1, save_last=True)]

    lightning(out, callbacks, "last")


def name_by_step(out: Path, save_mode: str) -> None:
    """Let every checkpoint of ours be named after its step, as ckpt-chaos wants it."""
    from lightning_sbckpt import Checkpointer

    save = Checkpointer.save

    def named(self: Checkpointer, request: SaveRequest) -> SaveResult:
        step = request.meta["global_step"]
        saved = save(self, replace(request, name=f"step={step}"))
        if save_mode == "sync":
            reported(out, step)
        return saved

    Checkpointer.save = named


def ours_in_lightning(out: Path, save_mode: str) -> None:
    """Fit with an `SBCheckpoint` that keeps everything."""
    from lightning_sbckpt import SBCheckpoint

    name_by_step(out, save_mode)
    checkpoint = SBCheckpoint(out / "run", num_to_keep=99, save_mode=save_mode)
    lightning(out, lambda _: [checkpoint], None)
    report = checkpoint.resume_report
    say_resumed(report.meta["global_step"] if report else 0)


def example(out: Path) -> None:
    """Run the example that is shipped, which keeps the best and the newest."""
    from lightning_sbckpt import Checkpointer, SBCheckpoint

    save, begin = Checkpointer.save, SBCheckpoint.__init__
    callbacks: list[SBCheckpoint] = []

    def noted(self: Checkpointer, request: SaveRequest) -> SaveResult:
        saved = save(self, request)
        reported(out, request.meta["global_step"])
        return saved

    def remembered(self: SBCheckpoint, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        callbacks.append(self)

    Checkpointer.save = noted
    SBCheckpoint.__init__ = remembered
    devices = os.environ.get("WORLD_SIZE", "1")
    sys.argv = [str(PREEMPTIBLE), "--dir", str(out / "run"), "--devices", devices]
    sys.argv += ["--epochs", str(STEPS)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(PREEMPTIBLE), run_name="__main__")
    print(printed.getvalue())
    report = callbacks[0].resume_report
    say_resumed(report.meta["global_step"] if report else 0)
    if is_main():
        done(out, re.findall("add up to (.*)", printed.getvalue())[0])


JOBS: dict[str, Callable[[Path], None]] = {
    "loop": ours,
    "loop-async": lambda out: ours(out, save_mode="async"),
    "loop-prune": lambda out: ours(out, prune=True),
    "fit": lambda out: ours_in_lightning(out, "sync"),
    "fit-async": lambda out: ours_in_lightning(out, "async"),
    "fit-overlap": lambda out: ours_in_lightning(out, "overlap"),
    "example": example,
    "stock-lightning": stock_lightning,
    "stock-speechbrain": speechbrain,
}


# ---------------------------------------------------------------------- without a safety measure


def no_flush() -> None:
    """Flush nothing."""
    os.fsync = lambda descriptor: None


def prune_first() -> None:
    """Remove the older checkpoints before a new one is there."""
    from lightning_sbckpt import Checkpointer

    save = Checkpointer.save_and_keep_only

    def call(self: Checkpointer, *arguments: Any, **more: Any) -> Any:
        self.delete_checkpoints(num_to_keep=0)
        return save(self, *arguments, **more)

    Checkpointer.save_and_keep_only = call


BREAKS = {function.__name__: function for function in (no_flush, prune_first)}


def main(job: str, out: str, *broken: str) -> None:
    """Run a job in this process, which ckpt-chaos may have armed."""
    if os.environ.get("CKPT_CHAOS_WATCH"):
        import _chaos_sight

        from lightning_sbckpt._io import exchange

        _chaos_sight.install()
        _chaos_sight.see_exchanges(exchange)
    torch.set_num_threads(1)
    for name in broken:
        BREAKS[name]()
    JOBS[job](Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
