"""`joinwise bench kv --gpu`: all of it on a stand-in for the device, and what it says where there is none."""

import json

import pytest
import torch
from typer.testing import CliRunner

from joinwise.actors.bench import kv_device
from joinwise.actors.bench.commands import bench
from joinwise.actors.bench.kv_ends import Shape

STAND_IN = "cpu:0"  # a device to the benchmark, and main memory to torch


def test_transfers_are_checked_and_measured_by_every_transport():
    rows = kv_device.between(STAND_IN, STAND_IN, [1], 1, lambda _: None, Shape(4, layers=3))
    assert [row["transport"] for row in rows] == list(kv_device.TRANSPORTS)
    for row in rows:
        assert row["verified_bytes"] == row["bytes"] > 0
        assert row["way"] == "cpu:0 to cpu:0"
        assert min(row["ratio"], row["gb_per_s"], row["tcp_baseline_gb_per_s"]) > 0


def test_kernels_are_compared_with_a_copy():
    rows = kv_device.measure("cpu", 1 << 18, 1, lambda _: None)
    names = {"pack", "unpack", "int8 encode", "int8 decode", "fp8 encode", "fp8 decode"}
    assert {(row["kernel"], row["dtype"]) for row in rows} == {
        (name, dtype) for name in names for dtype in ("torch.bfloat16", "torch.float16")
    }
    assert all(row["ratio"] > 0 and row["bytes"] > 0 for row in rows)


def test_what_does_not_come_back_ends_the_benchmark(monkeypatch):
    monkeypatch.setattr(kv_device.kv_pack, "unpack", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="does not undo packing"):
        kv_device.measure("cpu", 1 << 18, 1, lambda _: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_every_piece_says_why(tmp_path):
    out = tmp_path / "out.json"
    told = CliRunner().invoke(bench, ["kv", "--gpu", "--size", "1", "--json", str(out)])
    assert told.exit_code == 0, told.output
    result = json.loads(out.read_text())
    assert len(result["figures"]) == 3 * 3 + 4
    assert set(result["figures"].values()) == {None}
    assert {row["piece"] for row in result["rows"]} == result["figures"].keys()
    assert all(row["why"] == kv_device.missing() != "" for row in result["rows"])
    for piece in ("cuda_to_cpu_tcp_ratio", "gpu_pack_ratio"):
        assert piece in told.output
    assert "CUDA" in told.output
