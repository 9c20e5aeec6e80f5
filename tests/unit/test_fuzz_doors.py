"""Generated input at a worker's KV port and in the configuration: whatever comes, the answer is a declared error,
nothing is held or told afterwards, and what is right still works. `FUZZ_ROUNDS` says how many examples.

KV frames are in test_kv_frames.py, a client's gRPC in test_grpc_server.py, HTTP in test_guard.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from helpers.kv_rig import Receiver, Sender, eventually
from helpers.messages import messages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joinwise.actors.kv.server import FETCH, LAYOUT
from joinwise.cluster.config import default_config, load_config
from joinwise.cluster.errors import ConfigError
from joinwise.proto import kv_pb2

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_ROUNDS", "30")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_UNDECLARED = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED})  # a crash, and no answer at all


# --- a worker's KV port -----------------------------------------------------------------------------------------------


class Port:
    """A prefill worker's port, asked with raw bytes."""

    def __init__(self) -> None:
        self.sender = Sender(claim_timeout_s=0.02, kinds=())
        self.instance = self.sender.server.instance
        self._channel = grpc.insecure_channel(self.sender.server.address)
        self._opened = 0

    def opened(self, lease_s: float) -> str:
        """The name of a new transfer of four blocks, all of them computed."""
        self._opened += 1
        transfer = self.sender.open(f"t{self._opened}", range(4), lease_s=lease_s)
        self.sender.compute(transfer)
        self.sender.finish(transfer)
        return transfer.transfer_id

    def call(self, method: str, request: bytes) -> grpc.StatusCode:
        """The status of a call."""
        try:
            if method == FETCH:
                for _ in self._channel.unary_stream(method)(request, timeout=10):
                    pass
            else:
                self._channel.unary_unary(method)(request, timeout=10)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    def check(self) -> None:
        """A receiver that behaves still gets its KV; then nothing is held."""
        receiver = Receiver()
        try:
            receiver.fetch(self.opened(60.0), range(10, 14), self.sender.server.address).succeed()
            receiver.assert_idle()
        finally:
            receiver.stop()

        def nothing_held() -> bool:
            self.sender.sweep()
            return not self.sender.table.held() and not self.sender.server.open_streams

        eventually(nothing_held, "leases end")

    def close(self) -> None:
        self._channel.close()
        self.sender.stop()


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    port = Port()
    yield port
    port.check()
    port.close()


@FUZZ
@given(st.sampled_from([FETCH, LAYOUT]), st.binary(max_size=300))
def test_noise_at_the_kv_port(port: Port, method: str, noise: bytes) -> None:
    assert port.call(method, noise) not in _UNDECLARED


@FUZZ
@given(messages(kv_pb2.LayoutRequest))
def test_any_layout_at_the_kv_port(port: Port, request: kv_pb2.LayoutRequest) -> None:
    assert port.call(LAYOUT, request.SerializeToString()) not in _UNDECLARED


_FETCH = {
    "instance": st.just(0),  # the worker's own, filled in below
    "transfer_id": st.just("t"),  # one that is open
    "epoch": st.just(1),
    "lane_id": st.just(0),
    "num_tokens": st.integers(0, 40),
    "first_token": st.integers(0, 40),
    "encoding": st.integers(0, 6),
    "wire_dtype": st.sampled_from(["torch.float32", "torch.bfloat16", "torch.int8", "float32", "", "torch.nn"]),
    "first_head": st.integers(0, 3),
    "num_heads": st.integers(0, 3),
    "layers": st.lists(st.integers(0, 4), max_size=4),
    "streams": st.integers(0, 3),
}


@FUZZ
@given(messages(kv_pb2.FetchRequest, _FETCH) | messages(kv_pb2.FetchRequest))
def test_any_fetch_at_the_kv_port(port: Port, request: kv_pb2.FetchRequest) -> None:
    if not request.instance:
        request.instance = port.instance
    if request.transfer_id == "t":
        request.transfer_id = port.opened(lease_s=0.1)
    request.lane_id = 0  # a lane that nobody opens is waited for
    assert port.call(FETCH, request.SerializeToString()) not in _UNDECLARED
    port.sender.sweep()


# --- configuration ----------------------------------------------------------------------------------------------------

SECRET = "jw-do-not-tell"
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_JSON = st.recursive(_SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=6), each))


def loaded(folder: Path, data: bytes) -> None:
    """Read a configuration, which succeeds, or is refused in our own words without a secret in them."""
    path = folder / "joinwise.yaml"
    path.write_bytes(data)
    said = ""
    try:
        load_config(path, {})
    except ConfigError as error:
        said = str(error)
    assert SECRET not in said


@FUZZ
@given(
    st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | _JSON.map(lambda each: yaml.dump(each).encode())
)
def test_any_file_as_configuration(tmp_path: Path, data: bytes) -> None:
    loaded(tmp_path, data)


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of dictionaries and lists."""
    if at:
        yield at
    for key, below in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(below, (*at, key))


@FUZZ
@given(st.data())
def test_a_right_configuration_with_wrong_values(tmp_path: Path, data: st.DataObject) -> None:
    tree = default_config("cpu").model_dump(mode="json")
    tree["gateway"]["api_keys"] = [SECRET]
    tree["redis"]["url"] = f"redis://:{SECRET}@cache.example:6379"
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(list(places(tree))))
        inside = tree
        for key in path:
            inside = inside[key]
        match data.draw(st.sampled_from(["other", "without", "more"])):
            case "other":
                inside[last] = data.draw(_JSON)
            case "without":
                del inside[last]
            case "more" if isinstance(inside, dict):
                inside[data.draw(st.text(max_size=6))] = data.draw(_JSON)
    loaded(tmp_path, yaml.safe_dump(tree).encode())
