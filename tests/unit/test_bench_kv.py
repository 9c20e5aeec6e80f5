"""`joinwise bench kv`, small: real processes, lanes and kernels; the figures' values are another matter."""

import json
import os
import signal

import psutil
import pytest
from helpers.certificates import Authority
from helpers.kv_rig import eventually
from typer.testing import CliRunner

from joinwise.actors.bench import kv, kv_kernels, kv_nixl, kv_tls
from joinwise.actors.bench.commands import bench
from joinwise.actors.bench.kv_ends import Receiver, Sender, Shape
from joinwise.actors.bench.remote import Remote
from joinwise.cluster.config import PeerTlsConfig
from joinwise.cluster.errors import ConfigError

SHAPE = Shape(num_blocks=4, layers=3)


@pytest.fixture(scope="module")
def ends():
    """Starting them takes seconds; the last test of this file ends the sender."""
    sender = Remote(Sender, SHAPE)
    receiver = Remote(Receiver, SHAPE, ["tcp", "shm"], *sender("addresses"))
    yield kv.Pair(sender, receiver, SHAPE)
    receiver.close()
    sender.close()


def test_the_command_writes_every_figure_and_what_is_behind_it(tmp_path, monkeypatch):
    monkeypatch.setattr(kv_nixl, "missing", lambda: "not in this test")
    out = tmp_path / "out.json"
    told = CliRunner().invoke(bench, ["kv", "--size", "1", "--repeats", "2", "--json", str(out)])
    assert told.exit_code == 0, told.output
    result = json.loads(out.read_text())
    assert {"bench", "commit", "machine", "figures", "rows"} <= set(result)
    assert result["bench"] == "kv"
    assert set(result["figures"]) == {*kv.TARGETS, "nccl_ratio"}
    assert result["figures"].pop("nixl_ratio") is None
    assert all(value > 0 for value in result["figures"].values())
    assert [row["why"] for row in result["rows"] if "why" in row] == ["not in this test"]
    moved = [row for row in result["rows"] if "transport" in row]
    assert [row["transport"] for row in moved] == list(kv.TRANSPORTS)
    for row in moved:
        assert row["verified_bytes"] == row["bytes"] == Shape(1).block_bytes
        assert row["gb_per_s"] > 0
        assert row["cpu_s_per_gb"] >= 0, "some kernels count ticks"
    assert {row["kernel"] for row in result["rows"] if "kernel" in row} == {
        "pack",
        "unpack",
        "int8 encode",
        "int8 decode",
    }


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_all_that_lands_is_verified_and_compared(ends, transport):
    sender, receiver = ends.sender, ends.receiver
    assert ends.check(transport, [3, 1]) == 2 * SHAPE.block_bytes
    assert receiver("digest", [3, 1]) == sender("digest", [3, 1])
    assert receiver("digest", [0]) != sender("digest", [0]), "blocks that nobody asked for have come too"


def test_other_bytes_than_were_sent_end_the_benchmark():
    class Sent:
        def __call__(self, method, *arguments):
            return {"offer": None, "digest": "sent"}[method]

    class Landed:
        def __init__(self, digest, verified):
            self.answer = digest, verified

        def __call__(self, method, *arguments):
            return self.answer

    size = SHAPE.block_bytes
    assert kv.Pair(Sent(), Landed("sent", size), SHAPE).check("tcp", [0]) == size
    with pytest.raises(RuntimeError, match="not what was sent"):
        kv.Pair(Sent(), Landed("other", size), SHAPE).check("tcp", [0])
    with pytest.raises(RuntimeError, match="checksums of 0 bytes"):
        kv.Pair(Sent(), Landed("sent", 0), SHAPE).check("tcp", [0])


def test_an_end_s_error_is_told_and_it_serves_on(ends):
    receiver = ends.receiver
    with pytest.raises(RuntimeError, match=r"IndexError.*blocks"):
        receiver("digest", [99])
    assert receiver("cpu_seconds") > 0


def test_only_large_sizes_count():
    rows = [
        {"transport": "tcp", "ratio": ratio, "in_figure": counts}
        for ratio, counts in ((9, False), (1, True), (2, True))
    ]
    assert kv._median(rows, "transport", "tcp") == 1.5
    assert kv._median(rows[:1], "transport", "tcp") == 9


def test_a_ratio_is_memcpy_s_seconds_by_ours(monkeypatch):
    monkeypatch.setattr(kv_kernels, "_seconds", lambda function: {"memcpy": 1.0, "kernel": 4.0}[function()])
    found = kv_kernels._compare(lambda: "memcpy", lambda: "kernel", 8 * 10**9, 3)
    assert found == {"gb_per_s": 2.0, "memcpy_gb_per_s": 8.0, "ratio": 0.25}


def test_what_ucx_chose_is_read_from_its_log(tmp_path):
    (tmp_path / "joinwise-bench-ucx.7.log").write_text(
        "| active message by ucp_am_send* from host memory |\n"
        "|          0 | short              | tcp/lo        |\n"
        "| remote memory read by ucp_get*(multi) into host memory from host |\n"
        "| 0..inf | zero-copy   | cma/memory                                |\n"
        "| remote memory write by ucp_put* from host memory to host |\n"
        "| 0..inf | zero-copy   | sysv/memory |\n"
    )
    assert kv_nixl.chosen(tmp_path) == "cma/memory"


def test_an_end_sleeps_between_calls_and_its_death_is_noticed(ends):
    sender = ends.sender
    for _ in range(2):
        with sender.awake():
            assert sender("digest", [0])
    process = psutil.Process(sender._pid)
    eventually(lambda: process.status() == psutil.STATUS_STOPPED, "the signal has arrived")
    with sender.awake():
        os.kill(sender._pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="has died"):
            sender("addresses")


def test_tls_is_measured_beside_none(tmp_path):
    files = Authority().issue(tmp_path)
    assert kv_tls.settings(tmp_path) == PeerTlsConfig(cert=str(files.cert), key=str(files.key), ca=str(files.ca))
    figures, rows = kv_tls.run(tmp_path, [1], 2, lambda line: None, SHAPE)
    assert set(figures) == {
        f"tls_{transport}_{name}" for transport in ("tcp", "grpc") for name in ("ratio", "cpu_ratio")
    }
    assert all(value > 0 for value in figures.values())
    assert [(row["transport"], row["bytes"]) for row in rows] == [
        ("tcp", 4 * SHAPE.block_bytes),
        ("grpc", 4 * SHAPE.block_bytes),
    ]


def test_tls_needs_its_files(tmp_path):
    with pytest.raises(ConfigError, match="TLS files"):
        kv_tls.run(tmp_path, [1], 1, lambda line: None, SHAPE)
