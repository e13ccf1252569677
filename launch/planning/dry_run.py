"""Run a step without its arithmetic and count the memory of its tensors.

Within a `DryRun` floating-point tensors have shapes and types but no numbers (torch's FakeTensorMode); where a number
is asked for, it is 0. Ids, masks and positions are real, so that code which looks at them takes its usual path:

    with DryRun() as dry:
        model = AutoModelForCausalLM.from_config(config)      # 8B weights in no memory
        with dry.measured() as used:
            model(ids).logits.sum().backward()
    used.peak                                                 # bytes beyond those before
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
MOST_REAL = 2**20
"Elements above which a tensor of ids or masks is fake too: such masks only choose what attention sees."
ANSWERS = (
    aten.le,
    aten.lt,
    aten.ge,
    aten.gt,
    aten.eq,
    aten.ne,
    aten.isfinite,
    aten.all,
    aten.any,
    aten.searchsorted,
)
"Operations whose results decide what runs next; they are computed with 0 in place of unknown numbers."


@dataclass
class Used:
    """Bytes of tensors beyond those before: the most at a time, and those that are left."""

    peak: int = 0
    left: int = 0


class DryRun(TorchDispatchMode):
    """Context in which floating-point tensors have no numbers, and the bytes of all tensors are counted."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = ExitStack()
        self._storages: dict[int, weakref.ref] = {}
        self._bytes = self._peak = 0

    def __enter__(self) -> Self:
        self._stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings(
            "ignore", message="Accessing the data pointer of FakeTensor"
        )  # torch's own deepcopy
        self._stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        self._stack.enter_context(self._fakes)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextmanager
    def measured(self) -> Iterator[Used]:
        """Count the bytes of the tensors that are made within this context."""
        used, before, outer_peak = Used(), self._bytes, self._peak
        self._peak = before
        try:
            yield used
        finally:
            used.peak, used.left = self._peak - before, self._bytes - before
            self._peak = max(self._peak, outer_peak)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = self._result(func, args, kwargs or {})
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            self._bytes -= size
            del self._storages[place]

        self._storages[place] = weakref.ref(storage, freed)
        self._bytes += size
        self._peak = max(self._peak, self._bytes)

    def _result(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not fakes:
            if not tensors and not _makes_real(func, args, kwargs):
                return func(*args, **kwargs)
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            is_large = any(
                leaf.numel() > MOST_REAL for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
            )
            return tree_map_only(Tensor, self._fakes.from_tensor, result) if is_large else result
        if func is aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if func in (aten.equal.default, aten.allclose.default):
            return True
        if func.overloadpacket in ANSWERS and all(fake.numel() <= MOST_REAL for fake in fakes):
            with unset_fake_temporarily():
                args, kwargs = tree_map_only(FakeTensor, _zeros, (args, kwargs))
                return func(*args, **kwargs)
        if func is aten.index.Tensor:
            args = (args[0], [index for each in args[1] for index in _as_indices(each)])
        return func(*args, **kwargs)


def _makes_real(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Return whether an operation without inputs makes ids, masks, or the ramp by which scoring probes a head."""
    dtype = kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return True
    is_range = func.overloadpacket is aten.arange and dtype is None
    return func is aten.linspace.default or (is_range and all(isinstance(number, int) for number in args))


def _as_indices(index: Any) -> tuple[Any, ...]:
    """Turn a real mask into the indices it selects, so that the size of the result is known."""
    if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        with unset_fake_temporarily():
            return index.nonzero().unbind(1)
    return (index,)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace nn.Module._apply (`to`, `float`, ...), which swaps fake weights in place and fails."""
    for child in module.children() if recurse else ():
        _apply(child, fn)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = fn(parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module
