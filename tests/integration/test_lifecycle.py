"""`joinwise up`, `down`, `status`: what they start is there; what they stop is gone, however it is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from helpers.cluster import MODEL, mixed_config
from helpers.processes import Home

pytestmark = [pytest.mark.cluster, pytest.mark.model]


@pytest.fixture
def home(tmp_path: Path, small_model: object) -> Home:
    """A home of its own, by which every process that belongs to it is known."""
    return Home(tmp_path)


def test_up_detached_serves_and_leaves_no_orphan_when_its_launcher_is_killed(home: Home) -> None:
    """Then, over what it has left: a second `up` in the foreground, ended by `down`."""
    file = home.write_config(mixed_config("detached"))
    up = home.joinwise("up", "-f", file, "--detach")
    assert up.returncode == 0, up.stderr
    assert re.search(r"engine all-0-1 is ready after .* s: process .* imports .* engine ", up.stderr), up.stderr
    assert re.search(r"started in .* s: imports .* Ray .* actors ", up.stderr), "and what the seconds went to"
    assert not [line for line in home.processes() if "/dashboard.py" in line or "/monitor.py" in line]
    assert "WARNING" not in up.stderr, "what engines print is in the log"
    launcher = home.run_file("detached")["pid"]

    status = json.loads(home.joinwise("status", "--json").stdout)
    assert [worker["role"] for worker in status["workers"]] == ["mixed"]
    assert status["models"][0]["name"] == MODEL
    chat = home.joinwise("generate", "The capital of France is", "--max-tokens", "4")
    assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr
    doctor = home.joinwise("doctor", "--running", "--json")
    assert json.loads(doctor.stdout)["healthy"], doctor.stdout
    assert {"gateway": "ok", "leases": "ok", "workers": "ok"}.items() <= {
        each["check"]: each["level"] for each in json.loads(doctor.stdout)["findings"]
    }.items()

    again = home.joinwise("up", "-f", file, "--detach")
    assert again.returncode == 1
    assert "runs on this machine already" in again.stderr and "Traceback" not in again.stderr

    os.kill(launcher, signal.SIGKILL)
    home.wait_until_empty(60)

    with home.start("up", "-f", file) as foreground:
        home.wait_ready("detached", foreground)
        down = home.joinwise("down", "-f", file)
        assert down.returncode == 0 and "has stopped" in down.stderr
        assert foreground.wait(10) == 0
    shown = foreground.stderr.read() if foreground.stderr else ""
    assert "ready: http://127.0.0.1:" in shown and "WARNING" not in shown and "Traceback" not in shown
    home.wait_until_empty(5)
    assert not home.run_path("detached").exists()
    assert "does not run" in home.joinwise("down", "-f", file).stderr


def test_an_interrupt_stops_a_start_at_once(home: Home) -> None:
    file = home.write_config(mixed_config("interrupted"))
    with home.start("up", "-f", file) as foreground:
        assert foreground.stderr is not None
        for line in foreground.stderr:
            if "starting 1 engines" in line:
                break
        foreground.send_signal(signal.SIGINT)
        assert foreground.wait(60) == 0
    home.wait_until_empty(5)
    assert not home.run_path("interrupted").exists()


def test_a_start_that_fails_says_why_in_one_line(home: Home) -> None:
    config = mixed_config("broken")
    config["pools"][0]["engine"]["block_sise"] = 32
    up = home.joinwise("up", "-f", home.write_config(config), "--detach")
    assert up.returncode == 1
    (error,) = [line for line in up.stderr.splitlines() if line.startswith("error: ")]
    assert "block_sise" in error
    assert "Traceback" not in up.stderr
    assert "block_sise" in home.log("broken").splitlines()[-1]
    home.wait_until_empty(5)
