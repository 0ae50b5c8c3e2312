"""What of the hardware, and of how torch uses it, keeps a resumed run from being exact; without any."""

from __future__ import annotations

import pytest
import torch
from _runs import fit, newest
from torch import nn

from lightning_sbckpt.plugin._private.compiled import autotuned
from lightning_sbckpt.plugin.state import exact
from lightning_sbckpt.plugin.state.hardware import (
    changes,
    describe,
    warnings_of_device,
    warnings_of_parts,
)

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Deterministic algorithms, as `Trainer(deterministic=True)` asks for them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class TestWhatIsNotDeterministic:
    """Each is a sentence that says what to do."""

    def test_nothing_with_deterministic_algorithms_or_on_the_processor(self):
        """Then there is nothing to say."""
        assert warnings_of_device(CUDA) == []
        torch.use_deterministic_algorithms(False)
        assert warnings_of_device(CPU) == []

    def test_any_kernel_without_them(self):
        """On every device."""
        torch.use_deterministic_algorithms(False)
        for name in ("cuda", "mps", "xpu"):
            (said,) = warnings_of_device(torch.device(name))
            assert f"kernels on {name} may be nondeterministic" in said
            assert "deterministic=True" in said

    def test_kernels_that_have_no_deterministic_form_and_only_warn(self):
        """`deterministic="warn"` looks like `True` to who asks whether they are enabled."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        (said,) = warnings_of_device(CUDA)
        assert 'pass Trainer(deterministic=True), not "warn"' in said

    def test_algorithms_chosen_by_their_speed(self, monkeypatch):
        """Another one may be the fastest in the next process."""
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        (said,) = warnings_of_device(CUDA)
        assert "benchmark=False" in said
        assert warnings_of_device(torch.device("mps")) == []

    @pytest.mark.parametrize("value", [None, ":0:0"])
    def test_workspaces_of_cublas(self, monkeypatch, value):
        """Lightning sets the variable; who calls torch himself may not."""
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        if value is not None:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        (said,) = warnings_of_device(CUDA)
        assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in said

    def test_random_states_that_torch_does_not_give(self):
        """Of a device whose module has no such functions."""
        (said,) = warnings_of_device(torch.device("hpu"))
        assert "random states of hpu devices are not saved" in said


class TestParts:
    """What a part of the module keeps for itself."""

    def test_dropout_of_cudnn(self):
        """Its state can't be read; layers of torch's own have their states in the generator."""
        module = nn.ModuleDict({"encoder": nn.LSTM(2, 2, num_layers=2, dropout=0.1)})
        (said,) = warnings_of_parts(module, CUDA)
        assert "encoder (LSTM)" in said and "cuDNN" in said
        assert warnings_of_parts(module, CPU) == []
        others = [nn.LSTM(2, 2, num_layers=2), nn.GRU(2, 2, dropout=0), nn.Dropout(0.5)]
        assert warnings_of_parts(nn.ModuleList(others), CUDA) == []

    @pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
    @pytest.mark.parametrize("in_place", [False, True])
    def test_kernels_that_the_compiler_tries_out(self, mode, in_place):
        """It takes the fastest, which may be another one the next time."""
        part = nn.Linear(2, 2)
        if in_place:
            part.compile(mode=mode)
        else:
            part = torch.compile(part, mode=mode)
        module = nn.ModuleDict({"part": part, "other": torch.compile(nn.Linear(2, 2))})
        assert autotuned(module) == ["part"]
        (said,) = warnings_of_parts(module, CUDA)
        assert "part" in said and "max-autotune" in said

    @pytest.mark.parametrize("mode", [None, "reduce-overhead"])
    def test_other_modes_of_the_compiler_try_out_nothing(self, mode):
        """They are as exact as kernels are."""
        module = nn.Linear(2, 2)
        module.compile(mode=mode)
        assert autotuned(nn.ModuleList([module, torch.compile(nn.Linear(2, 2), mode=mode)])) == []


class TestAnotherMachine:
    """What the bits depend on is in the checkpoint, and compared when the run goes on."""

    def test_the_processor_has_nothing_to_say(self):
        """Checkpoints of runs without a device are as they were."""
        assert describe(CPU) == {}

    def test_a_device_is_described_by_what_its_bits_depend_on(self, monkeypatch):
        """Its name, the versions of its libraries, and whether products are rounded."""
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
        found = describe(CUDA)
        assert found["device"] == "NVIDIA H100"
        assert (found["CUDA"], found["cuDNN"]) == ("12.8", "91002")
        assert found["precision of float32 products"] == "highest"
        assert found["TF32 in cuDNN"] in ("True", "False")
        assert describe(torch.device("mps"))["device"] == "mps"

    def test_every_difference_is_told_with_both_values(self):
        """What only one of the two has, too."""
        before = {"device": "NVIDIA A100", "CUDA": "12.4", "cuDNN": "90100"}
        now = {"device": "NVIDIA H100", "CUDA": "12.4", "TF32 in cuDNN": "True"}
        assert changes(before, before) == []
        (said,) = changes(before, now)
        assert "device: NVIDIA A100, now NVIDIA H100" in said
        assert "cuDNN: 90100, now unknown" in said
        assert "CUDA" not in said.replace("NVIDIA", "")
        (said,) = changes(before, {})
        assert "device: NVIDIA A100, now the processor" in said

    def test_checkpoints_that_say_nothing_are_no_other_machine(self):
        """Of earlier releases, or of the processor."""
        assert changes(None, {"device": "NVIDIA H100"}) == []
        assert changes("damaged", {"device": "NVIDIA H100"}) == []

    def test_a_resume_on_another_machine_is_told_in_the_report(self, tmp_path, monkeypatch):
        """And one on the same is not."""
        torch.use_deterministic_algorithms(False)
        for number, name in enumerate(("NVIDIA A100", "NVIDIA A100", "NVIDIA H100")):
            monkeypatch.setattr(exact, "describe", lambda device, name=name: {"device": name})
            run = fit(tmp_path, trainer={"max_epochs": number + 1})
        notes = run.callback.resume_report.notes
        assert [note for note in notes if "device: NVIDIA A100, now NVIDIA H100" in note]
        state = torch.load(newest(tmp_path).path / "rng.ckpt", weights_only=True)
        assert state["ranks"][0]["hardware"] == {"device": "NVIDIA H100"}
