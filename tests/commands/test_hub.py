"""Students on the Hub, against a server of this test that speaks the Hub's protocol on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml

import diffkd.data
from diffkd import save_student
from diffkd.commands.cli import main
from diffkd.commands.push import push
from diffkd.export.hub import model_card, write_repository
from diffkd.export.student_file import make_card, read_card
from diffkd.files.config import describe
from diffkd.files.weights import read_weights
from diffkd.inference.students import load_student
from diffkd.models import load_model
from diffkd.models.hub import fetch_student
from diffkd.tasks.data_facts import facts_of
from diffkd.tasks.options import DetectionOptions
from diffkd.tasks.task_of_data import load

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Handler(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for to create a repository, send files in a commit, and fetch a file."""

    def log_message(self, *words):
        self.server.seen.append(f"{self.command} {self.path}")

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_writer":
            return self.answer(401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "alice":
                return self.answer(403)
            self.server.repositories.setdefault(name, {})
            return self.answer(200, json.dumps({"url": f"{self.server.address}/{name}"}).encode())
        if self.path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        repository, _, rest = self.path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if rest == "preupload":
            asked = json.loads(body)["files"]
            told = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            return self.answer(200, json.dumps({"files": told}).encode())
        assert rest == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[repository][line["value"]["path"]] = content
        address = f"{self.server.address}/{repository}/commit/{COMMIT}"
        return self.answer(200, json.dumps({"commitUrl": address, "commitOid": COMMIT}).encode())

    def do_GET(self):
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        files = self.server.repositories.get(repository)
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        digest = hashlib.sha1(files[file]).hexdigest()
        return self.answer(200, files[file], X_Repo_Commit=COMMIT, ETag=f'"{digest}"')

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Start the server, and let the library talk to it alone, as somebody who may write."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address, server.repositories, server.seen = f"http://127.0.0.1:{server.server_port}", {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def student(tmp_path, image_files):
    """A student's file with its card, as a training leaves them."""
    torch.manual_seed(0)
    data = diffkd.data.Arrays(image_files["train"], test=image_files["test"])
    named = {"class_path": "diffkd.data.Arrays", "init_args": dict(image_files) | {"batch_size": 20}}
    config = {"data": named, "teacher": "cifar/resnet14", "method": {"class_path": "diffkd.KD"}, "seed": 0}
    card = make_card("cifar/resnet8", facts_of(data), config) | {"metrics": {"top1": 0.25}, "which": "last epoch"}
    save_student(load_model("cifar/resnet8", num_classes=6, in_channels=3), tmp_path / "run/student.safetensors", card)
    return tmp_path / "run"


def words_of(image_files):
    return [f"--data.train={image_files['train']}", f"--data.test={image_files['test']}"]


def test_what_was_pushed_is_tested_inspected_and_teaches(hub, student, image_files, tmp_path, capsys):
    assert main(["push", str(student), "alice/small", "--license=apache-2.0"]) == 0
    assert f"{hub.address}/alice/small" in capsys.readouterr().out
    assert sorted(hub.repositories["alice/small"]) == ["README.md", "student.json", "student.safetensors"]

    fetched = fetch_student("hub:alice/small")
    expected = read_weights(student / "student.safetensors")
    torch.testing.assert_close(read_weights(fetched), expected, rtol=0, atol=0)
    assert main(["test", "hub:alice/small", *words_of(image_files)]) == 0
    assert "top1" in capsys.readouterr().out
    assert main(["inspect", "hub:alice/small"]) == 0
    assert "cifar/resnet8" in capsys.readouterr().out
    assert main(["layers", "cifar/resnet8", "--teacher=hub:alice/small", "--num_classes=6"]) == 0

    run = tmp_path / "taught"
    words = ["--student=cifar/resnet8", "--teacher=hub:alice/small", "--method=diffkd.KD", "--epochs=1"]
    words += ["--data=Arrays", "--accelerator=cpu", *words_of(image_files)]
    assert main(["fit", *words, f"--out={run}"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["teacher"] == "hub:alice/small"
    again = tmp_path / "again"
    words = ["--student=hub:alice/small", "--epochs=1", "--max_steps=1", "--data=Arrays", "--accelerator=cpu"]
    assert main(["fit", *words, *words_of(image_files), f"--out={again}"]) == 0
    assert read_card(again / "student.safetensors")["model"] == "cifar/resnet8"


def test_what_is_in_the_cache_serves_without_a_network(hub, student, monkeypatch, capsys):
    push(str(student), "alice/small")
    first = fetch_student("hub:alice/small")
    assert first == fetch_student(f"hub:alice/small@{COMMIT}")
    assert read_card(first)["model"] == "cifar/resnet8"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_student("hub:alice/small") == first
    with pytest.raises(OSError, match=r"hub:alice/other could not be fetched .*where there is a network"):
        fetch_student("hub:alice/other")


def test_the_page_says_what_the_card_says_and_names_no_path_of_this_machine(student, tmp_path):
    folder = tmp_path / "files"
    assert push(str(student), "alice/small", folder=folder) == str(folder)
    page = (folder / "README.md").read_text()
    header = yaml.safe_load(page.split("---")[1])
    assert header["library_name"] == "diffkd"
    assert header["pipeline_tag"] == "image-classification"
    assert "| top1 | 0.2500 |" in page
    assert "load_model('cifar/resnet8', num_classes=6, in_channels=3, weights=weights)" in page
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    assert read_card(folder / "student.safetensors")["data"]["init_args"] == {"batch_size": 20}


def test_the_lines_without_diffkd_build_the_model(tmp_path):
    for name, classes in (("timm/test_resnet", 5), ("torchvision/resnet18", 5)):
        card = {"model": name, "num_classes": classes, "in_channels": 3, "image_size": [32, 32], "classes": []}
        page = model_card(card, "alice/small")
        code = page.partition("Without diffkd")[2].partition("```python\n")[2].partition("```")[0]
        weights = tmp_path / "weights.safetensors"
        save_student(load_model(name, num_classes=classes), weights, card)
        found = {}
        exec(code.replace('hf_hub_download("alice/small", "student.safetensors")', repr(str(weights))), found)
        assert found["model"](torch.zeros(2, 3, 32, 32)).shape == (2, classes)


SCENES = {"train_count": 2, "val_count": 2, "batch_size": 2}
KINDS = {
    "cifar/resnet8": (lambda files: diffkd.data.Arrays(files["train"], files["test"]), {}),
    "timm/test_resnet": (lambda files: diffkd.data.Arrays(files["train"], files["test"], labels=False), {}),
    "fcos/timm/test_resnet": (
        lambda _: diffkd.data.DetectionScenes(size=(96, 80), classes=(0, 1), min_size=(48, 64), max_size=90, **SCENES),
        {"detection": {"fpn_channels": 64, "norm": "group", "anchor_scale": 0.1}},
    ),
    "torchvision/lraspp_mobilenet_v3_large": (lambda _: diffkd.data.SegmentationScenes(size=(64, 64), **SCENES), {}),
    "torchvision/deeplabv3_mobilenet_v3_large": (
        lambda _: diffkd.data.SegmentationScenes(size=(64, 64), **SCENES),
        {"segmentation": {"auxiliary": True}},
    ),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_the_lines_of_the_page_build_the_student_that_is_loaded_by_its_card(name, tmp_path, image_files, monkeypatch):
    make, options = KINDS[name]
    data = make(image_files)
    facts = facts_of(data)
    card = make_card(name, facts, {"data": describe(data), **options})
    auxiliary, detection = "segmentation" in options, DetectionOptions(**options.get("detection", {}))
    model = load(name, facts, num_classes=facts.num_classes, in_channels=3, auxiliary=auxiliary, detection=detection)
    save_student(model, tmp_path / "run/student.safetensors", card)
    files = write_repository(tmp_path / "run/student.safetensors", tmp_path / "files", "alice/small")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: str(tmp_path / "files" / file))
    expected = load_student(files[0]).module
    blocks = [part.partition("```")[0] for part in files[-1].read_text().split("```python\n")[1:]]
    assert len(blocks) == 1 + name.startswith(("timm", "torchvision"))
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *facts.image_size, generator=draw)
    for code in blocks:
        found = {}
        exec(code, found)
        ours = found["model"].eval()
        torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=0, atol=0)
        if facts.task == "detection":
            assert (ours.transform.min_size, ours.transform.max_size) == ((48, 64), 90)
        given = list(images) if facts.task == "detection" else images
        with torch.no_grad():
            torch.testing.assert_close(ours(given), expected(given), rtol=0, atol=0)


def test_texts_of_a_card_are_no_markup(student):
    card = read_card(student / "student.safetensors") | {"classes": ["<img src=x>", "a|b", "[c](d)"]}
    page = model_card(card, "alice/small")
    assert "&lt;img src=x&gt;, a\\|b, \\[c\\](d)" in page
    assert "<img" not in page


def test_code_of_ones_own_keeps_its_name_alone_and_is_never_run(hub, student, image_files, capsys):
    card = json.loads((student / "student.json").read_text()) | {"model": "/home/somebody/nets.py:small"}
    (student / "student.json").write_text(json.dumps(card))
    push(str(student), "alice/own")
    assert b"/home" not in hub.repositories["alice/own"]["student.json"] + hub.repositories["alice/own"]["README.md"]
    assert main(["test", "hub:alice/own", *words_of(image_files)]) == 1
    assert "names code to run, 'nets.py:small'" in capsys.readouterr().err
    words = ["--student=cifar/resnet8", "--teacher=hub:alice/own", "--method=diffkd.KD", "--data=Arrays"]
    assert main(["fit", *words, *words_of(image_files), f"--out={student}/taught"]) == 1
    said = capsys.readouterr().err
    assert "is of somebody's own code, 'nets.py:small': give the model yourself, --teacher MODEL" in said


@pytest.mark.parametrize(
    ("name", "token", "reason"),
    [
        ("alice", "hf_writer", "'alice' is no name of a repository: write USER/NAME"),
        ("bob/small", "hf_writer", "does not let you write bob/small: log in with `hf auth login`"),
        ("alice/small", "hf_other", "does not let you write alice/small: log in with `hf auth login`"),
    ],
)
def test_a_name_that_cannot_be_written_is_one_line(hub, student, name, token, reason, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(student), name]) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
    assert not hub.repositories


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hub:alice/none", "there is no such repository, or it is private"),
        ("hub:alice/small@v9", "the repository has no revision 'v9'"),
        ("hub:alice/empty", "holds none of student.safetensors, model.safetensors"),
    ],
)
def test_a_student_that_is_not_there_is_one_line(hub, student, name, reason, capsys):
    push(str(student), "alice/small")
    hub.repositories["alice/empty"] = {"README.md": b"nothing"}
    assert main(["test", name]) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_a_hub_that_is_away_is_one_line(hub, student, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(student), "alice/small"]) == 1
    assert "alice/small could not be sent" in capsys.readouterr().err
    assert main(["push", str(student / "nothing"), "alice/small"]) == 1
    assert "there is no run and no file" in capsys.readouterr().err


def test_a_folder_that_is_not_empty_is_left_alone(student, capsys):
    assert main(["push", str(student), "alice/small", f"--folder={student}"]) == 1
    assert "is there and not empty" in capsys.readouterr().err


def test_nothing_is_sent_where_a_card_is_missing(hub, student, capsys):
    (student / "student.json").unlink()
    assert main(["push", str(student), "alice/small"]) == 1
    assert "has no card that says which model it is" in capsys.readouterr().err
    assert not hub.seen
