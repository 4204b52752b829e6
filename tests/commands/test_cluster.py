"""Comparisons on clusters, and a training on two nodes: on this machine, and equal to what it does without a cluster.

What starts a cluster is left out by default: `uv run --extra cluster --extra tune pytest -n 0 -m cluster`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import MODELS, TRUST, write_recipe

from diffkd.commands import launchers
from diffkd.commands.cli import main
from diffkd.commands.compare import compare

ON_RAY = """
import json, sys, threading, time
from pathlib import Path

from ray.cluster_utils import Cluster

from diffkd.commands.compare import compare


def lose_a_node(cluster, node, out):
    started = [out / "alone" / f"seed-{seed}" / "checkpoints" / "last.ckpt" for seed in (0, 1)]
    while not all(file.is_file() for file in started):
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    Path(out / "lost").touch()


if __name__ == "__main__":
    recipe, out, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    node = cluster.add_node(**small)
    threading.Thread(target=lose_a_node, args=(cluster, node, out), daemon=True).start()
    compare(recipe, out, methods=["alone"], seeds=2, cost=False, launcher="ray",
            launcher_options={"address": cluster.address}, options=options)
    cluster.shutdown()
"""


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def students(out):
    return {file.relative_to(out): file.read_bytes() for file in sorted(out.glob("*/*/student.safetensors"))}


def script(tmp_path, words, timeout=900, **environment):
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"} | environment
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.cluster
def test_a_comparison_on_ray_survives_the_loss_of_a_node_and_ends_as_without(recipe, tmp_path):
    pytest.importorskip("ray")
    options = [TRUST, "--epochs=60"]
    (tmp_path / "on_ray.py").write_text(ON_RAY)
    out = tmp_path / "ray"
    process = script(tmp_path, [str(tmp_path / "on_ray.py"), str(recipe), str(out), json.dumps(options)])
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-3000:]
    assert (out / "lost").exists()
    compare(str(recipe), tmp_path / "here", methods=["alone"], seeds=2, cost=False, options=options)
    assert students(out) == students(tmp_path / "here")
    assert len(students(out)) == 2
    rows = [json.loads((folder / "comparison.json").read_text())["rows"] for folder in (out, tmp_path / "here")]
    assert rows[0][0]["last"] == rows[1][0]["last"]


@pytest.mark.cluster
def test_a_comparison_and_a_study_by_submitit_end_as_without(recipe, tmp_path, capsys):
    pytest.importorskip("submitit")
    pytest.importorskip("optuna")
    words = ["--methods", "alone", "--seeds=2", "--cost=false"]
    local = ["--launcher=submitit", "--launcher_options={cluster: local}"]
    for name, more in (("slurm", local), ("here", [])):
        out = f"--out={tmp_path / name}"
        assert main(["compare", str(recipe), *words, out, *more, TRUST, "--", TRUST]) == 0
    assert students(tmp_path / "slurm") == students(tmp_path / "here")
    assert len(students(tmp_path / "slurm")) == 2
    space = "--space={optimizer.init_args.lr: {low: 0.01, high: 0.1}}"
    assert (
        main(["tune", str(recipe), f"--out={tmp_path / 'study'}", space, "--trials=2", "--jobs=2", *local, TRUST]) == 0
    )
    assert (tmp_path / "study" / "best.yaml").is_file()
    assert len((tmp_path / "study" / "trials.csv").read_text().splitlines()) == 1 + 2
    assert "best: trial" in capsys.readouterr().err


@pytest.mark.cluster
def test_a_run_that_fails_on_a_cluster_is_named_with_its_reason(recipe, tmp_path, capsys):
    pytest.importorskip("submitit")
    broken = tmp_path / "broken.yaml"
    broken.write_text("student: cifar/resnet9000\nteacher: null\nmethod: null\n")
    local = ["--launcher=submitit", "--launcher_options={cluster: local}"]
    words = ["--methods", str(broken), "--seeds=1", f"--out={tmp_path / 'out'}", *local, TRUST]
    assert main(["compare", str(recipe), *words]) == 1
    assert "broken seed 0 failed: model 'cifar/resnet9000' is unknown" in capsys.readouterr().err


@pytest.mark.cluster
def test_two_nodes_by_torchrun_train_as_two_processes_of_one(recipe, tmp_path):
    fit = ["-m", "diffkd", "fit", str(recipe), TRUST, "--epochs=2", "--accelerator=cpu", "--progress=false"]
    here = script(tmp_path, [*fit, "--devices=2", f"--out={tmp_path / 'here'}"])
    _, errors = here.communicate(timeout=600)
    assert here.returncode == 0, errors[-3000:]
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29411"]
    torchrun = ["-m", "torch.distributed.run", *rendezvous, "--rdzv-id=two-nodes"]
    words = [*torchrun, *fit, "--num_nodes=2", f"--out={tmp_path / 'nodes'}"]
    nodes = [script(tmp_path, words, GLOO_SOCKET_IFNAME="lo") for _ in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=600)
        assert node.returncode == 0, errors[-3000:]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("here", "nodes")]
    assert [result["device"] for result in results] == ["2 x cpu", "2 x cpu"]
    assert (tmp_path / "nodes/student.safetensors").read_bytes() == (tmp_path / "here/student.safetensors").read_bytes()


def test_a_launcher_that_cannot_work_is_one_line_before_anything_is_trained(recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for command in ("compare", "tune"):
        words = [command, str(recipe), f"--out={out}", TRUST]
        assert main([*words, "--launcher=dask"]) == 2
        assert "--launcher" in capsys.readouterr().err
        assert main([*words, "--launcher_options={num_cpus: 1}"]) == 1
        assert "launcher_options are for --launcher ray or submitit" in capsys.readouterr().err
        with monkeypatch.context() as without:
            without.setattr(launchers, "find_spec", lambda name: None)
            assert main([*words, "--launcher=ray"]) == 1
        assert "--launcher ray needs ray: pip install 'diffkd[cluster]'" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("ray {address: '127.0.0.1:9'}", "could not be reached"),
        ("ray {num_wheels: 1}", "Ray does not take them"),
        ("submitit {cluster: local, wheels: 1}", "submitit does not take them"),
        ("submitit {cluster: moon}", "submitit does not take them"),
    ],
)
def test_options_that_a_cluster_does_not_take_are_one_line(options, reason, recipe, tmp_path):
    launcher, _, values = options.partition(" ")
    pytest.importorskip(launcher)
    words = ["-m", "diffkd", "compare", str(recipe), "--methods", "alone", f"--out={tmp_path / 'out'}"]
    trust = [TRUST, f"--trust={MODELS}"]
    process = script(tmp_path, [*words, *trust, f"--launcher={launcher}", f"--launcher_options={values}"])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    (said,) = [line for line in errors.splitlines() if line.startswith("diffkd: ") and "warning" not in line]
    assert reason in said
