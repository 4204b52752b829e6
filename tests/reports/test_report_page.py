"""The page of a run and of a comparison: self-contained, with text as text, and readable in a browser."""

import base64
import json
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffkd.commands import cli
from diffkd.commands.report import report
from diffkd.files.history import read_csv
from diffkd.reports.html_page import PageTable, Plot, Section, plain, write_page
from diffkd.reports.mistakes import confused, find_mistakes
from diffkd.tasks.data_facts import DataFacts

pytest.importorskip("plotly")
NAMES = ["cat", "<b>dog</b>", "a & b", "</script><script>document.title='owned'</script>"]


class Elements(HTMLParser):
    """Collects the elements of a page, and all addresses in it."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.addresses, self.texts, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.inside = tag
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_file):
    """A distillation on the command line, whose class names are markup."""
    top = tmp_path_factory.mktemp("report")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        labels = np.arange(40) % 4
        images = (draw.integers(0, 120, (40, 8, 8, 3)) + labels[:, None, None, None] * 30).astype(np.uint8)
        np.savez(top / f"{split}.npz", images=images, labels=labels, classes=np.array(NAMES))
    words = ["fit", f"--student={model_file}:small", f"--teacher={model_file}:large", "--method=diffkd.DiffKD"]
    words += ["--data=Arrays", f"--data.train={top}/train.npz", f"--data.test={top}/test.npz", "--data.batch_size=10"]
    words += ["--epochs=2", f"--out={top / 'run'}", "--accelerator=cpu", "--sample_every=1", "--progress=false"]
    assert cli.main(words) == 0
    return top / "run"


def test_a_finished_run_has_its_page(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Elements(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert "default-src 'none'" in text
    shown = " ".join(page.texts)
    result = json.loads((run / "result.json").read_text())
    assert f"{100 * result['last']['top1']:.2f}" in shown
    for title in ("Course", "Gradient balance", "What student and teacher see", "Worst images", "Sample predictions"):
        assert title in shown
    assert "class_path: diffkd.data.Arrays" in shown
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', text, re.DOTALL)[1])
    titles = {name for plot in plots.values() for name in [one.get("name") for one in plot["data"]]}
    assert {"top1", "task", "0/kd", "0/diffusion"} <= titles
    curve = next(one for plot in plots.values() for one in plot["data"] if one.get("name") == "top1")
    assert curve["y"] == pytest.approx([100 * row["top1"] for row in read_csv(run / "metrics.csv")])
    (heat,) = (one for plot in plots.values() for one in plot["data"] if one["type"] == "heatmap")
    assert np.nansum(np.array(heat["z"], dtype=float)) == pytest.approx(4, abs=1e-3)  # rows are shares of a class
    # Pictures are whole.
    for address in page.addresses:
        if address.startswith("data:"):
            assert base64.b64decode(address.partition(",")[2]).startswith(b"\x89PNG")


def test_the_confusions_of_an_averaged_student_are_those_of_its_score(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config | {"ema": 0.5, "out": str(tmp_path / "run")}))
    trust = [f"--trust={config['student'].rpartition(':')[0]}"]
    assert cli.main(["fit", str(tmp_path / "recipe.yaml"), *trust]) == 0
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', text, re.DOTALL)[1])
    (heat,) = (one for plot in plots.values() for one in plot["data"] if one["type"] == "heatmap")
    score = json.loads((tmp_path / "run" / "result.json").read_text())["last"]["top1"]
    # All classes have as many images, so that the score is the mean of the shares that are right.
    assert np.diag(np.array(heat["z"], dtype=float)).mean() == pytest.approx(score, abs=1e-3)


def test_names_are_text_and_never_markup(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert Elements(text).elements.count("script") == 3  # the library, the values and the page's own
    assert "document.title='owned'</script>" not in text
    assert "<b>dog" not in text
    assert "&lt;b&gt;dog&lt;/b&gt;" in text
    assert plain("<a href=x>") == "&lt;a href=x&gt;"


def test_a_comparison_has_a_page(tmp_path, run):
    folder = tmp_path / "comparison"
    rows = []
    for method in ("alone", "<i>kd</i>".replace("/", "_")):
        shutil.copytree(run, folder / method / "seed-0")
        row = {"method": method, "seeds": [0], "last": 50.0, "last_std": None, "best": 60.0, "best_std": None}
        row |= {"against": {}, "parameters": 10, "method_parameters": 0, "seconds": 1.0, "peak_memory": float("nan")}
        rows.append(row | {"step_cost": None, "step_reference": ""})
    rows[1]["against"] = {"alone": {"mean": 1.25, "p": None}}
    (folder / "comparison.json").write_text(json.dumps({"metric": "top1", "rows": rows}))
    page = report(str(folder), progress=False)
    text = page.read_text(encoding="utf-8")
    shown = " ".join(Elements(text).texts)
    assert "<i>kd<_i>" in shown
    assert "<i>" not in text
    assert "+1.25" in shown
    assert (folder / "alone" / "seed-0" / "report.html").read_text() != text


def test_a_page_without_pictures_needs_no_models(tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"student": "nowhere.py:gone"}))
    text = report(str(folder), pictures=False, progress=False).read_text(encoding="utf-8")
    assert "Worst images" not in text
    with pytest.raises(Exception, match="nowhere"):
        report(str(folder), progress=False)


def test_what_cannot_be_reported_is_named(tmp_path, run, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "neither a run of at least one epoch nor a comparison" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert cli.main(["report", str(run), "--images=0"]) == 1
    assert "images must be at least 1" in capsys.readouterr().err
    assert cli.main(["report", str(run), f"--out={tmp_path}"]) == 1
    assert "is a folder; give a file" in capsys.readouterr().err
    assert cli.main(["report", str(run), f"--out={run / 'config.yaml' / 'page.html'}"]) == 1
    assert "config.yaml is a file and no folder; give another --out" in capsys.readouterr().err
    (tmp_path / "comparison.json").write_text("{")
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "comparison.json is no JSON" in capsys.readouterr().err


def facts(task, classes, **more):
    count = len(classes)
    return DataFacts(count, 3, (8, 8), (0.0,) * 3, (1.0,) * 3, tuple(classes), None, task=task, **more)


class Fixed(torch.nn.Module):
    """Returns given outputs, batch by batch."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = list(outputs)
        self.place = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.outputs.pop(0)


