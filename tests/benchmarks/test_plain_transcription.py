import pytest
import torch
from benchmarks.plain_transcription import PlainDiffKD

from diffkd import DiffKD, FeatureShape
from diffkd.official import to_official_state


@pytest.mark.parametrize(
    ("size", "options"),
    [((), {}), ((3, 4), {}), ((4, 3), {"ae_channels": 16, "inference_steps": 3})],
    ids=["logits", "map", "map with autoencoder"],
)
def test_equals_the_package(size, options):
    pytest.importorskip("diffusers")
    role = "feature" if size else "logits"
    shapes = FeatureShape(8, size, role=role), FeatureShape(16, size, role=role)
    fast, plain = DiffKD(*shapes, **options).double(), PlainDiffKD(*shapes, **options).double()
    plain.load_state_dict(to_official_state(fast))
    student, teacher = (torch.randn(4, channels, *size, dtype=torch.float64) for channels in (8, 16))
    latent = (4, options.get("ae_channels", 16), *size)
    given = {"noise": torch.randn(latent, dtype=torch.float64), "timesteps": torch.randint(1000, (4,))}
    given["diffusion_noise"] = torch.randn(latent, dtype=torch.float64)
    ours, theirs = fast(student, teacher, **given).losses, plain(student, teacher, **given)
    assert sorted(ours) == sorted(theirs)
    for term in ours:
        # diffusers keeps its table in float32, of which the first steps are taken.
        torch.testing.assert_close(ours[term], theirs[term], rtol=1e-5, atol=1e-6)
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    gradient, expected = fast.student_projection.weight.grad, plain.trans.weight.grad
    assert (gradient - expected.reshape(gradient.shape)).abs().max() < 1e-4 * expected.abs().max()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match="uv run --group bench"):
        PlainDiffKD(FeatureShape(4), FeatureShape(4))
