"""Loops over time as machine code: how they are compiled, and run over sequences in threads.

A recursion over time is a chain of tiny steps, of which each costs a call of torch far more than its arithmetic. The
modules ``*_loops`` write it as a plain loop that numba compiles. They are imported when the first of them runs, so that
nobody waits for numba who does not need it; the machine code is kept beside the source, or in the user's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Loop = TypeVar("Loop", bound=Callable[..., Any])

# Below this many multiplications a thread costs more than it saves, also by what torch's own threads then wait for.
WORK_OF_A_THREAD = 16_000_000
TASKS_OF_A_THREAD = 4  # so that sequences of different lengths share out evenly


def compiled(loop: Loop) -> Loop:
    """Compile a loop over arrays, which then holds no lock of Python's: rounding as written, no fused operations.

    Write ``@no_type_check`` below it: what checks shapes while tests run would stand in numba's way.
    """
    return _made(loop, fastmath=False)


def summing(loop: Loop) -> Loop:
    """Compile like :func:`compiled` a loop whose sums may be taken in any order: several terms at once."""
    return _made(loop, fastmath={"reassoc", "nsz"})


def _made(loop: Loop, fastmath: bool | set[str]) -> Loop:
    from numba import njit

    make: Callable[..., Any] = partial(njit, nogil=True, error_model="numpy", fastmath=fastmath)
    made: Loop
    try:
        made = make(cache=True)(loop)
    except RuntimeError:  # no folder that it may write to
        made = make()(loop)
    return made


@cache
def is_available() -> bool:
    """Whether numba is there and works beside the NumPy that is; everything runs as plain torch otherwise."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def suits(values: Tensor) -> bool:
    """Whether the loops serve these values: they run on the CPU."""
    return values.device.type == "cpu" and is_available()


def suits_without_gradient(*values: Tensor) -> bool:
    """Whether loops serve that no gradient passes through: on the CPU, and nobody asks for one."""
    asked_for = torch.is_grad_enabled() and any(v.requires_grad for v in values)
    return not asked_for and suits(values[0])


def over_sequences(loop: Callable[..., None], sequences: int, work: int, *arrays: Any) -> None:
    """Call ``loop(start, stop, *arrays)`` for ranges that cover all sequences, in as many threads as torch uses.

    Every sequence is computed on its own, so that no figure depends on how many threads share them.

    Parameters
    ----------
    work : int
        About how many multiplications all sequences take together.
    """
    threads = threads_for(sequences, work)
    if threads <= 1:
        loop(0, sequences, *arrays)
        return
    ends = np.linspace(0, sequences, min(sequences, threads * TASKS_OF_A_THREAD) + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        tasks = [pool.submit(loop, start, stop, *arrays) for start, stop in pairwise(ends)]
        for task in tasks:
            task.result()


def threads_for(tasks: int, work: int) -> int:
    """Return how many of torch's threads to use for so many tasks, with about ``work`` multiplications in all."""
    threads = min(torch.get_num_threads(), tasks, 1 + work // WORK_OF_A_THREAD)
    return threads if threads <= 1 else min(threads, os.cpu_count() or 1)


def at_the_same_time(*calls: Callable[[], None]) -> None:
    """Make all calls, each in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for task in [pool.submit(call) for call in calls]:
            task.result()


def operation(schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """Make a function on tensors one operation of torch, so that captured graphs, vmap and autograd take it whole.

    Parameters
    ----------
    schema : str
        Name, arguments and results in torch's notation.
    run : callable
        Computes the results, tensors of their own.
    shapes : callable
        Takes the same arguments and returns empty results of the right shapes.
    """
    name, arguments = schema.split("(", 1)
    made = torch.library.custom_op(f"elbozoo::{name}", run, mutates_args=(), schema=f"({arguments}")
    made.register_fake(shapes)
    made.register_vmap(partial(_one_by_one, made))
    return made


def blank(values: Tensor) -> Tensor:
    """Return an empty tensor of the shape of ``values``, laid out as the loops' results are."""
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _one_by_one(made: Any, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Run an operation for each element of a dimension that vmap has added."""
    results = [
        made(*(a if d is None else a.select(d, row) for a, d in zip(arguments, in_dims, strict=True)))
        for row in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def as_array(values: Tensor) -> Array:
    """Return the values as a contiguous array of float64, whole numbers and booleans as they are."""
    values = values.detach()
    array: Array = (values.double() if values.is_floating_point() else values).contiguous().numpy()
    return array


def as_tensor(array: Array, like: Tensor) -> Tensor:
    """Return the numbers as a tensor of the kind of ``like``."""
    return torch.from_numpy(array).to(like)


def slopes_by_torch(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], slopes: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Pull slopes by the results of ``function`` back to its inputs, by autograd; differentiable where that is asked.

    For derivatives that no loop computes: those of a smoother, and derivatives of derivatives.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [v if again and v.requires_grad else v.detach().requires_grad_() for v in inputs]
        return torch.autograd.grad(function(*leaves), leaves, slopes, create_graph=again, allow_unused=True)
