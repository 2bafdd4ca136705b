"""Bytes that a forward pass leaves behind, whoever holds them: the graph, hooks' objects, attributes of a ctx, caches."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Watches every storage that an operation returns while the mode is on.

    `alive()` afterwards gives {shape, dtype: bytes} of those that still exist. Whatever keeps a tensor, autograd's saved variables,
    a Python attribute or a cache, it is counted, once a storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                storage = tensor.untyped_storage()
                name = f"{func._schema.name.split('::')[1]} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), name)
        return out

    def alive(self, but: tuple[torch.Tensor, ...] = ()) -> dict[str, int]:
        """Bytes by what made them, without the tensors `but`."""
        gc.collect()
        known = {tensor.untyped_storage()._cdata for tensor in but}
        found: dict[str, int] = {}
        for key, (reference, nbytes, name) in self.seen.items():
            if key not in known and not reference.expired():
                found[name] = found.get(name, 0) + nbytes
        return found
