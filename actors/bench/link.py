"""A slower network for what is measured: a namespace of its own, whose loopback has a link's rate and losses."""

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from joinwise.cluster.errors import ConfigError

_CLONE_NEWNET = 0x40000000
_NAMESPACE = "/proc/self/ns/net"
_RATE = re.compile(r"(\d+)(kbit|mbit|gbit)")
_BITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_BURSTS_A_SECOND = 1000
_LEAST_BURST = 128 << 10  # what the kernel sends as one packet fits
_QUEUE_MS = 50


def refused(loss: float = 0.0) -> str:
    """Why no link, or none with losses, can be made here; empty when one can."""
    try:
        with link("1gbit", loss=loss):
            return ""
    except ConfigError as error:
        return str(error)


@contextmanager
def link(rate: str, *, loss: float = 0.0) -> Iterator[None]:
    """Put the calling thread, and what it starts, behind a link. Nothing else is reached from in there.

    Threads that run already stay where they are.

    Args:
        rate: as `tc` writes it: 1gbit, 100mbit.
        loss: share of the packets that get lost.

    Raises:
        ConfigError: not a rate; or this machine allows no namespaces, or lacks `ip`, `tc` or, for losses, `nft`.
    """
    with own_network(), shaped(rate):
        if loss:
            run("nft add table inet lossy")
            run("nft add chain inet lossy input { type filter hook input priority 0 ; }")
            share = round(1000 * loss)
            run(f"nft add rule inet lossy input meta l4proto tcp numgen random mod 1000 < {share} counter drop")
        yield


@contextmanager
def shaped(rate: str) -> Iterator[None]:
    """Give the loopback of a network of our own a link's rate. Errors as for `link`."""
    if not (found := _RATE.fullmatch(rate)):
        raise ConfigError(f"link {rate!r}: give a rate as `tc` writes it, such as 1gbit or 100mbit")
    burst = max(_LEAST_BURST, int(found[1]) * _BITS[found[2]] // 8 // _BURSTS_A_SECOND)
    run(f"tc qdisc add dev lo root tbf rate {rate} burst {burst}b latency {_QUEUE_MS}ms")
    try:
        yield
    finally:
        run("tc qdisc del dev lo root")


@contextmanager
def own_network() -> Iterator[None]:
    """Put the calling thread, and what it starts, into a network with a loopback and nothing else.

    Threads that run already stay where they are.

    Raises:
        ConfigError: this machine allows no namespaces, or lacks `ip`.
    """
    home = os.open(_NAMESPACE, os.O_RDONLY)
    try:
        _call("unshare", _CLONE_NEWNET)
        try:
            run("ip link set lo up")
            yield
        finally:
            _call("setns", home, _CLONE_NEWNET)
    finally:
        os.close(home)


def _call(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        why = os.strerror(ctypes.get_errno())
        raise ConfigError(f"cannot make a network namespace ({why}): this takes root's rights")


def run(command: str) -> str:
    """Run one of the programs that set up networks; returns what it says.

    Raises:
        ConfigError: it fails, or is not installed.
    """
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"`{command.split()[0]}` is not installed: install iproute2 and nftables") from None
    if done.returncode:
        raise ConfigError(f"`{command}`: {done.stderr.strip()}")
    return done.stdout
