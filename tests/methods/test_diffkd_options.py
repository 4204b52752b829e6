import copy
from functools import partial

import pytest
import torch
from torch import nn

from diffkd import DiffKD, FeatureShape
from diffkd.diffusion.distances import dist, kl_divergence, mse


class TestOptions:
    def run(self, model, *, channels=(6, 8), size=(3, 3), seed=1):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(torch.randn(4, channels[0], *size), torch.randn(4, channels[1], *size))

    def test_no_noise_adapter(self):
        model = DiffKD(6, 8, noise_adapter=False)
        result = self.run(model)
        assert result.gamma is None
        assert not any("noise_adapter" in name for name in model.state_dict())
        student, teacher = torch.randn(4, 6, 3, 3), torch.randn(4, 8, 3, 3)
        model.eval()
        noises = torch.randn(2, 4, 8, 3, 3)
        with_noise = [model(student, teacher, noise=noise).denoised for noise in noises]
        assert torch.equal(*with_noise)

    def test_inference_steps_start_and_schedule(self):
        assert "timesteps 400, 300, 200, 100, 0" in repr(DiffKD(6, 8))
        assert "timesteps 332, 166, 0" in repr(DiffKD(6, 8, inference_steps=3))
        assert "timesteps 500, 250" in repr(DiffKD(6, 8, inference_steps=2, start_timestep=500))
        assert "timesteps 40, 30, 20, 10, 0" in repr(DiffKD(6, 8, num_train_timesteps=100))
        assert DiffKD(6, 8, beta_schedule="cosine").steps != DiffKD(6, 8).steps

    def test_timesteps_are_drawn_from_all_there_are(self):
        model = DiffKD(2, 2, kind="vector", num_train_timesteps=3, inference_steps=1)
        seen = []
        model.denoiser.time_embedding.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        model(torch.randn(200, 2), torch.randn(200, 2))
        assert seen[-1][-200:].unique().tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("distance", "reference"),
        [
            ("mse", mse),
            ("kl", partial(kl_divergence, temperature=3.0)),
            ("dist", partial(dist, temperature=3.0)),
            (nn.L1Loss(), nn.functional.l1_loss),
        ],
    )
    def test_distances(self, distance, reference):
        result = self.run(DiffKD(6, 8, distance=distance, temperature=3.0))
        torch.testing.assert_close(result.losses["kd"], reference(result.denoised, result.target))

    def test_logits_are_compared_by_kl_unless_told_otherwise(self):
        shape = FeatureShape(5, (), "logits")
        student, teacher = torch.randn(2, 4, 5).unbind()
        result = DiffKD(shape, shape)(student, teacher)
        torch.testing.assert_close(result.losses["kd"], kl_divergence(result.denoised, result.target))
        result = DiffKD(shape, shape, distance="mse")(student, teacher)
        torch.testing.assert_close(result.losses["kd"], mse(result.denoised, result.target))

    def test_one_factory_may_give_features_an_autoencoder_and_logits_none(self):
        make = partial(DiffKD, ae_channels=4, logits_autoencoder=False)
        assert make(FeatureShape(6, (3, 3)), FeatureShape(8, (3, 3))).latent_channels == 4
        for size in ((), (3, 3)):
            logits = FeatureShape(8, size, "logits")
            assert make(logits, logits).autoencoder is None
            assert DiffKD(logits, logits, ae_channels=4).latent_channels == 4

    def test_weights_scale_their_terms(self):
        plain = DiffKD(6, 8, ae_channels=4)
        heavy = DiffKD(6, 8, ae_channels=4, kd_weight=2.0, diffusion_weight=3.0, reconstruction_weight=0.0)
        heavy.load_state_dict(plain.state_dict())
        before, after = self.run(plain).losses, self.run(heavy).losses
        factors = {term: float(after[term] / before[term]) for term in before}
        assert factors == pytest.approx({"kd": 2.0, "diffusion": 3.0, "reconstruction": 0.0})

    def test_sum_is_the_squared_norm_averaged_over_the_batch(self):
        mean, total = DiffKD(6, 8, ae_channels=4), DiffKD(6, 8, ae_channels=4, error="sum")
        total.load_state_dict(mean.state_dict())
        before, after = self.run(mean).losses, self.run(total).losses
        factors = {term: float(after[term] / before[term]) for term in before}
        assert factors == pytest.approx({"kd": 1.0, "diffusion": 4 * 9, "reconstruction": 8 * 9}, rel=1e-5)

    @pytest.mark.parametrize("options", [{"ae_channels": 12}, {}])
    def test_the_papers_variant_sets_every_difference(self, options):
        model = DiffKD(6, 8, variant="paper", **options)
        norms = [name for name, module in model.named_modules() if type(module).__name__ == "BatchNorm"]
        assert all(".block." in name for name in norms)
        assert isinstance(model.output_projection, nn.Identity)
        assert "timesteps 500, 400, 300, 200, 100" in repr(model)
        assert model.denoiser.pred[0].activate
        student, teacher = torch.randn(4, 6, 3, 3), torch.randn(4, 8, 3, 3, requires_grad=True)
        result = model(student, teacher)
        assert not result.target.requires_grad
        spelled_out = DiffKD(
            6,
            8,
            output_projection=False,
            latent_norm=False,
            denoiser_norm=False,
            activate=True,
            start_timestep=500,
            detach_target=True,
            **options,
        )
        spelled_out.load_state_dict(copy.deepcopy(model.state_dict()))
        assert all(
            torch.equal(a, b)
            for a, b in zip(self.run(model).losses.values(), self.run(spelled_out).losses.values(), strict=True)
        )

    def test_an_option_overrides_the_variant(self):
        model = DiffKD(6, 8, variant="paper", output_projection=True, start_timestep=-1, error="sum")
        assert isinstance(model.output_projection, nn.Sequential)
        assert "timesteps 400," in repr(model)
        assert model.error == "sum"