def test_the_worst_images_of_a_classifier_come_first():
    logits = torch.tensor([[4.0, 0.0], [0.0, 9.0], [0.0, 2.0], [1.0, 0.0]])
    batch = (torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 0, 1]), torch.arange(4))
    found = find_mistakes(Fixed(logits), facts("classification", ["cat", "dog"]), [batch], shown=2)
    assert found.confusion.tolist() == [[1, 2], [1, 0]]
    assert [line.split(":")[0] for _, line in found.worst] == ["image 1", "image 2"]
    assert confused(found.confusion, ["cat", "dog"]) == [("cat", "dog", 2, 2 / 3), ("dog", "cat", 1, 1.0)]


def test_boxes_are_matched_by_overlap_and_the_rest_is_missed_or_wrong():
    truth = {"boxes": torch.tensor([[0.0, 0, 4, 4], [4, 4, 8, 8]]), "labels": torch.tensor([1, 2])}
    output = {
        "boxes": torch.tensor([[0.0, 0, 4, 4], [0, 4, 4, 8], [4, 4, 8, 8]]),
        "scores": torch.tensor([0.9, 0.8, 0.1]),
        "labels": torch.tensor([2, 1, 2]),
    }
    batch = ([torch.rand(3, 8, 8)], [truth], torch.tensor([7]))
    found = find_mistakes(Fixed([output]), facts("detection", ["cat", "dog"]), [batch])
    # A cat is taken for a dog; the dog, whose box has a low score, is missed; one box is no object.
    assert found.confusion.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert found.worst[0][1].startswith("image 7: 0 of 2 objects found, 2 wrong boxes")


def test_ignored_pixels_are_no_mistakes():
    ids = torch.zeros(1, 8, 8, dtype=torch.int64)
    ids[0, :4] = 1
    logits = torch.nn.functional.one_hot(ids, 2).movedim(-1, 1).float()
    mask = torch.zeros(1, 8, 8, dtype=torch.int64)
    mask[0, :2] = 255
    model = Fixed(torch.nn.functional.pad(logits, (0, 24, 0, 24)))  # AnySize pads to 32
    batch = (torch.rand(1, 3, 8, 8), mask, torch.tensor([0]))
    found = find_mistakes(model, facts("segmentation", ["sky", "road"]), [batch])
    assert found.confusion.tolist() == [[32, 16], [0, 0]]
    assert isinstance(found.worst[0][0], Image.Image)


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: the page was not opened")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed: the page was not opened in a browser")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield opened
    opened.quit()


def test_the_page_works_in_a_browser(browser, tmp_path):
    rows = [["kd", "9.5"], ["<img src=x onerror=alert(1)>", "10.25"], ["alone", ""]]
    curve = {"type": "scatter", "name": plain("<b>loss</b>"), "x": [1, 2], "y": [3, 1]}
    page = write_page(
        tmp_path / "report.html",
        "<i>title</i>",
        "a line",
        [Section("Results", tables=[PageTable(["method", "score"], rows)], plots=[Plot("loss", [curve, curve])])],
    )
    for width, scheme in ((390, "light"), (1280, "dark")):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(page.as_uri())
        limit = time.monotonic() + 60
        while browser.execute_script("return document.documentElement.dataset.drawn") != "true":
            assert time.monotonic() < limit, "the curves were not drawn"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        red = browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0]")
        assert (int(red) < 100) == (scheme == "dark")
    assert browser.title == "<i>title</i>"
    assert browser.execute_script("return document.querySelector('.legendtext').textContent") == "<b>loss</b>"
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    column = "return [...document.querySelectorAll('tbody tr')].map((row) => row.cells[1].textContent)"
    for expected in (["9.5", "10.25", ""], ["10.25", "9.5", ""]):
        browser.execute_script("document.querySelectorAll('th button')[1].click()")
        assert browser.execute_script(column) == expected  # what has no number comes last either way
    requested = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in requested if one["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
