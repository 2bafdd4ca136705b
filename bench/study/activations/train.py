"""One run of the study, and what is measured in it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from coat_train.memory import LiveStorages
from torch import Tensor, nn

from ..family.train import fit
from ..family.works import Batch, Work
from . import forms
from .works import WORKS

#: At how many steps of a run the gradients are compared with the plain twin's.
COMPARISONS = 6
#: A parameter with less than this share of the squared gradient has none but by rounding: a LoRA's A before its B moves.
NO_GRADIENT = 1e-12


def case(work: Work, form: str, lr: float, seed: int) -> dict:
    """What one run is asked for, as plain values; decides whether a recorded row is the one."""
    return {"work": work.name, "form": form, "lr": lr, "seed": seed, "recipe": asdict(work)}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def sqnr(reference: dict[str, Tensor], measured: dict[str, Tensor]) -> dict:
    """10 log10(sum of reference^2 / sum of (measured - reference)^2), in dB.

    Returns:
        all: over all parameters together; worst: of the parameter that has the lowest, and its name.

    Raises:
        ValueError: the two do not hold gradients of the same parameters.
    """
    if reference.keys() != measured.keys():
        raise ValueError(f"gradients of different parameters: {sorted(reference.keys() ^ measured.keys())} have only one")
    signal = {name: grad.double().square().sum().item() for name, grad in reference.items()}
    noise = {name: (measured[name].double() - grad.double()).square().sum().item() for name, grad in reference.items()}
    total = sum(signal.values())
    each = {name: decibel(signal[name], noise[name]) for name in signal if signal[name] > NO_GRADIENT * total}
    worst = min(each, key=each.__getitem__)
    return {"all": decibel(total, sum(noise.values())), "worst": each[worst], "worst_parameter": worst}


def decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf


def saved_bytes(forward: Callable[[], Tensor]) -> dict[str, int]:
    """What a forward pass leaves behind for the backward pass: bytes, and how many of them hold 8-bit elements."""
    with LiveStorages() as live:
        loss = forward()
    alive = live.alive(but=(loss,))
    eight = sum(size for name, size in alive.items() if name.rpartition(" ")[2] in ("uint8", "int8", "float8_e4m3fn", "float8_e5m2"))
    return {"saved_bytes": sum(alive.values()), "saved_bytes_in_8_bits": eight}


def run(asked: dict) -> dict:
    """Train once; weights and batches depend on the seed alone.

    Returns:
        What `fit` returns; `saved_bytes` of one forward pass; SQNR of gradients as [step, ...] against a plain network with the same
        weights and the same batch, none for the float32 form, which is that network.
    """
    work, form, seed = WORKS[asked["work"]](**asked["recipe"]), asked["form"], asked["seed"]
    torch.manual_seed(seed)
    network = work.build()
    twin = copy.deepcopy(network)
    forms.convert(network, form)
    optimizer = forms.optimizer(network, form, asked["lr"], work.weight_decay)
    batch = work.batch(work.load()[0], torch.Generator().manual_seed(seed))
    saved = saved_bytes(lambda: work.loss(network, batch))
    compare_at = {int(work.steps * (i + 0.5) / COMPARISONS) for i in range(COMPARISONS)} if form != forms.FLOAT32 else set()
    compared: list[dict] = []

    def observe(step: int, batch: Batch) -> None:
        if step in compare_at:
            compared.append({"step": step, **sqnr(twin_gradients(twin, network, work, batch), gradients(network))})

    began = time.perf_counter()
    fitted = fit(work, network, [optimizer], asked["lr"], seed, observe)
    return {**fitted, **saved, "sqnr": compared, "seconds": time.perf_counter() - began}


def twin_gradients(twin: nn.Module, network: nn.Module, work: Work, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the plain twin with the network's weights."""
    with torch.no_grad():
        weights = dict(network.named_parameters())
        for name, parameter in twin.named_parameters():
            parameter.copy_(weights[name])
    twin.zero_grad(set_to_none=True)
    work.loss(twin, batch).backward()
    return gradients(twin)