def test_shapes_are_taken_for_channel_counts():
    model = DiffKD(FeatureShape(6, (4, 4)), FeatureShape(8, (7, 7)))
    assert model.is_map
    assert (model.student_channels, model.teacher_channels) == (6, 8)
    assert not DiffKD(FeatureShape(6), FeatureShape(8)).is_map
    assert not DiffKD(FeatureShape(6), 8).is_map
    assert DiffKD(6, 8).is_map


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiffKD(6, 8, variant="book"), "variant must be 'code' or 'paper', got 'book'"),
        (lambda: DiffKD(6, 8, ae_channels=0), "ae_channels must be at least 1"),
        (lambda: DiffKD(6, 8, temperature=0.0), "temperature must be finite and above 0"),
        (lambda: DiffKD(6, 8, distance="l7"), "mse, kl, dist, attention_mse or a callable, got 'l7'"),
        (lambda: DiffKD(6, 8, error="median"), "error must be 'mean' or 'sum', got 'median'"),
        (lambda: DiffKD(6, 8, kind="tensor"), "kind must be 'map' or 'vector', got 'tensor'"),
        (lambda: DiffKD(6, 8, inference_steps=0), "inference_steps must be in 1..500"),
        (lambda: DiffKD(6, 8, start_timestep=1000), "start_timestep must be in 1..999"),
        (lambda: DiffKD(0, 8), "at least 1 channel, got 0"),
        (lambda: DiffKD(FeatureShape(6), FeatureShape(8, (7, 7))), "pool the map first"),
        (lambda: DiffKD(FeatureShape(6), FeatureShape(8), kind="map"), "mix maps and vectors"),
        (lambda: DiffKD(1, FeatureShape(1, (), "logits")), r"DiffKD\(distance='kl'\).* 2 or more .*distance='mse'"),
        (lambda: DiffKD(6, 8, ae_channels=1, distance="dist"), r"DiffKD\(distance='dist'\) compares softmax"),
    ],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_single_logit_can_be_matched_by_its_squared_error():
    logit = FeatureShape(1, (), "logits")
    student = torch.randn(4, 1, requires_grad=True)
    DiffKD(logit, logit, distance="mse")(student, torch.randn(4, 1)).losses["kd"].backward()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "message"),
    [
        ("map", (2, 7, 3, 3), (2, 8, 3, 3), r"student's feature has shape \(2, 7, 3, 3\).*\(B, 6, H, W\)"),
        ("map", (2, 6), (2, 8), r"built for \(B, 6, H, W\)"),
        ("map", (2, 6, 3, 3), (2, 8, 6, 6), "resize one of them first"),
        ("map", (2, 6, 3, 3), (3, 8, 3, 3), "same batch"),
        ("vector", (2, 6), (2, 8, 3, 3), r"teacher's feature has shape .*\(B, 8\) or \(B, 8, 1, 1\)"),
    ],
)
def test_features_of_another_shape_are_named(kind, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        DiffKD(6, 8, kind=kind)(torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": torch.randn(2, 8, 3, 4)}, r"noise has shape \(2, 8, 3, 4\), expected \(2, 8, 3, 3\)"),
        ({"diffusion_noise": torch.randn(2, 8)}, r"diffusion_noise has shape \(2, 8\), expected \(2, 8, 3, 3\)"),
        ({"timesteps": torch.zeros(3, dtype=torch.long)}, r"timesteps has shape \(3,\), expected \(2,\)"),
    ],
)
def test_draws_of_another_shape_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        DiffKD(6, 8)(torch.randn(2, 6, 3, 3), torch.randn(2, 8, 3, 3), **given)
