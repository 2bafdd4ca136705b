"""`COATTrainer`: an optimizer with 8-bit states, a model that saves its activations in 8 bits, and a step that logs its memory."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from coat_kernels import BackendUnavailable, CoatWarning
from coat_kernels.backends import require_backend
from coat_kernels.config import COATConfig
from coat_kernels.nn import MemoryEfficientCheckpoint, convert_to_coat
from coat_kernels.optim import FP8AdamW

from .memory import MemoryLog, to_stdout

LEARNING_RATE = 1e-4
#: Ops without which a device has no FP8 here: the optimizer's step and the activations' codes.
_NEEDED = ("adamw_fp8", "activation_quant")
_LossFunction = Callable[[nn.Module, Any], Tensor]


class COATTrainer:
    """What COAT (arXiv 2410.19313) does for a training loop of one's own.

    ```python
    trainer = COATTrainer(COATConfig())
    model = trainer.prepare_model(model)
    optimizer = trainer.create_optimizer(model.parameters(), lr=1e-4)
    for step, batch in enumerate(batches):
        loss = trainer.training_step(model, batch, optimizer, step)["loss"]
    ```

    Args:
        config: `COATConfig`; default `COATConfig()`.
        learning_rate: of `create_optimizer`, where that is given none.
        log: gets each line of the memory log; the default writes to standard output.

    On a device for which the package has no kernels (a GPU without Triton, or neither CPU nor CUDA) training goes on without FP8:
    `torch.optim.AdamW`, an unconverted model, and a forward pass under bfloat16 autocast. A `CoatWarning` says so, once a device.

    Raises:
        TypeError: config is no `COATConfig`.
    """

    def __init__(
        self, config: COATConfig | None = None, *, learning_rate: float = LEARNING_RATE, log: Callable[[str], None] = to_stdout
    ) -> None:
        if config is not None and not isinstance(config, COATConfig):
            raise TypeError(f"config must be a COATConfig, got {type(config).__name__}: COATConfig() has the defaults")
        self.config = config or COATConfig()
        self.learning_rate = learning_rate
        self.memory = MemoryLog(log)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def create_optimizer(self, model_params: Any, lr: float | Tensor | None = None, **optimizer_kwargs: Any) -> torch.optim.Optimizer:
        """`FP8AdamW`, or `torch.optim.AdamW` with `use_fp8_optimizer=False`.

        Args:
            model_params: parameters, named parameters or param groups. The frozen ones may be among them; they get no state.
            lr: learning rate; None: the trainer's, 1e-4 unless told otherwise.
            optimizer_kwargs: of the class. FP8AdamW's `min_quant_numel` (4096 elements: smaller tensors keep float32 moments) and
                `param_rounding` are worth a look.

        Raises:
            TypeError: an argument that the class does not have.
        """
        params = model_params if isinstance(model_params, Tensor) else list(model_params)
        lr = self.learning_rate if lr is None else lr
        device = _device_of(params)
        if self.config.use_fp8_optimizer and (device is None or _has_fp8(device)):
            return FP8AdamW(params, lr=lr, fp8_config=self.config.to_fp8_quant_config(), **optimizer_kwargs)
        ours = set(optimizer_kwargs) - set(inspect.signature(torch.optim.AdamW).parameters)
        if ours:
            why = "there is no FP8 on this device" if self.config.use_fp8_optimizer else "use_fp8_optimizer=False"
            raise TypeError(f"{why}, so create_optimizer makes a torch.optim.AdamW, which has no {', '.join(sorted(ours))}: leave it out")
        return torch.optim.AdamW(params, lr=lr, **optimizer_kwargs)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Convert a model in place by the configuration and return it; before or after LoRA is put on it.

        With `use_fp8_activation` its modules save 8 bits (`convert_to_coat`; `coat_kernels.nn.conversion_report(model)` says which).
        With `enable_memory_efficient_checkpoint`, models of diffusers and transformers recompute their blocks in the backward pass from
        inputs kept in 8 bits; other models have no blocks that a trainer would know: call `MemoryEfficientCheckpoint` in them.
        """
        self.device = _device_of(model.parameters()) or self.device
        fp8 = self.config.use_fp8_activation and _has_fp8(self.device)
        if fp8:
            convert_to_coat(model, self.config)
        if self.config.enable_memory_efficient_checkpoint:
            enable_checkpointing(model, fp8, self.config)
        return model

    def training_step(
        self, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, step: int, *, loss_fn: _LossFunction | None = None
    ) -> dict[str, float]:
        """One step: forward, backward and `optimizer.step()`, with a line of the memory log before, between and after them.

        Gradients of earlier steps are dropped first and this step's stay, to be looked at, until the next one.

        Args:
            model: called as `model(**batch)`, or with `*batch` for a sequence and `batch` for anything else.
            batch: on the model's device.
            step: for the log.
            loss_fn: `loss_fn(model, batch)` for a model that does not return a loss itself.

        Returns:
            `{"loss": ...}`

        Raises:
            TypeError: no loss is found in what the model returns: neither `.loss`, nor `["loss"]`, nor one number, alone or
                first in a tuple.
        """
        self.device = _device_of(model.parameters()) or self.device
        optimizer.zero_grad()
        self.log_memory(step, "before_forward")
        with nullcontext() if _has_fp8(self.device) else torch.autocast(self.device.type, torch.bfloat16):
            loss = _loss_of(_call(model, batch)) if loss_fn is None else loss_fn(model, batch)
        self.log_memory(step, "after_forward")
        loss.backward()
        self.log_memory(step, "after_backward")
        optimizer.step()
        self.log_memory(step, "after_optimizer_step")
        return {"loss": loss.item()}

    def log_memory(self, step: int, phase: str = "") -> None:
        """Write `[phase] Step N: Allocated: x.xxGB, Reserved: x.xxGB`; nothing with `log_memory_stats=False`.

        On a GPU these are torch's allocator's numbers; on a CPU, where torch counts nothing, both are the process's resident set.
        """
        if self.config.log_memory_stats:
            self.memory.sample(self.device, step, phase)

    def get_memory_report(self) -> dict[str, Any]:
        """Largest and mean of the logged samples: `peak_allocated_gb`, `peak_reserved_gb`, `avg_allocated_gb`, `avg_reserved_gb`,
        `total_samples` and `source`, which says what was measured. GB are 2^30 bytes. Empty if nothing was logged.
        """
        return self.memory.report()


