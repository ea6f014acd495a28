"""A gradient step captured as one graph of tensor operations, free of Python.

Model, guide, objective, gradient and Adam run once under ``make_fx``, which writes down every tensor operation that
they carry out. What is left is a function of parameters, moments of Adam, rows and noise, which can be called again
without Pyro, mapped over seeds by ``vmap``, or compiled. The operations are those of the eager step in the same order,
so that it gives the same numbers.

That holds for programs whose operations do not depend on the values of tensors. Others are refused, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import pyro
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize, vmap
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from elbozoo.inference.losses import OwnELBO
from elbozoo.inference.noise import Noise, OutsideNoise
from elbozoo.inference.steps import PyroStep
from elbozoo.models.contract.batch import Batch
from elbozoo.models.contract.checks import unchecked
from elbozoo.models.contract.isolation import random_state, set_random_state

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's, as PyTorch sets them
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the captured loss with the eager one, relative
MOST_CALLS = 5000  # of PyTorch's functions in a loss; loops over time steps make graphs that take minutes
TAKING_OUT = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}
WARNING_PLACES = ("trace_elbo", "trace_mean_field_elbo", "traceenum_elbo")


class NotCapturable(Exception):
    """A step that is no fixed graph of tensor operations; the message says why."""


@dataclass(frozen=True)
class StepGraph:
    """One step as a function of tensors alone.

    Attributes
    ----------
    graph : GraphModule
        From the trained parameters, their first moments, their second ones, the constants, three numbers as of
        :func:`numbers_of_step`, rows, their positions and the noise, to the loss, the new parameters and moments.
    trained : list of str
        Names in :class:`Programs` of the parameters that have a gradient.
    constants : list of str
        Names of all other parameters and buffers.
    noise : list of Noise
        What a step asks for.
    samplers : tuple of str
        Operations that draw inside the graph, because their noise cannot come from outside.
    """

    graph: fx.GraphModule
    trained: list[str]
    constants: list[str]
    noise: list[Noise]
    samplers: tuple[str, ...]


class Programs(nn.Module):
    """Model and guide as one module whose value is the loss, so that all their tensors can be given from outside."""

    def __init__(self, step: PyroStep) -> None:
        super().__init__()
        self.entry, self.guide = step.entry, step.guide
        self._step = (step,)

    def forward(self, batch: Batch) -> Tensor:
        """Minus the objective, (), nats over the whole data set."""
        return self._step[0].loss(batch)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by name, each once."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def capture(step: PyroStep, batch: Batch) -> StepGraph:
    """Capture ``step`` for batches of the form of ``batch``; parameters, buffers and random states stay as they are.

    Raises
    ------
    NotCapturable
        For programs that decide by the values of tensors, or remember anything from one run to the next.
    """
    programs = Programs(step)
    state, held = random_state(), _Held(programs)
    try:
        with _quiet():
            with _errors_as_refusals():  # the eager step has them again, and says them better
                recorded = _record(step, programs, batch, held)
            _refuse_other_noise(recorded.noise, state)
            captured = _capture(step, programs, batch, recorded, outside=True)
            if captured.samplers:  # then all draws stay inside, and come in the order of the eager step's
                captured = _capture(step, programs, batch, recorded, outside=False)
                set_random_state(state)
            _check(captured, step, programs, batch, recorded)
    finally:
        set_random_state(state)
        held.put_back()
    return captured


def numbers_of_step(step: PyroStep) -> tuple[float, float, float]:
    """Return what the next step takes beside tensors: Adam's step size, the root of its second correction, β."""
    count = step.count + 1
    learning_rate = step.optimizer.param_groups[0]["lr"]
    beta = step.elbo.beta_at(step.count) if isinstance(step.elbo, OwnELBO) else 1.0
    return learning_rate / (1 - BETA1**count), (1 - BETA2**count) ** 0.5, beta


def loss_on_noise(step: PyroStep, batch: Batch, noise: Sequence[Tensor]) -> float:
    """Return the loss of ``batch`` by the program itself, on ``noise`` that is given."""
    with _quiet(), OutsideNoise(noise), torch.enable_grad(), _beta_of(step, numbers_of_step(step)[-1]):
        return float(step.loss(batch).detach())


def with_narrow_products_as_sums(graph: fx.GraphModule) -> fx.GraphModule:
    """Return ``graph`` with products of thin matrices written as sums of products of numbers.

    A library's product of thin matrices spends its time in reading and writing them; a compiler carries out a sum in
    one pass with what comes before and after it.
    """
    copied = copy.deepcopy(graph)
    for node in copied.graph.nodes:
        if node.target in _PRODUCTS and not node.kwargs and _is_narrow(*node.args[-2:]):
            with copied.graph.inserting_before(node):
                total = _as_sum(copied.graph, *node.args)
                total.meta = dict(node.meta)
                node.replace_all_uses_with(total)
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return copied


