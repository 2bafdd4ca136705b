"""Linear layers that save their input in FP8, and may store a frozen weight in FP8."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._native import CoatWarning
from ..autograd import linear as fp8
from ..autograd.shared import quantize
from ..config import COATConfig
from ..ops.fp8_gemm import say_storage


class FP8Linear(nn.Linear):
    """`torch.nn.Linear` that saves its input in FP8 for the weight's gradient, or not at all while the weight is frozen.

    Names, parameters and state dictionary are those of `nn.Linear`, `isinstance(layer, nn.Linear)` holds and the class is *named*
    "Linear": that is how PEFT, ai-toolkit and sd-scripts find the layers that they adapt.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`.
        config: `COATConfig`: `activation_linear_granularity`; `frozen_weight_format` stores weights only in `from_linear`.

    A product runs in FP8 on GPUs that multiply it (compute capability 8.9 and later) and in the dtype of the activations elsewhere, where
    the forward pass is exactly that of `nn.Linear`. float64 is never compressed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        config: COATConfig | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.coat_config = config or COATConfig()

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: COATConfig | None = None) -> FP8Linear:
        """Turn an `nn.Linear` into an `FP8Linear` in place: the same object, parameters, hooks and names.

        With `config.frozen_weight_format` a weight that does not require a gradient is stored in FP8 from then on.

        Raises:
            TypeError: linear is no `nn.Linear`, or of a subclass of it, whose own forward pass would be lost.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear takes a torch.nn.Linear, got {type(linear).__module__}.{type(linear).__qualname__}")
        linear.__class__ = cls
        assert isinstance(linear, FP8Linear)
        linear.coat_config = config or COATConfig()
        if linear.coat_config.frozen_weight_format is not None and not linear.weight.requires_grad and linear.weight.numel():
            linear.store_weight()
        return linear

    def store_weight(self) -> None:
        """Keep the weight in e4m3 from now on, with one scale or one for each output channel (`frozen_weight_granularity`).

        Raises:
            RuntimeError: the weight requires a gradient.
        """
        if self.weight.requires_grad:
            raise RuntimeError("a weight that is trained cannot be stored in FP8: call layer.weight.requires_grad_(False) first")
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.__class__ = _StoredLinear
        assert isinstance(self, _StoredLinear)
        self.weight_dtype = weight.dtype
        self._take_weight(weight.detach())

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.coat_config.use_fp8_products:
            say_storage(input.device)
        return fp8.linear(input, self.weight, self.bias, **self._options)

    @property
    def _options(self) -> dict[str, bool]:
        config = self.coat_config
        return {"per_row": config.activation_linear_granularity == "per_row", "products": config.use_fp8_products}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8={self.coat_config.activation_linear_granularity}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight, scale = state_dict.get(prefix + "weight"), state_dict.pop(prefix + "weight_scale", None)
        if scale is not None and weight is not None:  # of a layer whose weight was stored in FP8
            wrong = _unfit(weight, scale, self.weight.shape, prefix)
            if wrong is not None:
                args[-1].append(wrong)
            state_dict[prefix + "weight"] = self.weight if wrong else fp8.decode(_codes(weight, scale), self.weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _codes(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return weight.detach().view(torch.uint8), scale.detach().float()


def _unfit(weight: Tensor, scale: Tensor, shape: torch.Size, prefix: str) -> str | None:
    """Why a dictionary's weight and weight_scale are not codes of a weight of this shape, if they are not."""
    if weight.shape != shape:
        return f"size mismatch for {prefix}weight: the dictionary has {tuple(weight.shape)}, the layer {tuple(shape)}"
    if weight.dtype not in (torch.float8_e4m3fn, torch.uint8):
        return (
            f"{prefix}weight is {weight.dtype} beside a {prefix}weight_scale: codes in float8_e4m3fn are needed. An adapter is merged into "
            "values, not into codes: layer.weight.data = layer.weight.data + delta; or leave weight_scale out if these are values"
        )
    if scale.shape not in ((), (1,), (shape[0], 1)):
        return f"size mismatch for {prefix}weight_scale: the dictionary has {tuple(scale.shape)}, needed is () or ({shape[0]}, 1)"
    return None


class _StoredLinear(FP8Linear):
    """An `FP8Linear` whose frozen weight is codes and a scale.

    Both are plain attributes: DDP would broadcast buffers in every forward pass, and casts of a module would reach the scale. In a state
    dictionary they are `weight` (float8_e4m3fn) and `weight_scale` (float32); dictionaries with a plain weight and no scale load, too.
    Assigning to `weight` makes the layer one with a plain weight again.

    Adapters are merged into `weight.data`, not into the dictionary: values beside a scale are refused, but codes that were cast to
    float, added to and cast back to float8_e4m3fn look like any others and load as the wrong weight.
    """

    weight_codes: Tensor  # uint8 [out_features, in_features]
    weight_scale: Tensor  # float32, 0-dim or [out_features, 1]
    weight_dtype: torch.dtype  # of decoded values

    def _take_weight(self, weight: Tensor) -> None:
        per_channel = self.coat_config.frozen_weight_granularity == "per_channel"
        values = weight if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else weight.float()
        self.weight_codes, self.weight_scale = quantize(values, "e4m3", per_channel)

    def _take_codes(self, codes: Tensor, scale: Tensor) -> None:
        codes, scale = _codes(codes, scale)
        device = self._device_for(codes)
        self.weight_codes = codes.to(device, copy=True)
        self.weight_scale = scale.to(device, copy=True).reshape(() if scale.numel() == 1 else scale.shape)

    def _device_for(self, incoming: Tensor) -> torch.device:
        """Of loaded values: the layer's, unless that is "meta", where there is nothing to load into."""
        return incoming.device if self.weight_codes.is_meta else self.weight_codes.device

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight, for reading; assigning to it or to its `data` stores a plain weight."""
        return _StoredWeight(self)

    def decoded_weight(self) -> Tensor:
        return fp8.decode((self.weight_codes, self.weight_scale), self.weight_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._unstore(value)
        else:
            super().__setattr__(name, value)

    def _unstore(self, weight: Tensor) -> None:
        warnings.warn(
            f"a weight that was stored in FP8 was written to: it is kept in {weight.dtype} from now on, since FP8 would round most of a "
            "merged adapter away",
            CoatWarning,
            stacklevel=4,
        )
        weight = weight.plain() if isinstance(weight, _Decoded) else weight
        for name in ("weight_codes", "weight_scale", "weight_dtype"):
            del self.__dict__[name]
        self.__class__ = FP8Linear  # type: ignore[assignment]
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), requires_grad=False)  # type: ignore[misc]

    def store_weight(self) -> None:
        """Nothing to do: it is stored."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.coat_config.use_fp8_products:
            say_storage(input.device)
        return fp8.stored_linear(input, self.weight_codes, self.weight_scale, self.bias, **self._options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight=e4m3 {self.coat_config.frozen_weight_granularity}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _StoredLinear:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)  # casts reach neither

        super()._apply(fn, recurse)
        self.weight_codes, self.weight_scale = moved(self.weight_codes), moved(self.weight_scale)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight_codes.view(torch.float8_e4m3fn)
        destination[prefix + "weight_scale"] = self.weight_scale
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, scale = state_dict.pop(prefix + "weight", None), state_dict.pop(prefix + "weight_scale", None)
        nn.Linear._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        shape = self.weight_codes.shape
        if weight is None:
            missing_keys.append(prefix + "weight")
        elif scale is not None:
            wrong = _unfit(weight, scale, shape, prefix)
            if wrong is None:
                self._take_codes(weight, scale)
            else:
                error_msgs.append(wrong)
        elif weight.shape != shape:
            error_msgs.append(f"size mismatch for {prefix}weight: the dictionary has {tuple(weight.shape)}, the layer {tuple(shape)}")
        elif not weight.is_floating_point():
            error_msgs.append(f"{prefix}weight is {weight.dtype} without a {prefix}weight_scale: codes need their scale, values are floats")
        else:
            self._take_weight(weight.detach().to(self._device_for(weight)))


_NO_WRITING = (
    "would change a weight that is stored in FP8; assign a new one (layer.weight.data = tensor), which the layer then keeps in the "
    "tensor's dtype, or change a copy (layer.weight.clone())"
)


class _Decoded(Tensor):
    """A stored weight's values, decoded: operations that would write to them, or to a view of them, raise, since the codes would stay.

    `weight.data += delta` assigns: Python adds out of place and hands the sum to the setter of `data`.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name: str = func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            first = args[0] if args else next(iter(kwargs.values()), None)
            in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
            written = [first if in_place else None, kwargs.get("out"), first if kwargs.get("inplace") else None]
            if any(isinstance(leaf, cls) for leaf in torch.utils._pytree.tree_leaves(written)):
                raise RuntimeError(f"{name} {_NO_WRITING}")
            out = func(*args, **kwargs)
            storages = {leaf.untyped_storage()._cdata for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls)}

        def guarded(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            with torch._C.DisableTorchFunctionSubclass():
                return value.as_subclass(cls if value.untyped_storage()._cdata in storages else Tensor)

        return type(out)(map(guarded, out)) if type(out) in (list, tuple) else guarded(out)

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
        return self.clone().__iadd__(other)

    def __isub__(self, other: Any) -> Any:  # type: ignore[misc]
        return self.clone().__isub__(other)

    def __imul__(self, other: Any) -> Any:  # type: ignore[misc]
        return self.clone().__imul__(other)

    def __itruediv__(self, other: Any) -> Any:  # type: ignore[misc]
        return self.clone().__itruediv__(other)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)


_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_"})


class _StoredWeight(Tensor):
    """The weight of a `_StoredLinear` as a tensor: shape, dtype and device at once, values decoded where an operation reads them."""

    _layer: _StoredLinear

    @staticmethod
    def __new__(cls, layer: _StoredLinear) -> _StoredWeight:
        codes = layer.weight_codes
        view = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=layer.weight_dtype, device=codes.device)
        view._layer = layer
        return view

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for each in func._schema.arguments:
            if each.alias_info is not None and each.alias_info.is_write and isinstance(given.get(each.name), cls):
                raise RuntimeError(f"{func} {_NO_WRITING}")

        def values(value: Any) -> Any:
            return value._layer.decoded_weight() if isinstance(value, cls) else value

        return func(*torch.utils._pytree.tree_map(values, args), **torch.utils._pytree.tree_map(values, kwargs or {}))

    @property
    def data(self) -> Tensor:
        """The decoded values, to read; writing to them raises, assigning to `data` stores a plain weight."""
        return self._layer.decoded_weight().as_subclass(_Decoded)

    @data.setter
    def data(self, value: Tensor) -> None:
        self._layer.weight = value  # type: ignore[misc]

    def detach(self) -> Tensor:
        return self.data

    def __setitem__(self, key: Any, value: Any) -> None:
        raise RuntimeError(f"item assignment {_NO_WRITING}")

    def requires_grad_(self, requires_grad: bool = True) -> _StoredWeight:
        if requires_grad:
            raise RuntimeError("a weight that is stored in FP8 cannot be trained; assign a plain one first (layer.weight.data = tensor)")
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"weight stored in FP8, decoded:\n{self._layer.decoded_weight()}"


# The name by which trainers know the layers; pickle finds the classes by their qualified names.
FP8Linear.__name__ = _StoredLinear.__name__ = "Linear"
