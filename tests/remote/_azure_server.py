"""A server that speaks the API of Azure's blobs: azurite, from npm, with the account it is made with."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import ClassVar

from remote._server import Server

ACCOUNT = "devstoreaccount1"
# Published with azurite: the same for everybody.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURITE = shutil.which("azurite-blob", path=os.environ.get("AZURITE_BIN") or os.environ["PATH"])


class AzureServer(Server):
    """It has one account."""

    scheme = "abfs"
    needs: ClassVar = {
        "adlfs": find_spec("adlfs"),
        "azurite (npm install azurite; AZURITE_BIN is the folder of azurite-blob)": AZURITE,
    }

    @property
    def options(self) -> dict[str, object]:
        endpoint = f"{self.endpoint}/{ACCOUNT}"
        parts = {"AccountName": ACCOUNT, "AccountKey": KEY, "BlobEndpoint": endpoint}
        text = ";".join(f"{name}={value}" for name, value in parts.items())
        return {"connection_string": f"DefaultEndpointsProtocol=http;{text};"}

    @property
    def environment(self) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": str(self.options["connection_string"])}

    def bucket(self, name: str) -> None:
        import adlfs

        filesystem = adlfs.AzureBlobFileSystem(**self.options, skip_instance_cache=True)
        filesystem.mkdir(name)

    def command(self) -> list[str]:
        assert AZURITE is not None
        command = [AZURITE, "--silent", "--skipApiVersionCheck", "--location", str(self.folder)]
        return [*command, "--blobHost", "127.0.0.1", "--blobPort", str(self.port)]
