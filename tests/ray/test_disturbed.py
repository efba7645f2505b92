"""Runs whose workers, driver or nodes are killed end as if nothing had happened, to the last bit.

Steps are drawn anew each time: none may matter, and a failure shows which it was. `make chaos` does the same, longer.
"""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest

from benchmarks.disturb import SHORT, Bench, Left, SmallCluster, left_by, steps_in, wait_for_end, workers_below

pytestmark = pytest.mark.ray

TWO = ("workers.num_workers=2", "training.train_batch_size=16")


@pytest.mark.parametrize("name", ["killed", pytest.param("killed-twice", marks=pytest.mark.slow)])
def test_worker_and_driver_are_killed(name: str, bench: Bench, cluster: SmallCluster, undisturbed: Left) -> None:
    """SIGKILL to the worker, or to it and to the driver, then SIGTERM to the driver; the same command follows each.

    Begun on a Ray of its own, the run ends on a cluster that runs already.
    """
    first = bench.train(name, SHORT)
    first.wait_for_step(random.randint(1, 15))
    (worker,) = workers_below(first.process.pid)
    worker.kill()
    first.wait_until(lambda: first.restarts, "a restart")
    assert "Worker 0 on node" in first.output
    assert f"(process {worker.pid}) failed after step" in first.output
    assert "its process ended without a word" in first.output
    assert "attempt 2 of 4 follows" in first.output
    assert "A worker died or was killed" not in first.output
    first.wait_for_step(first.restarts[0] + random.randint(1, 15), restarts=1)
    if name == "killed-twice":
        first.kill()
        first = bench.train(name, SHORT)
        first.wait_until(lambda: first.restarts, "a restart")
        first.wait_for_step(first.restarts[0] + random.randint(1, 7), restarts=1)
    first.terminate()
    assert first.status() == 143, first.output

    with cluster.node():
        last = bench.train(name, SHORT, address=cluster.address)
        assert last.status() == 0, last.output
    assert f"Stopped after step {last.restarts[0]} of 90" in first.output  # what SIGTERM saved is not done again
    assert left_by(last.run) == undisturbed


def test_finished_run_given_again(bench: Bench, undisturbed: Left) -> None:
    command = bench.train("undisturbed", SHORT)
    assert command.status() == 0
    assert "is finished" in command.output
    assert "Connecting to Ray" not in command.output
    assert f"| {undisturbed.results['best']['step']} |" in command.output


@pytest.mark.slow
def test_two_workers_and_their_nodes(bench: Bench, cluster: SmallCluster) -> None:
    """Nodes are taken away without and with notice, which costs no attempt."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(cluster.node()) for _ in range(2)]
        whole = bench.train("two-undisturbed", SHORT, *TWO, address=cluster.address)
        assert whole.status() == 0, whole.output

        command = bench.train("two", SHORT, *TWO, "workers.max_failures=0", address=cluster.address)
        command.wait_for_step(random.randint(1, 20))
        cluster.remove(nodes[0])
        nodes.append(stack.enter_context(cluster.node()))
        command.wait_until(lambda: len(command.restarts) == 1, "a restart on other nodes")
        assert command.output.count("no attempt is spent") == 1

        nodes.append(stack.enter_context(cluster.node()))
        command.wait_for_step(command.restarts[0] + random.randint(1, 10), restarts=1)
        cluster.announce(nodes[1], 4.0)
        command.wait_until(lambda: "will be taken away" in command.output, "the notice")
        workers = cluster.workers(nodes[1])
        cluster.remove(nodes[1])
        wait_for_end(workers)
        assert command.status() == 0, command.output
        assert len(command.restarts) == 2
        assert command.output.count("no attempt is spent") == 2
        assert left_by(command.run) == left_by(whole.run)


@pytest.mark.slow  # tests/training/test_resume.py has two attempts at once without Ray
def test_the_newer_of_two_drivers_has_the_run(bench: Bench, cluster: SmallCluster) -> None:
    """The older one stops, with a message and a status that say so, and so gives up the room that the newer needs."""
    endless = "training.max_steps=100000"
    with cluster.node():
        older = bench.train("contested", endless, address=cluster.address)
        older.wait_for_step(random.randint(5, 20))
        newer = bench.train("contested", endless, address=cluster.address)
        assert older.status() == 1, older.output
        assert "took the run over" in older.output
        newer.wait_until(lambda: newer.restarts, "the newer one's start")
        newer.wait_for_step(newer.restarts[0] + 10, restarts=1)
        newer.terminate()
        assert newer.status() == 143, newer.output
        steps = steps_in(newer.run / "history.jsonl")
        assert steps == list(range(1, len(steps) + 1))
        assert f"Stopped after step {len(steps)} " in newer.output


def test_more_workers_than_there_is_room_for(bench: Bench, cluster: SmallCluster) -> None:
    with cluster.node(cpus=2):
        command = bench.train("too-many", SHORT, "workers.num_workers=3", address=cluster.address)
        assert command.status() == 1
        assert "workers.num_workers asks for 3 x (1 CPU, 0 GPU), but the cluster has room for 2" in command.output
        assert not command.run.exists()


@pytest.mark.slow
def test_an_elastic_run_uses_a_new_node_and_survives_its_loss(bench: Bench, cluster: SmallCluster) -> None:
    elastic = ("workers.num_workers=[1,2]", "training.global_batch_size=32", "workers.max_failures=0")
    with cluster.node():
        command = bench.train("elastic", "training.max_steps=100000", *elastic, address=cluster.address)
        command.wait_for_step(random.randint(1, 10))
        with cluster.node() as added:
            command.wait_until(lambda: command.restarts, "a restart with the new node")
            assert f"Going on from step {command.restarts[0]} with 2 workers" in command.output
            command.wait_for_step(command.restarts[0] + random.randint(1, 10), restarts=1)
            assert len(cluster.workers(added)) == 1
        command.wait_until(lambda: len(command.restarts) == 2, "a restart without the lost node")
        assert f"Going on from step {command.restarts[1]} with 1 worker\n" in command.output
        command.wait_for_step(command.restarts[1] + 5, restarts=2)
        command.terminate()
        assert command.status() == 143, command.output
        steps = steps_in(command.run / "history.jsonl")
        assert steps == list(range(1, len(steps) + 1))
