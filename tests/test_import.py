import subprocess
import sys

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
