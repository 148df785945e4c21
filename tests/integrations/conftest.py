"""The servers that several folders of tests share: one RabbitMQ for each test process."""

from __future__ import annotations

from tests.support.cluster_sources import rabbit as rabbit
from tests.support.cluster_sources import redis_only as redis_only
from tests.support.cluster_sources import server as server
