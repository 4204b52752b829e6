import sys

import pytest

from diffkd.models import load_model, model_names
from diffkd.models.extras import nearest


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("timm/resnet18", "timm", "train"),
        ("torchvision/resnet18", "torchvision", "train"),
        ("hf/microsoft/resnet-18", "transformers", "hf"),
    ],
)
def test_a_missing_library_is_named(name: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
            if fullname.partition(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {library!r}", name=library)

    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=rf"'{name}' needs {library}.*pip install 'diffkd\[{extra}\]'"):
        load_model(name)
    if library != "transformers":
        with pytest.raises(ModuleNotFoundError, match=rf"listing {library} models needs {library}"):
            model_names(library)


def test_nearest() -> None:
    assert nearest("layer5", ["layer4", "fc", "stem"]) == "nearest: 'layer4'"
    assert nearest("zzz", ["layer4"]) == "nothing is close to it"


@pytest.mark.parametrize(
    ("build", "file"),
    [
        (
            lambda: load_model("timm/resnet18.a1_in1k", pretrained=True),
            r"timm/resnet18\.a1_in1k on the Hugging Face Hub",
        ),
        (lambda: load_model("torchvision/resnet18", pretrained=True), r"https://download\.pytorch\.org/.*resnet18"),
    ],
)
def test_published_weights_without_a_network_name_model_file_and_the_local_way(monkeypatch, tmp_path, build, file):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refused(*args, **options):
        raise OSError("the network is unreachable")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refused)
    monkeypatch.setattr("urllib.request.urlopen", refused)
    monkeypatch.setattr("torch.hub.urlopen", refused)
    with pytest.raises(OSError, match=rf"{file}.*network is unreachable.*--teacher_weights FILE"):
        build()
