"""Which torch functions keep a tensor rebuildable: what they return is made again from what their operands are rebuilt from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from .saved import compress_saved_activations

_ATTENTION = {F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
#: Cheap, deterministic, and done element by element: casts, copies, concatenation, modulation.
_REPLAYED = {
    *(torch.mul, torch.add, torch.sub, torch.cat, torch.concat, torch.concatenate, torch.clone, torch.reshape, torch.flatten),
    *(getattr(Tensor, name) for name in ("mul", "add", "sub", "to", "float", "bfloat16", "half", "type_as", "clone")),
    *(getattr(Tensor, name) for name in ("contiguous", "reshape", "flatten", "__rmul__", "__radd__")),
}
#: Nodes of a graph that is searched for parameters.
_MOST_NODES = 16
#: Kinds of storages that somebody keeps whatever else is saved.
HELD = ("attention", "kept")
#: A plain operand of a replayed function is held as it is if it is this much smaller than the result.
_SMALL = 8


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has a storage of its own: subclasses (DTensor and the like) and `torch.func`'s wrappers keep values elsewhere."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class Watch(TorchFunctionMode):
    """Tells a `compress_saved_activations` what the tensors are that torch's functions return."""

    def __init__(self, context: compress_saved_activations) -> None:
        super().__init__()
        self.context = context

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in _ATTENTION:
            operands = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return self.context.attend(lambda: func(*args, **kwargs), operands["query"], operands["key"], operands["value"])
        for operand in _flat((args, kwargs)):
            if isinstance(operand, Tensor):
                self._adopt(operand)
        if func is F.linear and args:
            args = (self._cast_as_autocast_does(args[0]), *args[1:])
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._watch(out, func, args, kwargs)
        elif isinstance(out, tuple | list):
            for each in out:
                if isinstance(each, Tensor):
                    self._watch(each, None, args, kwargs)
        return out

    def _adopt(self, operand: Tensor) -> None:
        """Mark what no torch function returned: the output of an `autograd.Function`, or a tensor from before the context."""
        node = operand.grad_fn
        if node is not None and is_plain(operand) and self.context.known(operand) is None and not _made_of_parameters(node):
            self.context.mark(operand, "activation")

    def _cast_as_autocast_does(self, x: Tensor) -> Tensor:
        """Autocast would cast inside of the operation, and what it saved then would be a copy that nobody knows how to rebuild."""
        if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
            return x
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype in (dtype, torch.float64):
            return x
        cast = x.to(dtype)
        self._watch(cast, Tensor.to, (x, dtype), {})
        return cast

    def _watch(self, out: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not out.requires_grad or not is_plain(out) or self.context.known(out) is not None:
            return
        operands = [operand for operand in _flat((args, kwargs)) if isinstance(operand, Tensor)]
        parameters = [operand for operand in operands if self._is_parameter(operand)]
        # one that shares its storage: `weight.type_as(x)` of the same dtype, and views
        if len(parameters) == len(operands) or any(_share_storage(parameter, out) for parameter in parameters):
            self.context.mark(out, "parameter")
            return
        self.context.mark(out, "activation")
        if func in _REPLAYED:
            replay = self._replay(out, func, args, kwargs, operands)
            if replay is not None:
                self.context.offer(out, replay)

    def _is_parameter(self, tensor: Tensor) -> bool:
        found = self.context.known(tensor)
        return tensor.dim() == 0 or isinstance(tensor, torch.nn.Parameter) or (found is not None and found.kind == "parameter")

    def _replay(self, out: Tensor, func: Any, args: Any, kwargs: Any, operands: list[Tensor]) -> Callable[[], Tensor] | None:
        context = self.context
        if not any(context.rebuilds(operand) for operand in operands):
            return None
        for operand in operands:
            found = context.known(operand)
            held_anyway = found is not None and found.kind in HELD
            if not (held_anyway or context.rebuilds(operand) or operand.numel() * _SMALL <= out.numel()):
                return None

        def pack(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_leaf and not isinstance(value, torch.nn.Parameter):  # a buffer, small: its owner may write to it
                again = value.detach().clone()
                return lambda: again
            return context.pack(value)

        held = _map(pack, (args, kwargs))

        def replay() -> Tensor:
            again_args, again_kwargs = _map(lambda value: value() if callable(value) else value, held)
            again: Tensor = func(*again_args, **again_kwargs)
            return again.contiguous()

        return replay


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return is_plain(a) and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _made_of_parameters(node: Any) -> bool:
    """Whether all that flows into an autograd node are parameters; a graph of many nodes is taken for a model."""
    seen, pending = {node}, [node]
    while pending:
        node = pending.pop()
        # the nodes of leaves have a variable
        if hasattr(node, "variable") and not isinstance(node.variable, torch.nn.Parameter):
            return False
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        if len(seen) > _MOST_NODES:
            return False
        pending += new
    return True


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for each in value for leaf in _flat(each)]
    if isinstance(value, dict):
        return _flat(list(value.values()))
    return [value]


def _map(convert: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple | list):
        mapped = [_map(convert, each) for each in value]
        return mapped if isinstance(value, list) else tuple(mapped)
    if isinstance(value, dict):
        return {key: _map(convert, each) for key, each in value.items()}
    return convert(value)
