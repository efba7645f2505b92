"""`emoray predict` on Ray: killed and given again, it gives every row once, in order, with the classifier's answers"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LABELS, sentences, write_rows

from benchmarks.disturb import SCORING, Bench, Command, SmallCluster, wait_for_end
from emoray.classifier import Classifier
from emoray.console import ScoringDisplay
from emoray.on_ray import predict
from emoray.on_ray.scorer import Scorer
from emoray.run import Attempt

pytestmark = pytest.mark.ray

ROWS = 20_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences, among them rows that can't be scored."""
    texts = [text for label in LABELS for text in sentences(label)]
    rows: list[dict[str, Any]] = [{"id": i, "text": texts[i % len(texts)]} for i in range(ROWS)]
    rows[5]["text"], rows[ROWS - 1] = None, {"id": ROWS - 1}
    return write_rows(tmp_path_factory.mktemp("input") / "rows.jsonl", rows)


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(output.glob("part-*")) for line in part.read_text().splitlines()]


def test_every_row_once_and_in_order(bench: Bench, cluster: SmallCluster, trained_run: Path, source: Path) -> None:
    with cluster.node(cpus=2):
        command = bench.start("whole", _command(trained_run, source, bench, "whole"), address=cluster.address)
        assert command.status() == 0, command.output
    _must_be_whole(command, trained_run, source)
    assert parts(command.run) == scored_here(trained_run, source, bench.folder / "runs" / "undisturbed-scored")


def _command(trained_run: Path, source: Path, bench: Bench, name: str) -> list[str]:
    return ["predict", str(trained_run), str(source), "--output", str(bench.folder / "runs" / name), "--json"]


def _must_be_whole(command: Command, trained_run: Path, source: Path) -> None:
    """Every row once, in order, with the classifier's answers."""
    summary = json.loads(command.output.splitlines()[-1])
    assert (summary["rows"], summary["errors"], summary["parts"]) == (ROWS, 2, 10)
    assert sum(summary["labels"].values()) == ROWS - 2
    rows = read(command.run)
    given = [json.loads(line) for line in source.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert [row.get("text") for row in rows] == [row.get("text") for row in given]
    assert rows[5]["error"] == rows[-1]["error"] == "there is no text"
    assert rows[5]["label"] is None and rows[5]["scores"] is None
    predictions = Classifier.load(trained_run)([row["text"] for row in given[6:3000]])
    for row, prediction in zip(rows[6:3000], predictions, strict=True):
        assert (row["label"], row["tokens"], row["truncated"], row["error"]) == (
            prediction.label,
            prediction.tokens,
            prediction.truncated,
            None,
        )
        assert row["scores"] == pytest.approx(prediction.scores, abs=1e-5)


@pytest.mark.slow  # what is kept of a killed command is in tests/test_batch.py, without Ray
def test_killed_and_given_again(bench: Bench, cluster: SmallCluster, trained_run: Path, source: Path) -> None:
    """Begun on a Ray of its own, it ends on a cluster that runs already."""
    output = bench.folder / "runs" / "scored"
    arguments = _command(trained_run, source, bench, "scored")
    first = bench.start("scored", arguments)
    first.wait_until(lambda: len(list(output.glob("_emoray/done/*"))) >= 2, "two parts")
    first.kill()
    first.end()
    before = {path.stem[-5:]: path.stat().st_mtime_ns for path in output.glob("part-*")}
    before = {number: when for number, when in before.items() if (output / f"_emoray/done/{number}.json").exists()}

    with cluster.node(cpus=2):
        second = bench.start("scored", arguments, address=cluster.address)
        assert second.status() == 0, second.output
    assert f"Going on: {len(before)} of 10 parts are there already" in second.output
    assert all((output / f"part-{number}.jsonl").stat().st_mtime_ns == when for number, when in before.items())
    _must_be_whole(second, trained_run, source)
    assert parts(output) == scored_here(trained_run, source, bench.folder / "runs" / "undisturbed-again")


def parts(output: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(output.glob("part-*"))]


def scored_here(model: Path, source: Path, output: Path) -> list[bytes]:
    """The parts that one actor writes to which nothing happens, not even Ray."""
    threads = torch.get_num_threads()
    work = predict.look(predict.Request(str(model), [str(source)], str(output)), ScoringDisplay())
    attempt = Attempt.begin(work.output.home, work.identity)
    scorer = Scorer(work.job(attempt, cpus=1, use_gpu=False))
    for piece in work.found.pieces:
        assert scorer({"piece": json.dumps(asdict(piece))})["error"] == b""
    torch.set_num_threads(threads)
    return parts(output)


@pytest.mark.slow
def test_on_a_cluster_actors_and_nodes_go_and_a_newer_command_comes(
    bench: Bench, cluster: SmallCluster, trained_run: Path, tmp_path: Path
) -> None:
    """The newer of two commands has the output; SIGTERM ends all actors; a killed actor's piece goes to another."""
    rows = [{"id": i, "text": sentences(LABELS[i % 4])[i % 60]} for i in range(240)] * 3000
    source = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ["predict", str(trained_run), str(source), "--output", str(bench.folder / "runs" / "contested")]
    with cluster.node(), cluster.node() as lost:
        older = bench.start("contested", [*arguments, "workers.num_workers=1"], address=cluster.address)
        older.wait_until(lambda: "Scoring with" in older.output, "its actors")
        newer = bench.start("contested", arguments, address=cluster.address)
        assert older.status() == 1, older.output
        assert "took the run over" in older.output and "Traceback" not in older.output
        newer.wait_until(lambda: "Scoring with" in newer.output and cluster.workers(lost, SCORING), "actors")
        newer.terminate()
        assert newer.status() == 143, newer.output
        assert "the same command goes on" in newer.output
        wait_for_end(cluster.workers(kind=SCORING))

        last = bench.start("contested", [*arguments, "--on-existing", "replace"], address=cluster.address)
        last.wait_until(lambda: len(list(last.run.glob("_emoray/done/*"))) in (2, 3), "two parts")
        cluster.workers(lost, SCORING)[0].kill()
        assert last.status() == 0, last.output
        assert [row["id"] for row in read(last.run)] == [row["id"] for row in rows]
