"""Helpers of the tests of the file writer: files written by it and by torch, and how to compare."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from lightning_sbckpt._format.templates import Templates
from lightning_sbckpt._io.storage import LocalStorage
from lightning_sbckpt._layout.links import Links
from lightning_sbckpt._save.items import Contents, SaveItem


def contents_of(state, templates=None, name="model.ckpt"):
    """Return the contents of the files of a state, by name."""
    item = SaveItem(Path(name).stem, "state", lambda: state)
    return Contents.of(item, state, templates or Templates(), Path("nowhere"))


def written(state, folder, templates=None, name="model.ckpt"):
    """Write a state, and return the paths of its files by name."""
    paths = {}
    for filename, contents in contents_of(state, templates, name).items():
        paths[filename] = folder / filename
        paths[filename].unlink(missing_ok=True)
        contents.write(paths[filename], LocalStorage(), Links(enabled=False))
    return paths


def by_torch(state, path):
    """Let torch write a state; return the path."""
    torch.save(state, path)
    return path


def form_of(value):
    """Return all there is to a loaded state as plain things that can be compared.

    Bytes stand for tensors (a NaN equals itself, and -0.0 differs from 0.0), and the first places
    of objects and storages for what is shared.
    """
    return _Form().of(value)


class _Form:
    def __init__(self):
        self.seen = {}
        self.kept = []

    def number(self, kind, identity):
        return self.seen.setdefault((kind, identity), len(self.seen))

    def of(self, value):
        known = ("object", id(value)) in self.seen
        number = self.number("object", id(value)) if _has_identity(value) else None
        self.kept.append(value)
        if known:
            return ("again", number)
        if isinstance(value, torch.Tensor):
            # Those of a nested tensor number all nested tensors of the process.
            attributes = None if value.is_nested else self.of(vars(value))
            return (type(value), number, self.tensor(value), attributes)
        if isinstance(value, (dict, OrderedDict)):
            members = [(self.of(key), self.of(item)) for key, item in value.items()]
            return (type(value), number, members, self.of(getattr(value, "__dict__", None)))
        if isinstance(value, (list, tuple)):
            return (type(value), number, [self.of(item) for item in value])
        if isinstance(value, torch.UntypedStorage):
            return ("storage", self.number("storage", value._cdata), value.tolist())
        if isinstance(value, torch.TypedStorage):
            return ("typed", value.dtype, self.of(value._untyped_storage))
        if isinstance(value, float):
            return struct.pack(">d", value)
        return (type(value), value)

    def tensor(self, tensor):
        common = (tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad)
        if tensor.is_nested:
            return (*common, [self.of(part) for part in tensor.unbind()])
        common = (*common, tensor.shape)
        if tensor.layout is torch.sparse_coo:
            parts = [tensor._indices(), tensor._values()]
            return (*common, tensor.is_coalesced(), [self.of(part.detach()) for part in parts])
        if tensor.layout is torch.sparse_csr:
            parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
            return (*common, [self.of(part.detach()) for part in parts])
        strided = (tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg())
        if tensor.device.type == "meta":
            return (*common, strided)
        if tensor.is_quantized:
            strided = (*strided, _quantized(tensor))
        storage = tensor.untyped_storage()
        self.kept.append(storage)
        number = self.number("storage", storage._cdata)
        data = bytes(torch.empty(0, dtype=torch.uint8).set_(storage).tolist())
        return (*common, strided, number, data)


def _has_identity(value):
    return isinstance(value, (dict, list, torch.Tensor))


def _quantized(tensor):
    if tensor.qscheme() is torch.per_tensor_affine:
        return (tensor.q_scale(), tensor.q_zero_point())
    scales, points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return (scales.tolist(), points.tolist(), tensor.q_per_channel_axis())


def without_checksums(data):
    """Return a torch file with zeros where checksums of tensor bytes lie, or what is made of them.

    That is: the CRC-32 of each record `data/<number>`, behind the record and in the index; the
    second half of the serialization id, which torch makes of all checksums; and its own CRC-32.
    """
    cleared = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        following = archive.start_dir
        for record in archive.infolist():
            entry = following
            assert data[entry : entry + 4] == b"PK\x01\x02"
            following += 46 + sum(struct.unpack_from("<28xHHH", data, entry))
            is_id = record.filename.endswith("/.data/serialization_id")
            if "/data/" not in record.filename and not is_id:
                continue
            name, extra = struct.unpack_from("<26xHH", data, record.header_offset)
            start = record.header_offset + 30 + name + extra
            stop = start + record.file_size
            if is_id:
                cleared[start + 20 : stop] = bytes(20)
            if record.flag_bits & 8:
                assert data[stop : stop + 4] == b"PK\x07\x08"
                cleared[stop + 4 : stop + 8] = bytes(4)
            cleared[entry + 16 : entry + 20] = bytes(4)
    return bytes(cleared)


def checksums(data):
    """Return the CRC-32 of each record, by its name without the archive's."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {record.filename.split("/", 1)[1]: record.CRC for record in archive.infolist()}
