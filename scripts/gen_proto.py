"""Generate the Python stubs of `proto/*.proto`, beside their sources.

Owns the one protoc invocation of the project. The sources are mapped to the virtual path `joinwise/proto`, so
that generated modules import each other as `from joinwise.proto import x_pb2` with no rewriting.

    python scripts/gen_proto.py            write proto/*_pb2.py, *_pb2.pyi and, for files with a service, *_pb2_grpc.py
    python scripts/gen_proto.py --check    exit 1 and name the files if the committed stubs are not current
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
VIRTUAL = "joinwise/proto"
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
_SERVICE = re.compile(r"^\s*service\s+\w+", re.MULTILINE)


def generate(out: Path) -> dict[str, bytes]:
    """Run protoc into `out` (an empty folder); return the stubs as name -> content."""
    from grpc_tools import protoc

    sources = sorted(PROTO.glob("*.proto"))
    if not sources:
        sys.exit(f"gen_proto: no .proto file in {PROTO}")
    with_service = [s for s in sources if _SERVICE.search(s.read_text(encoding="utf-8"))]
    include = ["-I", f"{VIRTUAL}={PROTO}", "-I", str(resources.files("grpc_tools") / "_proto")]
    _protoc(protoc, include, [f"--python_out={out}", f"--pyi_out={out}"], sources)
    if with_service:
        _protoc(protoc, include, [f"--grpc_python_out={out}"], with_service)
    return {p.name: p.read_bytes() for p in (out / VIRTUAL).iterdir() if p.is_file()}


def _protoc(protoc, include: list[str], outputs: list[str], sources: list[Path]) -> None:  # type: ignore[no-untyped-def]
    names = [f"{VIRTUAL}/{s.name}" for s in sources]
    if protoc.main(["protoc", *include, *outputs, *names]) != 0:
        sys.exit("gen_proto: protoc failed, see above")


def committed() -> dict[str, bytes]:
    """The stubs that lie in the tree now."""
    return {p.name: p.read_bytes() for pattern in STUB_PATTERNS for p in PROTO.glob(pattern)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the stubs of proto/*.proto.")
    parser.add_argument("--check", action="store_true", help="only compare with the stubs in the tree")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as tmp:
        fresh = generate(Path(tmp))
    old = committed()
    stale = sorted(name for name in fresh.keys() | old.keys() if fresh.get(name) != old.get(name))
    if check:
        if stale:
            sys.exit("gen_proto: not current (run `make proto`): " + ", ".join(stale))
        return
    for name in stale:
        if name in fresh:
            (PROTO / name).write_bytes(fresh[name])
            print(f"wrote proto/{name}")
        else:
            (PROTO / name).unlink()
            print(f"removed proto/{name}")
    if not stale:
        print("stubs are current")


if __name__ == "__main__":
    main()
