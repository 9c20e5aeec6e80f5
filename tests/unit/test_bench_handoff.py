"""`joinwise bench handoff` without engines: what it makes of answers, and the links it measures over."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from joinwise.actors.bench.handoff import Side, agreement, crossovers
from joinwise.actors.bench.link import link, refused
from joinwise.actors.bench.serve import Answer
from joinwise.cluster.errors import ConfigError


@pytest.mark.parametrize(
    ("tokens", "first", "same"),
    [([[1, 2, 3, 4]], None, 1.0), ([[1, 2, 9, 4]], 2, 0.75), ([[9, 9, 9, 9]], 0, 0.0)],
)
def test_agreement_is_by_position(tokens: list[list[int]], first: int | None, same: float) -> None:
    found = agreement([Answer(each) for each in tokens], [Answer([1, 2, 3, 4])])
    assert found == {"first_divergence": first, "same_tokens": same}


def test_a_figure_says_what_it_is_of() -> None:
    assert Side("tcp", "int8", "1gbit").suffix == "_tcp_int8_1gbit"
    assert Side("shm").suffix == "_shm"


@pytest.mark.parametrize(
    ("gaps", "tokens"),
    [([9, 9, 9], 128), ([11, 9, 9], 512), ([9, 11, 9], 1500), ([9, 9, 11], -1), ([11, 11, 11], -1)],
)
def test_a_codec_pays_from_where_it_pays_for_all_that_is_longer(gaps: list[float], tokens: float) -> None:
    lengths = (128, 512, 1500)
    what = {"link": "1gbit", "transport": "tcp", "codec": "none", "exposed_ms": 10}
    plain = [what | {"prompt_tokens": length} for length in lengths]
    coded = [each | {"codec": "int8", "exposed_ms": gap} for each, gap in zip(plain, gaps, strict=True)]
    elsewhere = [each | {"link": "10gbit", "exposed_ms": 0} for each in plain]
    assert crossovers([*plain, *coded, *elsewhere]) == {"crossover_tokens_tcp_int8_1gbit": tokens}


@pytest.mark.parametrize("rate", ["fast", "1gbit; reboot", "-1gbit", "gbit"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ConfigError, match="link"), link(rate):
        pass


@pytest.mark.skipif(bool(refused()), reason=refused() or "links can be made")
def test_a_link_has_its_rate_and_ends_with_its_context() -> None:
    home = socket.create_server(("127.0.0.1", 0))
    with link("100mbit"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(home.getsockname())
        assert _seconds(5_000_000) > 5_000_000 * 8 / 100e6 * 0.7  # less its first burst
    socket.create_connection(home.getsockname()).close()


def _seconds(size: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = threading.Thread(target=lambda: _send(server, size))
        sender.start()
        begin = time.perf_counter()
        with socket.create_connection(server.getsockname()) as connected:
            left = size
            while left:
                left -= len(connected.recv(1 << 20))
        taken = time.perf_counter() - begin
        sender.join()
        return taken


def _send(server: socket.socket, size: int) -> None:
    accepted, _ = server.accept()
    with accepted:
        accepted.sendall(bytes(size))
