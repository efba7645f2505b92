"""`emoray submit`: a command of emoray's as a job on a running cluster, followed to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import RayError
from ray.job_submission import JobInfo, JobStatus, JobSubmissionClient

from emoray.classifier import locate_model
from emoray.errors import ClusterError, ConfigError
from emoray.storage import is_uri
from emoray.wording import first_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

STOPPED = 3
"""Exit status where someone stopped the job; 0 is success, 1 failure."""

_MENDABLE = (1, 2)
"""Exit statuses of a command that has said what a person must do: the same again would say the same."""

_TAKE_MODELS = ("classify", "evaluate", "predict", "export", "serve")
_PATIENCE_S = 600.0
"""How long the cluster may not answer before following ends, in seconds; the job is not touched by that."""

_AGAIN_S = 2.0
_STOP_S = "90"
"""How long Ray lets a job that is stopped save its checkpoint; by default 3 s."""

_NO_AGENT = "No available agent"
"""Begins Ray's answer while no node has its job agent: for seconds after `ray start`, longer on a busy machine."""
_AGENT_S = 60.0

_TOKEN = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's."

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is to be done where.

    Attributes:
        command: of emoray, its name first.
        address: of the cluster's dashboard; None takes RAY_API_SERVER_ADDRESS, else this machine's.
        working_dir: uploaded, but for what .gitignore and .rayignore name.
        runtime_env: file with more of the job's environment, for clusters whose image lacks emoray.
        retries: how often a job that was lost is submitted again.
    """

    command: Sequence[str]
    address: str | None = None
    working_dir: str = "."
    runtime_env: str | None = None
    retries: int = 0


def submit(order: Order, detach: bool, say: Say) -> int:
    """Submit a command, and follow it.

    Returns:
        The exit status: 0 where the job succeeded or was detached from, 1 where it failed, 3 where it was stopped.

    Raises:
        ConfigError: the command is wrong; nothing was uploaded.
        ClusterError: the cluster can't be reached, or doesn't take the job.
    """
    check(order.command)
    environment = _environment(order)
    client = connect(order.address)
    retries = order.retries
    while True:
        job = _submit(client, order.command, environment, say)
        say(f"Job {job} runs `{_entrypoint(order.command)}` on {client.get_address()}")
        if detach:
            say(f"Follow it with: emoray submit --follow {job}")
            return 0
        info = follow(client, job, say)
        lost = info.status == JobStatus.FAILED and info.driver_exit_code not in _MENDABLE
        if not (lost and retries):
            return told(job, info, say)
        retries -= 1
        say(f"Job {job} was lost ({_why(info)}): submitted again, it goes on from the last checkpoint")


def check(command: Sequence[str]) -> None:
    """Refuse here, before anything is uploaded, what the command would refuse there.

    Raises:
        ConfigError: with every problem found.
    """
    if not command:
        raise ConfigError("emoray submit", ["no command: e.g. emoray submit -- train configs/emotion.yaml"])
    name, *arguments = [word for word in command if word != "--json"]
    if name in _TAKE_MODELS and arguments:
        _refuse_local_model(name, arguments[0])
    if name not in ("train", "tune", "predict") or not arguments:
        return
    from emoray import config, tune_config

    if name == "train":
        key, storage = "run.storage_path", config.load(arguments[0], arguments[1:]).run.storage_path
    elif name == "tune":
        key, storage = "run.storage_path", tune_config.load(arguments[0], arguments[1:]).config.run.storage_path
    else:
        key, storage = "--output", _value_of("--output", arguments)
    if storage and not is_uri(storage) and not os.path.isabs(storage):
        raise ConfigError(
            f"emoray submit {name}",
            [
                f"{key} is {storage}, which would lie in the job's own folder, and Ray deletes that: give "
                f"{key}=/a/path/that/all/nodes/see, s3://... or gs://..."
            ],
        )


def _refuse_local_model(name: str, location: str) -> None:
    runs = os.path.join(os.getcwd(), "runs", "")
    if not is_uri(location) and not os.path.isabs(location) and locate_model(location, os.getcwd()).startswith(runs):
        raise ConfigError(
            f"emoray submit {name}",
            [f"{location} lies in runs/, which no job is sent: give an absolute path that all nodes see, or a URI"],
        )


def _value_of(option: str, arguments: Sequence[str]) -> str:
    """What an option is given, as `--output x` or `--output=x`; empty where it isn't there, which the command tells."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return ""


