"""Workers that differ: in block size, interior, ranks and element type. Real endpoints, real kernels, no engines."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from helpers.kv_rig import Receiver, Sender, eventually

from joinwise.actors.kv.layout import PLAIN, WHOLE, LayerGeometry, LayoutMismatchError, plan, signature
from joinwise.kernels.kv_pack import Axis, BlockInterior, Part
from joinwise.proto import kv_pb2

HEADS, HEAD_DIM, LAYERS = 4, 8, 3
TOKENS = 150


def _interior(kind: str, heads: int, block_size: int) -> BlockInterior:
    """`hnd`: [head][K, V][token][dim], `nhd`: [token][head][K, V][dim], `tiled`: keys of 16 tokens transposed."""
    row, half = HEAD_DIM, block_size * HEAD_DIM
    whole = Axis(block_size, 0, row)
    dims = Axis(HEAD_DIM, 0, 1)
    if kind == "hnd":
        parts = (Part(0, 2 * half, whole, dims), Part(half, 2 * half, whole, dims))
    elif kind == "nhd":
        tokens = Axis(block_size, 0, heads * 2 * row)
        parts = (Part(0, 2 * row, tokens, dims), Part(row, 2 * row, tokens, dims))
    else:
        keys = Part(0, 2 * half, Axis(16, 16 * row, 1), Axis(HEAD_DIM, 0, 16))
        parts = (keys, Part(half, 2 * half, whole, dims))
    return BlockInterior(heads, block_size, HEAD_DIM, parts, block_stride=heads * 2 * half)


class Rank:
    """What one rank is, to build a sender's or a receiver's cache of it."""

    def __init__(self, kind: str, block_size: int, rank: int = 0, ranks: int = 1, dtype=torch.float32, layers=None):
        self.heads = max(1, HEADS // ranks)
        self.first = rank * HEADS // ranks
        self.block_size, self.kind, self.dtype = block_size, kind, dtype
        self.interior = _interior(kind, self.heads, block_size)
        self.names = [f"layers.{index}" for index in (layers if layers is not None else range(LAYERS))]
        self.geometry = {
            name: LayerGeometry(self.heads, self.first, HEADS, 2, HEAD_DIM, self.interior) for name in self.names
        }

    def layout(self) -> dict:
        shape = (self.heads, 2, self.block_size, HEAD_DIM)
        return {
            "layers": dict.fromkeys(self.names, shape),
            "block_size": self.block_size,
            "interior": self.kind,
            "geometry": self.geometry,
            "dtype": self.dtype,
        }


def _content(end: Sender | Receiver, rank: Rank, block_ids: list[int]) -> dict[str, torch.Tensor]:
    """[head][token][part][dim] of each layer, element by element from the interior's definition."""
    blocks = torch.tensor(block_ids)
    gathered = {}
    for name in rank.names:
        index = rank.interior.index() if hasattr(rank.interior, "index") else _index(rank)
        flat = end.caches[name].view(end.caches[name].shape[0], -1)[blocks]
        each = flat[:, index.flatten()].view(len(block_ids), *index.shape)  # [block][head][token][part][dim]
        gathered[name] = each.transpose(0, 1).flatten(1, 2)[:, :TOKENS]
    return gathered


def _index(rank: Rank) -> torch.Tensor:
    def along(axis: Axis, size: int) -> torch.Tensor:
        places = torch.arange(size)
        return places // axis.tile * axis.outer_stride + places % axis.tile * axis.inner_stride

    parts = [
        part.offset
        + torch.arange(rank.heads)[:, None, None] * part.head_stride
        + along(part.token, rank.block_size)[None, :, None]
        + along(part.dim, HEAD_DIM)[None, None]
        for part in rank.interior.parts
    ]
    return torch.stack(parts, dim=2)


def _blocks(rank: Rank, seed: int) -> list[int]:
    count = -(-TOKENS // rank.block_size)
    return torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:count].tolist()


@pytest.fixture
def started() -> Iterator[list]:
    ends: list = []
    yield ends
    for end in ends:
        if isinstance(end, Sender):
            end.assert_idle()
        else:
            end.assert_idle()
        end.stop()


