"""Converted models under DDP and FSDP2, in two processes over gloo on loopback."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8LayerNorm, convert_to_coat
from tests.accuracy import sqnr

BATCH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x):
        return x + self.frozen(self.down(self.act(self.up(self.norm(x)))))


def build() -> nn.Module:
    torch.manual_seed(0)
    return convert_to_coat(nn.Sequential(Block(), Block()), COATConfig(frozen_weight_format="e4m3"))


def batch(rank: int) -> torch.Tensor:
    return torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(rank))


def backward_twice(model: nn.Module, *ranks: int) -> None:
    """The mean over the ranks' batches, accumulated over two micro-batches."""
    for micro in range(2):
        for rank in ranks:
            (model(batch(rank) + micro).square().mean() / len(ranks)).backward()


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = build()
    replicated = DistributedDataParallel(copy.deepcopy(model))
    backward_twice(replicated, rank)
    found = {"ddp": {name: p.grad for name, p in replicated.module.named_parameters()}}
    for block in model:
        fully_shard(block)
    fully_shard(model)
    assert isinstance(model[0].norm, FP8LayerNorm)
    backward_twice(model, rank)
    found["fsdp2"] = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        torch.save(found, Path(folder) / "grads.pt")
    dist.barrier()
    os._exit(0)  # gloo's destructors may end a rank in std::terminate


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "grads.pt")
    model = build()
    backward_twice(model, 0, 1)
    want = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for kind in ("ddp", "fsdp2"):
        grads = {name: grad for name, grad in found[kind].items() if grad is not None}
        assert grads.keys() == want.keys()
        assert sqnr(want.values(), grads.values()) > 100  # the same 8 bits in either; sums in another order
