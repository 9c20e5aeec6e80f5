"""Values that turn each toggle of the chart on or off, alone."""

from __future__ import annotations

from typing import Any

import yaml
from helpers.chart import CHART, EXAMPLES, defaults, first_pool

NO_REDIS = {"redis": {"bundled": {"enabled": False}}}
EXTERNAL = {"redis": {"bundled": {"enabled": False}, "external": {"url": "rediss://cache.example:6380/2"}}}
EXTERNAL_SECRET = {
    "redis": {"bundled": {"enabled": False}, "external": {"existingSecret": {"name": "cache", "key": "dsn"}}}
}
PERSISTENT = {"redis": {"bundled": {"persistence": {"enabled": True, "size": "3Gi", "storageClassName": "fast"}}}}
API_KEYS = {"gateway": {"apiKeysSecret": {"name": "tokens", "key": "keys"}}}
KEYS = {"gateway": {"keysSecret": {"name": "hashed", "key": "keys.yaml", "testKey": "probe"}}}
SCALED = {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 5, "targetRequests": 8}}}
POOL_SCALED = first_pool(autoscale={"least": 1, "most": 6})
POOL_AT_ZERO = first_pool(replicas=0, autoscale={"least": 0, "most": 3})
INGRESS = {
    "gateway": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "hosts": ["llm.example"],
            "tlsSecret": "llm-tls",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"},
        }
    }
}
ROUTE = {
    "gateway": {
        "route": {"enabled": True, "parentRefs": [{"name": "public", "namespace": "g"}], "hostnames": ["llm.example"]}
    }
}
TLS = {
    "tls": {"secret": "peers", "serverName": "inner"},
    "gateway": {"tls": {"secret": "front", "clientCertificates": True}},
    "monitoring": {"serviceMonitor": {"enabled": True}},
}
REDIS_TLS = {
    "redis": {
        "bundled": {"enabled": False},
        "external": {"url": "rediss://cache.example:6380", "tls": {"secret": "cache-tls", "clientCertificate": True}},
    }
}
CLAIM = {"modelStorage": {"claim": {"enabled": True, "size": "7Gi", "storageClassName": "nfs"}}}
MODEL_IMAGE = {"modelStorage": {"image": {"reference": "registry.example/m:1"}, "hubToken": {"name": "hub"}}}
STRICT = {
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}],
        "monitoring": [{"namespaceSelector": {"matchLabels": {"team": "watch"}}}],
        "operator": {"namespaceLabels": {"kubernetes.io/metadata.name": "kuberay"}},
        "egress": {"enabled": True, "allow": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}]},
    }
}
MONITORED = {
    "monitoring": {
        "serviceMonitor": {"enabled": True, "interval": "30s", "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboards": {"enabled": True},
    }
}
PLACED = first_pool(
    hosts=2,
    image="registry.example/gpu:1",
    sharedMemory="8Gi",
    affinity={"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    topologySpread=[{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
    priorityClassName="high",
    runtimeClassName="nvidia",
)
DRAFTS = yaml.safe_load((CHART / "examples" / "drafts.yaml").read_text(encoding="utf-8"))
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


def drafts(pool: str, **changes: Any) -> dict[str, Any]:
    """The example with drafts, with one pool changed."""
    return {**DRAFTS, "pools": [{**each, **changes} if each["name"] == pool else each for each in DRAFTS["pools"]]}


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
    "autoscaled gateways": SCALED,
    "autoscaled pool": POOL_SCALED,
    "pool at zero": POOL_AT_ZERO,
    "Ingress": INGRESS,
    "Gateway API": ROUTE,
    "TLS": TLS,
    "external Redis with TLS": REDIS_TLS,
    "bundled Redis with TLS": {"redis": {"bundled": {"tls": {"secret": "redis-tls"}}}},
    "hashed keys": KEYS,
    "claim": CLAIM,
    "model image": MODEL_IMAGE,
    "no disruption budgets": {"disruptionBudget": {"enabled": False}},
    "no network policies": {"networkPolicy": {"enabled": False}},
    "strict network policies": STRICT,
    "monitoring": MONITORED,
    "placed pools": PLACED,
} | {f"example {path.stem}": yaml.safe_load(path.read_text(encoding="utf-8")) for path in EXAMPLES}
