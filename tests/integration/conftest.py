"""The cluster that integration tests share: one start for the whole run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from helpers.cluster import RunningCluster, cluster_config, running_cluster
from helpers.idle import assert_idle


@pytest.fixture(scope="session")
def shared_cluster(small_model: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """A float32 cluster of one prefill and one decode engine."""
    with running_cluster(cluster_config("shared"), tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
async def cluster(shared_cluster: RunningCluster) -> AsyncIterator[RunningCluster]:
    """The shared cluster; it must be idle after the test."""
    yield shared_cluster
    await assert_idle(shared_cluster)
