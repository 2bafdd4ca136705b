"""What is rebuilt, packed and kept of the tensors that autograd saves, and that gradients stay right."""

from __future__ import annotations

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from coat_train.memory import LiveStorages
from torch import nn

from coat_kernels.autograd import saved
from coat_kernels.autograd.saved import compress_saved_activations
from coat_kernels.config import COATConfig
from coat_kernels.nn import FP8Linear
from tests.accuracy import sqnr

WIDTH, ROWS = 128, 64


class Offered(torch.autograd.Function):
    """tanh, whose output can be rebuilt from codes that are kept for its own backward pass."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        codes, scale = torch.ops.coat_kernels.quantize_activation(y, "int8", 128)
        ctx.save_for_backward(codes, scale)
        ctx.mark_non_differentiable(codes, scale)
        return y, codes, scale

    @staticmethod
    def backward(ctx, dy, *_):
        y = torch.ops.coat_kernels.dequantize_activation(*ctx.saved_tensors, "int8", 128, dy.dtype)
        return dy * (1 - y * y)


def offered_tanh(x):
    y, codes, scale = Offered.apply(x)
    saved.offer(y, lambda: torch.ops.coat_kernels.dequantize_activation(codes, scale, "int8", 128, x.dtype))
    return y


class Attention(nn.Module):
    def __init__(self, width=WIDTH, heads=2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def saved_bytes(run) -> tuple[torch.Tensor, dict[str, int]]:
    with LiveStorages() as live:
        out = run()
    return out, live.alive((out,))


@pytest.fixture
def x():
    return torch.randn(4, ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def test_an_activation_is_packed_once_however_often_it_is_saved(x):
    readers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    first = nn.Linear(WIDTH, WIDTH)
    with compress_saved_activations() as context:
        h = first(x)
        out = sum(reader(h).sum() for reader in readers)
    assert context.tally.packed == 3
    assert context.tally.bytes_before == h.nbytes
    out.backward()
    assert sqnr(out.new_ones(4 * ROWS, WIDTH).T @ h.flatten(0, 1), readers[0].weight.grad) > 30


def test_what_can_be_rebuilt_costs_nothing_and_its_casts_copies_and_modulations_neither(x):
    x.requires_grad_()
    readers = [nn.Linear(WIDTH, 16, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    scale, shift = torch.randn(4, 1, WIDTH), torch.randn(4, 1, WIDTH)

    def run():
        with compress_saved_activations() as context:
            y = offered_tanh(x)
            modulated = y * (1 + scale) + shift
            both = torch.cat([y, modulated.contiguous()], dim=1)
            out = readers[0](y).sum() + readers[1](y.to(torch.bfloat16)).float().sum() + readers[2](both).sum()
            out = out + readers[0](modulated).sum()
        assert context.tally.packed == 0
        return out

    out, alive = saved_bytes(run)
    large = {name: size for name, size in alive.items() if size > 4096}
    assert sum(large.values()) == x.numel(), alive  # one byte an element, nothing else
    out.backward()
    with torch.no_grad():
        y = x.tanh()
        both = torch.cat([y, y * (1 + scale) + shift], dim=1)
    assert sqnr(both.flatten(0, 1).sum(0).expand(16, -1), readers[2].weight.grad) > 40
    assert sqnr(y.flatten(0, 1).sum(0).expand(16, -1), readers[1].weight.grad) > 30


def test_linears_under_autocast_read_a_cast_that_is_rebuilt(x):
    x.requires_grad_()
    reader = nn.Linear(WIDTH, WIDTH)
    expected = torch.autograd.grad(reader(x.tanh()).square().sum(), reader.weight)[0]

    def run():
        with compress_saved_activations(), torch.autocast("cpu", torch.bfloat16):
            return reader(offered_tanh(x)).float().square().sum()

    out, alive = saved_bytes(run)
    weight = 2 * WIDTH * WIDTH  # autocast's copy
    assert sum(size for size in alive.values() if size > 2048) <= x.numel() + weight + 2 * x.numel(), alive
    assert sqnr(expected, torch.autograd.grad(out, reader.weight)[0]) > 30


def test_a_change_in_place_ends_what_was_known(x):
    x.requires_grad_()
    reader = nn.Linear(WIDTH, 16)
    with compress_saved_activations(unregistered="keep"):
        y = offered_tanh(x)
        with torch.no_grad():
            y.add_(1)
        assert not saved.can_rebuild(y)
        out = reader(y).sum()
    out.backward()
    assert sqnr(y.flatten(0, 1).sum(0).expand(16, -1), reader.weight.grad) > 100


def test_a_kept_tensor_changed_in_place_is_noticed_as_autograd_does(x):
    small = torch.randn(3, 3, requires_grad=True)
    with compress_saved_activations():
        h = small * 2
        out = h.square().sum()
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        out.backward()


@pytest.mark.parametrize("attention_format", [None, "int8"])
def test_attention_is_kept_unless_asked(x, attention_format):
    torch.manual_seed(0)
    model = Attention()
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    context = compress_saved_activations(COATConfig(attention_format=attention_format))

    def run():
        with context:
            return model(x)

    out, alive = saved_bytes(run)
    full = x.nbytes
    large = {name: size for name, size in alive.items() if size >= x.numel()}
    if attention_format is None:
        assert sum(large.values()) == 4 * full, large  # q, k, v and the output; to_out's input is the output
    else:
        codes = 4 * x.numel()
        assert codes <= sum(large.values()) <= codes + 4 * x.numel() // 8, large  # groups of 32: a float32 scale each
    actual = torch.autograd.grad(out.square().sum(), model.parameters())
    assert min(sqnr(a, b) for a, b in zip(expected, actual, strict=True)) > (100 if attention_format is None else 30)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def test_the_output_of_a_function_of_somebody_else_is_an_activation(x):
    h, weight = x.clone().requires_grad_(), nn.Parameter(torch.randn(WIDTH, WIDTH))
    with compress_saved_activations() as context:
        F.silu(Doubled.apply(h * 1.0)).sum()
    assert context.tally.packed == 1
    with compress_saved_activations() as context:
        F.linear(x, Doubled.apply(weight)).sum()  # fake quantization and the like: made of parameters alone
    assert context.tally.packed == 0


def test_the_input_of_a_function_after_a_converted_linear_is_packed(x):
    for linear in (nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH).requires_grad_(False)):
        layer = FP8Linear.from_linear(linear, COATConfig(frozen_weight_format="e4m3"))
        with compress_saved_activations() as context:
            F.silu(layer(x.clone().requires_grad_() * 1.0)).sum()
        assert context.tally.bytes_before >= x.nbytes


def test_parameters_and_what_is_made_of_them_are_kept(x):
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    frozen = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
    lora_a, lora_b = nn.Parameter(torch.randn(16, WIDTH)), nn.Parameter(torch.randn(WIDTH, 16))
    h = x.clone().requires_grad_()
    with compress_saved_activations() as context:
        merged = frozen + lora_b @ lora_a + weight.t().contiguous() * 2
        out = F.linear(h * 1.0, merged)
    assert context.tally.packed == 1  # the input; not the merged weight
    out.sum().backward()
    assert sqnr(merged.sum(0).expand_as(x), h.grad) > 100


@pytest.mark.parametrize(
    "cast", [lambda w, h: w.type_as(h), lambda w, h: w.to(h), lambda w, h: w.view(-1).view_as(w)], ids=["type_as", "to", "view"]
)
def test_a_cast_that_returns_the_parameter_makes_no_activation_of_it(x, cast):
    weight, h = nn.Parameter(torch.randn(WIDTH, WIDTH)), x.clone().requires_grad_()
    with compress_saved_activations():
        out = F.linear(h * 1.0, cast(weight, h))
    out.sum().backward()
    assert sqnr(weight.detach().sum(0).expand_as(x), h.grad) > 100


def test_weights_merged_before_the_context_are_kept(x):
    weight, h = nn.Parameter(torch.randn(WIDTH, WIDTH)), x.clone().requires_grad_()
    merged = (weight.t() * 2).contiguous()
    with compress_saved_activations():
        out = F.linear(h * 1.0, merged)
    out.sum().backward()
    assert sqnr(2 * weight.detach().sum(1).expand_as(x), h.grad) > 100


@pytest.mark.parametrize("activation", [torch.relu, torch.sigmoid, torch.tanh])
def test_an_output_that_an_operation_keeps_is_not_packed_for_its_reader_too(x, activation):
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    _, plain_alive = saved_bytes(lambda: second(activation(first(x))))

    def compressed():
        with compress_saved_activations():
            return second(activation(first(x)))

    _, alive = saved_bytes(compressed)
    assert sum(alive.values()) <= sum(plain_alive.values()), alive


def test_codes_do_not_pile_up_in_a_long_context(x):
    model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
    with LiveStorages() as live, compress_saved_activations() as context:
        for _ in range(60):
            model(x).sum().backward()
    codes = sum(size for name, size in live.alive().items() if name.startswith("quantize"))
    assert codes == 0
    assert len(context._storages) == 0
    with compress_saved_activations() as context:
        for _ in range(60):
            model(x).sum().backward()
        assert len(context._storages) < 100


def test_a_buffer_may_change_after_it_was_added(x):
    x.requires_grad_()
    mean, reader = torch.zeros(WIDTH), nn.Linear(WIDTH, 16)
    with compress_saved_activations():
        out = reader(offered_tanh(x) - mean)
        mean.add_(100)
    out.sum().backward()
    assert sqnr(x.detach().tanh().flatten(0, 1).sum(0).expand(16, -1), reader.weight.grad) > 40


def test_named_tuples_and_functional_transforms(x):
    class Pair(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    with compress_saved_activations():
        y = offered_tanh(x.clone().requires_grad_())
        torch.cat(Pair(y, y)).square().sum().backward()
        assert torch.vmap(torch.sin)(x).shape == x.shape


def test_a_second_derivative_raises(x):
    from coat_kernels.autograd.activation import silu

    h = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(silu(h).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    "run",
    [
        lambda y: (y[:1, :8] ** 2).sum(),
        lambda y: y.sum(-1, keepdim=True).exp().sum(),
        lambda y: (y.reshape(-1, 32) * 1.0).square().sum(),  # as narrow as the output of LoRA's A
        lambda y: y.sort(-1).values.sum(),  # integers
    ],
    ids=["small", "statistics", "narrow", "integers"],
)
def test_what_is_left_alone(x, run):
    h = x.clone().requires_grad_()
    with compress_saved_activations() as context:
        run(h * 1.0)
    assert context.tally.packed == 0
    assert context.tally.kept


def test_an_operation_that_saves_its_output_does_not_keep_itself_alive():
    small = torch.randn(3, 3, requires_grad=True)
    with LiveStorages() as live, compress_saved_activations():
        out = small.exp()
    del out
    assert not live.alive()


def test_attention_does_not_read_what_was_rebuilt(x):
    """exp(q k - logsumexp) of other values than the forward pass had would not sum to one."""
    x.requires_grad_()

    with compress_saved_activations() as context:
        q = offered_tanh(x).unflatten(-1, (2, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q.detach() * 2, q.detach())
    assert context.tally.rebuilt == 0
    plain = x.detach().tanh().unflatten(-1, (2, -1)).transpose(1, 2).requires_grad_()
    expected = torch.autograd.grad(F.scaled_dot_product_attention(plain, plain.detach() * 2, plain.detach()).square().sum(), plain)[0]
    assert sqnr(expected, torch.autograd.grad(out.square().sum(), q)[0]) > 100


def test_a_large_constant_is_not_held_to_rebuild_a_product(x):
    x.requires_grad_()
    reader = nn.Linear(WIDTH, 16)

    def run():
        with compress_saved_activations():
            return reader(offered_tanh(x) * torch.rand(x.shape).add_(0.0)).sum()

    _, alive = saved_bytes(run)
    # the constant is autograd's, for the product; the product itself is packed
    assert sum(size for size in alive.values() if size > 2048) == x.nbytes + 2 * x.numel(), alive


def test_a_concatenation_with_the_output_of_attention_costs_nothing(x):
    torch.manual_seed(0)
    attention, reader = Attention(), nn.Linear(2 * WIDTH, 16)
    x.requires_grad_()

    def run(tanh=offered_tanh):
        q, k, v = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return reader(torch.cat([attended, tanh(x)], dim=2)).sum()

    def compressed():
        with compress_saved_activations():
            return run()

    expected = torch.autograd.grad(run(torch.tanh), reader.weight)[0]
    out, alive = saved_bytes(compressed)
    # q, k, v, the output of attention, and the codes of tanh
    assert sum(size for size in alive.values() if size >= x.numel()) == 4 * x.nbytes + x.numel(), alive
    assert sqnr(expected, torch.autograd.grad(out, reader.weight)[0]) > 40


def test_a_view_of_part_of_a_storage(x):
    x.requires_grad_()
    with compress_saved_activations() as context:
        packed = torch.cat([x * 2, x * 3], dim=-1)
        a, b = packed.chunk(2, dim=-1)
        out = (a * b).sum()
    assert context.tally.bytes_before == packed.nbytes
    out.backward()
    assert sqnr(12 * x.detach(), x.grad) > 25


@pytest.mark.parametrize(
    ("shape", "row"), [((2, 64, 20, 20), 400), ((2, 8, 64, 96), 96), ((2, 1, 1, 40), 80), ((2, 40, 16), 16), ((128,), 128)]
)
def test_rows_of_images_and_heads_are_joined_until_they_are_long_enough(shape, row):
    assert saved._row(torch.empty(shape)) == row


def test_heads_of_another_memory_order_are_joined_too():
    assert saved._row(torch.empty(2, 50, 8, 40).transpose(1, 2)) == 320


def test_nothing_is_left_when_the_graph_is_gone(x):
    x.requires_grad_()
    reader = nn.Linear(WIDTH, 16)
    with compress_saved_activations() as context:
        y = offered_tanh(x)
        out = reader(y).sum()
    gone = weakref.ref(y)
    del y
    out.backward()
    del out
    gc.collect()
    assert gone() is None
    assert not context._storages


def test_retain_graph_and_two_contexts(x):
    x.requires_grad_()
    reader = nn.Linear(WIDTH, 16)
    with compress_saved_activations() as outer:
        y = offered_tanh(x)
        with compress_saved_activations():
            assert not saved.can_rebuild(y)
        assert saved.can_rebuild(y)
        with pytest.raises(RuntimeError, match="entered already"), outer:
            pass
        out = reader(y).sum()
    out.backward(retain_graph=True)
    once = reader.weight.grad.clone()
    out.backward()
    assert torch.equal(reader.weight.grad, 2 * once)


def test_without_gradients_nothing_is_watched(x):
    reader = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad(), compress_saved_activations() as context:
        reader(reader(x))
        assert not context._storages
    assert context.tally == saved.Tally()


def test_bad_input():
    with pytest.raises(TypeError, match=r"COATConfig, got dict.*defaults"):
        compress_saved_activations({"activation_format": "e4m3"})
    with pytest.raises(ValueError, match="'compress' or 'keep'"):
        compress_saved_activations(unregistered="drop")


def test_inside_the_context_compiled_functions_are_left_to_the_compiler(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    with compress_saved_activations():
        out = compiled(x)
    actual = torch.autograd.grad(out.square().sum(), model.parameters())
    assert min(sqnr(a, b) for a, b in zip(expected, actual, strict=True)) > 100


def test_queries_and_keys_share_their_storage_with_attention():
    from coat_kernels.autograd.norm_rope import norm_rope

    x = torch.randn(2, 32, 2, 128, requires_grad=True)
    weight = torch.rand(128) + 0.5
    angle = torch.rand(32, 64).repeat_interleave(2, -1)
    for attention_format, each in ((None, 4), ("int8", 1)):
        context = compress_saved_activations(COATConfig(attention_format=attention_format))

        def run(context=context):
            with context:
                q, k = (norm_rope(x, weight, angle.cos(), angle.sin(), eps=1e-6).transpose(1, 2) for _ in range(2))
                return F.scaled_dot_product_attention(q, k, q)

        out, alive = saved_bytes(run)
        large = [size for name, size in alive.items() if name.startswith(("norm_rope", "quantize")) and size >= x.numel()]
        # q and k; the output is the caller's unless it is packed
        assert sum(large) == (2 if attention_format is None else 3) * each * x.numel(), alive
        out.sum().backward()
