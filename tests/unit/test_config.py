"""The configuration: every mistake is named with its place, and the environment has the last word."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from joinwise.cluster import env as environment
from joinwise.cluster.config import JoinwiseConfig, default_config, json_schema, load_config, redacted
from joinwise.cluster.errors import ConfigError

GOOD = """\
cluster: prod
models:
  - name: small
    model: org/small
    revision: "0123"
pools:
  - name: prefill
    model: small
    role: prefill
    engine: {block-size: 64}
  - name: decode
    model: small
    role: decode
    replicas: 2
"""


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(text: str) -> Path:
        path = tmp_path / "joinwise.yaml"
        path.write_text(text)
        return path

    return make


def problems(path: Path | None, env: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, env or {})
    return caught.value.problems


def test_the_demo_is_valid_and_local() -> None:
    config = default_config("cpu")
    assert [pool.role for pool in config.pools] == ["prefill", "decode"]
    assert config.redis.url == "embedded"
    assert (config.gateway.host, config.gateway.http_port, config.gateway.grpc_port) == ("127.0.0.1", 8000, 8001)
    assert config.gateway.max_body_bytes < 10_000_000
    assert config.engine_arguments(config.pools[0])["max_model_len"] == 2048
    assert load_config(None, {}) == default_config("cpu")


def test_a_file_is_read(write) -> None:  # type: ignore[no-untyped-def]
    config = load_config(write(GOOD), {})
    assert config.models[0].public_name == "small"
    assert config.engine_arguments(config.pools[0]) == {"dtype": "bfloat16", "block_size": 64}
    assert config.source_of("pools[1].replicas").endswith("joinwise.yaml:14")
    assert config.source_of("gateway.host") == "default"


def test_unknown_keys_name_the_nearest(write) -> None:  # type: ignore[no-untyped-def]
    text = GOOD.replace("replicas:", "replcas:") + "gatewya: {}\nkv: {zzz: 1}\n"
    first, second, third = problems(write(text))
    assert first.startswith("unknown key 'replcas' in pools[1] (")
    assert first.endswith("joinwise.yaml:14); did you mean 'replicas'?")
    assert "unknown key 'zzz' in kv" in second
    assert "known: " in second and "frame_bytes" in second
    assert second != third
    assert "did you mean 'gateway'?" in third


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("role: decode", "role: decoder", "'prefill', 'decode', 'mixed' or 'draft', not 'decoder'"),
        ("role: decode", "role: prefill", "has only prefill pools"),
        ("replicas: 2", "replicas: 0", "has only prefill pools"),
        ("replicas: 2", "replicas: -1", "greater than or equal to 0, not -1"),
        ("name: decode", "name: prefill", "the name 'prefill' is used 2 times"),
        ("    model: small\n    role: decode", "    model: big\n    role: decode", "unknown model 'big'; known: small"),
        (
            "cluster: prod",
            "cluster: '{prod}'",
            "cluster (",
        ),
        (
            "cluster: prod",
            "cluster: prod\ngateway: {http_port: 8001}",
            "gateway.http_port and gateway.grpc_port are both",
        ),
        ("cluster: prod", "cluster: prod\nredis: http://x", "redis.url"),
        ("cluster: prod", "cluster: prod\nkv: {lossy: int8}", "kv.lossy (int8) is what kv.codec: auto may choose"),
        ("cluster: prod", "cluster: prod\nkv: {codec: auto, lossy: zstd}", "kv.lossy"),
        ("cluster: prod", "cluster: prod\nkv: {transport: nixl, codec: int8}", "kv.transport: nixl codes nothing"),
        ("cluster: prod", "cluster: prod\nkv: {transport: rdma}", "kv.transport"),
        ("cluster: prod", "cluster: prod\nrouter: {worker_ttl_s: 1}", "at least twice router.heartbeat_s"),
        ("block-size: 64", "kv_transfer_config: {}", "belongs to joinwise: set kv"),
        ("block-size: 64", "speculative-config: {}", "belongs to joinwise: set pools[].speculation"),
        ("replicas: 2", "replicas: 2\n    cores: [1]", "2 replicas but only 1 cores"),
        ("replicas: 2", "replicas: 2\n    replicas: 3", "'pools[1].replicas' is given twice (line 15)"),
        ("cluster: prod", "cluster: [", "is not valid YAML: line"),
    ],
)
def test_mistakes(write, old: str, new: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    assert old in GOOD
    assert any(expected in problem for problem in problems(write(GOOD.replace(old, new))))


SPECULATING = """\
models:
  - {name: small, model: org/small}
  - {name: other, model: org/other}
