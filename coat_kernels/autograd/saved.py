"""What autograd keeps between forward and backward: in 8 bits, rebuilt when it is needed, or as it is.

`compress_saved_activations` is a context for the forward pass of any model. Inside it a tensor that autograd saves is

- *rebuilt*, if its values follow from 8-bit codes that are kept anyway: the outputs of this package's norms and activation
  functions, and what is made of them by casts, copies, concatenation and modulation (`replay.py`). Nothing is kept for it, however
  many layers read it.
- *packed* into one byte an element, once for each storage, if it is a large activation;
- *kept*, if it is anything else: parameters and what is made of them, constants, integers, statistics, and, unless told
  otherwise, what attention saves.

An activation is a tensor that a torch function returned inside the context, that requires a gradient and was not made of
parameters alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..config import COATConfig
from ..ops.activation_quant import ActivationQuantized, dequantize_activation, quantize_activation
from .replay import HELD, Watch, is_plain

#: Rows shorter than this are statistics and the outputs of LoRA's A: little to gain, much to lose.
MIN_ROW = 64
#: Tensors smaller than this are left alone.
MIN_NUMEL = 4096
#: A view of so small a part of its storage is kept: packing the whole would cost more than the part.
MAX_EXCESS = 4

#: Marks after which storages that are gone are forgotten.
PRUNE_EVERY = 64

PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


class Kept:
    """A tensor as it is. Like autograd without hooks, it notices a change in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version

    def __call__(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} needed for the backward pass was modified in place after it was saved: "
                f"it is at version {self.tensor._version}, expected {self.version}; use the out-of-place form of the operation"
            )
        return self.tensor


@dataclass(frozen=True)
class View:
    """A view of a storage whose values `base()` returns, in the storage's order."""

    base: Callable[[], Tensor]
    size: Sequence[int]
    stride: Sequence[int]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, base: Callable[[], Tensor]) -> View:
        return cls(base, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def __call__(self) -> Tensor:
        return self.base().as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Packed:
    """The values of a storage in 8 bits."""

    quantized: ActivationQuantized
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, fmt: str, group_size: int) -> Packed:
        return cls(quantize_activation(tensor, fmt, group_size), tensor.dtype)

    def __call__(self) -> Tensor:
        return dequantize_activation(self.quantized, self.dtype)


@dataclass
class Storage:
    """What is known of a live storage.

    Args:
        alive: while it holds, no other storage takes the address the storage is known by.
        version: of the values that `rebuild` and `packed` stand for.
        kind: "activation", "attention" (what it reads or returns), "parameter" (made of parameters alone), or "kept" (an operation
            keeps the whole storage for itself).
        rebuild: returns the values, contiguous, in the storage's order.
        packed: the values in 8 bits, once somebody saved them.
    """

    alive: StorageWeakRef
    kind: str
    version: int = 0
    rebuild: Callable[[], Tensor] | None = None
    packed: Packed | None = None


@dataclass
class Tally:
    """How many saved tensors went which way, and the bytes of those that were packed."""

    rebuilt: int = 0
    packed: int = 0
    kept: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


