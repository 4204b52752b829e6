"""The distiller: a student, a frozen teacher, and one method for each pair of their layers."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffkd.distill.balance import Balance, Balancer, Measurable
from diffkd.distill.checks import GradientFlow, check_models
from diffkd.distill.matching import (
    Pair,
    as_text,
    attribute_of,
    pair_layers,
    pair_representations,
    pair_rows,
    unique_names,
)
from diffkd.distill.observation import Observation, as_constant, read_pair, select_arguments
from diffkd.distill.stages import read_embedding
from diffkd.features.activations import before_activation
from diffkd.features.forward import first_parameter, on_device_of, run
from diffkd.features.layers import Layer, activations_of, find_layer, list_layers
from diffkd.features.layout import select_tensor
from diffkd.features.probe import probe, watch
from diffkd.features.reader import Reader, agree
from diffkd.features.recorder import Call, Recorder, split_selector
from diffkd.features.shape import Resizing
from diffkd.files.weights import unwrap
from diffkd.methods import DiffKD, MethodFactory
from diffkd.teacher.classifier import Head, rest_of
from diffkd.teacher.options import AS_GIVEN, TeacherOptions, prepare_teacher
from diffkd.teacher.view import StudentView

TeacherView = Callable[[Any], Any] | StudentView | None


def build_method(method: nn.Module | MethodFactory, student: Reader, teacher: Reader) -> nn.Module:
    """Return the method, or build it by its factory from the shapes of two readers.

    Raises:
        ValueError: if a method of this package has a loss factor that is negative or not finite.
    """
    if isinstance(method, nn.Module):
        built = method
    else:
        factory: Callable[..., nn.Module] = method
        built = factory(*((side.shapes if student.several else side.shapes[0]) for side in (student, teacher)))
    for part in built.modules():
        if type(part).__module__.startswith("diffkd.methods."):
            for name, value in _factors(part):
                if not 0 <= value < math.inf:  # which NaN is not
                    raise ValueError(
                        f"{type(part).__name__}: {name}={value} is no factor: give a finite one, 0 or more"
                    )
    return built


def _factors(method: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the factors of a method's losses or scores, with their names."""
    for name, value in vars(method).items():
        if name == "weights":
            yield from ((f"{term}_weight", weight) for term, weight in value.items())
        elif isinstance(value, (int, float)) and name.endswith(("weight", "alpha", "beta", "gamma", "temperature")):
            yield name, value


def _norm_before(teacher: nn.Module, layers: Sequence[Layer], name: str) -> nn.Module | None:
    """Return the BatchNorm right before the activation that "layer@pre" names, None if there is none."""
    path, before = before_activation(name)
    found = next((layer.before for layer in layers if layer.name == path and before), None)
    return teacher.get_submodule(found.norm) if found is not None and found.norm else None


@dataclass
class _Source:
    """A teacher, its input, and the recorder of its layers.

    Attributes:
        model: the frozen teacher, or the changed copy of it that runs.
        given: the teacher as given.
        input: as `teacher_input` of the distiller.
        options: how it runs.
        layers: its layers, for the example.
        example: its input for the example.
        prefix: of the names of its features, "" for the first teacher.
    """

    model: nn.Module
    given: nn.Module
    input: Callable[[Any], Any] | StudentView | None
    options: TeacherOptions
    layers: list[Layer]
    example: Any
    prefix: str
    recorder: Recorder = field(default_factory=lambda: Recorder(()))

    def inputs(self, inputs: Any, calls: Mapping[str, Call]) -> Any:
        """Return its input from the student's, and from the recorded calls of the student's layers."""
        if isinstance(self.input, StudentView):
            return self.input(inputs, calls)
        return inputs if self.input is None else self.input(inputs)


