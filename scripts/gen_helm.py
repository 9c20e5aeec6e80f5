"""Generate what follows from the chart's `values.yaml`: its schema, and the table of values in its README.

`values.yaml` is where a value is described: the comment above a key becomes its description in both. What may stand
under `config:` is joinwise.yaml's own schema, less the keys that the chart decides. Types of the rest are below.

    python scripts/gen_helm.py            write helm/joinwise/values.schema.json and the table in README.md
    python scripts/gen_helm.py --check    exit 1 and name what is not current
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from joinwise.cluster.config import json_schema

CHART = Path(__file__).resolve().parent.parent / "helm" / "joinwise"
VALUES, SCHEMA, README = CHART / "values.yaml", CHART / "values.schema.json", CHART / "README.md"
BEGIN, END = "<!-- values: made by scripts/gen_helm.py -->", "<!-- end of values -->"
Schema = dict[str, Any]

#: Keys of joinwise.yaml that the chart sets itself, by the definition that holds them.
DECIDED = {
    "": ("cluster", "pools", "tls"),
    "RedisConfig": ("url", "port", "data_dir", "tls"),
    "RayConfig": ("address", "namespace"),
    "GatewayConfig": ("host", "http_port", "grpc_port", "ops_port", "replicas", "api_keys", "keys_file", "tls"),
    "PoolConfig": ("device", "resources", "cores", "ops_port"),
}
#: Sections of joinwise.yaml that only the chart writes.
ONLY_THE_CHARTS = ("PeerTlsConfig", "PoolConfig", "RedisTlsConfig", "Resources", "TlsConfig")


@dataclass(frozen=True)
class Value:
    """One key of values.yaml: its path (items of a list are `[]`), the comment above it, its default."""

    path: str
    comment: str
    default: Any
    leaf: bool


def one(*kinds: str, **more: Any) -> Schema:
    """A value of one of these types."""
    return {"type": kinds[0] if len(kinds) == 1 else list(kinds), **more}


def record(_required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object with exactly these keys."""
    needed = {"required": list(_required)} if _required else {}
    return one("object", additionalProperties=False, properties=properties, **needed)


def items(schema: Schema) -> Schema:
    return one("array", items=schema)


TEXT, FILLED, FLAG, ANY = one("string"), one("string", minLength=1), one("boolean"), one("object")
COUNT, PORT = one("integer", minimum=1, maximum=1000), one("integer", minimum=1, maximum=65535)
TEXTS = one("object", additionalProperties=TEXT)
PULL = one("string", enum=["Always", "IfNotPresent", "Never"])
IMAGE = {"repository": FILLED, "tag": TEXT, "pullPolicy": PULL}
SECRET = {"name": TEXT, "key": FILLED}
SIZE = one("string", pattern=r"^[0-9.]+([KMGTPE]i?|m)?$")
QUANTITIES = one("object", additionalProperties=one("string", "number"))
TOLERATION = record(
    key=TEXT,
    operator=one("string", enum=["Exists", "Equal"]),
    value=TEXT,
    effect=one("string", enum=["NoSchedule", "PreferNoSchedule", "NoExecute"]),
    tolerationSeconds=one("integer"),
)
SPREAD = record(
    ("maxSkew", "topologyKey", "whenUnsatisfiable"),
    maxSkew=COUNT,
    minDomains=COUNT,
    topologyKey=FILLED,
    whenUnsatisfiable=one("string", enum=["DoNotSchedule", "ScheduleAnyway"]),
    labelSelector=ANY,
    matchLabelKeys=items(FILLED),
    nodeAffinityPolicy=one("string", enum=["Honor", "Ignore"]),
    nodeTaintsPolicy=one("string", enum=["Honor", "Ignore"]),
)
AFFINITY = record(nodeAffinity=ANY, podAffinity=ANY, podAntiAffinity=ANY)
PEER = record(namespaceSelector=ANY, podSelector=ANY, ipBlock=ANY)
PARENT = record(("name",), name=FILLED, namespace=FILLED, sectionName=FILLED, port=PORT, kind=FILLED, group=TEXT)
ENV = record(("name",), name=FILLED, value=TEXT, valueFrom=ANY)
RESOURCES = record(requests=QUANTITIES, limits=QUANTITIES)
POD = {
    "resources": RESOURCES,
    "nodeSelector": TEXTS,
    "tolerations": items(TOLERATION),
    "affinity": AFFINITY,
    "priorityClassName": TEXT,
}
SERVED = {**POD, "topologySpread": items(SPREAD)}
FOUND = record(enabled=FLAG, labels=TEXTS)