def storage_numel(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def fills_storage(tensor: Tensor) -> bool:
    """Whether the tensor is its storage, in order."""
    return tensor.is_contiguous() and tensor.storage_offset() == 0 and storage_numel(tensor) == tensor.numel()


class compress_saved_activations:  # a context manager, named as torch names its own
    """Keep what autograd saves inside this context in 8 bits; for the forward pass of any module, on any device.

    ```python
    with compress_saved_activations():
        loss = model(x)
    loss.backward()
    ```

    Args:
        config: `COATConfig`: `activation_format` and `activation_group_size` of packed activations; `attention_format` and
            `attention_group_size` of what scaled dot product attention saves (None keeps q, k, v and the output as they are).
        unregistered: "compress" or "keep": what happens to activations that cannot be rebuilt.

    The gradient of a model is the one of its un-quantized forward pass with 8-bit operands in the backward pass. Inside
    `torch.utils.checkpoint` the checkpoint decides; inside a compiled region the compiler does. Not re-entrant; reusable.

    Attributes:
        tally: what happened to the tensors saved so far.

    Raises:
        TypeError: config is no COATConfig.
        ValueError: unknown `unregistered`.
        RuntimeError: entered twice at a time.
    """

    def __init__(self, config: COATConfig | None = None, *, unregistered: str = "compress") -> None:
        if config is not None and not isinstance(config, COATConfig):
            raise TypeError(f"config must be a COATConfig, got {type(config).__name__}: coat_kernels.config.COATConfig() has the defaults")
        if unregistered not in ("compress", "keep"):
            raise ValueError(f"unknown unregistered {unregistered!r}; choose 'compress' or 'keep'")
        self.config = config or COATConfig()
        self.unregistered = unregistered
        self.tally = Tally()
        self._storages: dict[int, Storage] = {}
        self._marks = 0
        self._attention_shapes: list[torch.Size] = []
        self._hooks: saved_tensors_hooks | None = None
        self._watch = Watch(self)
        self._outer: compress_saved_activations | None = None

    def __enter__(self) -> compress_saved_activations:
        if self._hooks is not None:
            raise RuntimeError("this compress_saved_activations is entered already; make a second one for a nested context")
        self._outer = _THREAD.context
        self._hooks = saved_tensors_hooks(self._save, _unpack)
        self._hooks.__enter__()
        self._watch.__enter__()
        _THREAD.context = self
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._hooks is not None
        self._watch.__exit__(*error)
        self._hooks.__exit__(*error)
        self._hooks = None
        _THREAD.context = self._outer
        self._outer = None
        self._storages.clear()  # what is needed lives on in the graph

    # --- what is known of tensors

    def known(self, tensor: Tensor) -> Storage | None:
        if not is_plain(tensor):
            return None
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return None if found is None or found.alive.expired() else found

    def mark(self, tensor: Tensor, kind: str) -> Storage:
        """Note what a tensor's storage is."""
        found = self.known(tensor)
        if found is None:
            self._marks += 1
            if self._marks % PRUNE_EVERY == 0:  # entries of tensors that are gone would hold their codes
                self._storages = {key: s for key, s in self._storages.items() if not s.alive.expired()}
            storage = tensor.untyped_storage()
            found = self._storages[storage._cdata] = Storage(StorageWeakRef(storage), kind)
        found.kind = kind
        return found

    def offer(self, tensor: Tensor, rebuild: Callable[[], Tensor]) -> None:
        if is_plain(tensor) and fills_storage(tensor) and tensor.numel():
            found = self.mark(tensor, "activation")
            found.version, found.rebuild = tensor._version, rebuild

    def rebuild_of(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """What returns the values of the tensor's storage, if they can be rebuilt."""
        found = self.known(tensor)
        return found.rebuild if found is not None and found.version == tensor._version else None

    def rebuilds(self, tensor: Tensor) -> bool:
        return self.rebuild_of(tensor) is not None

    @contextmanager
    def expect_attention(self, shape: torch.Size) -> Iterator[None]:
        """A tensor of this shape that nobody has seen yet is attention's if it is saved now."""
        self._attention_shapes.append(shape)
        try:
            yield
        finally:
            self._attention_shapes.pop()

    def attend(self, run: Callable[[], Any], query: Tensor, key: Tensor, value: Tensor) -> Any:
        """The result of an attention function. What it saves of its operands and its output stays as exact as the user wants it.

        Its backward pass takes exp(q·k - logsumexp) of the saved tensors: rebuilt from other codes they would not sum to 1.
        """
        for operand in (query, key, value):
            if operand.requires_grad and is_plain(operand):
                self.mark(operand, "attention").rebuild = None
        with self.expect_attention(query.shape[:-1] + value.shape[-1:]):
            out = run()
        if out.requires_grad and is_plain(out):
            self.mark(out, "attention")
        return out

    # --- hooks

    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What stands for the tensor until the backward pass; calling it gives the tensor."""
        if not is_plain(tensor) or tensor.dtype not in PACKABLE or not tensor.numel():
            return Kept(tensor)
        if (rebuild := self.rebuild_of(tensor)) is not None:
            return View.of(tensor, rebuild)
        found = self.known(tensor)
        if found is None and self._attention_shapes and tensor.shape == self._attention_shapes[-1]:
            found = self.mark(tensor, "attention")
        if found is None and tensor.grad_fn is not None and tensor.numel() >= MIN_NUMEL:
            found = self.mark(tensor, "kept")  # by who saves it, whole; packing it for its readers would only add to that
        fmt = self._format(found)
        row = _row(tensor)
        if found is None or fmt is None or row < MIN_ROW or not MIN_NUMEL <= storage_numel(tensor) <= MAX_EXCESS * tensor.numel():
            return Kept(tensor)
        return View.of(tensor, self._packed(tensor, found, row, *fmt))

    def _save(self, tensor: Tensor) -> Callable[[], Tensor]:
        held = self.pack(tensor)
        kind = "kept" if isinstance(held, Kept) else "packed" if isinstance(held, View) and isinstance(held.base, Packed) else "rebuilt"
        setattr(self.tally, kind, getattr(self.tally, kind) + 1)
        return held

    def _format(self, found: Storage | None) -> tuple[str, int] | None:
        kind = None if found is None else found.kind
        if kind == "attention" and self.config.attention_format is not None:
            return self.config.attention_format, self.config.attention_group_size
        if kind == "activation" and self.unregistered == "compress":
            return self.config.activation_format, self.config.activation_group_size
        return None

    def _packed(self, tensor: Tensor, found: Storage, row: int, fmt: str, group_size: int) -> Packed:
        if found.packed is None or found.version != tensor._version:
            with torch.no_grad():
                flat = tensor.detach().as_strided((storage_numel(tensor) // row, row), (row, 1), 0)
                found.packed = Packed.of(flat, fmt, group_size)
            found.version, found.rebuild = tensor._version, None
            self.tally.bytes_before += tensor.untyped_storage().nbytes()
            self.tally.bytes_after += found.packed.quantized.nbytes
        return found.packed


def _row(tensor: Tensor) -> int:
    """Length of the rows that the tensor's storage is packed in; 0 if it has none.

    The dimension whose elements lie side by side; of images and heads, with four dimensions or more, as many as make a row long enough.
    """
    row = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride == row and (row == 1 or (row < MIN_ROW and tensor.dim() >= 4)):
            row *= size
    return row if storage_numel(tensor) % row == 0 else 0


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return packed()


@dataclass
class _Thread(threading.local):
    context: compress_saved_activations | None = field(default=None)


_THREAD = _Thread()


def _current() -> compress_saved_activations | None:
    """The context that gets what autograd saves now: none inside a checkpoint within it, whose second run must save the same tensors."""
    context = _THREAD.context
    hooks = None if context is None else torch._C._autograd._top_saved_tensors_default_hooks(True)
    return context if context is not None and hooks is not None and hooks[0] == context._save else None


def offer(tensor: Tensor, rebuild: Callable[[], Tensor]) -> None:
    """Say that a tensor's values need not be saved: `rebuild()` returns them, contiguous and in its dtype.

    `rebuild` must hold 8-bit codes that are kept for the backward pass anyway, and nothing large beside. Outside of
    `compress_saved_activations` nothing happens.
    """
    context = _current()
    if context is not None and tensor.requires_grad:
        context.offer(tensor, rebuild)


def announce(tensor: Tensor) -> Tensor:
    """Say that an `autograd.Function`, which torch's function modes do not see, has made an activation; returns it."""
    context = None if torch.compiler.is_compiling() else _current()
    if context is not None and tensor.requires_grad and is_plain(tensor) and context.known(tensor) is None:
        context.mark(tensor, "activation")
    return tensor


def can_rebuild(tensor: Tensor) -> bool:
    """Whether saving this tensor costs nothing: its values can be rebuilt, or its storage is kept anyway."""
    context = _current()
    if context is None:
        return False
    found = context.known(tensor)
    return context.rebuilds(tensor) or (found is not None and found.kind in HELD)


def attention_operand(shape: torch.Size) -> AbstractContextManager[None]:
    """While a function runs that saves its own output of this shape, and attention will read it: both save the same storage, once."""
    context = None if torch.compiler.is_compiling() else _current()
    return nullcontext() if context is None else context.expect_attention(shape)
