"""A run is measured on a folder that holds evaluation images alone."""

import shutil

import numpy as np
from PIL import Image

from diffkd.commands import cli


def test_a_run_is_tested_on_a_folder_without_training_images(tmp_path, capsys):
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "here" / split / name).mkdir(parents=True)
            for index in range(2):
                path = tmp_path / "here" / split / name / f"{index}.png"
                Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    shutil.copytree(tmp_path / "here" / "val", tmp_path / "there" / "val")
    run, data = str(tmp_path / "run"), ["--data=ImageFolder", f"--data.root={tmp_path / 'here'}"]
    small = ["--data.image_size=8", "--data.batch_size=4", "--data.num_workers=0", "--data.min_crop_area=1"]
    fit = ["fit", "--student=cifar/compact_resnet8", *data, *small, f"--out={run}", "--epochs=1", "--progress=false"]
    assert cli.main(fit) == 0
    capsys.readouterr()
    assert cli.main(["test", run]) == 0
    expected = capsys.readouterr().out
    assert cli.main(["test", run, f"--data.root={tmp_path / 'there'}"]) == 0
    assert capsys.readouterr().out == expected
    shutil.rmtree(tmp_path / "there" / "val")
    assert cli.main(["test", run, f"--data.root={tmp_path / 'there'}"]) != 0
    assert "there/train: no such folder" in capsys.readouterr().err
