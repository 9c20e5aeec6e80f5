"""Writes every golden file from the code: `python tests/golden/make.py` (`make golden`).

A golden file is what another release, or another language, has on its wire. Read the diff: a change
of a file that has been released needs a new version of the protocol. With `--check` nothing is
written, and files that differ are named.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

from joinwise.actors.kv.frames import FLAG_END, FrameHeader, encode, transfer_tag
from joinwise.proto import kv_pb2

HERE = pathlib.Path(__file__).parent
TRANSFER = "cmpl-1.0.0123456789abcdef"


def kv_frame() -> bytes:
    """Tokens 96 to 159 (two blocks of 32) of layer 7, 32 bytes a block, gathered from two places."""
    header = FrameHeader(
        transfer_tag(TRANSFER),
        epoch=42,
        sequence=5,
        layer=7,
        first_token=96,
        num_tokens=64,
        encoding=kv_pb2.ENCODING_BLOCKS,
    )
    payload = bytes(range(64))
    return encode(header, (payload[:32], memoryview(payload)[32:]))


def kv_frame_plain() -> bytes:
    """Tokens 5 and 6 of heads 2 to 4 of layer 1 in the canonical layout: two vectors of one 16-bit element each."""
    header = FrameHeader(
        transfer_tag(TRANSFER),
        epoch=42,
        sequence=0,
        layer=1,
        first_token=5,
        num_tokens=2,
        first_head=2,
        num_heads=3,
        encoding=kv_pb2.ENCODING_PLAIN,
    )
    return encode(header, (bytes(range(24)),))


def kv_frame_end() -> bytes:
    """The last frame of the same transfer: 1,234 microseconds were exposed."""
    return encode(FrameHeader(transfer_tag(TRANSFER), 42, 6, flags=FLAG_END, exposed_us=1234))


FILES: dict[str, Callable[[], bytes]] = {
    "kv_frame_v2.bin": kv_frame,
    "kv_frame_v2_plain.bin": kv_frame_plain,
    "kv_frame_v2_end.bin": kv_frame_end,
}


def main() -> int:
    """Write or check the files; the number of files that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")
    check = parser.parse_args().check
    changed = 0
    for name, make in FILES.items():
        path, content = HERE / name, make()
        if path.exists() and path.read_bytes() == content:
            continue
        changed += 1
        print(f"{'differs' if check else 'written'}: {path}")
        if not check:
            path.write_bytes(content)
    return changed if check else 0


if __name__ == "__main__":
    sys.exit(main())
