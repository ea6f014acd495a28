"""A device that this machine does not have, played on its CPU.

Tensors of the class :class:`Elsewhere` say that they are on the device ``meta`` and hold numbers of the CPU. Like those
of an accelerator they meet no tensor of the CPU in one operation, but for scalars, indices, and copies that someone
asked for. The arithmetic and the random numbers are the CPU's, so that a fit there must end with the bits of a
fit here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
HERE = torch.device("cpu")
aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.copy_.default}  # from device to device, because someone asked
FROM_DATA = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}
ITEMS = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
PACKING = {aten._pack_padded_sequence.default, aten._pad_packed_sequence.default}  # lengths are the CPU's everywhere
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default}


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device.

    Attributes
    ----------
    held : Tensor
        Its numbers, on the CPU.
    """

    held: torch.Tensor
    is_meta = False  # there are numbers, which a state that is loaded must reach

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Elsewhere({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()


class Device(TorchDispatchMode):
    """Makes the device known to operations that take no tensor, such as ``torch.zeros``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class FromData(TorchFunctionMode):
    """Makes tensors from numbers of Python, which torch moves to their device where no dispatch sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in ITEMS:
            args = (args[0], _without_lists(args[1]), *args[2:])
        if func not in FROM_DATA:
            return func(*args, **kwargs)
        like = args[0] if func is torch.Tensor.new_tensor else None
        asked = kwargs.pop("device", None if like is None else like.device)
        if like is not None:
            func, args = torch.tensor, args[1:]
            kwargs.setdefault("dtype", like.dtype)
        made = func(*args, **kwargs)
        return made if asked is None else made.to(asked)


@contextmanager
def device() -> Iterator[torch.device]:
    """Have the device while the block runs."""
    with Device(), FromData():
        yield DEVICE


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of ATen where its tensors are, or where it is told to."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    is_there = [isinstance(value, Elsewhere) for value in tensors]
    asked = kwargs.get("device")
    if any(value.device == DEVICE and not isinstance(value, Elsewhere) for value in tensors):
        raise AssertionError(f"a tensor without numbers has come to {func}: torch made it where no dispatch sees it")
    if not any(is_there) and (asked is None or asked.type != DEVICE.type):
        return func(*args, **kwargs)
    if func not in COPIES | PACKING:
        strangers = [value for value in tensors if not isinstance(value, Elsewhere) and value.ndim > 0]
        if func in INDEXING:
            strangers = [value for value in strangers if value is args[0] or value is (args[2:3] or (None,))[0]]
        if any(is_there) and strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu, in "
                f"{func} (a tensor of the CPU has the shape {tuple(strangers[0].shape)})"
            )
    goes_there = asked.type == DEVICE.type if asked is not None else any(is_there)
    if func is aten.copy_.default:
        goes_there = isinstance(args[0], Elsewhere)
    held_args, held_kwargs = tree_map(_held, (args, kwargs))
    if asked is not None:
        held_kwargs["device"] = HERE
    out = func(*held_args, **held_kwargs)
    if func is aten._to_copy.default and not goes_there:
        return out
    if not goes_there:
        return args[0] if func is aten.copy_.default else out
    if func is aten._pack_padded_sequence.default:
        return Elsewhere(out[0]), out[1]
    wrapped = tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _without_lists(key: Any) -> Any:
    """Turn lists in an index into tensors: torch itself makes them on the device, where no dispatch sees it."""
    if isinstance(key, list):
        return torch.tensor(key)
    return tuple(_without_lists(part) for part in key) if isinstance(key, tuple) else key