pools:
  - {name: whole, model: small, role: mixed}
  - {name: fast, model: small, role: decode, speculation: {draft: drafts, k: 5}}
  - {name: drafts, model: small, role: draft, draft: {model: org/tiny}}
  - {name: others, model: other, role: mixed}
"""


def test_engines_that_speculate_and_their_draft_pool(write) -> None:  # type: ignore[no-untyped-def]
    fast, drafts = load_config(write(SPECULATING), {}).pools[1:3]
    assert fast.speculation is not None and drafts.draft is not None
    assert (fast.speculation.draft, fast.speculation.k) == ("drafts", 5)
    assert drafts.draft.model == "org/tiny"
    lookup = load_config(write(SPECULATING.replace(", draft: {model: org/tiny}", "")), {})
    assert lookup.pools[2].draft is None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("draft: drafts, k: 5", "draft: nobody", "speculation.draft 'nobody' is no draft pool; draft pools: drafts"),
        ("draft: drafts, k: 5", "draft: whole", "speculation.draft 'whole' is no draft pool"),
        (", speculation: {draft: drafts, k: 5}", "", "'drafts' drafts for nobody"),
        ("k: 5", "k: 0", "speculation.k"),
        ("k: 5", "k: 65", "speculation.k"),
        ("k: 5", "deadline_ms: 0", "speculation.deadline_ms"),
        (
            "drafts, model: small",
            "drafts, model: other",
            "serves 'small', but its draft pool 'drafts' drafts for 'other'",
        ),
        (
            "whole, model: small, role: mixed",
            "whole, model: small, role: prefill",
            "decodes in pools with speculation only",
        ),
        ("role: decode, spec", "role: prefill, spec", "`speculation` belongs to decode and mixed pools"),
        (
            "role: mixed}\n  - {name: fast",
            "role: mixed, draft: {}}\n  - {name: fast",
            "`draft` belongs to pools with role",
        ),
        ("draft: {model: org/tiny}", "engine: {block_size: 8}", "it has no engine"),
        ("draft: {model: org/tiny}", "device: gpu", "that needs no GPU"),
        ("draft: {model: org/tiny}", "device: gpu, draft: {model: org/tiny, dtype: int8}", "int8 weights"),
        ("draft: {model: org/tiny}", "draft: {slots: 0}", "draft.slots"),
    ],
)
def test_mistakes_in_speculation(write, old: str, new: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    assert old in SPECULATING
    assert any(expected in problem for problem in problems(write(SPECULATING.replace(old, new, 1))))


@pytest.mark.parametrize("text", ["", "just text", "- a\n", "a: &x [*x]\n", "? [1, 2]\n: 3\n", "\x00"])
def test_what_is_no_configuration(write, text: str) -> None:  # type: ignore[no-untyped-def]
    assert problems(write(text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "none.yaml")[0]
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "UTF-8" in problems(tmp_path / "binary")[0]


def test_all_mistakes_come_at_once(write) -> None:  # type: ignore[no-untyped-def]
    text = GOOD.replace("role: decode", "role: x").replace("cluster: prod", "cluster: P")
    assert len(problems(write(text), {"JOINWISE_FOO": "1", "JOINWISE_POOLS__9__NAME": "x"})) == 4


def test_the_environment_has_the_last_word(write) -> None:  # type: ignore[no-untyped-def]
    env = {
        "JOINWISE_CLUSTER": "42",
        "JOINWISE_GATEWAY__HTTP_PORT": "9000",
        "JOINWISE_GATEWAY__API_KEYS": "[a, b]",
        "JOINWISE_MODELS__0__REVISION": "0777",
        "JOINWISE_MODELS__0__TOKENIZER": "null",
        "JOINWISE_POOLS__0__REPLICAS": "3",
        "JOINWISE_POOLS__0__ENGINE__ENFORCE_EAGER": "true",
        "JOINWISE_POOLS__2": "{name: extra, model: small, role: mixed}",
        "JOINWISE_CACHE": "/tmp/x",
        "HOME": "/root",
    }
    config = load_config(write(GOOD), env)
    assert (config.cluster, config.gateway.http_port, config.gateway.api_keys) == ("42", 9000, ["a", "b"])
    assert (config.models[0].revision, config.models[0].tokenizer) == ("0777", None)
    assert (config.pools[0].replicas, config.pools[2].name) == (3, "extra")
    assert config.pools[0].engine == {"block_size": 64, "enforce_eager": True}
    assert config.source_of("pools[0].replicas") == "environment variable JOINWISE_POOLS__0__REPLICAS"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("JOINWISE_GATEWAY__HTP_PORT", "1", "did you mean 'JOINWISE_GATEWAY__HTTP_PORT'?"),
        ("JOINWISE_CASH", "1", "did you mean 'JOINWISE_CACHE'?"),
        ("JOINWISE_POOLS__X__NAME", "1", "'X' must be the number of a list item"),
        ("JOINWISE_POOLS__5__NAME", "x", "item 5 does not follow the 2"),
        ("JOINWISE_CLUSTER__NAME", "x", "'joinwise_cluster__' is a value"),
        ("JOINWISE_GATEWAY__HTTP_PORT", "[", "not valid YAML"),
        ("JOINWISE_GATEWAY__HTTP_PORT", "many", "valid integer"),
    ],
)
def test_wrong_variables(write, variable: str, value: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    found = problems(write(GOOD), {variable: value})
    assert any(expected in problem and (variable in problem or expected == "valid integer") for problem in found), found


def test_variables_that_are_no_configuration_are_listed_once() -> None:
    assert environment.overrides(dict.fromkeys(environment.OTHERS, "x")) == ([], [])


def test_the_schema_accepts_what_the_loader_accepts() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(yaml.safe_load(GOOD))
    validator.validate(json.loads(default_config().model_dump_json()))
    assert not validator.is_valid({**yaml.safe_load(GOOD), "gatewya": {}})
    assert "Compute threads" in schema["$defs"]["PoolConfig"]["properties"]["threads"]["description"]


def test_secrets_are_blacked_out(write) -> None:  # type: ignore[no-untyped-def]
    env = {"JOINWISE_REDIS__URL": "redis://user:hush@h:6379/0", "JOINWISE_GATEWAY__API_KEYS": "[hush]"}
    shown = json.dumps(redacted(load_config(write(GOOD), env)))
    assert "hush" not in shown
    assert "user:***@h" in shown


def test_a_configuration_survives_its_own_dump() -> None:
    config = default_config()
    assert JoinwiseConfig.model_validate(config.model_dump()) == config


def test_the_redis_password_may_come_apart_from_the_url(tmp_path: Path) -> None:
    file = tmp_path / "joinwise.yaml"
    file.write_text(GOOD + "redis: redis://store:6379/1\n")
    config = load_config(file, {"JOINWISE_REDIS_PASSWORD": "a b@c"})
    assert config.redis.url == "redis://:a%20b%40c@store:6379/1"
    file.write_text(GOOD + "redis: redis://:own@store:6379/1\n")
    assert load_config(file, {"JOINWISE_REDIS_PASSWORD": "other"}).redis.url == "redis://:own@store:6379/1"
