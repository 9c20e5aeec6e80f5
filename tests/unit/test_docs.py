"""The documentation: reference pages are current, links lead somewhere, examples are valid, settings named exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from joinwise.cluster.config import load_config
from joinwise.cluster.config_model import JoinwiseConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMING_FROM = sorted((DOCS / "coming-from").glob("*.md"))


def named(path: Path) -> str:
    return str(path.relative_to(DOCS))


@pytest.fixture(scope="module")
def gen_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_docs", ROOT / "scripts" / "gen_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_current() -> None:
    script = ROOT / "scripts" / "gen_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_page_that_is_behind_is_named(gen_docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gen_docs, "ROOT", tmp_path)
    pages = {tmp_path / "same.md": "a", tmp_path / "old.md": "b", tmp_path / "gone.md": "c"}
    monkeypatch.setattr(gen_docs, "pages", lambda: pages)
    (tmp_path / "same.md").write_text("a")
    (tmp_path / "old.md").write_text("a")
    assert gen_docs.stale() == ["old.md", "gone.md"]


def paths(node: Any, known: dict[str, Any], before: str = "") -> Iterator[str]:
    """Every key of the configuration as pages write it: `pools[].engine`."""
    for name, each in node["properties"].items():
        path = f"{before}{name}"
        yield path
        for kind in (each, *each.get("anyOf", ()), each.get("items", {}), each.get("additionalProperties") or {}):
            if isinstance(kind, dict) and "$ref" in kind:
                many = "[]" if kind is each.get("items") else ""
                yield from paths(known[kind["$ref"].rpartition("/")[2]], known, f"{path}{many}.")


def values(node: Any, before: str = "") -> Iterator[str]:
    """Every value of the chart, written likewise."""
    for name, each in node.items():
        path = f"{before}{name}"
        yield path
        if isinstance(each, list) and each and isinstance(each[0], dict):
            yield from values(each[0], f"{path}[].")
        elif isinstance(each, dict):
            yield from values(each, f"{path}.")


def test_every_setting_has_its_line(gen_docs: ModuleType) -> None:
    schema = JoinwiseConfig.model_json_schema()
    page = gen_docs.configuration()
    for path in paths(schema, schema["$defs"]):
        assert f"| `{path.rpartition('.')[2]}` |" in page, path
    assert "| `http_port` | integer ≥ 0, ≤ 65,535 | `8000` |" in page
    assert "| `role` | `prefill`, `decode`, `mixed`, `draft` | **required** |" in page
    assert "\n## `router.tenants.<name>`\n" in page and "\n## `models[].adapters[]`\n" in page


def test_every_call_and_message_is_described(gen_docs: ModuleType) -> None:
    page = gen_docs.protocols()
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "proto").glob("*.proto"))
    for kind, name in re.findall(r"^\s*(message|enum|service|rpc) (\w+)", sources, re.MULTILINE):
        assert f"`{name}`" in page, f"{kind} {name}"
    assert not re.findall(r"^\| `.*\| *\|$", page, re.MULTILINE), "something without a comment"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    """Also on the site, where headings become anchors; `make docs` checks those of other pages as well."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if "://" in target or target.startswith("#"):
            continue
        assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_has_its_place_on_the_site() -> None:
    found = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]))
    assert found == {named(page) for page in PAGES}


def examples() -> Iterator[Any]:
    for page in [DOCS / "quickstart.md", *COMING_FROM]:
        for at, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            yield pytest.param(text, id=f"{named(page)}-{at}")


@pytest.mark.parametrize("text", list(examples()))
def test_examples_are_valid_configurations(text: str, tmp_path: Path) -> None:
    file = tmp_path / "joinwise.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(file, {"JOINWISE_REDIS_PASSWORD": "secret"}).pools


@pytest.mark.parametrize("page", COMING_FROM, ids=named)
def test_settings_that_a_page_maps_to_exist(page: Path) -> None:
    schema = JoinwiseConfig.model_json_schema()
    ours = set(paths(schema, schema["$defs"]))
    chart = yaml.safe_load((ROOT / "helm" / "joinwise" / "values.yaml").read_text(encoding="utf-8"))
    known = ours | {f"config.{path}" for path in ours} | set(values(chart))
    rows = re.findall(r"^\| .+? \| (.+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    roots = "config|models|pools|gateway|router|kv|redis|tracing|modelStorage|monitoring"
    mapped = [path for row in rows for path in re.findall(rf"`((?:{roots})(?:\[\])?\.[\w.\[\]]+)", row)]
    assert len(mapped) > 10
    for path in mapped:
        parts = path.split(".")
        whole = [".".join(parts[: len(parts) - n]) for n in range(len(parts))]
        engine = next((each for each in whole if each.endswith((".engine", ".custom"))), None)
        assert (engine or path) in known, path
