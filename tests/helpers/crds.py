"""Schemas of the custom resources that the chart may make, as far as it uses them; nothing else passes.

Written after the APIs' own references: Gateway API v1 (HTTPRoute, GRPCRoute), Prometheus operator monitoring/v1.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required),
    }


def _list(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _manifest(version: str, kind: str, spec: Schema) -> Schema:
    meta = _object(("name",), name=_TEXT, labels=_TEXTS, annotations=_TEXTS)
    required = ("apiVersion", "kind", "metadata", "spec")
    return _object(required, apiVersion={"const": version}, kind={"const": kind}, metadata=meta, spec=spec)


_TEXT: Schema = {"type": "string", "minLength": 1}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_HOST: Schema = {"type": "string", "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
_PARENT = _object(("name",), name=_TEXT, namespace=_TEXT, sectionName=_TEXT, port=_PORT, kind=_TEXT, group=_TEXT)
_BACKEND = _object(("name", "port"), name=_TEXT, port=_PORT, namespace=_TEXT)
_HTTP_RULE = _object(backendRefs=_list(_BACKEND, 1), timeouts=_object(request=_DURATION, backendRequest=_DURATION))
_GRPC_MATCH = _object(method=_object(service=_TEXT, method=_TEXT, type={"enum": ["Exact", "RegularExpression"]}))
_GRPC_RULE = _object(matches=_list(_GRPC_MATCH), backendRefs=_list(_BACKEND, 1))
_SECRET_KEY = _object(("key",), name=_TEXT, key=_TEXT)
_ENDPOINT = _object(
    port=_TEXT,
    path=_TEXT,
    interval=_DURATION,
    scheme={"enum": ["http", "https", "HTTP", "HTTPS"]},
    tlsConfig=_object(serverName=_TEXT, ca=_object(secret=_SECRET_KEY)),
    relabelings=_list(_object(sourceLabels=_list(_TEXT), targetLabel=_TEXT, action=_TEXT, regex=_TEXT)),
)
_ALERT = _object(("alert", "expr"), alert=_TEXT, expr=_TEXT, labels=_TEXTS, annotations=_TEXTS, **{"for": _DURATION})


def _route(kind: str, rule: Schema) -> Schema:
    spec = _object(("parentRefs", "rules"), parentRefs=_list(_PARENT, 1), hostnames=_list(_HOST), rules=_list(rule, 1))
    return _manifest("gateway.networking.k8s.io/v1", kind, spec)


SCHEMAS: dict[tuple[str, str], Schema] = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _route("HTTPRoute", _HTTP_RULE),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _route("GRPCRoute", _GRPC_RULE),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _manifest(
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
        _object(("selector", "endpoints"), selector=_object(matchLabels=_TEXTS), endpoints=_list(_ENDPOINT, 1)),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _manifest(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        _object(("groups",), groups=_list(_object(("name", "rules"), name=_TEXT, rules=_list(_ALERT, 1)), 1)),
    ),
}