def _each(value: Any, count: int, what: str) -> list[Any]:
    """Return `value` for each of `count` teachers, or the values of a list for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{what} has {len(value)} values for {count} teacher(s): give one for each, or one for all")
    return list(value)


class Distiller(nn.Module):
    """Trains a student on the features of a frozen teacher, or of several.

    One forward runs teacher, student and all losses, so the distiller as a whole can be compiled or wrapped for
    distributed training. `parameters()` and `state_dict()` hold the student and the methods, not the teacher, which
    `.to()` moves too and which stays in evaluation mode. The student's forward may return anything.

    Args:
        student: the model to train.
        teacher: the model to learn from, or a list of several.
        pairs: pairs of layers, or "auto" (see :func:`~diffkd.match_layers`), with each of the teachers. The teacher's
            forward stops after the last paired layer.
        example: input of the student for probing: a tensor (B, C, H, W), a tuple of arguments or a mapping of keyword
            arguments. Two images suffice.
        method: default method of the pairs; with "auto" also a list of methods, each with its own automatic pairs.
        teacher_input: converts the student's input to the teacher's, if normalisation or size differ
            (:class:`~diffkd.TeacherInput`), or takes it from layers of the student
            (:class:`~diffkd.teacher.view.StudentView`). With several teachers one for all, or a list.
        teacher_options: how the teacher runs; by default unchanged (:class:`~diffkd.TeacherOptions`). With several
            teachers one for all, or a list.
        balance: weight of the automatic pairs on features and on a detector's outputs; pairs on logits and given
            pairs keep their weights.
        representations: whether the models return representations, not class scores: automatic pairing then pairs
            their last maps and their pooled outputs (:func:`~diffkd.distill.matching.pair_representations`).
        teacher_weights: weight of the automatic pairs of each teacher; None: 1. A `balance` takes their place.

    Methods that need the rest of the teacher after the layer (SRRL) get it as a function that has given the teacher's
    own scores for the example (:func:`~diffkd.teacher.classifier.rest_of`).

    Raises:
        ValueError: if a layer is unknown or cannot be distilled, shapes are not understood, nothing can be paired, or a
            model has weights on the device "meta".

    Warns:
        GradientWarning: once for each pair whose student feature carries no gradient in training.

    Example:
        >>> from torch import nn, randn
        >>> def net(width):
        ...     conv = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
        ...     return nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
        >>> images = randn(4, 3, 16, 16)
        >>> distiller = Distiller(net(8), net(32), example=images)
        >>> output, losses = distiller(images)
        >>> sorted(losses)
        ['0/diffusion', '0/kd', 'output/diffusion', 'output/kd']
    """

    ramp_factors: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        pairs: Sequence[Pair] | Literal["auto"] = "auto",
        *,
        example: Any,
        method: MethodFactory | Sequence[MethodFactory] = DiffKD,
        teacher_input: TeacherView | Sequence[TeacherView] = None,
        teacher_options: TeacherOptions | Sequence[TeacherOptions] = AS_GIVEN,
        balance: Balance | None = None,
        representations: bool = False,
        teacher_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        teachers: list[Any] = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        if not teachers:
            raise ValueError("there is no teacher in the list: give one or more")
        for one in teachers:
            check_models(student, one)
        views = _each(teacher_input, len(teachers), "teacher_input")
        self.student = student
        self._watched = tuple(
            dict.fromkeys(name for view in views if isinstance(view, StudentView) for name in view.layers)
        )
        student_layers = _listed(student, example, representations)
        calls = watch(student, self._watched, example)
        # In a list, so that they are no submodules: not in state dict, optimiser, broadcast or EMA.
        self._sources: list[_Source] = []
        for index, (one, view, options) in enumerate(
            zip(teachers, views, _each(teacher_options, len(teachers), "teacher_options"), strict=True)
        ):
            source = _Source(one, unwrap(one), view, options, [], None, f"{index}:" if index else "")
            source.example = source.inputs(example, calls)
            source.layers = _listed(one.eval(), source.example, representations)
            self._sources.append(source)

        methods = list(method) if isinstance(method, Sequence) else [method]
        if balance is not None and not isinstance(pairs, str):
            raise ValueError("balance is the weight of automatic pairs: give it as the weight of your own pairs")
        if isinstance(pairs, str):
            if pairs != "auto":
                raise ValueError(f"pairs must be 'auto' or a list of Pair, got {pairs!r}")
            match = pair_representations if representations else pair_layers
            weights = (
                [1.0] * len(teachers)
                if teacher_weights is None
                else _each(list(teacher_weights), len(teachers), "teacher_weights")
            )
            pairs = [
                replace(
                    pair,
                    source=index,
                    weight=weights[index],
                    name=pair.name if len(teachers) == 1 else f"teacher{index}:{_name(pair)}",
                )
                for index, source in enumerate(self._sources)
                for one in methods
                for pair in match(student_layers, source.layers, one)
            ]
        if not pairs:
            raise ValueError("pairs is empty: name at least one Pair, or leave it at 'auto'")
        if len(methods) > 1 and (bare := next((pair for pair in pairs if pair.method is None), None)) is not None:
            raise ValueError(
                f"pair '{bare.student}' must name its own method, since {len(methods)} are given beside it"
            )
        self.pairs = tuple(pairs)
        self.names = unique_names(self.pairs)
        for pair in self.pairs:
            if pair.source >= len(teachers):
                raise ValueError(
                    f"pair '{_name(pair)}' learns from teacher {pair.source}, but there are {len(teachers)}, counted "
                    "from 0: correct its source"
                )
        student_names = [name for pair in self.pairs for name in pair.student_names]
        for name in student_names:
            find_layer(student_layers, split_selector(name)[0], f"student {student_layers[-1].type}")
        self._student_recorder = Recorder(
            list(dict.fromkeys(student_names)), self._watched, activations_of(student_layers)
        )
        self._student_recorder.attach(student)
        read_student = probe("student", self._student_recorder, student, example, student_layers)
        read_teachers = [self._prepared(index) for index in range(len(teachers))]
        self.readers: list[tuple[Reader, Reader]] = []
        self.methods = nn.ModuleList()
        self._resizes: list[Resizing] = []
        for pair in self.pairs:
            several = not isinstance(pair.student, str)
            factory = methods[0] if pair.method is None else pair.method
            resizes: Resizing = attribute_of(factory, "resizes", "student")
            source = self._sources[pair.source]
            ours, theirs = agree(
                read_student(pair.student_names, several=several, layout=pair.student_layout),
                read_teachers[pair.source](pair.teacher_names, several=several, layout=pair.teacher_layout),
                resizes,
            )
            self.readers.append((ours, theirs))
            self._resizes.append(resizes)
            self.methods.append(built := build_method(factory, ours, theirs))
            if (take_norms := getattr(built, "take_norms", None)) is not None:
                take_norms([_norm_before(source.given, source.layers, name) for name in pair.teacher_names])
        # Of pairs whose method wants it; where it cannot be had, the reason, since the caller may hand over another.
        self._heads: dict[str, Head | ValueError] = {
            name: self._head(pair, theirs)
            for name, pair, (_, theirs), built in zip(self.names, self.pairs, self.readers, self.methods, strict=True)
            if "teacher_head" in getattr(built, "needs", ())
        }
        if balance is not None:
            of_logits = [any(shape.role == "logits" for shape in theirs.shapes) for _, theirs in self.readers]
            self.pairs = tuple(
                pair if logits else replace(pair, weight=balance)
                for pair, logits in zip(self.pairs, of_logits, strict=True)
            )
        if (parameter := first_parameter(student)) is not None:
            self.methods.to(parameter.device)
        device = None if parameter is None else parameter.device
        self.register_buffer("ramp_factors", torch.ones(len(self.pairs), device=device), persistent=False)
        self.set_epoch(0.0)
        balanced = any(isinstance(pair.weight, Balance) for pair in self.pairs)
        self.balancer = Balancer([pair.weight for pair in self.pairs], self.names).to(device) if balanced else None
        self.watched = False
        self._measurable: Measurable | None = None
        self.gammas: dict[str, Tensor] = {}
        self._flow = GradientFlow(self.names, self.pairs)

    def _prepared(self, index: int) -> Callable[..., Reader]:
        """Prepare a teacher and attach its recorder; return what builds the readers of its layers."""
        source = self._sources[index]
        names = [name for pair in self.pairs if pair.source == index for name in pair.teacher_names]
        side = "teacher" if len(self._sources) == 1 else f"teacher {index}"
        for name in names:
            find_layer(source.layers, split_selector(name)[0], f"{side} {source.layers[-1].type}")
        source.model = prepare_teacher(source.model, source.example, names, source.options)
        source.recorder = Recorder(list(dict.fromkeys(names)), activations=activations_of(source.layers))
        source.recorder.attach(source.model)
        return probe("teacher", source.recorder, source.model, source.example, source.layers)

    def _head(self, pair: Pair, reader: Reader) -> Head | ValueError:
        """Return the rest of a pair's teacher after its layer, or why it cannot be had."""
        source = self._sources[pair.source]
        with torch.no_grad():
            output, features, _ = source.recorder.record(source.model, on_device_of(source.model, source.example))
            feature = reader.read(features)
        scores = select_tensor(output, split_selector(source.layers[-1].name)[1])
        if not isinstance(feature, Tensor) or scores is None:
            return ValueError("the teacher's classifier takes one feature, and the pair has several: pair one")
        layer = split_selector(pair.teacher_names[0])[0]
        try:
            return rest_of(source.model, layer, source.example, feature, scores)
        except ValueError as error:
            return error

    def teacher_head(self, name: str) -> Head:
        """Return the rest of the teacher after the layer of a pair whose method needs "teacher_head".

        Args:
            name: the pair's, one of :attr:`names`.

        Returns:
            A function from the teacher's feature, (B, C, H, W) or (B, C), to its scores (B, K).

        Raises:
            ValueError: if the teacher's scores cannot be computed from that feature.
        """
        head = self._heads[name]
        if isinstance(head, ValueError):
            raise head
        return head

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher; of several the first."""
        return self._sources[0].model

    @property
    def teachers(self) -> tuple[nn.Module, ...]:
        """All frozen teachers."""
        return tuple(source.model for source in self._sources)

    @property
    def teacher_input(self) -> TeacherView:
        """What the teacher's input is made by; of several teachers the first's."""
        return self._sources[0].input

    @property
    def needs(self) -> frozenset[str]:
        """Names of keyword arguments that the methods need besides features, such as "labels" or "indices"."""
        return frozenset(name for method in self.methods for name in getattr(method, "needs", ()))

    def forward(
        self, inputs: Any, *, teacher_features: Mapping[str, Tensor] | None = None, **context: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run teacher and student on a batch and compare their features.

        Args:
            inputs: the student's input, as in the constructor's `example`.
            teacher_features: the result of :meth:`teacher_features` for these inputs, such as a cached one; the teacher
                then does not run.
            context: the arguments that :attr:`needs` names, such as `labels=`; other names are ignored.

        Returns:
            The student's own output, and the weighted losses by "pair/term", to be added to the task's loss.

        Raises:
            TypeError: if an argument that a method needs is missing.
        """
        output, results, features = self._distil(inputs, teacher_features, context)
        losses: dict[str, Tensor] = {}
        every: list[dict[str, Tensor]] = []
        factors: list[Tensor | float] = []
        gammas: dict[str, Tensor] = {}
        for index, (name, pair, (_, _, result)) in enumerate(zip(self.names, self.pairs, results, strict=True)):
            terms = result if isinstance(result, dict) else result.losses
            factor: Tensor | float = 1.0 if pair.ramp.is_constant else self.ramp_factors[index]
            every.append(terms)
            factors.append(factor)
            if not isinstance(pair.weight, Balance):
                factor = pair.weight if pair.ramp.is_constant else pair.weight * factor
            elif self.balancer is not None:
                factor = factor * self.balancer.weight(index)
            losses.update({f"{name}/{term}": factor * loss for term, loss in terms.items()})
            if (gamma := getattr(result, "gamma", None)) is not None:
                gammas[name] = gamma.detach()
        self.gammas = gammas
        if not torch.compiler.is_compiling():
            self._keep(features, every, factors)
        return output, losses

    @property
    def due(self) -> bool:
        """Whether :meth:`balance` measures on the next batch, which must then run uncompiled."""
        return self.balancer is not None and len(self.balancer.due) > 0

    def balance(self, losses: Mapping[str, Tensor], task: Tensor) -> dict[str, Tensor]:
        """Update the weights of pairs with a :class:`~diffkd.Balance`; call between forward and backward.

        Does nothing without such pairs. With them, call it after every forward in training:

            output, losses = distiller(images)
            task = F.cross_entropy(output, labels)
            losses = distiller.balance(losses, task)
            (task + sum(losses.values())).backward()

        Args:
            losses: the losses from the forward.
            task: the task's loss, a scalar, with the factor it has in the sum.

        Returns:
            The losses, with the new weights if they were measured on this batch.

        Raises:
            RuntimeError: if a measurement is due, and the forward ran in a compiled graph.
            ValueError: if the task's loss does not depend on the student's feature of a balanced pair.
        """
        measurable, self._measurable = self._measurable, None
        if self.balancer is None:
            return dict(losses)
        result = dict(losses)
        if due := self.balancer.due:
            if measurable is None:
                raise RuntimeError(
                    "there are no gradients to balance by: call the distiller in training mode before, and itself, not "
                    "what torch.compile made of it, where distiller.due is true"
                )
            self.balancer.update(measurable, task)
            for index in due:
                factor = measurable.factors[index] * self.balancer.weight(index)
                for term, loss in measurable.terms[index].items():
                    result[f"{self.names[index]}/{term}"] = factor * loss
        self.balancer.advance()
        return result

    def pulls(self, task: Tensor) -> dict[str, tuple[float, float]] | None:
        """Return the gradient norms of method and task at the student's features, by pair; waits for the device.

        Call it between a forward with :attr:`watched` set and its backward, before :meth:`balance`.

        Args:
            task: the task's loss.

        Returns:
            The norms of the gradients of each pair's losses without the pair's weight, and of the task's, 0 if it does
            not depend on the feature; of this rank alone. None if the forward kept nothing.
        """
        if self._measurable is None:
            return None
        norms = self._measurable.norms(task, range(len(self.pairs)))
        roots = [(float(m.sqrt()), 0.0 if t is None else float(t.sqrt())) for m, t in norms]
        return dict(zip(self.names, roots, strict=True))

    def weights(self) -> dict[str, float | Tensor]:
        """Return the weight of each pair; for a :class:`~diffkd.Balance` the current one, a scalar tensor."""
        return {
            name: self.balancer.weight(index)
            if isinstance(pair.weight, Balance) and self.balancer is not None
            else float(pair.weight)  # type: ignore[arg-type]
            for index, (name, pair) in enumerate(zip(self.names, self.pairs, strict=True))
        }

    def _keep(
        self,
        features: Mapping[str, Tensor],
        terms: list[dict[str, Tensor]],
        factors: list[Tensor | float],
    ) -> None:
        """Keep the tensors for a measurement of gradients, until :meth:`balance` or the next batch."""
        kept = self.training and torch.is_grad_enabled()
        if kept and self.due and self._measurable is not None and not self.watched:
            raise RuntimeError(
                "a pair has a Balance, and its weight was not asked for: call losses = distiller.balance(losses, "
                "task_loss) after every forward in training"
            )
        self._measurable = None
        if kept and (self.watched or self.due):
            self._measurable = Measurable(
                [[features[layer] for layer in pair.student_names] for pair in self.pairs],
                [torch.stack(list(one.values())).sum() for one in terms],
                list(terms),
                factors,
            )

    def observe(self, inputs: Any, **context: Any) -> dict[str, Observation]:
        """Return the features of each pair for a batch, and the result of its method.

        The modules keep their modes: for inspection call `.eval()` first, and use `torch.no_grad()`.
        """
        return dict(zip(self.names, self._distil(inputs, None, context)[1], strict=True))

    def teacher_features(self, inputs: Any) -> dict[str, Tensor]:
        """Return the outputs of the teacher's paired layers by name, computed from `inputs` alone.

        Raises:
            TypeError: if its input is taken from layers of the student.
        """
        self._check_independent()
        return self._teach(inputs, {})

    def teach(self, inputs: Any, source: int = 0) -> Any:
        """Return a teacher's output for the student's inputs, computed from those alone.

        Args:
            inputs: the student's input.
            source: of several teachers the one that runs, counted from 0.

        Raises:
            TypeError: if its input is taken from layers of the student.
        """
        self._check_independent()
        chosen = self._sources[source]
        with torch.no_grad():
            return run(chosen.model, on_device_of(chosen.model, chosen.inputs(inputs, {})))

    def teacher_embedding(self, inputs: Any, source: int = 0) -> Tensor:
        """Return a teacher's embedding (B, C) of the student's inputs (:func:`~diffkd.distill.stages.read_embedding`).

        Raises:
            TypeError: if its input is taken from layers of the student.
            ValueError: if it returns neither a vector nor a map for each image.
        """
        return as_constant(read_embedding(self._sources[source].layers, self.teach(inputs, source)))

    def set_epoch(self, epoch: float) -> None:
        """Set the current epoch, fractional and counted from 0, for pairs with a :class:`~diffkd.Ramp`.

        Other pairs do not need it. The factors are kept in a tensor, so that a compiled distiller sees changes.
        """
        if not all(pair.ramp.is_constant for pair in self.pairs):
            self.ramp_factors.copy_(torch.tensor([pair.ramp(epoch) for pair in self.pairs]))

    def release(self) -> None:
        """Remove the hooks from both models, for example to pickle the student; the distiller is unusable then."""
        self._student_recorder.detach()
        for source in self._sources:
            source.recorder.detach()

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise ValueError if `optimizer` misses a trainable parameter of the student or of a method."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise ValueError(
                f"the optimiser misses {len(missing)} trainable parameters, first {missing[0]!r}: those parts would "
                "never learn; build it with distiller.parameters()"
            )

    def check_gradients(self) -> None:
        """Raise ValueError if a pair had no gradient to the student in the last training forward."""
        self._flow.check()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the student and the methods; the teacher stays in evaluation mode."""
        super().train(mode)
        for teacher in self.teachers:
            teacher.eval()
        return self

    def rows(self) -> list[tuple[str, ...]]:
        """Return one row per pair: name, student layer and shape, teacher layer and shape, method, parameters.

        The shapes are those that the models return; the method may get resized maps.
        """
        return list(pair_rows(self.names, self.readers, self.methods))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return as_text(self.title, self.rows())

    @property
    def title(self) -> str:
        """Who learns from whom, by the names of their classes."""
        teachers = " and ".join(type(unwrap(teacher)).__name__ for teacher in self.teachers)
        return f"{type(unwrap(self.student)).__name__} learns from {teachers}"

    def _distil(
        self, inputs: Any, teacher_features: Mapping[str, Tensor] | None, context: dict[str, Any]
    ) -> tuple[Any, list[Observation], dict[str, Tensor]]:
        output, ours, calls = self._student_recorder.record(self.student, inputs)
        if self.training and torch.is_grad_enabled():
            self._flow.observe(ours)
        theirs = self._teach(inputs, calls) if teacher_features is None else teacher_features
        for source in self._sources:
            if isinstance(source.input, StudentView):
                context = source.input.context(inputs, calls) | context
        results = []
        for name, pair, (our_reader, their_reader), resizes, method in zip(
            self.names, self.pairs, self.readers, self._resizes, self.methods, strict=True
        ):
            prefix = self._sources[pair.source].prefix
            own = {layer: theirs[prefix + layer] for layer in their_reader.names}
            student, teacher = read_pair(our_reader, their_reader, ours, own, resizes)
            given = context
            if name in self._heads and context.get("teacher_head") is None:
                given = {**context, "teacher_head": self.teacher_head(name)}
            result = method(student, teacher, **select_arguments(method, name, given))
            results.append(Observation(student, teacher, result))
        return output, results, ours

    def _teach(self, inputs: Any, calls: dict[str, Call]) -> dict[str, Tensor]:
        every: dict[str, Tensor] = {}
        for source in self._sources:
            teacher = source.model
            if teacher.training and not torch.compiler.is_compiling():
                teacher.eval()  # user code has called train()
            if not source.recorder.names:
                continue  # given pairs leave this teacher out
            with torch.no_grad():
                # Like the example, images are cast to the dtype of the teacher.
                teacher_inputs = on_device_of(teacher, source.inputs(inputs, calls))
                features = source.recorder.record(teacher, teacher_inputs, whole=False).features
            for name, feature in features.items():
                constant = as_constant(feature)
                every[source.prefix + name] = constant.float() if source.options.lowers else constant
        return every

    def _check_independent(self) -> None:
        if any(isinstance(source.input, StudentView) for source in self._sources):
            raise TypeError("the teacher's input is made while the student runs; call the whole teacher instead")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for teacher in self.teachers:
            teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _listed(model: nn.Module, example: Any, representations: bool) -> list[Layer]:
    """Return the layers of a model, none of them with class scores if it returns representations."""
    layers = list_layers(model, example)
    return [replace(layer, scores=False) for layer in layers] if representations else layers


def _name(pair: Pair) -> str:
    return pair.name or ",".join(pair.student_names)
