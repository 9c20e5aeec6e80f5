"""The chart in helm/: linted, rendered with every toggle on and off, validated strictly; wrong values are refused."""

from __future__ import annotations

import copy
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from joinwise.cluster.config import JoinwiseConfig, load_config
from joinwise.cluster.errors import ConfigError

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "joinwise"
KUBERNETES = "1.33"
RAY_SCHEMA = Path(
    os.environ.get("KUBERAY_SCHEMA") or ROOT.parent / "shared" / "data" / "kuberay" / "rayservice.v1.schema.json"
)
NO_REDIS = {"redis": {"bundled": {"enabled": False}}}
EXTERNAL = {"redis": {"bundled": {"enabled": False}, "external": {"url": "rediss://cache.example:6380/2"}}}
EXTERNAL_SECRET = {
    "redis": {"bundled": {"enabled": False}, "external": {"existingSecret": {"name": "cache", "key": "dsn"}}}
}
PERSISTENT = {"redis": {"bundled": {"persistence": {"enabled": True, "size": "3Gi", "storageClassName": "fast"}}}}
API_KEYS = {"gateway": {"apiKeysSecret": {"name": "tokens", "key": "keys"}}}
MODELS = {"modelStorage": {"existingClaim": "models"}}
NO_ACCOUNT = {"serviceAccount": {"create": False}}
SETTINGS = {
    "image": {"repository": "registry.example/joinwise", "tag": "v9", "pullSecrets": ["pull"]},
    "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
    "gateway": {"replicas": 3, "service": {"type": "LoadBalancer", "httpPort": 80, "annotations": {"a": "b"}}},
    "head": {"nodeSelector": {"zone": "a"}},
    "config": {
        "kv": {"landing_bytes": 1 << 30, "frame_bytes": 1 << 18},
        "redis": {"retries": 0},
        "gateway": {"drain_s": 5},
        "router": {"max_queue": 0},
    },
}


def gpu_pools() -> dict[str, Any]:
    """A pool on two GPUs of chosen nodes beside a CPU pool with half a core."""
    values = defaults()
    values["pools"][0] |= {
        "replicas": 2,
        "engine": {"tensor_parallel_size": 2},
        "resources": {"limits": {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 2}},
        "nodeSelector": {"nvidia.com/gpu.product": "H100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    values["pools"][1]["resources"] = {"requests": {"cpu": "500m"}, "limits": {"cpu": "3500m"}}
    return {"pools": values["pools"]}


def defaults() -> dict[str, Any]:
    return yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


VARIANTS = {
    "default": {},
    "external Redis": EXTERNAL,
    "external Redis from a secret": EXTERNAL_SECRET,
    "persistent Redis": PERSISTENT,
    "API keys": API_KEYS,
    "model storage": MODELS,
    "no service account": NO_ACCOUNT,
    "GPU pools": gpu_pools(),
    "settings": SETTINGS,
}


class Rendered:
    """Manifests of one rendering, by kind and name."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        chart = helm_python.Chart.load(CHART)
        chart.validate_schema(copy.deepcopy(values or {}))
        files = chart.render(copy.deepcopy(values or {}), name="demo", namespace="ml")
        self.notes = next(text for path, text in files.items() if path.endswith("NOTES.txt"))
        texts = [text for path, text in files.items() if not path.endswith("NOTES.txt")]
        self.all = [item for text in texts for item in yaml.safe_load_all(text) if item]
        self._named = {(item["kind"], item["metadata"]["name"]): item for item in self.all}

    def __call__(self, kind: str, name: str = "demo-joinwise") -> dict[str, Any]:
        return self._named[kind, name]

    def has(self, kind: str, name: str = "demo-joinwise") -> bool:
        return (kind, name) in self._named

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Worker groups of the Ray cluster."""
        ray = self("RayService")["spec"]["rayClusterConfig"]
        return {group["groupName"]: group for group in ray["workerGroupSpecs"]}

    @property
    def templates(self) -> dict[str, dict[str, Any]]:
        """Pod templates of everything that runs."""
        found = {name: group["template"] for name, group in self.groups.items()}
        found["head"] = self("RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
        if self.has("StatefulSet", "demo-joinwise-redis"):
            found["redis"] = self("StatefulSet", "demo-joinwise-redis")["spec"]["template"]
        test = self("Pod", "demo-joinwise-test")
        return found | {"test": {"metadata": test["metadata"], "spec": test["spec"]}}

    def env(self, template: str = "prefill") -> dict[str, Any]:
        """Environment of a template's container: values, or where they come from."""
        entries = self.templates[template]["spec"]["containers"][0]["env"]
        return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}

    def config(self, folder: Path, **env: str) -> JoinwiseConfig:
        """The rendered joinwise.yaml, read as a pod reads it."""
        path = folder / "joinwise.yaml"
        path.write_text(self("ConfigMap")["data"]["joinwise.yaml"], encoding="utf-8")
        return load_config(path, env)


@pytest.fixture(params=VARIANTS, scope="module")
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return Rendered(VARIANTS[request.param])


# The whole.


@pytest.mark.parametrize("variant", VARIANTS)
def test_lint_finds_nothing(variant: str) -> None:
    report = helm_python.lint(CHART, copy.deepcopy(VARIANTS[variant]), strict=True, namespace="ml")
    assert (report["messages"], report["errors"]) == ([], [])


def test_generated_files_are_current() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "gen_helm.py", "--check"], check=True)


