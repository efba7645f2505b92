"""Where a run's time goes: what the loop tells of it, for metrics."""

from __future__ import annotations

import time
from collections import Counter

from harness import Configure, Script, begin

from emoray.on_ray.train_metrics import run_name
from emoray.training import train
from emoray.world import World


def test_parts_leave_no_time_out_and_count_none_twice(configure: Configure) -> None:
    task, state, attempt = begin(configure("training.evaluations_per_epoch=3", "training.logging_steps=2"))
    control = Script()
    started = time.perf_counter()
    train(task, state, World(), attempt, control)
    took = time.perf_counter() - started
    rows = [event for event in control.events if event["kind"] == "row"]
    assert sum(row["steps"] for row in rows) == rows[-1]["row"]["step"] == 22
    seconds: Counter[str] = Counter()
    for row in rows:
        seconds.update(row["parts"])
    parts = {"batch", "forward", "backward", "update", "agree", "read", "evaluation", "checkpoint"}
    assert seconds.keys() == parts and min(seconds.values()) > 0
    assert sum(seconds.values()) < took
    saved = [event["step"] for event in control.events if event["kind"] == "checkpoint"]
    assert saved == [4, 8, 11, 15, 19, 22]
    assert all(event["seconds"] > 0 for event in control.events if event["kind"] == "checkpoint")


def test_a_trial_is_called_after_its_sweep() -> None:
    assert run_name("/mnt/runs/emotion") == run_name("s3://bucket/runs/emotion/") == "emotion"
    assert run_name("/mnt/runs/sweep/trials/0003") == "sweep/0003"
    assert run_name("/trials/emotion") == "emotion"
