"""One end of a lane in a process of its own, to be killed.

`lane_peer.py send KIND` or `lane_peer.py receive KIND ADDRESS`, with `tests` on the path.
"""

import sys

from helpers.lane_rig import TOKEN, header

from joinwise.actors.kv.lanes.pool import LanePool
from joinwise.actors.kv.lanes.server import LaneServer


def send(kind: str) -> None:
    """Say the address, claim the lane whose id is said, send one frame, say so and wait to be killed."""
    server = LaneServer("127.0.0.1:0", token=TOKEN, kinds=[kind])
    print(server.address, flush=True)
    lane = server.claim(int(sys.stdin.readline()), 5.0)
    lane.send(header(1), [memoryview(b"first")])
    print("sent", flush=True)
    sys.stdin.readline()


def receive(kind: str, address: str) -> None:
    """Lease a lane, say its id, take one frame, say so and wait to be killed."""
    lane = LanePool(token=TOKEN).lease(address, kind)
    print(lane.lane_id, flush=True)
    assert lane.receive_header() == header(1)
    lane.receive([memoryview(bytearray(5))])
    print("received", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:])
