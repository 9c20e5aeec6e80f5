"""From a model reference to a local folder and a digest: `resolve_model`.

A reference is, in this order: a URI (`file://`, `s3://`, `gs://`, `az://`), a built-in name
(`smollm2-135m-instruct`), an existing folder or `.gguf` file, or a hub id with an optional `@revision`. Nothing here
imports torch; conversion runs in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from joinwise.actors.models import sources
from joinwise.actors.models.cache import Progress, cache_root
from joinwise.actors.models.digest import model_digest
from joinwise.cluster.errors import ModelNotFoundError

__all__ = ["LocalModel", "resolve_model"]

_BUILT_IN_PREFIX = "joinwise/"


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. `digest` is equal on every machine that holds the same model (see `digest.py`)."""

    name: str
    path: Path
    digest: str


def resolve_model(ref: str, *, revision: str | None = None, progress: Progress | None = None) -> LocalModel:
    """Make the model that `ref` names available in a local folder.

    `revision` is a hub branch, tag or commit; `org/name@revision` says the same. `progress` is called with one line
    a step. May take minutes (download, conversion) the first time. Raises ModelNotFoundError, which says what to do.
    """
    say = progress or (lambda _: None)
    name, path = _locate(ref.strip(), revision, say)
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"{ref!r}: {path} holds no config.json, so it is no model that vLLM can load")
    return LocalModel(name=name, path=path, digest=model_digest(path, cache_root() / "digests"))


def _locate(ref: str, revision: str | None, say: Progress) -> tuple[str, Path]:
    if not ref:
        raise ModelNotFoundError("the model reference is empty")
    if "://" in ref:
        _refuse_revision(ref, revision)
        uri = urlsplit(ref)
        if uri.scheme == "file":
            return _local(Path(unquote(uri.path)), say)
        return Path(uri.path).name or uri.netloc, sources.object_store(ref, say)
    built_in = ref.removeprefix(_BUILT_IN_PREFIX)
    if built_in in sources.BUNDLED:
        _refuse_revision(ref, revision)
        return built_in, sources.bundled(built_in, say)
    path = Path(ref).expanduser()
    if path.exists() or ref.startswith(("/", "./", "../", "~")):
        _refuse_revision(ref, revision)
        return _local(path, say)
    repository, _, inline = ref.partition("@")
    if inline and revision and inline != revision:
        raise ModelNotFoundError(f"{ref!r} names revision {inline!r}, but revision {revision!r} was asked for as well")
    return repository, sources.hub(repository, revision or inline or None, say)


def _local(path: Path, say: Progress) -> tuple[str, Path]:
    path = path.absolute()
    if path.suffix == ".gguf" and path.is_file():
        return path.stem, sources.gguf(path, path.stem, say)
    if not path.is_dir():
        raise ModelNotFoundError(f"there is no model folder {path}")
    return path.name, path


def _refuse_revision(ref: str, revision: str | None) -> None:
    if revision:
        raise ModelNotFoundError(f"{ref!r} is no hub id, so it has no revision {revision!r}")
