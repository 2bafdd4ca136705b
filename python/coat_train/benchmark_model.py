"""The transformer that `benchmark_coat.py` trains, and what it learns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64
#: Batches that the training cycles through.
POOL = 4


class Block(nn.Module):
    """A pre-norm transformer block, of torch's own modules."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.heads = max(1, hidden_size // HEAD_DIM)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(self.act(self.up(self.norm2(x))))


class BenchmarkModel(nn.Module):
    """`num_layers` blocks and a linear layer that starts at zero; returns the mean squared error.

    Args:
        hidden_size: a multiple of 64, or less than 64.
        num_layers: blocks.
        seed: of the weights.
    """

    def __init__(self, hidden_size: int, num_layers: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block(hidden_size) for _ in range(num_layers))
            self.norm = nn.LayerNorm(hidden_size)
            self.head = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """x and target [B, T, hidden_size]; the loss is one float32 number."""
        for block in self.blocks:
            x = block(x)
        return F.mse_loss(self.head(self.norm(x)).float(), target.float())


def make_batches(hidden_size: int, batch_size: int, seq_len: int, seed: int, device: torch.device) -> list[dict[str, Tensor]]:
    """`POOL` batches of normal tokens whose target is a fixed linear map of the token before, so that a model has something to learn.

    Returns:
        [{"x": ..., "target": ...}], float32 [batch_size, seq_len, hidden_size]; the loss of an untrained model is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(hidden_size, hidden_size, generator=generator) / hidden_size**0.5
    batches = []
    for _ in range(POOL):
        x = torch.randn(batch_size, seq_len, hidden_size, generator=generator)
        batches.append({"x": x.to(device), "target": (x.roll(1, dims=1) @ mix).to(device)})
    return batches
