"""Where the child processes of the tests come from, which really die.

They are forked from one server, quickly, and inherit nothing of the process that runs the tests. All
test files share it: whichever starts it first, it has everything loaded that any of them needs, and
no child spends seconds on imports (torch's compiler alone takes two, with the first optimizer).
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

context = multiprocessing.get_context("forkserver")

LOADED = (
    "lightning.pytorch",
    "lightning_sbckpt.cli",
    "lightning_sbckpt.plugin.selftest",
    "paramiko",
    "rich.progress",
    "rich.table",
    "s3fs",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torchmetrics.classification",
)

context.set_forkserver_preload(list(LOADED))


def start_server() -> None:
    """Start the server, before the package's own self-test would start one that has loaded less."""
    context.set_forkserver_preload(list(LOADED))
    forkserver.ensure_running()
