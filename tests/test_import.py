import subprocess
import sys
from importlib.metadata import packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = ("lightning", "timm", "torchvision", "transformers", "matplotlib", "jsonargparse", "PIL", "scipy", "rich")


def test_the_core_imports_torch_and_safetensors_alone():
    script = f"""
import sys
import torch, safetensors.torch
before = set(sys.modules)
import diffkd
new = {{name.partition('.')[0] for name in set(sys.modules) - before}}
third = new - set(sys.stdlib_module_names) - {{'diffkd'}}
assert not third, third
assert not set(sys.modules) & set({HEAVY!r})
assert all(hasattr(diffkd, name) for name in diffkd.__all__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def with_what_they_require(names):
    """The distributions that pip installs along with some."""
    found, waiting = set(), list(names)
    while waiting:
        if (name := canonicalize_name(waiting.pop())) not in found:
            found.add(name)
            wanted = map(Requirement, requires(name) or ())
            waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


TRAINING = """
import torch
from torch import nn
from diffkd import Distiller, load_weights, save_student
student, teacher = (nn.Sequential(nn.Conv2d(3, width, 3), nn.Flatten(), nn.Linear(width * 36, 5)) for width in (2, 4))
distiller = Distiller(student, teacher, example=torch.randn(2, 3, 8, 8))
sum(distiller(torch.randn(2, 3, 8, 8))[1].values()).backward()
save_student(student, {path!r})
load_weights(student, {path!r})
"""


def test_an_own_loop_needs_what_the_core_requires_alone(tmp_path):
    """All else that is installed here is hidden."""
    installed = with_what_they_require(["diffkd"])
    assert {"torch", "safetensors"} < installed
    owners = packages_distributions()
    hidden = {
        module
        for module, distributions in owners.items()
        if not installed.intersection(map(canonicalize_name, distributions))
    }
    assert {"torchvision", "matplotlib"} < hidden
    script = f"""
import sys
class Shown:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
sys.meta_path = [Shown(finder) for finder in sys.meta_path]
""" + TRAINING.format(path=str(tmp_path / "student.safetensors"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
