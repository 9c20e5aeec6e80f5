"""Renders the chart in helm/, and knows what to validate its manifests with."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml
from helpers import crds

from joinwise.cluster.config import JoinwiseConfig, load_config

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "joinwise"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
KUBERNETES = "1.33"
RAY_SCHEMA = Path(
    os.environ.get("KUBERAY_SCHEMA") or ROOT.parent / "shared" / "data" / "kuberay" / "rayservice.v1.schema.json"
)


def defaults() -> dict[str, Any]:
    """The chart's values.yaml."""
    return yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


def first_pool(**changes: Any) -> dict[str, Any]:
    """Values with something changed in the first pool."""
    values = defaults()
    values["pools"][0] |= changes
    return {"pools": values["pools"]}


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
        assert len(self._named) == len(self.all), "two manifests have one name"

    def __call__(self, kind: str, name: str = "demo-joinwise") -> dict[str, Any]:
        return self._named[kind, name]

    def has(self, kind: str, name: str = "demo-joinwise") -> bool:
        return (kind, name) in self._named

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        """All manifests of a kind."""
        return [item for item in self.all if item["kind"] == kind]

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Worker groups of the Ray cluster."""
        ray = self("RayService")["spec"]["rayClusterConfig"]
        return {group["groupName"]: group for group in ray["workerGroupSpecs"]}

    @property
    def serve(self) -> dict[str, Any]:
        """Serve's configuration of the gateway's deployment."""
        config = yaml.safe_load(self("RayService")["spec"]["serveConfigV2"])
        (deployment,) = config["applications"][0]["deployments"]
        return deployment

    @property
    def templates(self) -> dict[str, dict[str, Any]]:
        """Pod templates of everything that runs."""
        found = {name: group["template"] for name, group in self.groups.items()}
        found["head"] = self("RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
        if self.has("StatefulSet", "demo-joinwise-redis"):
            found["redis"] = self("StatefulSet", "demo-joinwise-redis")["spec"]["template"]
        test = self("Pod", "demo-joinwise-test")
        return found | {"test": {"metadata": test["metadata"], "spec": test["spec"]}}

    def container(self, template: str) -> dict[str, Any]:
        """The container of a template."""
        container, *_ = self.templates[template]["spec"]["containers"]
        return container

    def env(self, template: str = "prefill") -> dict[str, Any]:
        """Environment of a template's container: values, or where they come from."""
        return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in self.container(template)["env"]}

    def mounts(self, template: str) -> dict[str, dict[str, Any]]:
        """What is mounted where, by path: the volume's source, and `readOnly`."""
        volumes = {each["name"]: each for each in self.templates[template]["spec"].get("volumes", ())}
        return {
            mount["mountPath"]: {**volumes[mount["name"]], "readOnly": mount.get("readOnly", False)}
            for mount in self.container(template).get("volumeMounts", ())
        }

    def config(self, folder: Path, **env: str) -> JoinwiseConfig:
        """The rendered joinwise.yaml, read as a pod reads it."""
        path = folder / "joinwise.yaml"
        path.write_text(self("ConfigMap")["data"]["joinwise.yaml"], encoding="utf-8")
        return load_config(path, env)


def validate(rendered: Rendered) -> None:
    """Every manifest, strictly: Kubernetes' schemas, those of the custom resources, and each pod template by itself."""
    for manifest in rendered.all:
        if manifest["kind"] == "RayService":
            continue
        if schema := crds.SCHEMAS.get((manifest["apiVersion"], manifest["kind"])):
            jsonschema.Draft202012Validator(schema).validate(manifest)
        else:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    for name, template in rendered.templates.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def validate_rayservice(rendered: Rendered) -> None:
    """The RayService against KubeRay's schema; skips the test where that is not at hand."""
    if not RAY_SCHEMA.exists():
        pytest.skip(f"no RayService schema at {RAY_SCHEMA}; set KUBERAY_SCHEMA")
    schema = json.loads(RAY_SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(rendered("RayService"))
