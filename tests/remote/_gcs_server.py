"""A server that speaks the JSON API of Google's storage: gcp-storage-emulator, from PyPI."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import ClassVar

from remote._server import Server

_RUN = (
    "import sys; from gcp_storage_emulator.server import create_server; "
    "create_server('127.0.0.1', int(sys.argv[1]), in_memory=False, data_dir=sys.argv[2]).run()"
)
# gcsfs asks for the kind of a bucket by gRPC otherwise, which the emulator does not speak.
_PLAIN = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


class GcsServer(Server):
    """It asks for no credentials."""

    scheme = "gs"
    needs: ClassVar = {
        f"{name} (pip install {name.replace('_', '-')})": find_spec(name)
        for name in ("gcsfs", "gcp_storage_emulator")
    }

    @property
    def options(self) -> dict[str, object]:
        return {"endpoint_url": self.endpoint, "token": "anon", "project": "test"}

    @property
    def environment(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.endpoint, "FSSPEC_GS_TOKEN": "anon", **_PLAIN}

    @property
    def configured(self) -> dict[str, object]:
        return {"gs": {"token": "anon"}}

    def bucket(self, name: str) -> None:
        import gcsfs

        filesystem = gcsfs.GCSFileSystem(**self.options, skip_instance_cache=True)
        filesystem.mkdir(name)

    def command(self) -> list[str]:
        os.environ.update(_PLAIN)
        return [sys.executable, "-c", _RUN, str(self.port), str(self.folder)]
