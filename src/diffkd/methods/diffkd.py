"""DiffKD: denoise the student's feature with a diffusion model trained on the teacher's, then match the two."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffkd.diffusion.distances import Distance, at_least_float32, check_several_classes, distance_by_name, mse
from diffkd.diffusion.modules import (
    BatchNorm,
    Denoiser,
    FilmDenoiser,
    LinearAutoencoder,
    NoiseAdapter,
    begin_at_zero,
    pointwise,
)
from diffkd.diffusion.passes import DenoiserPasses
from diffkd.diffusion.schedule import (
    BetaSchedule,
    DDIMStep,
    Prediction,
    add_noise,
    alphas_cumprod,
    clean_scales,
    ddim_denoise,
    ddim_scales,
    ddim_steps,
    learned,
    timesteps_of_level,
)
from diffkd.diffusion.standardization import Standardization
from diffkd.features.memory_layout import drawn, fast_layout
from diffkd.features.shape import FeatureShape, Want, channels_of

DistanceName = Literal["mse", "kl", "dist", "attention_mse"]


class DiffKDOutput(NamedTuple):
    """What one forward of :class:`DiffKD` returns.

    Attributes:
        denoised: the student's denoised feature, (B, C, H, W) or (B, C), C the latent channels.
        target: the teacher's latent of the same shape, which `denoised` was compared with.
        losses: scalars "kd", "diffusion" (not on the path of a flow), "reconstruction" with an autoencoder and "source"
            with a `source_weight`, each times its weight.
        gamma: (B,) weight of the student's feature against the added noise, in (0, 1); None without noise adapter.
    """

    denoised: Tensor
    target: Tensor
    losses: dict[str, Tensor]
    gamma: Tensor | None


class DiffKD(nn.Module):
    """Knowledge diffusion for distillation (Huang et al., NeurIPS 2023), for one pair of features.

    `variant="code"` computes what the authors' published code does; `variant="paper"` what the text describes. Each
    difference between the two is an option, which `variant` sets if it is None:

    | option              | code  | paper | meaning                                                                    |
    | ------------------- | ----- | ----- | -------------------------------------------------------------------------- |
    | `output_projection` | True  | False | a 1x1 convolution and BatchNorm on the student's feature after denoising   |
    | `latent_norm`       | True  | False | BatchNorm at the end of the autoencoder's encoder ("two convolutions only")|
    | `denoiser_norm`     | True  | False | BatchNorm at the end of the denoiser (maps)                                |
    | `activate`          | False | True  | ReLU after the residual sums of the bottlenecks (maps)                     |
    | `start_timestep`    | -1    | 500   | first timestep of the reverse process; -1: as the code spaces them         |
    | `detach_target`     | False | True  | no gradient to the teacher's feature even without autoencoder              |

    Eq. 4 and 6 are squared norms in the paper, and means over all entries in the authors' code. Both variants
    take the mean: with Eq. 7 as a mean and all weights 1, the sums would outweigh it by the size of the feature, and
    diverge at the learning rates of Table 1. `error="sum"` takes the squared norms, averaged over the batch.

    The following options are in neither paper nor code, and off by default; they are independent of one another:

    - `standardize`: standardise the teacher's feature, and with an autoencoder the latent too, per channel by running
      statistics (:class:`~diffkd.diffusion.standardization.Standardization`), so that noise level, losses and weights
      do not depend on the teacher's scale. Distances of distributions ("kl", "dist") compare the denoised feature in
      units of the logits. One DiffKD for several levels (:class:`~diffkd.Shared`) has one set of statistics for all.
    - `time="film"`: the timestep sets a scale and shift after every batch normalisation
      (:class:`~diffkd.diffusion.modules.FilmDenoiser`) instead of adding a constant to the input, which batch
      normalisation removes from the student's denoising during training.
    - `prediction`: the denoiser predicts, and Eq. 4 trains it on, the "noise" eps, the "clean" feature z_0, or the
      "velocity" sqrt(abar) eps - sqrt(1 - abar) z_0 (Salimans and Ho, ICLR 2022); see
      :func:`~diffkd.diffusion.schedule.clean_scales`. With few steps the noise is the hardest to divide out.
    - `every_step`: Eq. 7 is the mean over the estimates z_0 of all steps, not of the last alone.
    - `start_timestep="gamma"`: each sample starts at the timestep whose noise level the noise adapter chose,
      from (gamma z + (1 - gamma) eps) / sqrt(gamma^2 + (1 - gamma)^2), which Eq. 3 gives for
      abar = gamma^2 / (gamma^2 + (1 - gamma)^2); see :func:`~diffkd.diffusion.schedule.timesteps_of_level`.
    - `source_weight`: d of Eq. 7 between the projected student's feature itself, before noise and denoising, and the
      target, times this weight: the estimate before the first step, which is FitNet's loss where d is the mean squared
      error. It pulls the student while the denoiser is still young.
    - `path="flow"`: flow matching (Shao et al., *FM-KT*, arXiv 2402.02012, Eq. 5 to 9). No Gaussian noise and no
      gamma: from the projected student's feature S, for i = N..1 and t = i / N, v_i = Phi(Z, t), Z <- Z - v_i / N;
      the loss is (1 / N) sum_i d(S - v_i, target), and `denoised` is the last Z. There is no Eq. 4, and neither
      `output_projection` nor `denoiser_norm` unless set. The light denoiser begins at v = 0, so that the first estimate
      is S itself and the loss FitNet's: a random velocity would pull the student at random at first. N is
      `inference_steps`; if that is a sequence, N is drawn from it for every training batch (the paper's {1, 2, 4, 8})
      and is its maximum in evaluation. A compiled module keeps the last N drawn: `diffkd fit` calls :meth:`draw`
      before every batch, and so does the eager forward.

    Args:
        student_channels: channels of the student's feature, or its :class:`~diffkd.FeatureShape`.
        teacher_channels: channels of the teacher's feature, or its shape.
        kind: "map" for (B, C, H, W), "vector" for (B, C) or (B, C, 1, 1). None: as the shapes say, else "map".
        ae_channels: channels of the latent, which a linear autoencoder computes from the teacher's feature; None: no
            autoencoder, the latent is the teacher's feature.
        logits_autoencoder: whether logits get an autoencoder too, if one factory makes DiffKD for several pairs; the
            paper uses none for logits (Sec. 4.1).
        inference_steps: denoiser evaluations per forward (NFE); with `path="flow"` also a sequence to draw from.
        num_train_timesteps: number of timesteps T of the diffusion process.
        beta_schedule: "linear", "scaled_linear" or "cosine".
        noise_adapter: adaptive noise matching (Eq. 8). Off: the projected student feature is denoised without noise.
        distance: d of Eq. 7: "mse", "kl", "dist", "attention_mse" (for maps), or a callable `(denoised, target) ->
            scalar`. None: "kl" for logits, "dist" for class maps (Sec. 4.3), "mse" otherwise. On class maps "kl" is
            averaged over positions, and "dist" relates all positions of the batch.
        logits_distance: d for logits alone, if one factory makes DiffKD for several pairs; None: `distance`.
        temperature: tau of "kl" and "dist".
        kd_weight: lambda 3 of Eq. 9, of the distance.
        diffusion_weight: lambda 1, of the denoiser's loss.
        reconstruction_weight: lambda 2, of the autoencoder's loss.
        source_weight: of the distance of what is denoised, see above; 0 leaves it out.
        denoiser: factory of a network that replaces the light :class:`~diffkd.diffusion.modules.Denoiser` (Table 12),
            called with the latent's channels and whether it is a map. The network takes the noisy latent and the
            timesteps, (B,) int64, and returns the noise, in the latent's shape. `denoiser_norm` is for the light one.
        checkpoint: activation checkpointing of the denoiser's passes: less memory, more time, bitwise equal results.
        variant: "code" or "paper", see above.
        error: "mean" or "sum", see above; None: "mean".
        output_projection, latent_norm, denoiser_norm, activate, start_timestep, detach_target: see above.
        standardize, time, prediction, every_step, path: see above.
        features_only: automatic pairing pairs features only, not logits, for use beside a method on logits.
        last_stage: automatic pairing takes the teacher's last stage where a head's convolution makes a wider map of it,
            as in MobileNets and EfficientNets: fewer channels to compare.

    Raises:
        ValueError: if an option is out of range or incompatible with another, one feature is a map and the other a
            vector, or a distance of distributions gets a single channel.
    """

    wants: ClassVar[frozenset[Want]] = frozenset({"feature", "logits", "embedding"})
    least_classes: ClassVar[int] = 2
    alphas_cumprod_bits: Tensor
    visited: Tensor

    def __init__(
        self,
        student_channels: int | FeatureShape,
        teacher_channels: int | FeatureShape,
        *,
        kind: Literal["map", "vector"] | None = None,
        ae_channels: int | None = None,
        logits_autoencoder: bool = True,
        inference_steps: int | Sequence[int] = 5,
        num_train_timesteps: int = 1000,
        beta_schedule: BetaSchedule = "linear",
        noise_adapter: bool = True,
        distance: DistanceName | Distance | None = None,
        logits_distance: DistanceName | Distance | None = None,
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        diffusion_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        source_weight: float = 0.0,
        denoiser: Callable[[int, bool], nn.Module] | None = None,
        checkpoint: bool = False,
        variant: Literal["code", "paper"] = "code",
        output_projection: bool | None = None,
        latent_norm: bool | None = None,
        denoiser_norm: bool | None = None,
        activate: bool | None = None,
        error: Literal["mean", "sum"] | None = None,
        start_timestep: int | Literal["gamma"] | None = None,
        detach_target: bool | None = None,
        standardize: bool = False,
        time: Literal["embedding", "film"] = "embedding",
        prediction: Prediction = "noise",
        every_step: bool = False,
        path: Literal["diffusion", "flow"] = "diffusion",
        features_only: bool = False,
        last_stage: bool = False,
    ) -> None:
        super().__init__()
        if variant not in ("code", "paper"):
            raise ValueError(f"variant must be 'code' or 'paper', got {variant!r}")
        if ae_channels is not None and ae_channels < 1:
            raise ValueError(f"ae_channels must be at least 1, or None for no autoencoder, got {ae_channels}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be finite and above 0, got {temperature}")
        if error not in (None, "mean", "sum"):
            raise ValueError(f"error must be 'mean' or 'sum', got {error!r}")
        for name, value, known in (
            ("time", time, ("embedding", "film")),
            ("prediction", prediction, ("noise", "clean", "velocity")),
            ("path", path, ("diffusion", "flow")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if time == "film" and denoiser is not None:
            raise ValueError("time='film' is of the light denoiser: leave it out, or the denoiser of your own")
        self.flows = path == "flow"
        several = (inference_steps,) if isinstance(inference_steps, int) else tuple(inference_steps)
        if self.flows:
            _check_flow(several, num_train_timesteps, prediction, every_step, start_timestep)
            noise_adapter = False
        elif len(several) != 1:
            raise ValueError(
                f"inference_steps={list(several)} is drawn from on path='flow' alone: give one number of steps, or that"
            )
        self.from_gamma = start_timestep == "gamma"
        if self.from_gamma and not noise_adapter:
            raise ValueError(
                "start_timestep='gamma' takes gamma from the noise adapter, which is off: switch it on, or give a "
                "number as start_timestep"
            )
        paper = variant == "paper"
        plain = not paper and not self.flows
        activate = paper if activate is None else activate
        start_timestep = (500 if paper else -1) if start_timestep is None else start_timestep
        first = None if start_timestep in (-1, "gamma") else int(start_timestep)

        is_logits = isinstance(teacher_channels, FeatureShape) and teacher_channels.role == "logits"
        if is_logits and not logits_autoencoder:
            ae_channels = None
        self.is_map = _is_map(kind, student_channels, teacher_channels)
        self.student_channels, self.teacher_channels = channels_of(student_channels), channels_of(teacher_channels)
        self.latent_channels = latent = self.teacher_channels if ae_channels is None else ae_channels
        self.num_train_timesteps = num_train_timesteps
        self.checkpoint = checkpoint
        self.error = error or "mean"
        self.detach_target = paper if detach_target is None else detach_target
        self.weights = {"kd": kd_weight, "diffusion": diffusion_weight, "reconstruction": reconstruction_weight}
        self.weights["source"] = source_weight
        if is_logits:
            distance = logits_distance or distance or ("dist" if self.is_map else "kl")
        if distance in ("kl", "dist"):
            check_several_classes(f"DiffKD(distance={distance!r})", latent)
        distance = distance or "mse"
        self.restores = distance in ("kl", "dist")
        self.distance = (
            distance_by_name(distance, temperature, class_map=is_logits and self.is_map)
            if isinstance(distance, str)
            else distance
        )

        self.student_projection = pointwise(self.student_channels, latent, self.is_map)
        self.autoencoder = (
            LinearAutoencoder(self.teacher_channels, latent, self.is_map, _or(latent_norm, not paper))
            if ae_channels is not None
            else None
        )
        self.denoiser: nn.Module
        if denoiser is not None:
            self.denoiser = denoiser(latent, self.is_map)
        elif time == "film":
            self.denoiser = FilmDenoiser(latent, self.is_map, _or(denoiser_norm, plain), activate)
        else:
            self.denoiser = Denoiser(latent, self.is_map, num_train_timesteps, _or(denoiser_norm, plain), activate)
        if self.flows and denoiser is None:
            begin_at_zero(self.denoiser)
        self.noise_adapter = NoiseAdapter(latent, self.is_map, activate) if noise_adapter else None
        self.output_projection = (
            nn.Sequential(pointwise(latent, latent, self.is_map), BatchNorm(latent))
            if _or(output_projection, plain)
            else nn.Identity()
        )
        self.standardization = Standardization(self.teacher_channels) if standardize else None
        both = standardize and self.autoencoder is not None
        self.latent_standardization = Standardization(latent) if both else None
        abar = alphas_cumprod(num_train_timesteps, beta_schedule)
        self.prediction: Prediction = prediction
        self.every_step = every_step
        self.inference_steps, self.passes = several, max(several)
        self.steps: tuple[DDIMStep, ...] = () if self.flows else ddim_steps(abar, several[0], first, prediction)
        self.register_buffer("visited", torch.tensor([step.timestep for step in self.steps]), persistent=False)
        # Stored as the bits of float32 numbers: `.half()` and `.bfloat16()` round floating-point buffers, and a rounded
        # schedule divides by zero. Not in the state dict: the arguments determine it.
        self.register_buffer("alphas_cumprod_bits", abar.view(torch.int32), persistent=False)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        noise: Tensor | None = None,
        diffusion_noise: Tensor | None = None,
        timesteps: Tensor | None = None,
    ) -> DiffKDOutput:
        """Denoise the student's feature, compare it with the teacher's, and train the denoiser on the teacher's.

        Noise and timesteps that are None are drawn, in evaluation mode too.

        Args:
            student: (B, Cs, H, W), or (B, Cs) or (B, Cs, 1, 1) for vectors.
            teacher: (B, Ct, H, W), or as above, on the same grid.
            noise: the noise mixed into the student's latent, latent shape (eps_T of Eq. 8).
            diffusion_noise: the noise added to the teacher's latent, latent shape (eps of Eq. 4).
            timesteps: (B,) int64 in 0..T-1, its timesteps.

        Returns:
            A :class:`DiffKDOutput`; vectors keep the shape of the input.

        Raises:
            ValueError: if the shapes do not fit.
        """
        unit = student.ndim == 4 and not self.is_map  # vectors of shape (B, C, 1, 1) keep it in the output
        student, teacher = self._checked(student, "student"), self._checked(teacher, "teacher")
        if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same batch and "
                "spatial size; resize one of them first, or let Distiller do it"
            )
        layout = fast_layout(student)
        student, teacher = student.to(memory_format=layout), teacher.to(memory_format=layout)
        projected = self.student_projection(student.to(self.dtype))  # (B, C, H, W) or (B, C), here and below
        target, unscaled, reconstruction, reconstructed = self._encoded(teacher)
        latent = at_least_float32(projected)
        shape = latent.shape
        gamma: Tensor | None = None
        predicted: Tensor | None = None
        if self.flows:
            estimates, clean_student = self._flow(latent)
        else:
            noise = drawn(latent) if noise is None else _shaped("noise", noise, shape)
            noise = noise.to(memory_format=layout)
            noisy_student = latent
            if self.noise_adapter is not None:
                gamma = self.noise_adapter(projected)
                share = gamma.reshape(-1, *[1] * (latent.ndim - 1))
                noisy_student = share * latent + (1 - share) * noise  # Eq. 8
                if self.from_gamma:
                    noisy_student = noisy_student / (share.square() + (1 - share).square()).sqrt()
            diffusion_noise = drawn(latent) if diffusion_noise is None else diffusion_noise
            diffusion_noise = _shaped("diffusion_noise", diffusion_noise, shape).to(memory_format=layout)
            if timesteps is None:
                timesteps = torch.randint(self.num_train_timesteps, (shape[0],), device=latent.device)
            timesteps = _shaped("timesteps", timesteps, shape[:1])
            levels = self.alphas_cumprod_bits.view(torch.float32)
            abar = levels[timesteps].to(latent.dtype)
            noisy_target = add_noise(target, diffusion_noise, abar)

            starts = gamma if self.from_gamma else None
            chain = self.visited if starts is None else timesteps_of_level(levels, starts, len(self.steps))
            passes = DenoiserPasses(self.denoiser, chain, noisy_target, timesteps, checkpoint=self.checkpoint)
            estimates, clean_student = self._denoised(passes, noisy_student, chain, levels)
            predicted = passes.extra()

        projections = [at_least_float32(self.output_projection(one.to(self.dtype))) for one in estimates]
        source = [latent] if self.weights["source"] else []
        denoised = projections[-1]
        if clean_student is not estimates[-1]:
            denoised = at_least_float32(self.output_projection(clean_student.to(self.dtype)))
        scale = self.latent_standardization or self.standardization
        if self.restores and scale is not None:
            projections, source = ([scale.restore(one) for one in some] for some in (projections, source))
            denoised, compared = scale.restore(denoised), unscaled
        else:
            compared = target
        distances = [self.distance(one, compared) for one in projections]
        losses = {"kd": distances[0] if len(distances) == 1 else torch.stack(distances).mean()}  # Eq. 7
        if source:
            losses["source"] = self.distance(source[0], compared)
        if predicted is not None and diffusion_noise is not None:
            wanted = learned(target, diffusion_noise, abar, self.prediction)
            losses["diffusion"] = self._squared_error(predicted, wanted)  # Eq. 4
        if reconstruction is not None:
            losses["reconstruction"] = self._squared_error(reconstruction, reconstructed)  # Eq. 6
        losses = {term: self.weights[term] * loss for term, loss in losses.items()}
        if unit:
            denoised, compared = denoised[..., None, None], compared[..., None, None]
        return DiffKDOutput(denoised, compared, losses, gamma)

    def draw(self) -> None:
        """Draw the number of steps of the next batch, if `inference_steps` is a sequence."""
        if len(self.inference_steps) > 1 and self.training:
            index = int(torch.randint(len(self.inference_steps), ()))  # on the CPU: no synchronisation with the device
            self.passes = self.inference_steps[index]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.student_projection.get_parameter("weight").dtype

    def extra_repr(self) -> str:
        """Return the options that the submodules do not show."""
        visited = "timesteps " + ", ".join(str(step.timestep) for step in self.steps)
        if self.flows:
            visited = f"flow in {' or '.join(map(str, self.inference_steps))} steps"
        elif self.from_gamma:
            visited = f"{len(self.steps)} timesteps from gamma"
        return f"{self.student_channels} -> {self.latent_channels} <- {self.teacher_channels}, {visited}"

    def _encoded(self, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return the target, the target before standardisation, the reconstruction, and the reconstructed feature."""
        reconstruction = None
        reconstructed = teacher if self.standardization is None else self.standardization(teacher)
        if self.autoencoder is not None:
            latent, reconstruction = self.autoencoder(reconstructed.to(self.dtype))
            target = unscaled = latent.detach()
            if self.latent_standardization is not None:
                target = self.latent_standardization(unscaled)
        else:
            unscaled = teacher.detach() if self.detach_target else teacher
            target = reconstructed.detach() if self.detach_target else reconstructed
        return at_least_float32(target), at_least_float32(unscaled), reconstruction, reconstructed

    def _denoised(
        self, passes: DenoiserPasses, x: Tensor, chain: Tensor, levels: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Run the reverse process; return the estimates of the clean feature to compare, and the final one."""
        if not self.every_step and not self.from_gamma:
            x = ddim_denoise(lambda x, _: passes.step(x), x, self.steps)
            return [x], x
        now = levels[chain].to(x.dtype)  # (n,) or (n, B)
        now = now.reshape(*now.shape, *[1] * (x.ndim - 1 if now.ndim == 2 else 0))
        estimates = []
        for index, step in enumerate(self.steps):
            predicted = passes.step(x).to(x.dtype)
            x_scale, scale = clean_scales(now[index], self.prediction)
            estimates.append(x_scale * x + scale * predicted)
            if index + 1 == len(self.steps):
                break  # the last step arrives at the clean feature
            if self.from_gamma:
                x_scale, scale = ddim_scales(now[index], now[index + 1], self.prediction)
                x = x_scale * x + scale * predicted
            else:
                x = step.x_scale * x + step.noise_scale * predicted
        return (estimates if self.every_step else estimates[-1:]), estimates[-1]

    def _flow(self, source: Tensor) -> tuple[list[Tensor], Tensor]:
        """Follow the flow from the student's latent; return the estimate of every step, and the final latent."""
        if not torch.compiler.is_compiling():
            self.draw()
        n = self.passes if self.training else max(self.inference_steps)
        total = self.num_train_timesteps
        chain = torch.tensor([round(total * i / n) - 1 for i in range(n, 0, -1)], device=source.device)
        passes = DenoiserPasses(self.denoiser, chain, source, None, checkpoint=self.checkpoint)
        estimates, x = [], source
        for _ in range(n):
            velocity = passes.step(x).to(x.dtype)
            estimates.append(source - velocity)
            x = x - velocity / n
        return estimates, estimates[-1] if n == 1 else x

    def _checked(self, feature: Tensor, side: Literal["student", "teacher"]) -> Tensor:
        channels = self.student_channels if side == "student" else self.teacher_channels
        if not self.is_map and feature.ndim == 4 and feature.shape[2:] == (1, 1):
            feature = feature.flatten(1)
        if feature.ndim != (4 if self.is_map else 2) or feature.shape[1] != channels:
            wanted = f"(B, {channels}, H, W)" if self.is_map else f"(B, {channels}) or (B, {channels}, 1, 1)"
            raise ValueError(
                f"the {side}'s feature has shape {tuple(feature.shape)}, but this DiffKD was built for {wanted}; pass "
                f"{side}_channels and kind as the feature has them"
            )
        return feature

    def _squared_error(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = mse(prediction, target)
        return error if self.error == "mean" else error * target[0].numel()


def _check_flow(
    steps: tuple[int, ...], timesteps: int, prediction: str, every_step: bool, start_timestep: object
) -> None:
    """Raise ValueError if an option has no meaning for a flow, or a number of steps is invalid."""
    if not steps or not all(1 <= n <= timesteps for n in steps):
        raise ValueError(f"inference_steps must be in 1..{timesteps} each, got {list(steps)}")
    idle = {
        f"prediction={prediction!r}": prediction != "noise",
        f"every_step={every_step}": every_step,
        f"start_timestep={start_timestep!r}": start_timestep is not None,
    }
    if given := [name for name, is_given in idle.items() if is_given]:
        raise ValueError(
            f"{', '.join(given)} has no meaning on path='flow', which predicts the velocity, compares every step and "
            "starts at the student's feature: leave it out, or take path='diffusion'"
        )


def _shaped(name: str, given: Tensor, shape: torch.Size) -> Tensor:
    if given.shape not in (shape, (*shape, 1, 1)):
        raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {tuple(shape)}")
    return given.reshape(shape)


def _is_map(kind: Literal["map", "vector"] | None, *features: int | FeatureShape) -> bool:
    kinds = {feature.is_map for feature in features if isinstance(feature, FeatureShape)}
    if kind not in (None, "map", "vector"):
        raise ValueError(f"kind must be 'map' or 'vector', got {kind!r}")
    if kind is not None:
        kinds.add(kind == "map")
    if len(kinds) > 1:
        raise ValueError(
            f"student {features[0]}, teacher {features[1]} and kind={kind!r} mix maps and vectors; pool the map first"
        )
    return kinds.pop() if kinds else True


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value
