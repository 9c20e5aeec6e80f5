"""Every toggle of the chart: what it makes when it is on, and that nothing of it is left when it is off."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.chart import ROOT, Rendered
from helpers.chart_values import (
    API_KEYS,
    CLAIM,
    DRAFTS,
    EXTERNAL,
    EXTERNAL_SECRET,
    INGRESS,
    KEYS,
    MODEL_IMAGE,
    MODELS,
    MONITORED,
    NO_ACCOUNT,
    PERSISTENT,
    PLACED,
    POOL_AT_ZERO,
    POOL_SCALED,
    REDIS_TLS,
    ROUTE,
    SCALED,
    STRICT,
    TLS,
)

# Redis and keys.


def test_bundled_redis_on(tmp_path: Path) -> None:
    rendered = Rendered()
    assert rendered.has("StatefulSet", "demo-joinwise-redis")
    assert rendered.has("Service", "demo-joinwise-redis")
    assert rendered.config(tmp_path).redis.url == "redis://demo-joinwise-redis:6379"
    secret = rendered("Secret", "demo-joinwise-redis")["stringData"]
    assert len(secret["password"]) == 32
    assert rendered.env()["JOINWISE_REDIS_PASSWORD"]["secretKeyRef"]["name"] == "demo-joinwise-redis"
    assert secret["password"] != Rendered()("Secret", "demo-joinwise-redis")["stringData"]["password"]


@pytest.mark.parametrize("values", [EXTERNAL, EXTERNAL_SECRET])
def test_bundled_redis_off(values: dict[str, Any]) -> None:
    rendered = Rendered(values)
    assert not {manifest["kind"] for manifest in rendered.all} & {"StatefulSet", "Secret"}
    assert "JOINWISE_REDIS_PASSWORD" not in rendered.env()


def test_external_redis_url(tmp_path: Path) -> None:
    rendered = Rendered(EXTERNAL)
    assert rendered.config(tmp_path).redis.url == "rediss://cache.example:6380/2"
    assert "JOINWISE_REDIS__URL" not in rendered.env()


def test_external_redis_from_a_secret(tmp_path: Path) -> None:
    rendered = Rendered(EXTERNAL_SECRET)
    assert rendered.env()["JOINWISE_REDIS__URL"] == {"secretKeyRef": {"name": "cache", "key": "dsn"}}
    config = rendered.config(tmp_path, JOINWISE_REDIS__URL="redis://:secret@cache:6379")
    assert config.redis.url == "redis://:secret@cache:6379"


def test_persistence_on() -> None:
    rendered = Rendered(PERSISTENT)
    spec = rendered("StatefulSet", "demo-joinwise-redis")["spec"]
    claim = spec["volumeClaimTemplates"][0]["spec"]
    assert (claim["resources"]["requests"]["storage"], claim["storageClassName"]) == ("3Gi", "fast")
    assert [volume["name"] for volume in spec["template"]["spec"]["volumes"]] == ["config"]
    assert "appendonly yes" in rendered("Secret", "demo-joinwise-redis")["stringData"]["redis.conf"]


def test_persistence_off() -> None:
    rendered = Rendered()
    spec = rendered("StatefulSet", "demo-joinwise-redis")["spec"]
    assert "volumeClaimTemplates" not in spec
    assert {"name": "data", "emptyDir": {}} in spec["template"]["spec"]["volumes"]
    assert "appendonly no" in rendered("Secret", "demo-joinwise-redis")["stringData"]["redis.conf"]


def test_api_keys_on(tmp_path: Path) -> None:
    rendered = Rendered(API_KEYS)
    source = {"secretKeyRef": {"name": "tokens", "key": "keys"}}
    assert rendered.env("gateway")["JOINWISE_GATEWAY__API_KEYS"] == rendered.env("test")["API_KEYS"] == source
    config = rendered.config(tmp_path, JOINWISE_GATEWAY__API_KEYS='["one", "two"]')
    assert config.gateway.api_keys == ["one", "two"]
    assert "Everyone" not in rendered.notes


def test_api_keys_off() -> None:
    rendered = Rendered()
    assert "JOINWISE_GATEWAY__API_KEYS" not in rendered.env("gateway")
    assert "API_KEYS" not in rendered.env("test")
    assert "Everyone who reaches the Service may use it" in rendered.notes


@pytest.mark.parametrize(
    ("values", "source"),
    [(MODELS, {"persistentVolumeClaim": {"claimName": "models"}}), ({}, {"emptyDir": {}})],
    ids=["on", "off"],
)
def test_model_storage(values: dict[str, Any], source: dict[str, Any]) -> None:
    for name, template in Rendered(values).templates.items():
        if name not in ("redis", "test"):
            assert {"name": "models", **source} in template["spec"]["volumes"], name


@pytest.mark.parametrize(("values", "account"), [({}, "demo-joinwise"), (NO_ACCOUNT, "default")], ids=["on", "off"])
def test_service_account(values: dict[str, Any], account: str) -> None:
    rendered = Rendered(values)
    assert rendered.has("ServiceAccount") == (values == {})
    assert {template["spec"]["serviceAccountName"] for template in rendered.templates.values()} == {account}


@pytest.mark.parametrize(("enabled", "mode"), [(True, "token"), (False, "disabled")], ids=["on", "off"])
def test_ray_auth(enabled: bool, mode: str) -> None:
    ray = Rendered({"rayAuth": {"enabled": enabled}})("RayService")["spec"]["rayClusterConfig"]
    assert ray["authOptions"] == {"mode": mode}


@pytest.mark.parametrize("strategy", ["NewCluster", "None"])
def test_upgrade_strategy(strategy: str) -> None:
    assert Rendered({"upgradeStrategy": strategy})("RayService")["spec"]["upgradeStrategy"] == {"type": strategy}


def test_tls_of_bundled_redis_on(tmp_path: Path) -> None:
    rendered = Rendered({"redis": {"bundled": {"tls": {"secret": "redis-tls"}}}})
    redis = rendered.config(tmp_path).redis
    assert redis.url == "rediss://demo-joinwise-redis:6379"
    assert redis.tls is not None and redis.tls.ca == "/etc/joinwise-tls/redis/ca.crt"
    assert rendered.mounts("prefill")["/etc/joinwise-tls/redis"]["secret"] == {"secretName": "redis-tls"}
    assert rendered.mounts("redis")["/etc/redis-tls"]["secret"] == {"secretName": "redis-tls"}
    conf = rendered("Secret", "demo-joinwise-redis")["stringData"]["redis.conf"]
    assert {"port 0", "tls-port 6379"} <= set(conf.splitlines())
    assert "--tls" in rendered.container("redis")["readinessProbe"]["exec"]["command"][-1]
    containers = rendered.templates["redis"]["spec"]["containers"]
    assert [each["name"] for each in containers] == ["redis", "certificates"]


def test_tls_of_bundled_redis_off(tmp_path: Path) -> None:
    rendered = Rendered()
    assert rendered.config(tmp_path).redis.tls is None
    assert "tls" not in rendered("Secret", "demo-joinwise-redis")["stringData"]["redis.conf"]
    assert "/etc/redis-tls" not in rendered.mounts("redis")
    assert [each["name"] for each in rendered.templates["redis"]["spec"]["containers"]] == ["redis"]


def test_tls_of_external_redis_on(tmp_path: Path) -> None:
    rendered = Rendered(REDIS_TLS)
    tls = rendered.config(tmp_path).redis.tls
    assert tls is not None
    folder = "/etc/joinwise-tls/redis"
    assert (tls.ca, tls.cert, tls.key) == (f"{folder}/ca.crt", f"{folder}/tls.crt", f"{folder}/tls.key")
    assert rendered.mounts("gateway")[folder]["secret"] == {"secretName": "cache-tls"}


def test_tls_of_external_redis_off(tmp_path: Path) -> None:
    rendered = Rendered(EXTERNAL)
    assert rendered.config(tmp_path).redis.tls is None
    assert "/etc/joinwise-tls/redis" not in rendered.mounts("gateway")


def test_hashed_keys_on(tmp_path: Path) -> None:
    rendered = Rendered(KEYS)
    assert rendered.config(tmp_path).gateway.keys_file == "/etc/joinwise-keys/keys.yaml"
    assert rendered.mounts("gateway")["/etc/joinwise-keys"]["secret"] == {"secretName": "hashed"}
    assert "/etc/joinwise-keys" not in rendered.mounts("prefill")
    assert rendered.env("test")["API_KEYS"] == {"secretKeyRef": {"name": "hashed", "key": "probe"}}
    assert "Everyone" not in rendered.notes


def test_hashed_keys_without_a_key_for_the_test() -> None:
    env = Rendered({"gateway": {"keysSecret": {"name": "hashed"}}}).env("test")
    assert env["REFUSED"] == "1" and "API_KEYS" not in env


def test_hashed_keys_off(tmp_path: Path) -> None:
    rendered = Rendered()
    assert rendered.config(tmp_path).gateway.keys_file is None
    assert "/etc/joinwise-keys" not in rendered.mounts("gateway")


# TLS.


def test_tls_on(tmp_path: Path) -> None:
    rendered = Rendered(TLS)
    config = rendered.config(tmp_path)
    assert config.tls is not None and config.gateway.tls is not None
    assert (config.tls.ca, config.tls.server_name) == ("/etc/joinwise-tls/peers/ca.crt", "inner")
    assert config.gateway.tls.ca == "/etc/joinwise-tls/gateway/ca.crt"
    for name in ("head", "gateway", "prefill", "decode"):
        assert rendered.mounts(name)["/etc/joinwise-tls/peers"]["secret"] == {"secretName": "peers"}
        assert ("/etc/joinwise-tls/gateway" in rendered.mounts(name)) == (name == "gateway"), name
    gateway = rendered.container("gateway")
    assert gateway["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert "--tls" in gateway["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert "--tls" in gateway["livenessProbe"]["exec"]["command"][-1]
    assert rendered.env("test")["BASE"].startswith("https://")
    (endpoint,) = rendered("ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["tlsConfig"]["serverName"] == "inner"
    ports = rendered("Service", "demo-joinwise-gateway")["spec"]["ports"]
    assert {port["appProtocol"] for port in ports} == {"https"}


def test_tls_off(tmp_path: Path) -> None:
    rendered = Rendered({"monitoring": {"serviceMonitor": {"enabled": True}}})
    config = rendered.config(tmp_path)
    assert config.tls is None and config.gateway.tls is None
    assert not [path for name in rendered.templates for path in rendered.mounts(name) if "tls" in path]
    assert rendered.container("gateway")["readinessProbe"]["httpGet"]["scheme"] == "HTTP"
    assert "--tls" not in rendered.container("gateway")["livenessProbe"]["exec"]["command"][-1]
    assert "scheme" not in rendered("ServiceMonitor")["spec"]["endpoints"][0]


def test_tls_without_client_certificates(tmp_path: Path) -> None:
    tls = Rendered({"gateway": {"tls": {"secret": "front"}}}).config(tmp_path).gateway.tls
    assert tls is not None and tls.ca is None


# The way in.


def test_ingress_on() -> None:
    spec = Rendered(INGRESS)("Ingress")["spec"]
    (rule,) = spec["rules"]
    assert (spec["ingressClassName"], rule["host"]) == ("nginx", "llm.example")
    assert spec["tls"] == [{"secretName": "llm-tls", "hosts": ["llm.example"]}]
    backend = {"service": {"name": "demo-joinwise-gateway", "port": {"name": "http"}}}
    assert rule["http"]["paths"][0]["backend"] == backend
    assert Rendered({"gateway": {"ingress": {"enabled": True}}})("Ingress")["spec"] == {"defaultBackend": backend}


def test_ingress_off() -> None:
    assert not Rendered().kinds("Ingress")


def test_route_on() -> None:
    rendered = Rendered(ROUTE)
    ports = {kind: rendered(kind)["spec"]["rules"][0]["backendRefs"] for kind in ("HTTPRoute", "GRPCRoute")}
    assert ports["HTTPRoute"] == [{"name": "demo-joinwise-gateway", "port": 8000}]
    assert ports["GRPCRoute"] == [{"name": "demo-joinwise-gateway", "port": 8001}]
    assert rendered("HTTPRoute")["spec"]["hostnames"] == ["llm.example"]


def test_route_without_grpc() -> None:
    values = {"gateway": {"route": {**ROUTE["gateway"]["route"], "grpc": False}}}
    assert Rendered(values).kinds("HTTPRoute") and not Rendered(values).kinds("GRPCRoute")


def test_route_off() -> None:
    assert not Rendered().kinds("HTTPRoute") and not Rendered().kinds("GRPCRoute")


# Numbers, places, life.


def test_autoscaling_on() -> None:
    rendered = Rendered(SCALED)
    ray, group = rendered("RayService")["spec"]["rayClusterConfig"], rendered.groups["gateway"]
    scaling = rendered.serve["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (2, 5, 8)
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 5)
    assert rendered.serve["num_replicas"] == "auto"
    assert ray["enableInTreeAutoscaling"] is True
    assert rendered.templates["head"]["spec"]["automountServiceAccountToken"] is True
    assert rendered.templates["gateway"]["spec"]["automountServiceAccountToken"] is False


def test_autoscaling_off() -> None:
    rendered = Rendered()
    ray, group = rendered("RayService")["spec"]["rayClusterConfig"], rendered.groups["gateway"]
    assert "autoscaling_config" not in rendered.serve and "enableInTreeAutoscaling" not in ray
    assert group["minReplicas"] == group["maxReplicas"] == 1


def test_pool_autoscaling_on(tmp_path: Path) -> None:
    rendered = Rendered(POOL_SCALED)
    ray = rendered("RayService")["spec"]["rayClusterConfig"]
    group, other = rendered.groups["prefill"], rendered.groups["decode"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 6)
    assert other["minReplicas"] == other["maxReplicas"] == 1
    assert ray["enableInTreeAutoscaling"] is True and rendered.serve["num_replicas"] == 1
    assert rendered.templates["head"]["spec"]["automountServiceAccountToken"] is True
    bounds = rendered.config(tmp_path).pools[0].autoscale
    assert bounds is not None and (bounds.least, bounds.most) == (1, 6)


def test_a_pool_at_zero_has_no_pod(tmp_path: Path) -> None:
    rendered = Rendered(POOL_AT_ZERO)
    group = rendered.groups["prefill"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 3)
    config = rendered.config(tmp_path)
    assert config.wakes == {config.models[0].public_name: 300}


def test_pool_autoscaling_off(tmp_path: Path) -> None:
    rendered = Rendered()
    assert "enableInTreeAutoscaling" not in rendered("RayService")["spec"]["rayClusterConfig"]
    assert rendered.config(tmp_path).pools[0].autoscale is None


def test_drafts_on(tmp_path: Path) -> None:
    rendered = Rendered(DRAFTS)
    whole, fast, drafts = rendered.config(tmp_path).pools
    assert (fast.speculation is not None and fast.speculation.draft, whole.speculation) == ("drafts", None)
    assert drafts.draft is not None and drafts.draft.slots == 32
    assert [pool.device for pool in (whole, fast, drafts)] == ["cpu", "cpu", "gpu"]
    assert drafts.resources.num_gpus == 1
    containers = {name: template["spec"]["containers"][0] for name, template in rendered.templates.items()}
    assert containers["drafts"]["image"] != containers["fast"]["image"]


def test_drafts_off(tmp_path: Path) -> None:
    assert all(pool.draft is pool.speculation is None for pool in Rendered().config(tmp_path).pools)


def test_placement_on(tmp_path: Path) -> None:
    rendered = Rendered(PLACED)
    group, spec = rendered.groups["prefill"], rendered.templates["prefill"]["spec"]
    assert (group["numOfHosts"], spec["priorityClassName"], spec["runtimeClassName"]) == (2, "high", "nvidia")
    assert spec["containers"][0]["image"] == "registry.example/gpu:1"
    assert rendered.mounts("prefill")["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    (spread,) = spec["topologySpreadConstraints"]
    counted = spread["labelSelector"]["matchLabels"]
    assert counted.items() <= rendered.templates["prefill"]["metadata"]["labels"].items()
    assert not counted.items() <= rendered.templates["decode"]["metadata"]["labels"].items()
    assert "podAntiAffinity" in spec["affinity"]
    # Of several pods only one holds the worker; the others must become ready without.
    assert spec["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/api/healthz"
    assert rendered.config(tmp_path).pools[0].resources.num_gpus == 0


def test_placement_off() -> None:
    rendered = Rendered()
    spec = rendered.templates["prefill"]["spec"]
    placed = {"affinity", "topologySpreadConstraints", "priorityClassName", "runtimeClassName"}
    assert not placed & spec.keys() and "numOfHosts" not in rendered.groups["prefill"]
    assert "/dev/shm" not in rendered.mounts("prefill")


def test_probes_ask_what_they_guard() -> None:
    rendered = Rendered({"config": {"models": [{"name": "smollm2-135m-instruct", "model": "m"}]}})
    for name in ("prefill", "decode", "gateway"):
        container = rendered.container(name)
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz", name
        assert container["livenessProbe"]["exec"]["command"][-1].endswith(" live"), name
        assert {"name": "ops", "containerPort": 9400} in container["ports"], name
    assert rendered.container("head")["readinessProbe"]["httpGet"]["path"] == "/api/healthz"
    assert rendered.container("redis")["livenessProbe"]


def test_pods_drain_before_they_end() -> None:
    rendered = Rendered(
        {"config": {"models": [{"name": "smollm2-135m-instruct", "model": "m"}], "gateway": {"drain_s": 90}}}
    )
    for name in ("prefill", "gateway"):
        command = shlex.split(rendered.container(name)["lifecycle"]["preStop"]["exec"]["command"][-1])
        assert command[-1] == "drain"
        waits = float(command[command.index("--timeout") + 1])
        assert 90 < waits < rendered.templates[name]["spec"]["terminationGracePeriodSeconds"], name
    assert "lifecycle" not in rendered.container("head")


def test_disruption_budgets_on() -> None:
    rendered = Rendered({"disruptionBudget": {"maxUnavailable": "25%"}})
    budgets = {each["metadata"]["name"]: each["spec"] for each in rendered.kinds("PodDisruptionBudget")}
    assert budgets.keys() == {f"demo-joinwise-{name}" for name in ("gateway", "prefill", "decode")}
    for name, spec in budgets.items():
        chosen = [
            each
            for each, template in rendered.templates.items()
            if spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        ]
        assert chosen == [name.removeprefix("demo-joinwise-")]
        assert spec["maxUnavailable"] == "25%"


def test_disruption_budgets_off() -> None:
    assert not Rendered({"disruptionBudget": {"enabled": False}}).kinds("PodDisruptionBudget")


# Who may reach whom.


def test_network_policies_on() -> None:
    rendered = Rendered()
    policies = {each["metadata"]["name"]: each["spec"] for each in rendered.kinds("NetworkPolicy")}
    assert policies.keys() == {f"demo-joinwise{suffix}" for suffix in ("", "-gateway", "-head", "-redis")}
    assert "from" not in policies["demo-joinwise-gateway"]["ingress"][0]  # everybody
    assert policies["demo-joinwise-redis"]["ingress"][0]["ports"] == [{"port": "redis", "protocol": "TCP"}]
    (operator,) = policies["demo-joinwise-head"]["ingress"][0]["from"]
    assert operator["namespaceSelector"] == {}
    # What may come from outside the release: only named ports.
    inside, watched = policies["demo-joinwise"]["ingress"]
    assert "ports" not in inside and "podSelector" in inside["from"][0]
    assert [port["port"] for port in watched["ports"]] == ["ops"]
    assert policies["demo-joinwise"]["policyTypes"] == ["Ingress"]


def test_network_policies_strict() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in Rendered(STRICT).kinds("NetworkPolicy")}
    assert policies["demo-joinwise-gateway"]["ingress"][0]["from"] == STRICT["networkPolicy"]["clients"]
    assert policies["demo-joinwise"]["ingress"][1]["from"] == STRICT["networkPolicy"]["monitoring"]
    (operator,) = policies["demo-joinwise-head"]["ingress"][0]["from"]
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay"}
    assert policies["demo-joinwise"]["policyTypes"] == ["Ingress", "Egress"]
    assert policies["demo-joinwise"]["egress"][2:] == STRICT["networkPolicy"]["egress"]["allow"]


def test_network_policies_off() -> None:
    assert not Rendered({"networkPolicy": {"enabled": False}}).kinds("NetworkPolicy")


# Models.


def test_claim_on() -> None:
    rendered = Rendered(CLAIM)
    spec = rendered("PersistentVolumeClaim", "demo-joinwise-models")["spec"]
    assert (spec["resources"]["requests"]["storage"], spec["storageClassName"]) == ("7Gi", "nfs")
    assert rendered.mounts("decode")["/models"]["persistentVolumeClaim"] == {"claimName": "demo-joinwise-models"}


def test_claim_off() -> None:
    assert not Rendered().kinds("PersistentVolumeClaim")


def test_model_image_on() -> None:
    rendered = Rendered(MODEL_IMAGE)
    mount = rendered.mounts("prefill")["/model-image"]
    assert mount["image"] == {"reference": "registry.example/m:1", "pullPolicy": "IfNotPresent"}
    assert mount["readOnly"]
    assert rendered.env()["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}


def test_model_image_off() -> None:
    rendered = Rendered()
    assert "/model-image" not in rendered.mounts("prefill") and "HF_TOKEN" not in rendered.env()


# Seen.


def test_monitoring_on() -> None:
    rendered = Rendered(MONITORED)
    monitor = rendered("ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["endpoints"][0]["interval"] == "30s"
    service = rendered("Service", "demo-joinwise-metrics")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    gateway = rendered("Service", "demo-joinwise-gateway")
    assert not monitor["spec"]["selector"]["matchLabels"].items() <= gateway["metadata"]["labels"].items()
    chosen = {
        name
        for name, template in rendered.templates.items()
        if service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    }
    assert chosen == {"gateway", "prefill", "decode"}
    assert rendered("PrometheusRule")["spec"]["groups"][0]["name"] == "joinwise"
    boards = rendered("ConfigMap", "demo-joinwise-dashboards")
    files = (ROOT / "helm" / "joinwise" / "files" / "dashboards").glob("*.json")
    assert boards["data"].keys() == {path.name for path in files} != set()
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_monitoring_off() -> None:
    rendered = Rendered()
    assert not {"ServiceMonitor", "PrometheusRule"} & {each["kind"] for each in rendered.all}
    assert not rendered.has("ConfigMap", "demo-joinwise-dashboards")
