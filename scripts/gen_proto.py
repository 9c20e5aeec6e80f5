"""Generate what follows from `proto/*.proto`: the Python stubs, and the image that guards the wire contract.

Owns the one protoc invocation of the project. The sources are mapped to the virtual path `joinwise/proto`, so
that generated modules import each other as `from joinwise.proto import x_pb2` with no rewriting. The image
`proto/buf.image.binpb` is the contract as it was last accepted: a compatible change renews it, a breaking one is
refused unless it is asked for by name.

    python scripts/gen_proto.py                     write the stubs, renew the image
    python scripts/gen_proto.py --check             exit 1 and name what is not current or breaks the contract
    python scripts/gen_proto.py --accept-breaking   renew the image although the change breaks the contract
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
IMAGE = PROTO / "buf.image.binpb"
VIRTUAL = "joinwise/proto"
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
_SERVICE = re.compile(r"^\s*service\s+\w+", re.MULTILINE)


def generate_stubs(out: Path) -> dict[str, bytes]:
    """Run protoc into `out` (an empty folder); return the stubs as name -> content."""
    sources = sorted(PROTO.glob("*.proto"))
    if not sources:
        sys.exit(f"gen_proto: no .proto file in {PROTO}")
    with_service = [s for s in sources if _SERVICE.search(s.read_text(encoding="utf-8"))]
    _protoc([f"--python_out={out}", f"--pyi_out={out}"], sources)
    if with_service:
        _protoc([f"--grpc_python_out={out}"], with_service)
    return {p.name: p.read_bytes() for p in (out / VIRTUAL).iterdir() if p.is_file()}


def _protoc(outputs: Sequence[str], sources: Sequence[Path]) -> None:
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    names = [f"{VIRTUAL}/{s.name}" for s in sources]
    if protoc.main(["protoc", "-I", f"{VIRTUAL}={PROTO}", "-I", str(well_known), *outputs, *names]) != 0:
        sys.exit("gen_proto: protoc failed, see above")


def committed_stubs() -> dict[str, bytes]:
    """The stubs that lie in the tree now."""
    return {p.name: p.read_bytes() for pattern in STUB_PATTERNS for p in PROTO.glob(pattern)}


def buf(*arguments: str) -> bool:
    """Run buf in the repository's root with its output on the terminal; True if it exits 0."""
    beside = Path(sys.executable).with_name("buf")
    program = str(beside) if beside.exists() else shutil.which("buf")
    if program is None:
        sys.exit("gen_proto: `buf` is missing; run `make env`")
    return subprocess.run([program, *arguments], cwd=ROOT, check=False).returncode == 0


def build_image(out: Path) -> bytes:
    """The image of the protos as they are now."""
    if not buf("build", "--exclude-source-info", "-o", str(out)):
        sys.exit("gen_proto: the protos do not compile, see above")
    return out.read_bytes()


def check(stubs: dict[str, bytes], image: bytes) -> None:
    """Exit 1 if a stub or the image is not what the protos give, or if they break the image's contract."""
    old = committed_stubs()
    stale = sorted(name for name in stubs.keys() | old.keys() if stubs.get(name) != old.get(name))
    if stale:
        sys.exit("gen_proto: not current (run `make proto`): " + ", ".join(stale))
    if not IMAGE.exists() or not buf("breaking", "--against", str(IMAGE)):
        sys.exit(f"gen_proto: breaks the accepted contract {IMAGE.name}")
    if image != IMAGE.read_bytes():
        sys.exit(f"gen_proto: {IMAGE.name} is not current (run `make proto`)")


def write(stubs: dict[str, bytes], image: bytes, accept_breaking: bool) -> None:
    """Write what changed; the stubs first, so that a refused image does not hold up development."""
    old = committed_stubs()
    for name in sorted(stubs.keys() | old.keys()):
        if name not in stubs:
            (PROTO / name).unlink()
            print(f"removed proto/{name}")
        elif stubs[name] != old.get(name):
            (PROTO / name).write_bytes(stubs[name])
            print(f"wrote proto/{name}")
    if not accept_breaking and IMAGE.exists() and not buf("breaking", "--against", str(IMAGE)):
        sys.exit(
            "gen_proto: the change above breaks the accepted contract. If nothing released speaks it, "
            "run `make proto-accept-breaking`; otherwise add a new field or version."
        )
    if not IMAGE.exists() or image != IMAGE.read_bytes():
        IMAGE.write_bytes(image)
        print(f"wrote proto/{IMAGE.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate what follows from proto/*.proto.")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    parser.add_argument("--accept-breaking", action="store_true", help="renew the image in any case")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stubs = generate_stubs(Path(folder))
        image = build_image(Path(folder) / IMAGE.name)
    if arguments.check:
        check(stubs, image)
    else:
        write(stubs, image, arguments.accept_breaking)


if __name__ == "__main__":
    main()