def values_schema() -> Schema:
    """Types of values.yaml, with joinwise.yaml's schema under `config`; no descriptions of ours yet."""
    joinwise = json_schema()
    definitions = joinwise["$defs"]
    config = {key: joinwise[key] for key in ("type", "properties", "additionalProperties")}
    for name, keys in DECIDED.items():
        owner = definitions[name] if name else config
        owner["properties"] = {key: value for key, value in owner["properties"].items() if key not in keys}
    config["required"] = ["models"]
    pool = definitions["PoolConfig"]["properties"]
    for name in ONLY_THE_CHARTS:
        del definitions[name]
    pool |= {"hosts": COUNT, "image": TEXT, "sharedMemory": {**SIZE, "pattern": rf"^$|{SIZE['pattern']}"}}
    pool |= {"runtimeClassName": TEXT, **SERVED}
    root = record(
        **{"global": one("object")},
        image=record(**IMAGE, pullSecrets=items(FILLED)),
        rayVersion=one("string", pattern=r"^\d+\.\d+\.\d+$"),
        rayAuth=record(enabled=FLAG),
        upgradeStrategy=one("string", enum=["NewCluster", "None"]),
        config=config,
        pools={**items(record(("name", "model", "role", "resources"), **pool)), "minItems": 1},
        gateway=_gateway(),
        tls=record(secret=TEXT, serverName=FILLED),
        head=record(**POD),
        redis=_redis(),
        modelStorage=record(
            existingClaim=TEXT,
            claim=record(enabled=FLAG, size=SIZE, storageClassName=TEXT),
            image=record(reference=TEXT, pullPolicy=PULL),
            hubToken=record(**SECRET),
        ),
        disruptionBudget=record(
            enabled=FLAG,
            maxUnavailable={"anyOf": [one("integer", minimum=0), one("string", pattern=r"^[0-9]+%$")]},
        ),
        networkPolicy=record(
            enabled=FLAG,
            clients=items(PEER),
            monitoring=items(PEER),
            operator=record(namespaceLabels=TEXTS),
            egress=record(enabled=FLAG, allow=items(record(to=items(PEER), ports=items(ANY)))),
        ),
        monitoring=record(
            serviceMonitor=record(enabled=FLAG, interval=one("string", pattern=r"^[0-9]+(ms|s|m)$"), labels=TEXTS),
            rules=FOUND,
            dashboards=FOUND,
        ),
        env=items(ENV),
        serviceAccount=record(create=FLAG, name=TEXT, annotations=TEXTS),
        podSecurityContext=ANY,
        securityContext=ANY,
    )
    return {"$schema": joinwise["$schema"], "title": "Values of the joinwise chart", **root, "$defs": definitions}


def _gateway() -> Schema:
    ports = {"httpPort": PORT, "grpcPort": PORT}
    service = record(type=one("string", enum=["ClusterIP", "NodePort", "LoadBalancer"]), **ports, annotations=TEXTS)
    return record(
        replicas=COUNT,
        autoscaling=record(
            enabled=FLAG,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            targetRequests=one("integer", minimum=1),
            downscaleDelaySeconds=one("integer", minimum=0),
        ),
        **SERVED,
        service=service,
        ingress=record(enabled=FLAG, className=TEXT, annotations=TEXTS, hosts=items(FILLED), tlsSecret=TEXT),
        route=record(enabled=FLAG, parentRefs=items(PARENT), hostnames=items(FILLED), grpc=FLAG),
        tls=record(secret=TEXT, clientCertificates=FLAG),
        apiKeysSecret=record(**SECRET),
        keysSecret=record(**SECRET, testKey=TEXT),
    )


