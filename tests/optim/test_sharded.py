"""FP8AdamW under FSDP2, in real processes over gloo on loopback."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from coat_kernels.optim import FP8AdamW

GROUP = 128


def build() -> nn.Module:
    torch.manual_seed(0)
    # rows of 128 and 256: every shard boundary is a group boundary; the bias is too short to be quantized
    return nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 128, bias=False))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    model = build()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = FP8AdamW(model.parameters(), lr=1e-2, min_quant_numel=10_000)
    train(model, optimizer)
    with pytest.raises(RuntimeError, match="cannot save the state of sharded"):
        optimizer.state_dict()
    quantized = [optimizer.state[p]["exp_avg"].dtype == torch.uint8 for p in model.parameters()]
    full = [p.full_tensor().detach() for p in model.parameters()]
    if rank == 0:
        torch.save({"full": full, "quantized": quantized}, Path(folder) / "sharded.pt")
    # Both ranks are done; leaving without gloo's destructors, one of which ended a rank in std::terminate once in seven runs.
    dist.barrier()
    os._exit(0)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "sharded.pt")
    model = build()
    train(model, FP8AdamW(model.parameters(), lr=1e-2, min_quant_numel=10_000))
    # 96 x 128 = 12,288 elements count globally; a shard alone, 6,144, would have stayed in float32
    assert sharded["quantized"] == [True, False, True]
    for got, want in zip(sharded["full"], model.parameters(), strict=True):
        # gradients are averaged over two equal ranks: equal but for the order of sums
        assert torch.allclose(got, want, atol=2e-5)