def connect(address: str | None) -> Any:
    """The job server of a cluster.

    Raises:
        ClusterError: it can't be reached, or refuses the token.
    """
    for logger in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)  # that .git isn't sent
    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(where)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"{where}: no job server answers: {first_line(error)}. Give the dashboard's address with --address "
            f"(through a tunnel: kubectl port-forward, ray dashboard). {_TOKEN}"
        ) from None


def follow(client: Any, job: str, say: Say) -> JobInfo:
    """Print a job's log until it ends, through lost connections.

    Raises:
        ClusterError: there is no such job, or the cluster doesn't answer any more.
    """
    printed = 0
    answered = time.monotonic()
    while True:
        try:
            info = client.get_job_info(job)
            if info.status != JobStatus.PENDING:
                printed = asyncio.run(_tail(client, job, printed))
                info = client.get_job_info(job)
            if info.status.is_terminal():
                return info
            answered = time.monotonic()
        except (OSError, RuntimeError, RayError) as error:
            if "does not exist" in str(error):
                raise ClusterError(f"{job}: {first_line(error)}: `ray job list` shows those that there are") from None
            if time.monotonic() - answered > _PATIENCE_S:
                raise ClusterError(
                    f"The cluster has not answered for {_PATIENCE_S:g} s ({first_line(error)}). The job may go on all "
                    f"the same: emoray submit --follow {job}"
                ) from None
        time.sleep(_AGAIN_S)


async def _tail(client: Any, job: str, printed: int) -> int:
    """Print what follows after so many characters, until the connection or the job ends; the characters by then."""
    seen = 0
    try:
        async for text in client.tail_job_logs(job):
            new = text[max(0, printed - seen) :]
            seen += len(text)
            sys.stdout.write(new)
            sys.stdout.flush()
    except (OSError, RuntimeError, RayError):
        pass  # asked anew, from the beginning of the log, when the cluster answers again
    return max(printed, seen)


def told(job: str, info: JobInfo, say: Say) -> int:
    """Say how a job ended, and give the exit status of that."""
    if info.status == JobStatus.SUCCEEDED:
        say(f"Job {job} succeeded")
        return 0
    if info.status == JobStatus.STOPPED:
        say(f"Job {job} was stopped; the same command goes on from its last checkpoint")
        return STOPPED
    resumes = any(f" {name} " in f" {info.entrypoint} " for name in ("train", "tune", "predict"))
    say(f"Job {job} failed ({_why(info)})" + "; the same command goes on where it ended" * resumes)
    return 1


def _why(info: JobInfo) -> str:
    if info.driver_exit_code is not None:
        return f"exit status {info.driver_exit_code}"
    return first_line(info.message or "for no reason that Ray knows")


def _submit(client: Any, command: Sequence[str], environment: dict[str, Any], say: Say) -> str:
    job = f"emoray-{command[0]}-{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    given_up, told = time.monotonic() + _AGENT_S, False
    while True:
        try:
            # A copy: Ray puts the address of what it uploaded into it.
            return str(
                client.submit_job(entrypoint=_entrypoint(command), submission_id=job, runtime_env={**environment})
            )
        except (OSError, RuntimeError, ValueError, RayError) as error:
            no_agent = _NO_AGENT in str(error)
            if no_agent and time.monotonic() < given_up:
                if not told:
                    say("Waiting for the cluster's job agent")
                told = True
                time.sleep(_AGAIN_S)
                continue
            remedy = f"A token is missing? {_TOKEN}"
            if no_agent:
                remedy = (
                    "Another Ray on that machine may hold the agent's port: start this one with "
                    "--dashboard-agent-listen-port."
                )
            raise ClusterError(f"{client.get_address()} doesn't take the job: {first_line(error)}. {remedy}") from None


def _entrypoint(command: Sequence[str]) -> str:
    return shlex.join(["emoray", *command])


def _environment(order: Order) -> dict[str, Any]:
    if not Path(order.working_dir).is_dir():
        raise ConfigError("--working-dir", [f"{order.working_dir}: no such folder"])
    given: Any = {}
    if order.runtime_env is not None:
        try:
            given = yaml.safe_load(Path(order.runtime_env).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError("--runtime-env", [f"{order.runtime_env}: can't be read: {first_line(error)}"]) from None
        if not isinstance(given, dict):
            raise ConfigError("--runtime-env", [f"{order.runtime_env}: holds no keys; see cluster/runtime_env.yaml"])
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_S, **given.get("env_vars", {})}
    return {**given, "working_dir": order.working_dir, "env_vars": variables}