def test_chart_has_the_package_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{chart["appVersion"]}"' in project
    assert f"ray[default,serve]=={defaults()['rayVersion']}" in project


def test_core_manifests_are_valid(rendered: Rendered) -> None:
    for manifest in rendered.all:
        if manifest["kind"] != "RayService":
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    for name, template in rendered.templates.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_rayservice_is_valid(rendered: Rendered) -> None:
    if not RAY_SCHEMA.exists():
        pytest.skip(f"no RayService schema at {RAY_SCHEMA}; set KUBERAY_SCHEMA")
    schema = json.loads(RAY_SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(rendered("RayService"))


def test_serve_config_is_valid(rendered: Rendered) -> None:
    schema = importlib.import_module("ray.serve.schema")
    text = rendered("RayService")["spec"]["serveConfigV2"]
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert [app.import_path for app in config.applications] == ["joinwise.actors.serve:app"]


def test_pods_are_confined(rendered: Rendered) -> None:
    """Non-root, no escalation, no token; and no service links, whose variables joinwise would refuse."""
    for name, template in rendered.templates.items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False), name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert (context["allowPrivilegeEscalation"], context["privileged"]) == (False, False), name
            assert context["capabilities"]["drop"] == ["ALL"], name
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


def test_a_pod_holds_one_worker_of_its_pool(rendered: Rendered, tmp_path: Path) -> None:
    for pool in rendered.config(tmp_path).pools:
        group = rendered.groups[pool.name]
        (offered,) = shlex.split(group["rayStartParams"]["resources"])
        assert json.loads(offered) == pool.resources.custom == {f"joinwise_pool_{pool.name}": 1}
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == pool.replicas
        assert (group["rayStartParams"]["num-cpus"], pool.resources.num_cpus) == ("0", 0)


def test_cpu_pools_by_default(tmp_path: Path) -> None:
    pools = Rendered().config(tmp_path).pools
    assert [(pool.role, pool.device, pool.threads) for pool in pools] == [("prefill", "cpu", 2), ("decode", "cpu", 2)]


def test_gpu_pool(tmp_path: Path) -> None:
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
    group = rendered.groups["gateway"]
    serve = yaml.safe_load(rendered("RayService")["spec"]["serveConfigV2"])
    (deployment,) = serve["applications"][0]["deployments"]
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
    assert ports == {port["targetPort"] for port in service["ports"]}


def test_probes_ask_what_they_guard() -> None:
    for name, template in Rendered().templates.items():
        container = template["spec"]["containers"][0]
        if name == "test":
            continue
        assert container["livenessProbe"], name
        if name != "redis":
            path = "/health" if name == "gateway" else "/api/healthz"
            assert container["readinessProbe"]["httpGet"]["path"] == path, name


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


# Toggles: on and off.


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


# Values that are wrong.


def _pool(**changes: Any) -> dict[str, Any]:
    values = defaults()
    values["pools"][0] |= changes
    return {"pools": values["pools"]}


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
        (_pool(role="verify"), "role"),
        (_pool(name="Prefill"), "name"),
        (_pool(replicas=-1), "replicas"),
        (_pool(cores=[0]), "cores"),
        (_pool(engine="fast"), "engine"),
        (_pool(resources={"limit": {}}), "limit"),
        (_pool(tolerations=[{"effect": "Never"}]), "effect"),
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
        (_pool(name="decode"), "the name 'decode' is taken"),
        (_pool(name="gateway"), "the name 'gateway' is taken"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm_python.HelmError, match=sentence):
        helm_python.Chart.load(CHART).render(copy.deepcopy(values), name="demo", namespace="ml")
