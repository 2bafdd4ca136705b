"""Gradients as an optimizer met them, step by step: of two trainings, and synthetic ones as a control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..study.data import split, text
from ..study.model import ByteLanguageModel
from ..study.optimizers import REFERENCE
from ..study.train import Recipe, run

#: Pieces are cut and padded to multiples of this, the largest group: groups are those of the tensor itself.
ALIGNMENT = 256


@dataclass(frozen=True)
class Piece:
    """A contiguous run of one tensor's elements in row-major order.

    Args:
        name: of the tensor.
        start, length: the run; `start` a multiple of `ALIGNMENT`. It ends with the tensor where the tensor is shorter.
    """

    name: str
    start: int = 0
    length: int = 1 << 62

    def cut(self, tensor: Tensor) -> Tensor:
        """The run, float32, padded with zeros to a multiple of `ALIGNMENT`: no codec counts a zero, and no update comes of it."""
        run = tensor.detach().reshape(-1)[self.start : self.start + self.length].to(torch.float32)
        padded = run.new_zeros(-(-run.numel() // ALIGNMENT) * ALIGNMENT)
        padded[: run.numel()] = run
        return padded


@dataclass(frozen=True)
class Recording:
    """The gradients of one training.

    Args:
        name: how rows call it.
        what: one line for the page.
        grads: float32 [steps, elements], clipped as the optimizer saw them.
    """

    name: str
    what: str
    grads: Tensor

    def row(self) -> dict:
        """What the rows say of it."""
        steps, elements = self.grads.shape
        return {"kind": "recording", "recording": self.name, "what": self.what, "steps": steps, "elements": elements}


@contextmanager
def recording(names: Sequence[str], pieces: Sequence[Piece]) -> Iterator[list[Tensor]]:
    """Collects the pieces' gradients before every step that any optimizer makes meanwhile.

    Args:
        names: of the optimizer's parameters, in its order.
        pieces: what to keep of them.

    Yields:
        the list to which each step adds one tensor [elements].
    """
    steps: list[Tensor] = []

    def record(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in zip(names, params, strict=True)}
        steps.append(torch.cat([piece.cut(grads[piece.name]) for piece in pieces]))

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield steps
    finally:
        hook.remove()


def _language_pieces(width: int) -> list[Piece]:
    """Rows of every kind of tensor; rows of rare bytes, blank and punctuation, and letters of what has a row a byte."""

    def rows(name: str, first: int, count: int, length: int = width) -> Piece:
        return Piece(name, first * length, count * length)

    return [
        rows("embed.weight", 24, 16),
        rows("embed.weight", 96, 8),
        rows("position", 0, 8),
        Piece("blocks.0.norm1.weight"),
        rows("blocks.0.qkv.weight", 0, 8),
        rows("blocks.0.up.weight", 32, 8),
        rows("blocks.1.out.weight", 0, 8),
        rows("blocks.1.down.weight", 16, 2, 4 * width),
        Piece("blocks.2.up.bias"),
        rows("head.weight", 24, 8),
        rows("head.weight", 96, 8),
    ]


def _language_model(name: str, what: str, width: int, steps: int) -> Recording:
    recipe = replace(Recipe(), steps=steps, width=width)
    with torch.device("meta"):
        names = [name for name, _ in ByteLanguageModel(recipe.width, recipe.layers, length=recipe.length).named_parameters()]
    with recording(names, _language_pieces(width)) as grads:
        run(recipe, REFERENCE, 0, 0.999, *split(text()))
    return Recording(name, what, torch.stack(grads))


def language(steps: int = 800) -> Recording:
    """The study's byte-level transformer, 128 wide as models' widths are multiples of it, under float32 AdamW with beta2 = 0.999."""
    what = "the byte-level transformer of `bench/study`, 128 wide: embeddings, attention, MLP, biases, norms"
    return _language_model("language", what, 128, steps)


def straddling(steps: int = 400) -> Recording:
    """The same 96 wide: a group of 64 or more holds parts of two rows, which an embedding may keep many octaves apart."""
    return _language_model("straddling", "the same, 96 wide: groups of 64 and more straddle the rows of embeddings", 96, steps)


def _lora_pieces(names: Sequence[str]) -> list[Piece]:
    """A and B of layers at the model's start, middle and end."""
    layers = (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.2",
        "single_transformer_blocks.1.attn.to_k",
        "single_transformer_blocks.3.proj_out",
    )
    return [Piece(name, length=1024) for name in names if name.partition(".lora_")[0] in layers]


def lora(base_steps: int = 400, steps: int = 500) -> Recording:
    """The demo's LoRA on its small FLUX under float32 AdamW; the base model is trained before, unrecorded."""
    from coat_train.comparison import LORA_LR, WEIGHT_DECAY, Settings, train_base
    from coat_train.data import ImageClasses
    from coat_train.model import Prompts, add_lora
    from coat_train.training import Run, train

    settings = Settings(Path(), base_steps=base_steps, lora_steps=steps)
    classes = ImageClasses.load(settings.seed)
    prompts = Prompts.random(len(classes.names), settings.seed, torch.device("cpu"))

    def ignore(losses: list[float]) -> None:
        pass

    transformer = train_base(settings, classes, prompts, ignore).transformer
    params = add_lora(transformer, settings.seed)
    names = [name for name, p in transformer.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LORA_LR, weight_decay=WEIGHT_DECAY, fused=True)
    held_out, batch = [classes.held_out], settings.batch_size
    with recording(names, _lora_pieces(names)) as grads:
        runs = [Run("recorded", transformer, params, optimizer)]
        train(runs, classes, held_out, prompts, steps=steps, batch_size=batch, seed=settings.seed + 1, on_step=ignore)
    return Recording("lora", "the LoRA of `coat demo` on its small FLUX: A and B of four layers", torch.stack(grads))


def synthetic(steps: int = 300, elements: int = 8192) -> Recording:
    """A control: scales log-normal over rows of 64, columns and elements, heavy-tailed noise in time (a product of two normals)."""
    generator = torch.Generator().manual_seed(0)
    rows = (1.5 * torch.randn(elements // 64, 1, generator=generator)).exp()
    columns = (1.0 * torch.randn(1, 64, generator=generator)).exp()
    scale = (rows * columns).reshape(-1) * (0.7 * torch.randn(elements, generator=generator)).exp() * 1e-3
    noise = torch.randn(steps, elements, generator=generator) * torch.randn(steps, elements, generator=generator)
    return Recording("synthetic", "independent heavy-tailed noise, log-normal scales", scale * (noise + 0.1 * noise[:1]))
