"""The Triton kernels: compiled and interpreted everywhere, and on a CUDA device where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import gpu, kv_interiors

from joinwise.kernels import kv_pack
from joinwise.kernels.kv_pack import reference
from joinwise.kernels.kv_pack.job import Job

BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM = 7, 3, 32, 48
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [*((one, other) for one in FLOATS for other in FLOATS), *((t, t) for t in (torch.uint8, torch.float64))]
INTERIORS = {
    **kv_interiors.known(BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM),
    "mla": kv_interiors.mla(BLOCKS, BLOCK_SIZE, HEAD_DIM),
}


def compare(name: str, dtype: torch.dtype, wire_dtype: torch.dtype, device: str) -> None:
    """Pack and unpack with both, and find the same numbers in the wire and in the whole cache."""
    from joinwise.kernels.kv_pack import triton_kernels

    interior = INTERIORS[name]
    cache = kv_interiors.cache_for(interior, BLOCKS, dtype, 1)
    if dtype != wire_dtype:  # small whole numbers: Triton's interpreter cuts off what does not fit bfloat16
        cache = (cache.view(torch.uint8)[:: dtype.itemsize].to(dtype) - 128) * 0.25
    cache = cache.to(device)
    heads = range(interior.heads - 1, interior.heads)
    size = kv_pack.wire_bytes(interior, 61, len(heads), wire_dtype)
    found, wanted = torch.zeros(2, size, dtype=torch.uint8, device=device).unbind()

    def job(cache: torch.Tensor) -> Job:
        return Job.checked(cache, interior, [4, 2, 6, 1], 17, 61, heads, wire_dtype, 1)

    triton_kernels.pack(job(cache), found)
    reference.pack(job(cache), wanted)
    assert torch.equal(found, wanted), (name, dtype, wire_dtype)
    landed, expected = torch.zeros(2, cache.numel(), dtype=dtype, device=device).unbind()
    triton_kernels.unpack(job(landed), found)
    reference.unpack(job(expected), wanted)
    assert torch.equal(landed.view(torch.uint8), expected.view(torch.uint8)), (name, dtype, wire_dtype)


def test_interpreted() -> None:
    """In a process of its own: whether kernels are interpreted is settled when Triton is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, __file__]
    paths = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["compared", str(len(INTERIORS) + len(PAIRS))]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("cache", "wire", "conversion"),
    [("i16", "i16", ""), ("u8", "u8", ""), ("fp32", "bf16", "cvt.rn.bf16"), ("fp32", "fp16", "cvt.rn.f16")],
)
def test_compiles_for_devices_that_are_not_here(
    cache: str, wire: str, conversion: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, with the rounding that is promised."""
    triton = pytest.importorskip("triton")
    targets = pytest.importorskip("triton.backends.compiler")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no compiler for CUDA")
    from joinwise.kernels.kv_pack import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    kernel = triton_kernels._move
    constants = {"tile": 16, "dims": 64, "to_wire": True}
    types = {"cache": f"*{cache}", "wire": f"*{wire}", "ids": "*i64", **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(kernel, {n: types.get(n, "i64") for n in kernel.arg_names}, constants)
    compiled = triton.compile(source, target=targets.GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
    assert conversion in compiled.asm["ptx"]


needs_cuda = gpu.needs_cuda("Triton kernels that pack KV")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", INTERIORS)
def test_on_a_device(name: str) -> None:
    for dtype, wire_dtype in PAIRS:
        compare(name, dtype, wire_dtype, "cuda")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_cuda_cache_and_a_cpu_cache_meet(where: str) -> None:
    """Also with the wire on the host, as a socket needs it."""
    sender, receiver = INTERIORS["nhd"], kv_interiors.cpu_vec(HEADS, 64, HEAD_DIM)
    sent = kv_interiors.cache_for(sender, BLOCKS, torch.bfloat16, 1).cuda()
    landed = kv_interiors.cache_for(receiver, BLOCKS, torch.bfloat16, 2)
    out = torch.zeros(kv_pack.wire_bytes(sender, 90, HEADS, sent.dtype), dtype=torch.uint8, device=where)
    there, back = {"first_token": 3, "heads": range(HEADS)}, {"first_token": 10, "heads": range(HEADS)}
    kv_pack.pack(sent, sender, [5, 1, 3], num_tokens=90, out=out, **there)
    assert kv_pack.unpack(out.cpu(), receiver, landed, [2, 6], **back) == 90
    again = bytearray(out.numel())
    kv_pack.pack(landed, receiver, [2, 6], num_tokens=90, out=again, **back)
    assert bytes(again) == out.cpu().numpy().tobytes()
    returned = torch.zeros_like(sent)
    assert kv_pack.unpack(again, sender, returned, [5, 1, 3], **there) == 90
    once_more = torch.zeros_like(out)
    kv_pack.pack(returned, sender, [5, 1, 3], num_tokens=90, out=once_more, **there)
    assert torch.equal(once_more, out)


@pytest.mark.gpu
@needs_cuda
def test_a_wire_at_any_address_of_the_device() -> None:
    interior = INTERIORS["hnd"]
    cache = kv_interiors.cache_for(interior, BLOCKS, torch.bfloat16, 1).cuda()
    size = kv_pack.wire_bytes(interior, 40, HEADS, cache.dtype)
    job = {"first_token": 0, "heads": range(HEADS)}
    frame = torch.zeros(size + 1, dtype=torch.uint8, device="cuda")
    straight = torch.zeros(size, dtype=torch.uint8, device="cuda")
    kv_pack.pack(cache, interior, [1, 2], num_tokens=40, out=frame[1:], **job)
    kv_pack.pack(cache, interior, [1, 2], num_tokens=40, out=straight, **job)
    assert torch.equal(frame[1:], straight)
    one, other = torch.zeros_like(cache), torch.zeros_like(cache)
    kv_pack.unpack(frame[1:], interior, one, [1, 2], **job)
    kv_pack.unpack(straight, interior, other, [1, 2], **job)
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.gpu
@needs_cuda
def test_whole_blocks_on_a_device() -> None:
    cache = torch.randint(0, 256, (BLOCKS, 96), dtype=torch.uint8).cuda()
    flat = bytearray(3 * 96)
    kv_pack.gather_blocks(cache, [4, 0, 5], flat)
    assert bytes(flat) == cache[[4, 0, 5]].cpu().numpy().tobytes()
    landed = torch.zeros_like(cache)
    kv_pack.scatter_blocks(flat, landed, [4, 0, 5])
    assert torch.equal(landed[[4, 0, 5]], cache[[4, 0, 5]])
    assert not landed[[1, 2, 3, 6]].any()


if __name__ == "__main__":
    cases = [(name, torch.bfloat16, torch.bfloat16) for name in INTERIORS]
    cases += [("cpu_amx", *pair) for pair in PAIRS]
    for case in cases:
        compare(*case, "cpu")
    print("compared", len(cases))