def is_view(node: fx.Node) -> bool:
    """Whether an operation writes nothing and shows another one's numbers."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


def is_in_order(batch: Batch) -> bool:
    """Whether ``batch`` is the whole data set in its own order, so that to pick its rows is to take all."""
    positions = torch.arange(batch.total, device=batch.index.device)
    return len(batch.index) == batch.total and bool((batch.index == positions).all())


def for_many_seeds(graph: fx.GraphModule, is_own: Sequence[bool], examples: Sequence[Tensor]) -> fx.GraphModule:
    """Return ``graph`` mapped over the first dimension of those inputs that each seed has for its own.

    Raises
    ------
    NotCapturable
        Where an operation cannot be mapped.
    """
    dims = tuple(0 if own else None for own in is_own)
    singles = [example[0] if own else example for own, example in zip(is_own, examples, strict=True)]
    with _errors_as_refusals(), torch.no_grad():
        pure = _simplified(make_fx(functionalize(graph))(*singles))
        mapped = make_fx(vmap(pure, in_dims=dims))(*examples)
    return _simplified(mapped)


# ---- how a step is captured ------------------------------------------------------------------------------------------


@contextmanager
def _errors_as_refusals() -> Iterator[None]:
    """Whatever goes wrong in the block says that the step cannot be captured."""
    try:
        yield
    except NotCapturable:
        raise
    except Exception as error:
        raise NotCapturable(reason_of(error)) from error


class _Recorded(NamedTuple):
    loss: Tensor
    gradients: list[Tensor]
    noise: OutsideNoise
    trained: list[str]


class _Held:
    """What the modules of programs hold beside parameters: their buffers, and numbers, truths and texts."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.buffers = {key: (buffer, buffer._version, buffer.clone()) for key, buffer in self._buffers().items()}
        self.values = self._values()

    def changed(self) -> list[str]:
        """Names of what is not as it was."""
        unknown = (None, None, None)
        of_buffers = [
            key
            for key, buffer in self._buffers().items()
            if (known := self.buffers.get(key, unknown))[0] is not buffer or known[1] != buffer._version
        ]
        of_values = [key for key, value in self._values().items() if self.values.get(key, self) != value]
        return [".".join(filter(None, key)) for key in (*of_buffers, *of_values)]

    def _buffers(self) -> dict[tuple[str, str], Tensor]:
        modules = self.programs.named_modules()
        return {(path, name): b for path, module in modules for name, b in module._buffers.items() if b is not None}

    def _values(self) -> dict[tuple[str, str], Any]:
        kept, modules = (int, float, bool, str), self.programs.named_modules()
        return {(path, name): v for path, module in modules for name, v in vars(module).items() if type(v) in kept}

    def put_back(self) -> None:
        """Make everything as it was."""
        modules = dict(self.programs.named_modules())
        with torch.no_grad():
            for (path, name), (buffer, _, value) in self.buffers.items():
                modules[path]._buffers[name] = buffer.copy_(value)
        for (path, name), plain in self.values.items():
            modules[path].__dict__[name] = plain


class _Tracing(OutsideNoise):
    """Noise from outside, and none of the questions that Pyro asks of values.

    Pyro takes the value of a loss out of its tensor, and puts it back in without its gradient: it stays a tensor. It
    sums over values of positive probability alone, which it picks by a mask: the others are there as zeros. And
    picking all rows in their own order is to take them as they are. Numbers that leave the tensors altogether would be
    those of this one batch for ever.
    """

    def __init__(self, given: Sequence[Tensor] | None, all_rows: Tensor | None) -> None:
        super().__init__(given)
        self.all_rows, self.outside = all_rows, given is not None
        self._mask: Tensor | None = None
        self._to_pick = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.item:
            return args[0].detach().double()
        if func in TAKING_OUT and get_proxy_mode() is not None:
            raise NotCapturable(f"the program takes values out of tensors by {func.__name__}")
        if func is torch.Tensor.gt and hasattr(args[0], "_pyro_dims"):  # pyro.infer.util.Dice.compute_expectation
            self._mask = func(*args)
            return self._mask
        if func is torch.Tensor.all and args[0] is self._mask:
            self._to_pick = 2
            return False
        if func is torch.Tensor.masked_select and self._to_pick:
            self._to_pick -= 1
            return torch.where(args[1], args[0], 0)
        if func is torch.Tensor.__getitem__ and self._takes_all(*args):
            return args[0].clone()
        if self.outside:
            return super().__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))

    def _takes_all(self, values: Tensor, index: Any) -> bool:
        return self.all_rows is not None and index is self.all_rows and len(values) == len(index)


