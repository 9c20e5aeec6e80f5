"""The chart in helm/: linted, rendered with every toggle on and off, validated strictly; wrong values are refused."""

from __future__ import annotations

import copy
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from helpers.chart import CHART, ROOT, Rendered, defaults, first_pool, validate, validate_rayservice
from helpers.chart_values import DRAFTS, NO_REDIS, SETTINGS, VARIANTS, drafts, gpu_pools

from joinwise.cluster.errors import ConfigError


@pytest.fixture(params=VARIANTS, scope="module")
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return Rendered(VARIANTS[request.param])


# The whole.


@pytest.mark.parametrize("variant", VARIANTS)
def test_lint_finds_nothing(variant: str) -> None:
    report = helm_python.lint(CHART, copy.deepcopy(VARIANTS[variant]), strict=True, namespace="ml")
    assert (report["messages"], report["errors"]) == ([], [])


def test_package_is_built(tmp_path: Path) -> None:
    archive = Path(helm_python.package(CHART, destination=tmp_path))
    chart = helm_python.Chart.load(archive)
    assert chart.render({}, name="demo", namespace="ml").keys() >= {"joinwise/templates/rayservice.yaml"}


def test_generated_files_are_current() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "gen_helm.py", "--check"], check=True)


def test_chart_has_the_package_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{chart["appVersion"]}"' in project
    assert f"ray[default,serve]=={defaults()['rayVersion']}" in project


def test_manifests_are_valid(rendered: Rendered) -> None:
    validate(rendered)


def test_rayservice_is_valid(rendered: Rendered) -> None:
    validate_rayservice(rendered)


def test_serve_config_is_valid(rendered: Rendered) -> None:
    schema = importlib.import_module("ray.serve.schema")
    text = rendered("RayService")["spec"]["serveConfigV2"]
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(text))
    for deployment in config.applications[0].deployments:
        if isinstance(scaling := deployment.autoscaling_config, dict):
            module, function = scaling["policy"]["policy_function"].split(":")
            assert callable(getattr(importlib.import_module(module), function))
    assert [app.import_path for app in config.applications] == ["joinwise.actors.serve:app"]


def test_pods_are_confined(rendered: Rendered) -> None:
    """Non-root, no escalation, no token; and no service links, whose variables joinwise would refuse."""
    for name, template in rendered.templates.items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        scales = name == "head" and rendered("RayService")["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling")
        assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (bool(scales), False), name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["privileged"]) == (False, False), name
            assert context["capabilities"]["drop"] == ["ALL"], name
            assert context["readOnlyRootFilesystem"], name
            assert container["resources"]["limits"], name


def test_config_loads(rendered: Rendered, tmp_path: Path) -> None:
    config = rendered.config(tmp_path, JOINWISE_CLUSTER="demo-joinwise-x7k2p")
    assert config.cluster == "demo-joinwise-x7k2p"
    assert (config.gateway.host, config.gateway.http_port, config.gateway.grpc_port) == ("0.0.0.0", 8000, 8001)
    assert config.ray.address == "auto"
    assert [pool.name for pool in config.pools] == [name for name in rendered.groups if name != "gateway"]


def test_service_links_would_stop_a_pod(tmp_path: Path) -> None:
    """Why `enableServiceLinks` is false."""
    with pytest.raises(ConfigError, match="JOINWISE_GATEWAY_SERVICE_HOST"):
        Rendered().config(tmp_path, JOINWISE_GATEWAY_SERVICE_HOST="10.0.0.1")


# Pools and the gateway.


def test_a_pod_holds_one_worker_of_itsfirst_pool(rendered: Rendered, tmp_path: Path) -> None:
    for pool in rendered.config(tmp_path).pools:
        group = rendered.groups[pool.name]
        (offered,) = shlex.split(group["rayStartParams"]["resources"])
        assert json.loads(offered) == pool.resources.custom == {f"joinwise_pool_{pool.name}": 1}
        scale = pool.autoscale
        least, most = (scale.least, scale.most) if scale else (pool.replicas, pool.replicas)
        assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (least, pool.replicas, most)
        assert pool.ops_port == 9400
        assert (group["rayStartParams"]["num-cpus"], pool.resources.num_cpus) == ("0", 0)


