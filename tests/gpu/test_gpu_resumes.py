"""Runs on a GPU that go on from a checkpoint, to the bit: plain loops, and Lightning's through `selftest`."""

from __future__ import annotations

import os
from functools import partial

import lightning as L
import pytest
import torch
from _gpu import DEVICE, IS_GPU, MODES, needs_gpu, on_a_gpu, two_gpus
from _processes import start_server
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sbckpt import Checkpointer, SBCheckpoint
from lightning_sbckpt.plugin.selftest import assert_resume_exact
from lightning_sbckpt.rng import capture_rng, restore_rng

pytestmark = on_a_gpu

ON_A_GPU_ALONE = pytest.param({"capturable": True}, id="capturable", marks=needs_gpu)
OPTIMIZERS = [
    pytest.param({}, id="plain"),
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"fused": True}, id="fused"),
    ON_A_GPU_ALONE,
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Without it two runs that nobody stopped may differ, too."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Loop:
    """A plain loop: a model with dropout, AdamW, and a scaler if there is a precision to scale for."""

    def __init__(self, *, dtype=None, compiled=False, **options):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Dropout(0.3), nn.Linear(512, 9)
        )
        self.model = net.to(DEVICE)
        self.run = torch.compile(self.model) if compiled else self.model
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=dtype is torch.float16 and IS_GPU)

    def step(self):
        """Train on one batch."""
        batch = torch.rand(8, 512, device=DEVICE)
        with torch.autocast(DEVICE, self.dtype, enabled=self.dtype is not None):
            loss = self.run(batch).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def parts(self):
        """Return what is saved."""
        found = {"model": self.model, "optimizer": self.optimizer}
        return {**found, "scaler": self.scaler} if self.scaler.is_enabled() else found

    def end(self):
        """Return every tensor."""
        return [value.detach().cpu() for value in self.model.state_dict().values()]


def resumes(folder, mode, **options):
    """Return whether a loop that goes on from a checkpoint ends as one that was not stopped."""
    loop = Loop(**options)
    for _ in range(2):
        loop.step()
    with Checkpointer(folder, loop.parts(), save_mode=mode) as checkpointer:
        checkpointer.save_checkpoint()
        rng = capture_rng()
        for _ in range(3):
            loop.step()
    again = Loop(**options)
    again.step()
    with Checkpointer(folder, again.parts()) as checkpointer:
        assert checkpointer.recover_if_possible() is not None
    restore_rng(rng)
    for _ in range(3):
        again.step()
    return all(map(torch.equal, loop.end(), again.end()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIMIZERS)
def test_a_loop_resumes_with_every_kind_of_step(tmp_path, mode, options):
    """Moments and counts of steps lie where the step wants them."""
    assert resumes(tmp_path, mode, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_loop_resumes_with_amp(tmp_path, dtype):
    """With the scaler's state where there is one."""
    assert resumes(tmp_path, "overlap", dtype=dtype)


@needs_gpu
def test_a_compiled_loop_resumes(tmp_path):
    """The module is the one that is saved."""
    assert resumes(tmp_path, "overlap", compiled=True)


@needs_gpu
def test_a_captured_step_goes_on_after_a_load(tmp_path):
    """Forward, backward and step in one graph, with a learning rate that is a tensor."""

    def captured():
        torch.manual_seed(1)
        model = nn.Linear(512, 512, device=DEVICE)
        rate = torch.tensor(1e-2, device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, capturable=True)
        batch = torch.rand(8, 512, device=DEVICE)

        def step():
            optimizer.zero_grad(set_to_none=True)
            model(batch).square().mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return model, optimizer, graph

    model, optimizer, graph = captured()
    with Checkpointer(tmp_path, {"m": model, "o": optimizer}, save_mode="overlap") as checkpointer:
        graph.replay()
        checkpointer.save_checkpoint()
        graph.replay()
        checkpointer.wait()
        torch.cuda.synchronize()
        expected = model.weight.detach().clone()
        graph.replay()
        optimizer.param_groups[0]["lr"].fill_(9.0)
        checkpointer.recover_if_possible()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(model.weight, expected)


class Module(L.LightningModule):
    """A model with dropout and a normalization, of one kind of step."""

    def __init__(self, *, compiled=False, **options):
        super().__init__()
        net = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.Linear(64, 3)
        )
        self.net = torch.compile(net) if compiled else net
        self.options = options

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), **self.options)


def make(dirpath, *, trainer=None, mode="sync", workers=0, **options):
    """Return a fit of two epochs of eight batches that saves after every third."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    L.seed_everything(1)
    data = TensorDataset(torch.rand(64, 64), torch.randint(0, 3, (64,)))
    loader = DataLoader(
        data,
        batch_size=8,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=IS_GPU,
    )
    fit = L.Trainer(
        accelerator="gpu" if IS_GPU else "cpu",
        deterministic=True,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SBCheckpoint(dirpath, every_n_train_steps=3, save_mode=mode)],
        **{"devices": 1, **(trainer or {})},
    )
    return fit, Module(**options), loader


FITS = {
    "fp16 and a scaler": partial(make, trainer={"precision": "16-mixed"}, mode="async"),
    "bf16": partial(make, trainer={"precision": "bf16-mixed"}, mode="overlap"),
    "foreach": partial(make, foreach=True),
    "fused": partial(make, fused=True, mode="overlap"),
    "capturable": partial(make, capturable=True, mode="overlap"),
    "torch.compile": partial(make, compiled=True),
    "persistent workers and pinned batches": partial(make, workers=2, mode="async"),
    "accumulation": partial(make, trainer={"accumulate_grad_batches": 4}, mode="overlap"),
}
GPU_ALONE = {"fp16 and a scaler", "capturable", "torch.compile"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_gpu if n in GPU_ALONE else ()) for n in FITS]
)
def test_a_killed_fit_resumes(name):
    """With `deterministic=True`, killed within an epoch and at another one's end."""
    start_server()
    assert_resume_exact(FITS[name], ["on_train_batch_end:5", "on_train_epoch_end:2"])


@two_gpus
def test_a_run_resumes_on_another_gpu(tmp_path):
    """Random states go to the device that trains, whatever its number."""
    found = []
    for device in (0, 1):
        L.seed_everything(2)
        trainer, module, loader = make(tmp_path / "run", trainer={"devices": [device]})
        trainer.fit_loop.max_epochs = 1 + device
        trainer.fit(module, loader)
        found.append(module)
    trainer, through, loader = make(tmp_path / "through")
    trainer.fit(through, loader)
    expected = through.state_dict()
    assert all(torch.equal(v.cpu(), expected[k].cpu()) for k, v in found[1].state_dict().items())


@two_gpus
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_killed_fit_of_two_ranks_resumes(accumulate):
    """Over NCCL, also within a window of accumulation, where each rank has gradients of its own."""
    start_server()
    options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": accumulate}
    assert_resume_exact(partial(make, trainer=options), ["on_train_batch_end:4"], ranks=2)
