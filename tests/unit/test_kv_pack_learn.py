"""Learning block interiors: of vLLM's own CPU operation, of backends that are not here, and of what is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import kv_interiors
from helpers.kv_interiors import any_interior
from hypothesis import given, settings

from joinwise.kernels import kv_pack
from joinwise.kernels.kv_pack import BlockInterior, InteriorError, learn_interior

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def writer(interior: BlockInterior, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """A backend with this interior."""

    def write(*parts: torch.Tensor) -> torch.Tensor:
        block = torch.zeros(interior.block_stride, dtype=dtype)
        rows = torch.stack(parts, dim=2).transpose(0, 1)  # [heads, tokens, parts, dim]
        block[interior.offsets(range(interior.heads))] = rows
        return block

    return write


def places(interior: BlockInterior) -> torch.Tensor:
    return interior.offsets(range(interior.heads))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("block_size", "head_dim"), [(32, 64), (64, 128), (128, 64), (48, 64), (32, 80)])
def test_vllm_cpu_backend(dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    """Whatever instruction set this machine has; the last two sizes ask for another of vLLM's variants."""
    ops = pytest.importorskip("vllm._custom_ops")
    cpu_attn = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    heads = 3
    isa = cpu_attn._get_attn_isa(dtype, block_size, head_dim, "auto")

    def store(cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        key_cache, value_cache = cache.view(-1, heads, 2 * block_size, head_dim).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys, values, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )

    def write(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        cache = torch.zeros(1, heads, block_size, 2 * head_dim, dtype=dtype)
        store(cache, keys, values, torch.arange(block_size))
        return cache.flatten()

    interior = learn_interior(write, heads, block_size, head_dim, dtype)
    assert interior.block_stride == heads * block_size * 2 * head_dim

    # What the operation stores in scattered blocks, packing finds; what unpacking stores, equals the operation's work.
    blocks, ids, count = 6, [4, 0, 3], 2 * block_size + 7
    keys, values = torch.randn(2, count, heads, head_dim).to(dtype).unbind()
    token = torch.arange(count)
    slots = torch.tensor(ids)[token // block_size] * block_size + token % block_size
    cache = torch.zeros(blocks, heads, block_size, 2 * head_dim, dtype=dtype)
    store(cache, keys, values, slots)
    wire = torch.empty(kv_pack.wire_bytes(interior, count, heads, dtype), dtype=torch.uint8)
    kv_pack.pack(cache, interior, ids, first_token=0, num_tokens=count, heads=range(heads), out=wire)
    assert torch.equal(wire.view(dtype).view(heads, count, 2, head_dim), torch.stack([keys, values], 2).transpose(0, 1))
    landed = torch.zeros_like(cache)
    kv_pack.unpack(wire, interior, landed, ids, first_token=0, heads=range(heads))
    assert torch.equal(landed, cache)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["cpu_vec", "cpu_amx", "cpu_bfmmla"])
def test_backends_that_this_machine_may_lack(name: str, dtype: torch.dtype) -> None:
    truth = kv_interiors.known(1, 4, 64, 128)[name]
    assert learn_interior(writer(truth, dtype), 4, 64, 128, dtype) == truth


def test_a_latent() -> None:
    truth = kv_interiors.mla(3, 16, 576)
    found = learn_interior(writer(truth, torch.bfloat16), 1, 16, 576, torch.bfloat16, parts=1)
    assert torch.equal(places(found), places(truth))


@settings(deadline=None, max_examples=60)
@given(truth=any_interior())
def test_whatever_tiles_can_describe(truth: BlockInterior) -> None:
    found = learn_interior(
        writer(truth, torch.bfloat16),
        truth.heads,
        truth.block_size,
        truth.head_dim,
        torch.bfloat16,
        parts=len(truth.parts),
    )
    assert torch.equal(places(found), places(truth))
    assert found.block_stride == truth.block_stride
    assert found.span == truth.span == 1 + int(places(truth).max())


def spoilt(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A backend that does something to the block before it is read."""
    write = writer(kv_interiors.cpu_vec(2, 16, 16), torch.float32)
    return lambda *parts: spoil(write(*parts))


def swap_two(block: torch.Tensor) -> torch.Tensor:
    block[[5, 77]] = block[[77, 5]]
    return block


def double_one(block: torch.Tensor) -> torch.Tensor:
    block[5] = block[77]
    return block


def lose_one(block: torch.Tensor) -> torch.Tensor:
    block[5] = 0
    return block


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (swap_two, r"part 0: tiles put token \d+, head \d+, dim \d+ at \d+, the backend at \d+"),
        (double_one, r"element \(part 0, token 5, head 0, dim 0\) lies in 0 places"),
        (lose_one, r"element \(part 0, token 5, head 0, dim 0\) lies in 0 places"),
        (lambda block: block * 0.5, "changes what it stores"),
        (lambda block: block * -1, "changes what it stores"),
        (lambda block: block * float("nan"), "changes what it stores"),
        (lambda block: block * 2, "changes what it stores"),
        (lambda block: block.flip(0), "backwards"),
        (lambda block: torch.where(block > 0, 255.0, 0.0), "stores element"),
    ],
)
def test_what_is_no_permutation_in_tiles_is_refused(spoil: Callable[..., torch.Tensor], says: str) -> None:
    with pytest.raises(InteriorError, match=says):
        learn_interior(spoilt(spoil), 2, 16, 16, torch.float32)


def test_a_backend_that_stores_elsewhere_each_time_is_refused() -> None:
    rounds = iter(range(9))
    with pytest.raises(InteriorError, match="no permutation"):
        learn_interior(spoilt(lambda block: torch.cat([block, torch.zeros(next(rounds))])), 2, 16, 16, torch.float32)


def test_interiors_that_describe_no_block_are_refused() -> None:
    truth = kv_interiors.cpu_vec(2, 16, 16)
    part = truth.parts[0]
    for sizes in ((0, 16, 16), (2, 0, 16), (2, 16, 0)):
        with pytest.raises(InteriorError):
            BlockInterior(*sizes, truth.parts, 1024)
    for parts in (
        (),
        (kv_pack.Part(-1, 1, part.token, part.dim),),
        (kv_pack.Part(0, 1, kv_pack.Axis(0, 1, 1), part.dim),),
    ):
        with pytest.raises(InteriorError):
            BlockInterior(2, 16, 16, parts, 1024)
    with pytest.raises(InteriorError):
        BlockInterior(2, 16, 16, truth.parts, 0)


def test_views_that_are_no_interior_are_refused() -> None:
    cache = torch.zeros(2, 5, 16, 2, 8)
    with pytest.raises(InteriorError, match="four dimensions"):
        kv_pack.interior_from_views(cache, cache)
    with pytest.raises(InteriorError, match="one shape"):
        kv_pack.interior_from_views(cache, cache[0], cache[1, :, :8])
    with pytest.raises(InteriorError, match="no view of the cache"):
        kv_pack.interior_from_views(cache, cache[0].clone())
    with pytest.raises(InteriorError, match="block strides"):
        kv_pack.interior_from_views(cache, cache[0, :2], cache[1, ::2][:2])
    with pytest.raises(InteriorError, match="negative"):
        kv_pack.interior_from_views(cache[1], cache[0])
