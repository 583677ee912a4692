"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.policies.base import Policy
from kvstore.policies.gittins import Gittins
from kvstore.policies.lru import Lru
from kvstore.policies.s3_fifo import S3Fifo
from kvstore.policies.sieve import Sieve
from kvstore.policies.two_queue import TwoQueue

POLICIES: dict[str, Callable[[], Policy]] = {policy.name: policy for policy in (Lru, S3Fifo, Sieve, TwoQueue, Gittins)}