def _transfer(
    started: list,
    sends: list[Rank],
    receives: list[Rank],
    *,
    transport: str = "tcp",
    codec: str = "none",
    skip: int = 0,
) -> float:
    """One request from all ranks of a sender to all of a receiver; the largest difference."""
    senders = [
        Sender(seed=index, frame_bytes=700, kinds=("tcp", "shm", "nccl"), **r.layout()) for index, r in enumerate(sends)
    ]
    receivers = [Receiver(seed=50 + i, transport=transport, codec=codec, **r.layout()) for i, r in enumerate(receives)]
    started += [*senders, *receivers]
    for index, receiver in enumerate(receivers):
        receiver.client.set_ranks(index, [each.blocks.layout for each in receivers])
    peers = ",".join(sender.server.address for sender in senders)
    there = [_blocks(rank, 7) for rank in sends]
    here = [_blocks(rank, 8) for rank in receives]
    transfers = [sender.open("t", ids, num_tokens=TOKENS) for sender, ids in zip(senders, there, strict=True)]
    fetches = [
        receiver.fetch(
            "t", ids[skip // rank.block_size :], peers, first_block=skip // rank.block_size, num_tokens=TOKENS
        )
        for receiver, rank, ids in zip(receivers, receives, here, strict=True)
    ]
    for until in (1, 3, None):
        for sender, transfer in zip(senders, transfers, strict=True):
            sender.compute(transfer, until)
    for fetch in fetches:
        fetch.succeed()
    for sender, transfer in zip(senders, transfers, strict=True):
        sender.finish(transfer)
        eventually(lambda: sender.sweep() == {"t.p"}, "the blocks are given back")  # noqa: B023
    return _difference(
        [_content(s, r, ids) for s, r, ids in zip(senders, sends, there, strict=True)],
        [_content(s, r, ids) for s, r, ids in zip(receivers, receives, here, strict=True)],
        sends,
        receives,
        skip,
    )


def _difference(sent: list[dict], landed: list[dict], sends: list[Rank], receives: list[Rank], skip: int) -> float:
    whole: dict[tuple[str, int], torch.Tensor] = {}
    for content, rank in zip(sent, sends, strict=True):
        for name, heads in content.items():
            for head in range(rank.heads):
                whole.setdefault((name, rank.first + head), heads[head])  # the first of replicas is asked
    worst = 0.0
    for content, rank in zip(landed, receives, strict=True):
        for name, heads in content.items():
            for head in range(rank.heads):
                expected = whole[name, rank.first + head][skip:].float()
                worst = max(worst, (heads[head][skip:].float() - expected).abs().max().item())
    return worst


@pytest.mark.parametrize(("sender", "receiver"), list(itertools.permutations(["hnd", "nhd", "tiled"], 2)))
def test_any_interior_reaches_any_other(started: list, sender: str, receiver: str) -> None:
    assert _transfer(started, [Rank(sender, 16)], [Rank(receiver, 16)]) == 0


@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 16), (32, 48), (48, 16), (16, 160)])
@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm", "nccl"])
def test_any_block_size_reaches_any_other(started: list, transport: str, theirs: int, ours: int) -> None:
    assert _transfer(started, [Rank("tiled", theirs)], [Rank("hnd", ours)], transport=transport) == 0


@pytest.mark.parametrize(("n", "m"), list(itertools.product([1, 2, 4, 8], repeat=2)))
def test_any_width_reaches_any_other(started: list, n: int, m: int) -> None:
    """Eight ranks hold four heads twice."""
    sends = [Rank("tiled", 16, rank, n) for rank in range(n)]
    receives = [Rank("nhd", 32, rank, m) for rank in range(m)]
    assert _transfer(started, sends, receives) == 0


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
def test_ranks_that_have_restarted_are_agreed_with_again(started: list, transport: str) -> None:
    """What one rank says of it ends the other's stream, and the fetch begins anew."""
    ranks, whole = [Rank("tiled", 16, rank, 2) for rank in range(2)], Rank("hnd", 16)
    assert _transfer(started, ranks, [whole], transport=transport) == 0
    *senders, receiver = started
    for sender in senders:
        sender.server.instance += 1  # as if it had restarted at the same address
    there, here = _blocks(whole, 3), _blocks(whole, 4)
    transfers = [sender.open("u", there, num_tokens=TOKENS) for sender in senders]
    fetch = receiver.fetch("u", here, ",".join(each.server.address for each in senders), num_tokens=TOKENS)
    for sender, transfer in zip(senders, transfers, strict=True):
        sender.compute(transfer)
    fetch.succeed()
    for sender, transfer in zip(senders, transfers, strict=True):
        sender.finish(transfer)
    assert sum(link.retries for link in receiver.client.links.values()) == 1
    sent = [_content(sender, rank, there) for sender, rank in zip(senders, ranks, strict=True)]
    assert _difference(sent, [_content(receiver, whole, here)], ranks, [whole], 0) == 0


def test_equal_ranks_exchange_whole_blocks(started: list) -> None:
    ranks = [Rank("tiled", 16, rank, 2) for rank in range(2)]
    assert _transfer(started, ranks, ranks) == 0
    layouts = [end.blocks.layout for end in started[:2]]
    plans = [plan(layouts, rank, layouts) for rank in range(2)]
    assert [[(part.peer, part.encoding, part.streams) for part in each.parts] for each in plans] == [
        [(0, WHOLE, 1)],
        [(1, WHOLE, 1)],
    ]


