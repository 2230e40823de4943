"""A stand-in for an Apple GPU, which refuses what that refuses: float64, and the CPU's tensors.

Its tensors say that they are on `mps`; what they hold is computed on the CPU, so results are real.
It stands for the rules about types and places, not for the kernels of that device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MPS = torch.device("mps")
TAKE_INDICES = ("aten::index", "aten::index_put", "aten::index_put_")
"""Their second argument may be on the CPU; torch brings it over."""


class OnDevice(Tensor):
    """A tensor of the stand-in. To torch's C++ it is one without data, on the device `meta`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64")
        sizes = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        like = {"dtype": inner.dtype, "device": "meta"}
        self = Tensor._make_wrapper_subclass(cls, inner.shape, **like, **sizes)
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("used outside of apple_gpu()")

    def __tensor_flatten__(self) -> Any:  # nn.Module.to keeps tied weights tied only with these
        raise NotImplementedError

    __tensor_unflatten__ = __tensor_flatten__

    device = property(lambda self: MPS)
    is_meta = property(lambda self: False)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy")

    data_ptr = numpy

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()


def moved(x: Tensor, *wanted: Any) -> Tensor:
    """What x.to(*wanted) gives."""
    dtypes = [x for x in wanted if isinstance(x, torch.dtype)]
    (place,) = {torch.device(x).type for x in wanted if isinstance(x, str | torch.device)}
    x = x.to(dtypes[0]) if dtypes else x
    if place == x.device.type:
        return x
    return OnDevice(x.detach().clone()) if place == "mps" else x.detach().inner.clone()


class Calls(TorchFunctionMode):
    """Takes the calls that torch itself would refuse, having no such device."""

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = (*args[1:], *kwargs.values())
        if f is Tensor.to and any(isinstance(x, str | torch.device) for x in wanted):
            return moved(args[0], *wanted)
        if f is Tensor.cpu:
            return moved(args[0], "cpu")
        if f in (torch.tensor, torch.as_tensor) and kwargs.get("device") not in (None, "cpu"):
            place = kwargs.pop("device")
            return moved(f(*args, **kwargs), place)
        if f in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnDevice):
            # Of a list torch makes a tensor on `meta`, which has no values.
            args = tree_map_only(list, torch.tensor, args, is_leaf=lambda x: isinstance(x, list))
        return f(*args, **kwargs)


class Kernels(TorchDispatchMode):
    """Computes on the CPU what concerns the device."""

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        known: dict[int, Tensor] = {}
        """The tensors that were given, by what is computed with in their place."""

        def inside(x: Tensor) -> Tensor:
            plain = x.inner if isinstance(x, OnDevice) else x
            known[id(plain)] = x
            return plain

        def outside(x: Tensor) -> Tensor:
            return known[id(x)] if id(x) in known else OnDevice(x)

        made = torch.device(kwargs.get("device") or "cpu").type in ("mps", "meta")
        if made:
            kwargs["device"] = "cpu"
        check_places(f, args, kwargs)
        args, kwargs = tree_map_only(Tensor, inside, (args, kwargs))
        there = any(isinstance(x, OnDevice) for x in known.values())
        out = f(*args, **kwargs)
        return tree_map_only(Tensor, outside, out) if there or made else out


def check_places(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """RuntimeError for an operation over tensors of both places; single numbers may be anywhere."""
    if f is torch.ops.aten.copy_.default:
        return
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    free = tree_leaves(args[1]) if f._schema.name in TAKE_INDICES else []
    here = [x for x in tensors if x.ndim and not isinstance(x, OnDevice)]
    here = [x for x in here if not any(x is index for index in free)]
    if here and any(isinstance(x, OnDevice) for x in tensors):
        raise RuntimeError(f"{f}: Expected all tensors to be on the same device, but mps and cpu")


@contextmanager
def apple_gpu() -> Iterator[None]:
    """Inside there is such a device."""
    with pytest.MonkeyPatch.context() as patch, Kernels(), Calls():
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        yield
