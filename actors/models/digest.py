"""The digest that says two workers hold the same model.

Covers the weights, the model's configuration, the tokenizer and the chat template: whatever changes the KV of a prompt
or the ids of a text. Sampling defaults (`generation_config.json`) are left out; the gateway alone applies them.

Files up to 1 GiB are hashed whole. A larger safetensors file counts by name, size, header (names, types, shapes and
offsets of all tensors) and the middle 4 KiB of each tensor; any other larger file by name, size and 256 evenly spaced
chunks of 64 KiB. So a retrained or exchanged tensor is noticed, a few flipped bytes deep inside a huge file are not:
this guards against mixing models, not against tampering. Results are kept in `<cache>/digests`, keyed by size and
modification time of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

VERSION = "1"
LENGTH = 32  # hex digits
_WHOLE_FILE_LIMIT = 1 << 30
_BLOCK = 1 << 20
_SPARSE_CHUNKS, _SPARSE_CHUNK = 256, 64 << 10
_TENSOR_SAMPLE = 4 << 10
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_TEXT = ("tokenizer.model", "*.tiktoken", "vocab.*", "merges.txt", "*.jinja")
_JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Who wrote the file, and from where, is no property of the model.
_VOLATILE_KEYS = frozenset(
    {"transformers_version", "_name_or_path", "_model_name_or_path", "is_local", "local_files_only"}
)


def model_digest(folder: Path, cache: Path) -> str:
    """The digest of the model in `folder`: 32 hexadecimal digits, equal for equal content wherever it lies."""
    files = sorted(_relevant(folder))

    def make() -> str:
        total = hashlib.sha256(f"joinwise model digest {VERSION}\n".encode())
        for file in files:
            total.update(f"{file.name}\0{_file_digest(file)}\n".encode())
        return total.hexdigest()[:LENGTH]

    return _kept(folder, files, cache, make)


def file_digest(file: Path, cache: Path) -> str:
    """The digest of one weights file by the rules above: 64 hexadecimal digits."""
    return _kept(file, [file], cache, lambda: _file_digest(file))


def _kept(of: Path, files: list[Path], cache: Path, make: Callable[[], str]) -> str:
    """The digest of a folder or a file: made again only when one of its files has changed."""
    stamp = _stamp(files)
    sidecar = cache / f"{hashlib.sha256(str(of.resolve()).encode()).hexdigest()[:32]}.json"
    kept = _read_sidecar(sidecar)
    if kept is not None and kept.get("stamp") == stamp:
        return str(kept["digest"])
    digest = make()
    _write_sidecar(sidecar, {"folder": str(of), "stamp": stamp, "digest": digest})
    return digest


def _relevant(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if any(fnmatch(entry.name, pattern) for pattern in (*_WEIGHTS, *_TEXT, *_JSON)) and entry.is_file():
            yield entry


def _stamp(files: list[Path]) -> str:
    entries = [(f.name, s.st_size, s.st_mtime_ns, s.st_ino) for f in files for s in [f.stat()]]
    return hashlib.sha256(json.dumps([VERSION, entries]).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    if file.name in _JSON and (normal := _normal_json(file)) is not None:
        return hashlib.sha256(normal).hexdigest()
    size = file.stat().st_size
    if size <= _WHOLE_FILE_LIMIT:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    sampled = hashlib.sha256(str(size).encode())
    spans = _tensor_spans(file, size) if file.suffix == ".safetensors" else None
    with file.open("rb") as stream:
        for offset, length in spans or _even_spans(size):
            stream.seek(offset)
            while length > 0 and (block := stream.read(min(length, _BLOCK))):
                sampled.update(block)
                length -= len(block)
    return sampled.hexdigest()


def _normal_json(file: Path) -> bytes | None:
    """The file's content without volatile keys and layout; None if it is no JSON object (then its bytes count)."""
    if file.stat().st_size > 64 << 20:
        return None
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    kept = {key: value for key, value in content.items() if key not in _VOLATILE_KEYS}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def _tensor_spans(file: Path, size: int) -> list[tuple[int, int]] | None:
    """(offset, length) of the header and of each tensor's middle; None if the header cannot be read."""
    with file.open("rb") as stream:
        (header_length,) = struct.unpack("<Q", stream.read(8))
        if header_length > min(size - 8, 256 << 20):
            return None
        try:
            header = json.loads(stream.read(header_length))
            spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    start = 8 + header_length
    middles = sorted(start + max(begin, (begin + end - _TENSOR_SAMPLE) // 2) for begin, end in spans)
    return [(0, start), *((middle, _TENSOR_SAMPLE) for middle in middles)]


def _even_spans(size: int) -> list[tuple[int, int]]:
    last = size - _SPARSE_CHUNK
    return [(i * last // (_SPARSE_CHUNKS - 1), _SPARSE_CHUNK) for i in range(_SPARSE_CHUNKS)]


def _read_sidecar(sidecar: Path) -> dict[str, str] | None:
    try:
        kept = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and isinstance(kept.get("digest"), str) else None


def _write_sidecar(sidecar: Path, content: dict[str, str]) -> None:
    """Keep the result; a cache that cannot be written costs time only."""
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        draft = sidecar.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(sidecar)
    except OSError:
        pass