def test_layers_that_are_split_over_ranks_are_put_together(started: list) -> None:
    """A pipeline of two stages to one rank, and back."""
    stages = [Rank("hnd", 16, layers=[0, 1]), Rank("hnd", 16, layers=[2])]
    assert _transfer(started, stages, [Rank("hnd", 32)]) == 0
    assert _transfer(started, [Rank("hnd", 32)], stages) == 0


@pytest.mark.parametrize("skip", [32, 96])
def test_a_tail_that_begins_inside_a_block_of_the_sender(started: list, skip: int) -> None:
    assert _transfer(started, [Rank("tiled", 48)], [Rank("hnd", 16)], skip=skip) == 0


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_element_types_may_differ(started: list, narrow: torch.dtype) -> None:
    assert 0 < _transfer(started, [Rank("hnd", 16)], [Rank("nhd", 32, dtype=narrow)]) < 0.04
    assert _transfer(started, [Rank("hnd", 16, dtype=narrow)], [Rank("nhd", 32)]) == 0


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.02), ("fp8", 0.2), ("lossless", 0.0)])
@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
def test_codecs(started: list, transport: str, codec: str, most: float) -> None:
    rank = Rank("tiled", 16, dtype=torch.bfloat16)
    assert _transfer(started, [rank], [rank], transport=transport, codec=codec) <= most


def _layout(rank: Rank, **change: object) -> kv_pb2.KvLayout:
    layout = kv_pb2.KvLayout(protocol_version=2, dtype="torch.float32", block_size=rank.block_size, model_digest="m")
    for name in rank.names:
        layout.layers.add(
            name=name, block_bytes=9, num_heads=rank.heads, first_head=rank.first, total_heads=4, parts=2, head_dim=8
        )
    for name, value in change.items():
        setattr(layout, name, value)
    return layout


@pytest.mark.parametrize(
    ("mine", "theirs", "named"),
    [
        (_layout(Rank("hnd", 16)), [_layout(Rank("hnd", 16), model_digest="n")], "model_digest: 'm' here, 'n' there"),
        (_layout(Rank("hnd", 16)), [_layout(Rank("hnd", 16), protocol_version=3)], "protocol_version: 2 here, 3 there"),
        (_layout(Rank("hnd", 16)), [_layout(Rank("hnd", 16, layers=[0, 1]))], "no layer 'layers.2'"),
        (_layout(Rank("hnd", 16)), [_layout(Rank("hnd", 16, 0, 2))], "layer 'layers.0': nobody has its head 2"),
        (
            _layout(Rank("hnd", 16), dtype="torch.float16"),
            [_layout(Rank("hnd", 16), dtype="torch.bfloat16")],
            "dtype: 'torch.float16' here, 'torch.bfloat16' there",
        ),
        (_layout(Rank("hnd", 16)), [_layout(Rank("hnd", 16), dtype="torch.int8")], "'torch.int8' cannot be exchanged"),
    ],
)
def test_what_cannot_meet_is_refused_and_named(mine: kv_pb2.KvLayout, theirs: list, named: str) -> None:
    with pytest.raises(LayoutMismatchError, match=named):
        plan([mine], 0, theirs)


def test_unknown_insides_meet_only_their_equals() -> None:
    known = _layout(Rank("hnd", 16))
    opaque = _layout(Rank("hnd", 16))
    for layer in opaque.layers:
        layer.num_heads = layer.first_head = layer.total_heads = layer.parts = layer.head_dim = 0
    other = kv_pb2.KvLayout()
    other.CopyFrom(opaque)
    other.block_size = 32
    (part,) = plan([opaque], 0, [opaque]).parts
    assert part.encoding == WHOLE
    for theirs in (other, known):
        with pytest.raises(LayoutMismatchError):
            plan([opaque], 0, [theirs])
    assert signature(opaque, 1) != signature(other, 1)
    assert signature(opaque, 1) != signature(opaque, 2)
    assert signature(known, 1) == signature(_layout(Rank("nhd", 32, 0, 2)), 2)


def test_a_plan_says_how_many_streams_each_rank_gets() -> None:
    ours = [_layout(Rank("hnd", 16, rank, 4)) for rank in range(4)]
    theirs = [_layout(Rank("hnd", 16, rank, 2)) for rank in range(2)]
    for rank in range(4):
        (part,) = plan(ours, rank, theirs).parts
        assert (part.peer, part.first_head, part.num_heads, part.streams) == (rank // 2, rank, 1, 2)
        assert part.encoding == PLAIN


def test_ranks_that_nobody_needs_are_told_by_the_first() -> None:
    ours = [_layout(Rank("hnd", 16, rank, 2)) for rank in range(2)]
    theirs = [_layout(Rank("hnd", 16, rank, 8)) for rank in range(8)]
    assert plan(ours, 0, theirs).unneeded == (1, 3, 5, 7)
    assert plan(ours, 1, theirs).unneeded == ()