@contextmanager
def _quiet() -> Iterator[None]:
    """Run programs without what looks at values: Pyro's validation and warnings of NaN, and checks of rows.

    Pyro's switches are those of the process, here as everywhere: fits in several threads of one process are not served.
    """
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(unchecked())
        for place in WARNING_PLACES:
            stack.enter_context(mock.patch(f"pyro.infer.{place}.warn_if_nan", lambda value, *_, **__: value))
        yield


def _record(step: PyroStep, programs: Programs, batch: Batch, held: _Held) -> _Recorded:
    """Evaluate the loss once, with its gradient, and note what it takes."""
    elsewhere, noise = _numpy_state(), OutsideNoise()
    with noise, torch.enable_grad(), _beta_of(step, numbers_of_step(step)[-1]):
        loss = programs(batch)
    if changed := held.changed():
        raise NotCapturable(f"the program changes its own {', '.join(changed)}")
    if _numpy_state() != elsewhere:
        raise NotCapturable("the program draws from NumPy")
    if noise.calls > MOST_CALLS:
        raise NotCapturable(f"the program calls {noise.calls} functions one by one, and a graph of all would be long")
    if not loss.requires_grad:
        raise NotCapturable("the loss has no gradient")
    named = {name: p for name, p in programs.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
    return _Recorded(loss.detach(), list(found.values()), noise, list(found))


def _numpy_state() -> str:
    # Python's own generator is no witness: what checks types while tests run draws from it as well.
    return repr(random_state()["numpy"])


def _refuse_other_noise(recorded: OutsideNoise, state: dict[str, Any]) -> None:
    """Refuse programs that seed the generator themselves: their noise is not what comes next from it."""
    set_random_state(state)
    again = [noise.draw() for noise in recorded.asked]
    if recorded.is_all and any(not torch.equal(a, b) for a, b in zip(again, recorded.values, strict=True)):
        raise NotCapturable("the program sets the state of the random generator itself")


def _capture(step: PyroStep, programs: Programs, batch: Batch, recorded: _Recorded, *, outside: bool) -> StepGraph:
    constants = [name for name in programs.tensors() if name not in recorded.trained]
    count, total = len(recorded.trained), batch.total
    in_order = is_in_order(batch)

    def run(*inputs: Tensor) -> list[Tensor]:
        parameters = [p.detach().requires_grad_() for p in inputs[:count]]
        first, second, rest = inputs[count : 2 * count], inputs[2 * count : 3 * count], inputs[3 * count :]
        step_size, correction, beta, x, index, *noise = rest[len(constants) :]
        given = dict(zip([*recorded.trained, *constants], [*parameters, *rest[: len(constants)]], strict=True))
        tracing = _Tracing(noise if outside else None, index if in_order else None)
        with torch.enable_grad(), _beta_of(step, beta), tracing:
            loss = functional_call(programs, given, (Batch(x, index, total),))
        gradients: Sequence[Tensor] = torch.autograd.grad(loss, parameters)
        loss = loss.detach().to(recorded.loss.dtype)
        if step.clip_norm is not None:
            gradients = _clipped(gradients, step.clip_norm * total)
        state = zip(inputs[:count], gradients, first, second, strict=True)
        updated = [_adam(*tensors, step_size, correction) for tensors in state]
        return [loss, *(tensor for tensors in zip(*updated, strict=True) for tensor in tensors)]

    inputs = _inputs(step, programs, batch, recorded.trained, constants, recorded.noise.values if outside else [])
    with _errors_as_refusals(), torch.no_grad():
        graph = make_fx(run, tracing_mode="real")(*inputs)
    _refuse_shapes_by_value(graph)
    graph = _simplified(graph)
    return StepGraph(graph, recorded.trained, constants, recorded.noise.asked if outside else [], _samplers(graph))


def _inputs(
    step: PyroStep, programs: Programs, batch: Batch, trained: list[str], constants: list[str], noise: list[Tensor]
) -> list[Tensor]:
    """Return the inputs of a first step, with moments of zero."""
    tensors = {name: tensor.detach() for name, tensor in programs.tensors().items()}
    numbers = [torch.tensor(value, dtype=torch.float64, device=batch.x.device) for value in numbers_of_step(step)]
    moments = [torch.zeros_like(tensors[name]) for _ in range(2) for name in trained]
    of = [tensors[name] for name in trained], [tensors[name] for name in constants]
    return [*of[0], *moments, *of[1], *numbers, batch.x, batch.index, *noise]


def _check(captured: StepGraph, step: PyroStep, programs: Programs, batch: Batch, recorded: _Recorded) -> None:
    """Hold the captured loss and gradient against the eager ones."""
    noise, count = recorded.noise.values if captured.noise else [], len(captured.trained)
    tolerance = AGREEMENT.get(batch.x.dtype, 1e-4)
    with torch.no_grad():
        first, *state = captured.graph(*_inputs(step, programs, batch, captured.trained, captured.constants, noise))
    loss, expected = float(first), float(recorded.loss)
    if not abs(loss - expected) <= tolerance * max(1.0, abs(expected)):
        raise NotCapturable(f"its graph gives the loss {loss!r} where the program gives {expected!r}")
    gradients: Sequence[Tensor] = recorded.gradients
    if step.clip_norm is not None:
        gradients = _clipped(gradients, step.clip_norm * batch.total)
    largest = max(float(gradient.abs().max()) for gradient in gradients if gradient.numel())
    for name, moment, gradient in zip(captured.trained, state[count:], gradients, strict=False):
        if gradient.numel() == 0:
            continue
        # From moments of zero, Adam's first one is that share of the gradient.
        difference = float((moment / (1 - BETA1) - gradient).abs().max())
        if not difference <= 10 * tolerance * (float(gradient.abs().max()) + 1e-3 * largest):
            raise NotCapturable(f"its graph gives another gradient of {name} than the program")


@contextmanager
def _beta_of(step: PyroStep, beta: Tensor | float) -> Iterator[None]:
    """Let β be that one while the loss is evaluated."""
    if not isinstance(step.elbo, OwnELBO):
        yield
        return
    before = step.elbo.beta
    step.elbo.beta = beta
    try:
        yield
    finally:
        step.elbo.beta = before


def _adam(
    parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step_size: Tensor, correction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam (Kingma & Ba 2015, algorithm 1) in PyTorch's order of operations."""
    first = torch.lerp(first, gradient, 1 - BETA1)
    second = torch.addcmul(second * BETA2, gradient, gradient, value=1 - BETA2)
    # Both in the parameter's own type, which numbers in double precision would lift where it is a single number too.
    step_size, correction = step_size.to(parameter.dtype), correction.to(parameter.dtype)
    scale = second.sqrt() / correction + EPSILON
    return parameter + (-step_size * first) / scale, first, second


def _clipped(gradients: Sequence[Tensor], most: float) -> list[Tensor]:
    """Scale gradients to a norm of at most ``most``, as ``torch.nn.utils.clip_grad_norm_`` does."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)
    return [gradient * factor for gradient in gradients]


# ---- graphs ----------------------------------------------------------------------------------------------------------


def _refuse_shapes_by_value(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        indices = node.args[1] if node.target is torch.ops.aten.index.Tensor else ()
        picks = any(i is not None and i.meta["val"].dtype == torch.bool for i in indices)
        if (torch.Tag.dynamic_output_shape in tags and node.target is not torch.ops.aten.index.Tensor) or picks:
            raise NotCapturable(f"{_name(node)} has a shape that depends on values; use torch.where or a mask")


def _samplers(graph: fx.GraphModule) -> tuple[str, ...]:
    drawn = [n for n in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    return tuple(dict.fromkeys(_name(node) for node in drawn))


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _simplified(graph: fx.GraphModule) -> fx.GraphModule:
    """Leave out what changes nothing."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        if node.target is torch.ops.aten.copy.default:  # into what is of the same form, it is the thing itself
            target, source = node.args[:2]
            if _form(target) == _form(source):
                node.replace_all_uses_with(source)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


# Not those of many seeds at once, bmm: as sums they took six times as long (32 seeds, 1,000 rows).
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
NARROW = 16  # columns of a thin matrix


def _is_narrow(left: fx.Node, right: fx.Node) -> bool:
    """Whether at least two of the three dimensions of a product of matrices are small."""
    rows, common = left.meta["val"].shape[-2:]
    return sorted((rows, common, right.meta["val"].shape[-1]))[1] <= NARROW


def _as_sum(graph: fx.Graph, *factors: fx.Node) -> fx.Node:
    """Σ_k a_ik b_kj, and what is to be added to it, as operations of ``graph``."""
    *added, left, right = factors
    aten = torch.ops.aten
    columns = graph.call_function(aten.unsqueeze.default, (left, -1))
    rows = graph.call_function(aten.unsqueeze.default, (right, -3))
    terms = graph.call_function(aten.mul.Tensor, (columns, rows))
    total = graph.call_function(aten.sum.dim_IntList, (terms, [-2]))
    return graph.call_function(aten.add.Tensor, (total, added[0])) if added else total


def _form(node: fx.Node) -> tuple[torch.Size, torch.dtype]:
    return node.meta["val"].shape, node.meta["val"].dtype


def reason_of(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
