"""Forward passes for transformers' gated feed-forward layers and activation modules; transformers is never imported."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..autograd.activation import gated, geglu, swiglu
from ..config import COATConfig
from ._swap import Saving8Bit, Unconvertible, swap
from .activation import GELUForward, SiLUForward
from .norm import path_of

#: Activation module -> the kind of function it computes.
ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
}


class GatedMLP(Saving8Bit):
    """down_proj(act(gate_proj(x)) · up_proj(x))"""

    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]
    coat_kind: str

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.coat_kind == "silu":
            return self.down_proj(swiglu(gate, up, **self._format))
        return self.down_proj(geglu(gate, up, "tanh" if self.coat_kind == "gelu_tanh" else "none", **self._format))


class PackedMLP(Saving8Bit):
    """down_proj(act(gate) · up) of the halves of gate_up_proj(x)"""

    gate_up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]
    coat_kind: str

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_up_proj(hidden_states), self.coat_kind, gate_first=True, **self._format))


Convert = Callable[[nn.Module, COATConfig], str]


def _mlp(forward: type[Saving8Bit], activation: str) -> Convert:
    def convert(module: nn.Module, config: COATConfig) -> str:
        kind = ACTIVATIONS.get(path_of(type(getattr(module, activation))))
        if kind is None:
            raise Unconvertible(f"its activation function is {path_of(type(getattr(module, activation)))}")
        swap(module, forward, config)
        module.coat_kind = kind  # type: ignore[assignment]
        return "8-bit gated MLP"

    return convert


def _activation(kind: str) -> Convert:
    def convert(module: nn.Module, config: COATConfig) -> str:
        swap(module, SiLUForward if kind == "silu" else GELUForward, config)
        if kind != "silu":
            module.coat_approximate = "tanh" if kind == "gelu_tanh" else "none"  # type: ignore[assignment]
        return "8-bit activation function"

    return convert


_GATED = (
    *(("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")),
    *(("gemma", "Gemma"), ("gemma2", "Gemma2"), ("gemma3", "Gemma3")),
)

#: Class -> what converts it, and the children that it then does not call.
MODULES: dict[str, tuple[Convert, tuple[str, ...]]] = {
    **{f"transformers.models.{model}.modeling_{model}.{name}MLP": (_mlp(GatedMLP, "act_fn"), ("act_fn",)) for model, name in _GATED},
    "transformers.models.phi3.modeling_phi3.Phi3MLP": (_mlp(PackedMLP, "activation_fn"), ("activation_fn",)),
    **{path: (_activation(kind), ()) for path, kind in ACTIVATIONS.items() if path.startswith("transformers.")},
}
