"""The data modules under a real trainer: epochs are announced, and a resume in mid-epoch sees each batch once."""

import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from diffkd.data import Augmentation, FashionSubset, ImageFolder
from diffkd.data.image_data import placement

# Lightning 2.6 uses a name that newer versions of torch are about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Recorder(LightningModule):
    """Note the batches of training and validation; train one number."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_index):
        images, _, indices = batch
        self.seen.append((self.current_epoch, batch_index, indices.tolist(), images.sum().item()))
        return self.weight * images.mean()

    def validation_step(self, batch, batch_index):
        self.validated += batch[2].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def subset(folder):
    return FashionSubset(batch_size=1000, augmentation=Augmentation(crop_padding=2, flip=True))


def pictures(folder):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            path = folder / "images" / split / name
            path.mkdir(parents=True, exist_ok=True)
            for index in range(8):
                Image.fromarray(np.full((20, 20, 3), index * 30, dtype=np.uint8)).save(path / f"{index}.png")
    return ImageFolder(folder / "images", batch_size=2, image_size=8, num_workers=1)


def trainer(folder, **options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        **({"max_epochs": 3, "limit_val_batches": 0} | options),
    )


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize("make", [subset, pictures])
def test_a_resume_in_mid_epoch_sees_what_is_left(tmp_path, make):
    whole = Recorder()
    trainer(tmp_path).fit(whole, make(tmp_path))
    assert [entry[:2] for entry in whole.seen] == [(epoch, batch) for epoch in range(3) for batch in range(8)]
    resumed, data = Recorder(), make(tmp_path)
    data.start_batch = 3
    checkpoint = (tmp_path / "saved" / "step=11.ckpt").rename(tmp_path / "middle.ckpt")
    shutil.rmtree(tmp_path / "saved")
    trainer(tmp_path).fit(resumed, data, ckpt_path=checkpoint)
    assert resumed.seen == whole.seen[11:]
    assert resumed.weight == whole.weight


def test_validation_is_exact(tmp_path):
    model = Recorder()
    trainer(tmp_path).validate(model, datamodule=subset(tmp_path), verbose=False)
    assert model.validated == []  # limited to no batches
    trainer(tmp_path, limit_val_batches=1.0).validate(model, datamodule=subset(tmp_path), verbose=False)
    assert model.validated == list(range(2000))


def test_placement_is_the_trainers(tmp_path):
    alone = placement(None)
    attached = placement(trainer(tmp_path))
    assert alone == attached
    assert (alone.device, alone.rank, alone.world_size) == (torch.device("cpu"), 0, 1)
