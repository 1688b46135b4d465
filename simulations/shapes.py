"""What a step allocates, found without weights: its tensors are made as shapes alone, and counted.

The step itself runs, all of it but its arithmetic: torch's fake tensors know the shape, precision and life of
every tensor that the real step would make, and which kernel a processor would take. What the counting leaves
out is what no tensor holds: see docs/memory.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedllm.errors import ModelError

__all__ = ["peak_bytes", "without_weights"]


@contextmanager
def without_weights() -> Iterator[None]:
    """Let :func:`fedllm.models.model.load` make shapes alone."""
    with torch.device("meta"), _Answering():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        yield


def peak_bytes(modules: Iterable[nn.Module], step: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by a step fill at once, beside the modules' own.

    Args:
        modules: all that the step uses, made :func:`without_weights`; afterwards they are of no other use.
        step: what would be done; padding is taken to be there, as in most batches.

    >>> linear = nn.Linear(4, 8, bias=False, device="meta")
    >>> peak_bytes([linear], lambda: linear(torch.ones(2, 4)).relu())  # 32 bytes in, 64 and 64 out
    160

    Raises:
        ModelError: what the step does depends on values.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        counting = _Counting(_pretended(modules))
        try:
            with counting:
                step()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ModelError(
                f"cannot be counted by shapes alone: values decide what {error.func} does"
            ) from error
        return counting.peak


def _pretended(modules: Iterable[nn.Module]) -> list[torch.UntypedStorage]:
    """Put pretended tensors of the processor in the place of shapes; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    kept: list[torch.Tensor] = []
    for module in modules:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, old in table.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                        if isinstance(old, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                        made[id(old)] = new
                        kept.append(old)  # so that no other takes its number
                    table[name] = made[id(old)]  # type: ignore[assignment]  # as what was there
    return [tensor.untyped_storage() for tensor in made.values()]


class _Answering(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Answers what is asked of values, which are not there, as whole texts of sound numbers would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:  # float(loss), bool(mask.all())
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is aten.allclose.default:
            return True
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype is torch.bool:
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        if func is aten.nonzero.default:  # every token is predicted
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))


class _Counting(_Answering):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Adds up the bytes of storages as they come and go.

    Attributes:
        peak: the most there were at once.
    """

    def __init__(self, known: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._held = list(known)
        self._seen = {storage._cdata for storage in self._held}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):  # forward-mode rules see what is pretended with
            kwargs["device"] = torch.device("cpu")
        found = super().__torch_dispatch__(func, types, args, kwargs)
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                self._note(one.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:  # a view
            return
        self._seen.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size
