"""Two processes on the CPU: the same accuracy as one would measure, the same model on both, and a clean stop."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from short_trainings import arrays

from diffkd.models import load_model

SCRIPT = """
import sys
from functools import partial
from short_trainings import METHODS, arrays, train
import json, os, signal, torch
from diffkd.tasks.interruption import Interrupted

files, out, models, trip = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
first = os.environ.get("LOCAL_RANK", "0") == "0"

def action():
    if first:  # only one of the two hears the signal
        os.kill(os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    torch.set_num_threads(1)
    data = arrays(files, trip if trip >= 0 else None, action, batch_size=7)
    try:
        told = {"devices": 2, "epochs": 2, "log_every": 2, "resume": True, "progress": True}
        train(data, out, models, method=METHODS["diffkd"], ema=0.8, **told)
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
"""


def launch(files, out, models, trip=-1):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PYTHONWARNINGS": "ignore",
    }
    script = Path(out).with_suffix(".py")
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), json.dumps(files), str(out), models, str(trip)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_two_processes(tmp_path, image_files, model_file):
    out = tmp_path / "run"
    stopped = launch(image_files, out, model_file, trip=1)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr[-3000:]
    content = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 2  # the next step at which both look up
    done = launch(image_files, out, model_file)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result["device"] == "2 x cpu"
    assert result["last"]["step"] == 2 * (30 // 7 + 1)
    assert f"epoch 2/2  task loss {result['last']['train/task']:.4f}" in done.stderr

    student = load_model(
        f"{model_file}:small", num_classes=6, in_channels=3, weights=out / "student.safetensors"
    ).eval()
    hits = [
        (student(images).argmax(1) == labels).float().sum()
        for images, labels, _ in arrays(image_files).val_dataloader()
    ]
    assert result["last"]["top1"] == pytest.approx(float(sum(hits)) / 36)