def _redis() -> Schema:
    secret = record(secret=TEXT)
    return record(
        bundled=record(
            enabled=FLAG,
            image=record(**IMAGE),
            resources=RESOURCES,
            persistence=record(enabled=FLAG, size=SIZE, storageClassName=TEXT),
            tls=secret,
        ),
        external=record(
            url=one("string", pattern=r"^(rediss?://[^@]+)?$"),
            existingSecret=record(**SECRET),
            tls=record(secret=TEXT, clientCertificate=FLAG),
        ),
    )


def read_values() -> list[Value]:
    """Every key of values.yaml in its order; of a list of objects, the keys of the first."""
    text = VALUES.read_text(encoding="utf-8")
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    return list(_walk(tree, "", text.splitlines()))


def _walk(node: yaml.Node, prefix: str, lines: list[str]) -> Iterator[Value]:
    for key, child in node.value:
        path = f"{prefix}{key.value}"
        comment = _comment_above(key.start_mark.line, lines)
        nested = isinstance(child, yaml.MappingNode) and bool(child.value) and not child.flow_style
        if path == "config" or path.endswith(("SecurityContext", ".engine")) or path == "securityContext":
            nested = False
        yield Value(path, comment, yaml.SafeLoader("").construct_document(child), not nested)
        if nested and not all(flow.value.startswith(("requests", "limits")) for flow, _ in child.value):
            yield from _walk(child, f"{path}.", lines)
        elif path == "pools":
            yield from _walk(child.value[0], "pools[].", lines)


def _comment_above(line: int, lines: list[str]) -> str:
    found: list[str] = []
    while line > 0 and lines[line - 1].strip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].strip().lstrip("# "))
    return " ".join(found)


def describe(schema: Schema, values: list[Value]) -> None:
    """Write each comment of values.yaml into the schema. Exits on a key that one side lacks."""
    for value in values:
        node = schema
        for step in value.path.replace("[]", ".[]").split("."):
            node = node["items"] if step == "[]" else node["properties"].get(step)
            if node is None:
                sys.exit(f"gen_helm: {value.path} stands in values.yaml, but not in scripts/gen_helm.py")
        if value.comment:
            node["description"] = value.comment
    undescribed = [value.path for value in values if value.leaf and not value.comment]
    if undescribed:
        sys.exit(f"gen_helm: no comment in values.yaml above {', '.join(undescribed)}")


def table(values: list[Value]) -> str:
    """The values as a Markdown table."""
    rows = ["| value | default | what it does |", "|---|---|---|"]
    for value in values:
        if value.comment:
            compact = json.dumps(value.default, separators=(", ", ": "))
            default = f"`{compact}`" if len(compact) <= 60 else "see values.yaml"
            rows.append(f"| `{value.path}` | {default} | {value.comment.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def generate() -> dict[Path, str]:
    """Content of every generated file."""
    values = read_values()
    schema = json.loads(json.dumps(values_schema()))  # no part is shared any more, so that each can be described
    describe(schema, values)
    readme = README.read_text(encoding="utf-8")
    if BEGIN not in readme or END not in readme:
        sys.exit(f"gen_helm: {README.name} lacks the marks {BEGIN!r} and {END!r}")
    head, tail = readme.split(BEGIN)[0], readme.split(END)[1]
    return {
        SCHEMA: json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        README: f"{head}{BEGIN}\n\n{table(values)}\n\n{END}{tail}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate what follows from the chart's values.yaml.")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check
    stale = {
        path: text for path, text in generate().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    if check and stale:
        sys.exit("gen_helm: not current (run scripts/gen_helm.py): " + ", ".join(path.name for path in stale))
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote helm/joinwise/{path.name}")


if __name__ == "__main__":
    main()
