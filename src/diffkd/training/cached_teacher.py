"""The callback of the feature cache: the teacher runs once per sample and view; later epochs read the cache."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from diffkd.distill.distiller import Distiller
from diffkd.files.config import class_path, describe
from diffkd.tasks.data_facts import DataFacts
from diffkd.tasks.task import Step
from diffkd.teacher.cache import Storage, TeacherCache
from diffkd.teacher.options import TeacherOptions
from diffkd.teacher.view import TeacherInput

# Arguments of data modules that change no pixel of a view; the last two are read from its data loader instead.
_IGNORED_ARGUMENTS = {"num_workers", "verify", "cache", "val_batch_size", "batch_size", "seed"}


class CachedTeacher(Callback):
    """Reads the teacher's features from a :class:`~diffkd.teacher.cache.TeacherCache`, and fills it.

    Without augmentation a sample looks the same in every epoch. With augmentation, seed and epoch determine order and
    augmentation, so that the training can cycle through `views` epochs. Features are always read back from the cache,
    so that a run with an empty cache gives the same results as one with a full cache.

    Args:
        folder: of the cache; None: no cache, only repeat the views.
        identity: plain values about teacher and arithmetic that determine the features.
        data: the training data.
        facts: of the data.
        views: number of epochs that are repeated; None: images are not augmented.
        storage: type of the numbers on disk.
        num_nodes: machines of the training.

    Raises:
        ValueError: if sample and view do not determine the teacher's features; the message names the reason.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        identity: Mapping[str, Any],
        data: LightningDataModule,
        facts: DataFacts,
        views: int | None = None,
        storage: Storage = "float16",
        num_nodes: int = 1,
    ) -> None:
        if views is not None and views < 1:
            raise ValueError(f"teacher_views={views} is no number of epochs: give 1 or more, or leave it out")
        self.folder, self.views, self.storage = folder, views, storage
        self.cache: TeacherCache | None = None
        self._example = facts.example
        self._identity = {**identity, "data": describe_data(data, facts)}
        self._seed = describe(data)["init_args"].get("seed")
        if folder is not None:
            _check(data, facts, views, num_nodes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repeat the views, and open the cache on all ranks."""
        sampler: Any = getattr(trainer.train_dataloader, "sampler", None)
        if not hasattr(sampler, "views"):
            raise ValueError(
                f"the training data come from a {type(trainer.train_dataloader).__name__} whose sampler cannot repeat "
                "epochs; load them with diffkd.data.sampler.EpochSampler, or leave teacher_cache and teacher_views out"
            )
        sampler.views = self.views
        distiller = getattr(pl_module, "distiller", None)
        if self.folder is None or not isinstance(distiller, Distiller):
            return
        samples = describe_order(trainer.train_dataloader, self._seed)
        identity = self._identity | {"data": self._identity["data"] | samples}
        if self.views is not None:  # in-memory augmentation depends on the batches and on the device that draws
            identity["views"] = {
                "seed": sampler.seed,
                "batch_size": getattr(trainer.train_dataloader, "batch_size", None),
                "processes": trainer.world_size,
                "device": trainer.strategy.root_device.type,
            }
        features = distiller.teacher_features(self._example.to(pl_module.device))
        for name, feature in features.items():
            if len(feature) != len(self._example):
                raise ValueError(
                    f"the teacher's layer '{name}' returns {tuple(feature.shape)} for {len(self._example)} images, and "
                    "features are kept image by image: pair a layer whose output has the images first, or leave "
                    "teacher_cache out"
                )
        shapes = {name: feature.shape[1:] for name, feature in features.items()}
        for first in (True, False):
            if trainer.is_global_zero == first:
                self.cache = TeacherCache(
                    self.folder,
                    identity=identity,
                    shapes=shapes,
                    samples=sampler.size,
                    views=self.views or 1,
                    storage=self.storage,
                    rank=trainer.global_rank,
                    create=first,
                )
            trainer.strategy.barrier()

    def features(self, distiller: Distiller, step: Step, epoch: int) -> dict[str, Tensor] | None:
        """Return the teacher's features of a batch; the teacher runs only for samples that are not cached yet."""
        if self.cache is None:
            return None
        indices, view = step.context["indices"], 0 if self.views is None else epoch % self.views
        missing = ~self.cache.known(indices, view)
        if bool(missing.any()):
            chosen = missing.nonzero().flatten().to(indices.device)
            everything = len(chosen) == len(indices) or not isinstance(step.inputs, Tensor)
            inputs, rows = (step.inputs, indices) if everything else (step.inputs[chosen], indices[chosen])
            computed = distiller.teacher_features(inputs)
            self.cache.write(rows, computed, view)
            if not bool(self.cache.known(indices, view).all()):  # a cache with more layers than needed is not filled
                return computed if everything else distiller.teacher_features(step.inputs)
        images = step.images if isinstance(step.images, Tensor) else step.images[0]
        return {name: feature.to(images.dtype) for name, feature in self.cache.read(indices, view).items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Commit the features of the epoch, and read which ones other ranks have committed."""
        if self.cache is not None:
            self.cache.commit()
            trainer.strategy.barrier()
            self.cache.refresh()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Commit the features computed so far."""
        if self.cache is not None:
            self.cache.commit()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save no state in checkpoints."""


def describe_teacher(teacher: nn.Module, view: Any, options: TeacherOptions) -> dict[str, Any]:
    """Return plain values that determine a teacher's features: its class, weights, input, and how it runs.

    Raises:
        ValueError: if its state holds objects other than tensors and plain values, which cannot be compared.
    """
    digest = hashlib.sha256()
    for name, value in teacher.state_dict().items():
        digest.update(name.encode())
        _digest(digest, name, value)
    seen: Any = None if view is None else class_path(type(view))
    if isinstance(view, TeacherInput):
        seen = {"scale": view.scale.flatten().tolist(), "shift": view.shift.flatten().tolist(), "size": view.size}
    return {
        "class": class_path(type(teacher)),
        "weights": digest.hexdigest()[:32],
        "input": seen,
        "options": {name: getattr(options, name) for name in ("fold", "precision", "channels_last")},
    }


def describe_data(data: LightningDataModule, facts: DataFacts) -> dict[str, Any]:
    """Return plain values that determine the pixels of a view, apart from seed, batches, and which samples there are.

    The latter may depend on the seed, as where it draws the training part; :func:`describe_order` has them.
    """
    described = describe(data)
    arguments = {name: value for name, value in described["init_args"].items() if name not in _IGNORED_ARGUMENTS}
    pixels = hashlib.sha256()
    for image in facts.example:
        pixels.update(_bytes(image))
    return {"class": described["class_path"], **arguments, "first and last image": pixels.hexdigest()[:32]}


def describe_order(loader: Any, seed: int | None) -> dict[str, Any]:
    """Return plain values that differ if an index means another sample.

    Args:
        loader: of the training data.
        seed: of the data, which stands for their samples where neither loader nor data set has a digest.
    """
    for name in ("image_digest", "digest"):
        for owner in (loader, getattr(loader, "dataset", None)):
            if (digest := getattr(owner, name, None)) is not None:
                return {"samples": digest}
    return {"samples": None, "seed": seed}


def random_parts(data: LightningDataModule) -> list[str] | None:
    """Return the random augmentations of a data module's training images, None if unknown."""
    augmentation = getattr(data, "augmentation", None)
    if not dataclasses.is_dataclass(augmentation) or isinstance(augmentation, type):
        return None
    plain = type(augmentation)()
    parts = [
        f"{field.name}={getattr(augmentation, field.name)!r}"
        for field in dataclasses.fields(augmentation)
        if field.name != "rand_augment_magnitude" and getattr(augmentation, field.name) != getattr(plain, field.name)
    ]
    if hasattr(data, "min_crop_area"):
        parts.append(f"the random crop of min_crop_area={data.min_crop_area}")
    crop = getattr(data, "crop_size", None)
    if crop is not None and tuple(crop) != tuple(getattr(data, "resize", None) or ()):
        parts.append(f"the random crop to crop_size={tuple(crop)}")
    return parts


def _check(data: LightningDataModule, facts: DataFacts, views: int | None, num_nodes: int) -> None:
    if facts.task == "detection":
        raise ValueError(
            "teacher_cache does not work for detection: the student draws the size of its images anew in every step; "
            "leave it out"
        )
    if num_nodes > 1:
        raise ValueError(f"teacher_cache does not work over {num_nodes} machines, which share no memory; leave it out")
    if facts.mixup or facts.cutmix:
        raise ValueError(
            f"teacher_cache does not work with mixup={facts.mixup} and cutmix={facts.cutmix}, which mix other images "
            "in every step; set them to 0 or leave the cache out"
        )
    parts = random_parts(data)
    if views is None and parts is None:
        raise ValueError(
            f"teacher_cache: {type(data).__name__} does not say how it augments (it has no `augmentation`); give "
            "teacher_views, the number of epochs whose images are repeated, if they follow from seed and epoch alone"
        )
    if views is None and parts:
        raise ValueError(
            f"teacher_cache does not work with images that differ in every epoch ({', '.join(parts)}): turn that off, "
            "or give teacher_views, the number of epochs whose images are repeated thereafter"
        )


def _digest(digest: Any, name: str, value: Any) -> None:
    """Take in a value of a state: a tensor, or what `get_extra_state` returned, if that is of plain values."""
    if isinstance(value, Tensor) and not value.is_quantized:
        digest.update(f" {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value.to_dense() if value.layout is not torch.strided else value))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _digest(digest, name, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f" {len(value)}".encode())
        for item in value:
            _digest(digest, name, item)
    elif value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype)):
        digest.update(f" {value!r}".encode())
    else:
        kind = "quantized tensor" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"teacher_cache cannot tell this teacher from another: entry {name!r} of its state is a {kind}; let "
            "get_extra_state return tensors and plain values, or leave the cache out"
        )


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