def test_cpu_pools_by_default(tmp_path: Path) -> None:
    pools = Rendered().config(tmp_path).pools
    assert [(pool.role, pool.device, pool.threads) for pool in pools] == [("prefill", "cpu", 2), ("decode", "cpu", 2)]


def test_gpufirst_pool(tmp_path: Path) -> None:
    rendered = Rendered(gpu_pools())
    prefill, decode = rendered.config(tmp_path).pools
    assert (prefill.device, prefill.resources.num_gpus, prefill.threads) == ("gpu", 2, 8)
    assert (decode.device, decode.resources.num_gpus, decode.threads) == ("cpu", 0, 3)
    assert rendered.groups["prefill"]["rayStartParams"]["num-gpus"] == "2"
    spec = rendered.groups["prefill"]["template"]["spec"]
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "H100"}
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert not {"nodeSelector", "tolerations"} & rendered.groups["decode"]["template"]["spec"].keys()


def test_gateway_replicas_have_pods_of_their_own() -> None:
    rendered = Rendered(SETTINGS)
    group, deployment = rendered.groups["gateway"], rendered.serve
    assert group["replicas"] == deployment["num_replicas"] == 3
    (offered,) = shlex.split(group["rayStartParams"]["resources"])
    assert json.loads(offered) == deployment["ray_actor_options"]["resources"]


def test_gateway_service_reaches_gateways_only() -> None:
    rendered = Rendered(SETTINGS)
    service = rendered("Service", "demo-joinwise-gateway")["spec"]
    chosen = [
        name
        for name, template in rendered.templates.items()
        if service["selector"].items() <= template["metadata"]["labels"].items()
    ]
    assert chosen == ["gateway"]
    assert service["type"] == "LoadBalancer"
    assert {port["name"]: port["port"] for port in service["ports"]} == {"http": 80, "grpc": 8001}
    ports = {port["name"] for port in rendered.templates["gateway"]["spec"]["containers"][0]["ports"]}
    assert ports == {port["targetPort"] for port in service["ports"]} | {"ops"}


