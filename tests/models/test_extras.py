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
