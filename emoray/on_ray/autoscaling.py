"""How many replicas an endpoint wants: Ray Serve asks this policy, in its controller."""

from __future__ import annotations

from typing import Any

QUEUED, BUSY = "emoray_queued_tokens", "emoray_busy"
"""What each replica reports: tokens that wait, and the share of the last seconds in which its model computed."""
FULL = 0.75
"""The share of its time for which a replica should compute at the most: above, waits grow faster than the load."""


class ByQueuedTokens:
    """So many replicas that none is busier than `FULL`, and one more for every `target` tokens that wait.

    Queued tokens alone would stop replicas whose queues are short because they are enough, and start them again.

    Args:
        target: tokens.
    """

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, before bounds and delays; see `ray.serve.config.AutoscalingContext`."""
        metrics = context.aggregated_metrics or {}
        busy = sum(metrics.get(BUSY, {}).values())
        queued = sum(metrics.get(QUEUED, {}).values())
        if not metrics.get(BUSY):  # nothing was reported yet
            return float(context.target_num_replicas), {}
        wanted = busy / FULL + queued / self._target
        if context.total_num_requests > 0:
            wanted = max(wanted, 0.01)  # a request keeps a replica, or wakes one: Ray Serve rounds up
        return (0.0 if wanted < 0.001 else wanted), {}  # what is left of averages must not keep one up