def test_settings_arrive(tmp_path: Path) -> None:
    rendered = Rendered(SETTINGS)
    config = rendered.config(tmp_path)
    assert (config.kv.landing_bytes, config.kv.frame_bytes) == (1 << 30, 1 << 18)
    assert (config.redis.retries, config.router.max_queue, config.gateway.drain_s) == (0, 0, 5)
    assert config.gateway.replicas == 3
    assert rendered.env()["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    spec = rendered.templates["head"]["spec"]
    assert spec["containers"][0]["image"] == "registry.example/joinwise:v9"
    assert (spec["imagePullSecrets"], spec["nodeSelector"]) == ([{"name": "pull"}], {"zone": "a"})


def test_a_changed_config_changes_the_pods() -> None:
    def mark(values: dict[str, Any]) -> str:
        return Rendered(values).templates["head"]["metadata"]["annotations"]["checksum/config"]

    assert mark({}) == mark({}) != mark({"config": {"log": {"level": "debug"}}})


# Values that are wrong.


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"gatway": {}}, "gatway"),
        ({"gateway": {"replica": 2}}, "replica"),
        ({"gateway": {"replicas": "2"}}, "replicas"),
        ({"gateway": {"replicas": 0}}, "replicas"),
        ({"gateway": {"service": {"type": "Public"}}}, "type"),
        ({"redis": {"bundled": {"enabled": "yes"}}}, "enabled"),
        ({"redis": {"bundled": {"enabled": False}, "external": {"url": "redis://:pw@host"}}}, "url"),
        ({"config": {"rooter": {}}}, "rooter"),
        ({"config": {"router": {"lease": 1}}}, "lease"),
        ({"config": {"kv": {"frame_bytes": "no"}}}, "frame_bytes"),
        ({"config": {"cluster": "mine"}}, "cluster"),
        ({"config": {"pools": []}}, "pools"),
        ({"config": {"gateway": {"host": "127.0.0.1"}}}, "host"),
        ({"config": {"gateway": {"api_keys": ["secret"]}}}, "api_keys"),
        ({"config": {"redis": {"url": "embedded"}}}, "url"),
        ({"config": {"models": []}}, "models"),
        ({"pools": []}, "pools"),
        (first_pool(role="verify"), "role"),
        (first_pool(name="Prefill"), "name"),
        (first_pool(replicas=-1), "replicas"),
        (first_pool(cores=[0]), "cores"),
        (first_pool(engine="fast"), "engine"),
        (first_pool(resources={"limit": {}}), "limit"),
        (first_pool(tolerations=[{"effect": "Never"}]), "effect"),
        (first_pool(hosts=0), "hosts"),
        (first_pool(sharedMemory="much"), "sharedMemory"),
        (first_pool(topologySpread=[{"maxSkew": 1}]), "topologyKey"),
        (first_pool(ops_port=1), "ops_port"),
        ({"config": {"gateway": {"keys_file": "/x"}}}, "keys_file"),
        ({"config": {"tls": {"cert": "/x"}}}, "tls"),
        ({"config": {"gateway": {"jwt": {"algorithms": ["HS256"]}}}}, "algorithms"),
        ({"gateway": {"autoscaling": {"enabled": "on"}}}, "enabled"),
        ({"gateway": {"route": {"parentRefs": [{}]}}}, "name"),
        ({"networkPolicy": {"clients": [{"cidr": "10.0.0.0/8"}]}}, "cidr"),
        ({"disruptionBudget": {"maxUnavailable": "half"}}, "maxUnavailable"),
        ({"monitoring": {"serviceMonitor": {"interval": "often"}}}, "interval"),
        ({"modelStorage": {"claim": {"size": "big"}}}, "size"),
    ],
)
def test_bad_values_are_refused_by_the_schema(values: dict[str, Any], word: str) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=word):
        helm_python.Chart.load(CHART).validate_schema(copy.deepcopy(values))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (NO_REDIS, "redis: none is set"),
        ({"redis": {"external": {"url": "redis://host"}}}, "redis: both bundled and external are set"),
        (first_pool(name="decode"), "the name 'decode' is taken"),
        (first_pool(name="gateway"), "the name 'gateway' is taken"),
        (first_pool(model="other"), "'prefill' names the model 'other'"),
        (first_pool(role="decode"), "needs workers for prefill and for decode, or mixed ones; it has: decode, decode"),
        (first_pool(replicas=0), "it has: decode"),
        (drafts("fast", speculation=None), "'drafts' drafts for nobody"),
        (drafts("fast", speculation={"draft": "whole"}), "'fast' asks 'whole' for drafts, which is no pool with role"),
        (drafts("drafts", draft=None), "'drafts' looks drafts up in the prompt: that needs no GPU"),
        (drafts("drafts", draft={"model": "m", "dtype": "int8"}), "int8 weights of a draft model are for CPUs"),
        (
            {
                "config": {"models": [*DRAFTS["config"]["models"], {"name": "small", "model": "m"}]},
                "pools": [
                    *drafts("drafts", model="small")["pools"],
                    {**DRAFTS["pools"][0], "name": "s", "model": "small"},
                ],
            },
            "'fast' serves 'coder', but 'drafts' drafts for 'small'",
        ),
        ({"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, "minReplicas .9. is more than maxReplicas"),
        ({"gateway": {"tls": {"clientCertificates": True}}}, "clientCertificates needs gateway.tls.secret"),
        ({"gateway": {"route": {"enabled": True}}}, "no parentRefs"),
        ({"modelStorage": {"existingClaim": "a", "claim": {"enabled": True}}}, "both existingClaim and claim.enabled"),
        (
            {"redis": {"bundled": {"enabled": False}, "external": {"url": "redis://h", "tls": {"secret": "s"}}}},
            "write rediss://",
        ),
        (
            {
                "redis": {
                    "bundled": {"enabled": False},
                    "external": {"url": "rediss://h", "tls": {"clientCertificate": True}},
                }
            },
            "clientCertificate needs redis.external.tls.secret",
        ),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm_python.HelmError, match=sentence):
        helm_python.Chart.load(CHART).render(copy.deepcopy(values), name="demo", namespace="ml")
