"""How KV crosses between workers, for `joinwise status`: every receiver is asked; one that is silent is left out."""

import asyncio
from collections.abc import Sequence

import grpc

from joinwise.actors.gateway.links import Links
from joinwise.cluster.client.types import KvLinkStatus
from joinwise.cluster.router.registry import WorkerInfo
from joinwise.proto import engine_pb2, engine_pb2_grpc

_TIMEOUT_S = 1.0


async def kv_links(workers: Sequence[WorkerInfo], links: Links) -> tuple[KvLinkStatus, ...]:
    """The KV links of live workers, by receiver and sender.

    Args:
        workers: the live ones.
        links: how this gateway reaches them.
    """
    names = {address: worker.worker_id for worker in workers for address in worker.kv_address.split(",")}
    answers = await asyncio.gather(*(_ask(worker, links) for worker in workers))
    found = [
        _read(report, names.get(report.peer, report.peer), worker.worker_id)
        for worker, reports in zip(workers, answers, strict=True)
        for report in reports
    ]
    return tuple(sorted(found, key=lambda link: (link.receiver, link.sender)))


async def _ask(worker: WorkerInfo, links: Links) -> Sequence[engine_pb2.KvLinkReport]:
    async with links.channel(worker.engine_address) as channel:
        try:
            response = await engine_pb2_grpc.EngineServiceStub(channel).KvLinks(
                engine_pb2.KvLinksRequest(), timeout=_TIMEOUT_S, metadata=links.metadata
            )
        except grpc.aio.AioRpcError:  # gone, busy, or of a release that has no such call
            return ()
    return list(response.links)


def _read(report: engine_pb2.KvLinkReport, sender: str, receiver: str) -> KvLinkStatus:
    return KvLinkStatus(
        sender=sender,
        receiver=receiver,
        transport=report.transport,
        why=report.why,
        codec=report.codec,
        codec_why=report.codec_why,
        bytes_per_s=report.bytes_per_s,
        bytes=report.bytes,
        streams=report.streams,
        failed=report.failed,
        retries=report.retries,
        refused=dict(report.refused),
    )
