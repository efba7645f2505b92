"""`make chaos`: kill workers, drivers and nodes at random steps, and compare the weights with those of a quiet run.

Prints a table of what was killed, how often, how many steps had to be done again, and whether weights, optimizer
state, losses and results are identical to the last bit; writes the same as JSON; exits with 1 where anything differs.
Kills fall at steps drawn from a seed, which is printed; some hit a worker that is still being started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.disturb import Bench, Command, Left, SmallCluster, left_by, workers_below

STEPS = 240
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Recipe:
    """What a run trains: kills must not matter to any."""

    workers: int
    packing: str

    @property
    def overrides(self) -> list[str]:
        return [
            f"training.max_steps={STEPS}",
            f"training.packing={self.packing}",
            f"workers.num_workers={self.workers}",
            "training.global_batch_size=32",
            "workers.max_failures=100",
        ]


@dataclass
class Row:
    """A line of the table.

    Attributes:
        kills: how often something was killed.
        lost: steps that were done again, for each kill.
    """

    killed: str
    recipe: Recipe
    kills: int = 0
    lost: list[int] = field(default_factory=list)
    identical: bool = False
    seconds: float = 0.0
    problem: str = ""


class Run:
    """A run that is disturbed, and goes on.

    Args:
        kind: what will be killed.
        recipe: what it trains.
        draw: where kills come from.
    """

    def __init__(self, kind: str, recipe: Recipe, bench: Bench, cluster: SmallCluster, draw: random.Random) -> None:
        self.recipe, self.bench, self.cluster, self.draw = recipe, bench, cluster, draw
        self.row = Row(kind, recipe)
        self.name = f"{re.sub('[^A-Za-z]+', '-', kind)}-{recipe.workers}-{recipe.packing.strip(chr(39))}"
        # A run on one worker starts a cluster of its own, unless its node is to be killed; both ways must do.
        self.local = recipe.workers == 1 and kind != "node"
        self.command = self.start()

    def start(self) -> Command:
        address = "local" if self.local else self.cluster.address
        return self.bench.train(self.name, *self.recipe.overrides, address=address)

    def workers(self) -> list[psutil.Process]:
        return workers_below(self.command.process.pid) if self.local else self.cluster.workers()

    def wait_for_some_step(self, kills_left: int, fresh: bool) -> None:
        """Return at a step that leaves room for the other kills; these fall anywhere between here and the end.

        Args:
            fresh: whether this command is the run's first.
        """
        restarts = len(self.command.restarts) if fresh or self.command.restarts else 1
        self.command.wait_until(lambda: len(self.command.restarts) >= restarts, "the start")
        begin = self.command.restarts[-1] if self.command.restarts else 0
        room = max((int(0.75 * STEPS) - begin) // kills_left, 1)
        self.command.wait_for_step(begin + self.draw.randint(1, room), restarts)

    def note(self, before: int, count: int) -> None:
        """Wait until the run goes on, and note how many steps it goes back.

        Args:
            before: the last step in the history when the kill had happened.
            count: how many restarts that makes for the command under way.
        """
        self.command.wait_until(lambda: len(self.command.restarts) >= count, "a restart")
        self.row.kills += 1
        self.row.lost.append(max(before - self.command.restarts[-1], 0))


def kill_workers(run: Run, kills: int) -> None:
    """SIGKILL to one of the workers; each fourth one while it is still being started."""
    for left in range(kills, 0, -1):
        if run.draw.random() < 0.25:
            run.command.wait_until(run.workers, "a worker's process")
            time.sleep(run.draw.uniform(0, 3))  # it takes some seconds until it trains
        else:
            run.wait_for_some_step(left, fresh=True)
        seen, victim = len(run.command.restarts), run.draw.choice(run.workers())
        victim.kill()
        run.note(run.command.step, seen + 1)


def kill_driver(run: Run, kills: int) -> None:
    """SIGKILL to `emoray train`; the same command is given again."""
    for left in range(kills, 0, -1):
        run.wait_for_some_step(left, fresh=left == kills)
        run.command.kill()
        before = run.command.step
        run.command = run.start()
        run.note(before, 1)


def stop_driver(run: Run, kills: int) -> None:
    """SIGTERM to `emoray train`, which saves and stops with status 143; the same command is given again."""
    for left in range(kills, 0, -1):
        run.wait_for_some_step(left, fresh=left == kills)
        run.command.terminate()
        status = run.command.status()
        assert status == 143, f"status {status} after SIGTERM:\n{run.command.output}"
        before = run.command.step
        run.command = run.start()
        run.note(before, 1)


def kill_nodes(run: Run, kills: int) -> None:
    """All processes of a node that a worker runs on end at once; another node comes in its place."""
    with ExitStack() as stack:
        for left in range(kills, 0, -1):
            run.wait_for_some_step(left, fresh=True)
            stack.enter_context(run.cluster.node())
            busy = [node for node in run.cluster.nodes if run.cluster.workers(node)]
            seen = len(run.command.restarts)
            run.cluster.remove(run.draw.choice(busy))
            run.note(run.command.step, seen + 1)
        finish(run)


def finish(run: Run) -> None:
    status = run.command.status()
    assert status == 0, f"status {status}:\n{run.command.output}"


KINDS: dict[str, Callable[[Run, int], None]] = {
    "worker (SIGKILL)": kill_workers,
    "driver (SIGKILL)": kill_driver,
    "driver (SIGTERM)": stop_driver,
    "node": kill_nodes,
}


def disturb(run: Run, kills: int, expected: Left) -> Row:
    """Disturb a run that was just started, see it to its end and compare."""
    begin, row = time.monotonic(), run.row
    try:
        KINDS[row.killed](run, kills)
        finish(run)
        row.identical = left_by(run.command.run) == expected
        row.problem = "" if row.identical else f"differs: {run.command.run}"
    except Exception as error:  # told in the table; the other runs are worth their time all the same
        row.problem = f"{type(error).__name__}: {error}"
    run.command.end()
    row.seconds = round(time.monotonic() - begin, 1)
    return row


def chaos(bench: Bench, recipes: list[Recipe], kills: int, draw: random.Random) -> list[Row]:
    """All kinds of kills for all recipes.

    Args:
        kills: in each run.
    """
    rows: list[Row] = []
    with bench.cluster() as cluster:
        for recipe in recipes:
            with ExitStack() as nodes:
                for _ in range(recipe.workers):
                    nodes.enter_context(cluster.node())
                quiet = Run("nothing", recipe, bench, cluster, draw)
                finish(quiet)
                expected = left_by(quiet.command.run)
            for kind in KINDS:
                with ExitStack() as nodes:
                    for _ in range(recipe.workers):
                        nodes.enter_context(cluster.node())
                    rows.append(disturb(Run(kind, recipe, bench, cluster, draw), kills, expected))
                print(line(rows[-1]), flush=True)
    return rows


HEAD = """| Killed | Workers | Packing | Times | Steps lost, each | Identical | Seconds |
|---|---:|---|---:|---|---|---:|"""


def line(row: Row) -> str:
    lost = ", ".join(map(str, row.lost)) or "-"
    answer = "yes" if row.identical else "NO"
    return (
        f"| {row.killed} | {row.recipe.workers} | {row.recipe.packing} | {row.kills} | {lost} "
        f"| {answer} | {row.seconds:.0f} |"
    )


def totals(rows: list[Row]) -> str:
    """How often each kind was killed over all runs."""
    counts = {kind: sum(row.kills for row in rows if row.killed == kind) for kind in KINDS}
    return "In all: " + ", ".join(f"{kind} {count}" for kind, count in counts.items())


def write(rows: list[Row], seed: int, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"chaos-{time.strftime('%Y-%m-%d')}.json"
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seed": seed,
        "steps": STEPS,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "torch", "transformers")},
    }
    path.write_text(json.dumps({**facts, "runs": [asdict(row) for row in rows]}, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill a run, and two recipes instead of four")
    parser.add_argument("--rounds", type=int, default=3, help="kills in each run (default 3: twelve of each kind)")
    parser.add_argument("--seed", type=int, default=None, help="draw the same kills as a run with this seed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that all is ended, as on Ctrl-C
    seed = random.randrange(2**32) if options.seed is None else options.seed
    recipes = [Recipe(1, "auto"), Recipe(2, "'off'"), Recipe(1, "'off'"), Recipe(2, "auto")]
    recipes, kills = (recipes[:2], 1) if options.quick else (recipes, options.rounds)
    print(f"Seed {seed}\n\n{HEAD}", flush=True)
    scratch = tempfile.TemporaryDirectory(prefix="emoray-chaos-", ignore_cleanup_errors=True)
    with scratch as folder, Bench(Path(folder)) as bench:
        rows = chaos(bench, recipes, kills, random.Random(seed))
    print(f"\n{totals(rows)}\n{write(rows, seed, RESULTS)}")
    problems = [row for row in rows if not row.identical]
    for row in problems:
        print(f"\n{row.killed}, {row.recipe}: {row.problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
