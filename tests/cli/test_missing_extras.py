"""A library of an extra that is not installed is one line, which names the extra."""

from __future__ import annotations

import sys

import pytest

from lightning_sbckpt import Checkpointer
from lightning_sbckpt.errors import MissingDependencyError
from lightning_sbckpt.export import to_safetensors
from lightning_sbckpt.report import report

EXTRAS = {
    "plot": "matplotlib",
    "export": "safetensors",
    "s3": "s3fs",
    "gcs": "gcsfs",
    "azure": "adlfs",
    "sftp": "paramiko",
}


@pytest.fixture
def without(monkeypatch):
    """Have the library of an extra not be installed."""

    def forget(extra):
        for name in [name for name in sys.modules if name.partition(".")[0] == EXTRAS[extra]]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, EXTRAS[extra], None)

    return forget


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("plot", ["plot", "{run}"]),
        ("export", ["export", "{run}/best", "{run}/../model.safetensors"]),
        ("s3", ["ls", "s3://a-bucket/run"]),
        ("s3", ["best", "s3://a-bucket/run"]),
        ("s3", ["show", "s3://a-bucket/run/best"]),
        ("s3", ["diff", "s3://a-bucket/run/best", "newest"]),
        ("s3", ["verify", "s3://a-bucket/run"]),
        ("s3", ["verify", "s3://a-bucket/run/best"]),
        ("s3", ["pin", "s3://a-bucket/run/best"]),
        ("s3", ["average", "s3://a-bucket/run", "--newest", "2"]),
        ("s3", ["report", "s3://a-bucket/run"]),
        ("gcs", ["watch", "gs://a-bucket/run", "--once"]),
        ("azure", ["prune", "abfs://a-bucket/run"]),
        ("sftp", ["ls", "sftp://host/run"]),
    ],
)
def test_a_command_names_the_extra_that_it_needs(extra, arguments, run, call, without):
    """And ends as for any wrong usage."""
    without(extra)
    result = call(*(each.format(run=run) for each in arguments), code=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert f"pip install 'lightning-sbckpt[{extra}]'" in line


def test_so_does_what_is_called_in_python(run, without):
    """Pictures, exports, stores; a page goes without its picture, and says so."""
    for extra in EXTRAS:
        without(extra)
    checkpointer = Checkpointer(run, access="read")
    for extra, act in {
        "plot": checkpointer.plot,
        "export": lambda: to_safetensors(checkpointer.find_checkpoint(), run / "model.safetensors"),
        "s3": lambda: Checkpointer("s3://a-bucket/run").list_checkpoints(),
    }.items():
        with pytest.raises(MissingDependencyError, match=rf"lightning-sbckpt\[{extra}\]"):
            act()
    page = report(run, run / "report.html").read_text()
    assert "lightning-sbckpt[plot]" in page