def create_coat_trainer_for_flux_lora(
    learning_rate: float = LEARNING_RATE, enable_fp8_optimizer: bool = True, enable_fp8_activation: bool = True, **kwargs: Any
) -> COATTrainer:
    """A `COATTrainer` for a LoRA on FLUX.

    Args:
        learning_rate: what the trainer's `create_optimizer` takes where it is given none.
        enable_fp8_optimizer, enable_fp8_activation: `use_fp8_optimizer` and `use_fp8_activation` of `COATConfig`.
        kwargs: other fields of `COATConfig`.
    """
    config = COATConfig(use_fp8_optimizer=enable_fp8_optimizer, use_fp8_activation=enable_fp8_activation, **kwargs)
    return COATTrainer(config, learning_rate=learning_rate)


#: What switches checkpointing on in models of diffusers and transformers, and where they say that they have it.
_CHECKPOINTING = (
    ("enable_gradient_checkpointing", "_supports_gradient_checkpointing"),
    ("activation_checkpointing_enable", "supports_gradient_checkpointing"),
    ("gradient_checkpointing_enable", "supports_gradient_checkpointing"),
)


def enable_checkpointing(model: nn.Module, fp8: bool, config: COATConfig) -> None:
    """Make a diffusers or transformers model recompute its blocks from inputs kept in 8 bits, or as they are without `fp8`.

    Other models stay as they are. transformers' models recompute in training mode alone (`model.train()`).
    """
    offered = [name for name, flag in _CHECKPOINTING if hasattr(model, name) and getattr(model, flag, False)]
    if not offered:
        return
    getattr(model, offered[0])()
    fmt, group_size = config.activation_format, config.activation_group_size
    recompute = partial(MemoryEfficientCheckpoint.checkpoint, use_fp8=fp8, fmt=fmt, group_size=group_size)
    # both libraries keep the function on each module that has blocks, under one name
    for module in model.modules():
        if getattr(module, "_gradient_checkpointing_func", None) is not None:
            module._gradient_checkpointing_func = recompute


def _device_of(params: Iterable[Any]) -> torch.device | None:
    """Device of the first tensor among parameters, (name, parameter) pairs or param groups."""
    for each in params:
        if isinstance(each, Tensor):
            return each.device
        if not isinstance(each, str) and (found := _device_of([each["params"]] if isinstance(each, Mapping) else each)) is not None:
            return found
    return None


@cache
def _has_fp8(device: torch.device) -> bool:
    """Whether the package has kernels for a device; says once what happens if not."""
    try:
        for op in _NEEDED:
            require_backend(op, device)
    except BackendUnavailable as error:
        warnings.warn(
            f"no FP8 on {device}, training goes on in bfloat16 without it: torch.optim.AdamW, unconverted models, autocast ({error})",
            CoatWarning,
            stacklevel=3,
        )
        return False
    return True


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def _loss_of(outputs: Any) -> Tensor:
    if isinstance(outputs, list | tuple) and outputs and not hasattr(outputs, "loss"):
        outputs = outputs[0]  # where transformers put it with return_dict=False
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", outputs)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(outputs).__name__}"
        raise TypeError(
            f"the model returned {got} and no loss; training_step needs one number, `.loss` or ['loss'], or "
            "loss_fn=lambda model, batch: ..."
        )
    return loss
