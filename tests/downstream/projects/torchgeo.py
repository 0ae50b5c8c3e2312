"""TorchGeo: its segmentation task, a raster on the disk, and samplers that draw places in it."""

from __future__ import annotations

import kornia.augmentation as K
import lightning.pytorch as L
import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from torchgeo.datamodules import GeoDataModule
from torchgeo.datasets import RasterDataset, random_bbox_splitting
from torchgeo.samplers import GridGeoSampler, RandomBatchGeoSampler
from torchgeo.trainers import SemanticSegmentationTask

# `requests`: TorchGeo imports it whether or not its data sets are downloaded.
PINS = ("torchgeo==0.8.1", "requests==2.34.2")
TORCH = "torch==2.14.1"  # torchvision's wheels take the build for CUDA alone.
LIGHTNING = "lightning.pytorch"
CHECKPOINT = {"min_key": "val_loss"}


class Image(RasterDataset):
    filename_glob = "image*.tif"
    filename_regex = r"image_(?P<date>\d{8})"


class Mask(RasterDataset):
    filename_glob = "mask*.tif"
    filename_regex = r"mask_(?P<date>\d{8})"
    is_image = False


class Rasters(GeoDataModule):
    def __init__(self, paths):
        super().__init__(Image, batch_size=2, patch_size=32, length=14, paths=paths)
        self.paths = str(paths)
        self.train_aug = K.AugmentationSequential(
            K.RandomHorizontalFlip(), data_keys=None, keepdim=True
        )

    def setup(self, stage):
        self.dataset = Image(self.paths) & Mask(self.paths)
        self.train_dataset, self.val_dataset = random_bbox_splitting(
            self.dataset, [0.5, 0.5], torch.Generator().manual_seed(1)
        )
        self.test_dataset = self.predict_dataset = self.val_dataset
        self.train_batch_sampler = RandomBatchGeoSampler(self.train_dataset, 32, 2, 14)
        self.val_sampler = self.test_sampler = self.predict_sampler = GridGeoSampler(
            self.val_dataset, 32, 32
        )


def write(folder):
    numbers = np.random.default_rng(7).random((3, 128, 128)).astype("float32")
    place = {"crs": "EPSG:32631", "transform": from_origin(0, 128, 1, 1), "driver": "GTiff"}
    for name, values in (("image", numbers), ("mask", (numbers[:1] > 0.5).astype("uint8"))):
        shape = dict(zip(("count", "height", "width"), values.shape, strict=True))
        with rasterio.open(
            folder / f"{name}_20260101.tif", "w", dtype=values.dtype, **place, **shape
        ) as file:
            file.write(values)


def train(trainer, folder):
    write(folder)
    data = Rasters(folder)
    module = SemanticSegmentationTask("unet", "resnet18", task="multiclass", num_classes=2)
    trainer = L.Trainer(**trainer)
    trainer.fit(module, data)
    return {
        "test": lambda best: trainer.test(module, data, ckpt_path="best"),
        "predict": lambda best: torch.cat(trainer.predict(module, data, ckpt_path="best")),
        "load": SemanticSegmentationTask.load_from_checkpoint,
    }
