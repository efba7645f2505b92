"""The endpoint on Ray Serve: a deployment whose replicas are whole endpoints, and the builder that configures it.

`serve run emoray.on_ray.serve:build model=/runs/emotion`, `serve deploy` and a RayService build the same application
as `emoray serve` does; `args` is the content of configs/serve.yaml, and `user_config: {model: ...}` of the deployment
`endpoint` changes the model while its replicas go on.
"""

import logging
import os
import time
from collections.abc import Sequence
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import ray
from ray import serve

from emoray import __version__
from emoray.http import keys as api_keys
from emoray.http.app import App, access_log, make_app
from emoray.http.errors import unavailable
from emoray.http.keys import Keys
from emoray.http.service import Answer
from emoray.on_ray import cluster, direct_ingress
from emoray.on_ray.autoscaling import BUSY, QUEUED
from emoray.on_ray.board import open_board
from emoray.on_ray.replica import ReplicaService
from emoray.on_ray.serve_metrics import RayMetrics
from emoray.serve_config import ReplicasConfig, ServeConfig

# No `from __future__ import annotations` here: Ray Serve reads the builder's annotation as it stands.

APP = "emoray"
"""Name of the application where nothing else is said."""
DRAIN_S = 60.0
"""How long a replica that is to stop goes on with what it has, in seconds."""
REPORT_EVERY_S = 1.0
"""How often replicas report what scaling is decided by, in seconds."""
_LOOK_BACK_S = 5.0
"""Over how many seconds what replicas report is averaged."""
_LOG_BYTES = 50 << 20
_ASKED = 4
"""How often another replica is looked for to share a request with."""


class LateApp:
    """What Ray Serve takes for the app: the real one wants a config, which comes a moment later, in `reconfigure`."""

    app: App

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        while True:  # the service starts in `reconfigure` and ends in `__del__`
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return


@serve.ingress()
class Replica:
    """One replica: the ASGI app, a model, and the queue between them.

    Args:
        threads: of the model.
        settings: what `reconfigure` is given where nothing else is said.
    """

    def __init__(self, threads: int, settings: dict[str, Any]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by whichever engine is loaded
        self._settings = settings
        context = serve.get_replica_context()
        self._name = str(context.replica_id.unique_id)
        self._metrics = RayMetrics()
        self._service: ReplicaService | None = None
        self._app = LateApp()
        direct_ingress.set_app(self._app)
        self._others: Any = None
        self._before = (time.monotonic(), 0.0)
        _write_logs(self._name)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called before the first request, and again when the application is deployed with another config.

        Later calls return at once, because a replica isn't given requests meanwhile: a new model is loaded beside.

        Args:
            user_config: `application`'s settings, or of a config file for Serve what differs from them, mostly
                `{"model": location}`.
        """
        settings = {**self._settings, **user_config}
        config = ServeConfig.model_validate(settings["config"])
        if "model" in settings:
            config = config.model_copy(update={"model": settings["model"]})
        keys = api_keys.parse(settings["keys"], "keys")
        if self._service is not None:
            self._app.app.reconfigure(config, keys)
            await self._service.reconfigure(config)
            return
        board = open_board(serve.get_replica_context().app_name)
        self._service = ReplicaService(
            config, settings["base"], board, self._name, self._metrics, elsewhere=self._elsewhere
        )
        self._app.app = make_app(self._service, config, keys=keys, metrics=self._metrics)
        direct_ingress.open_for_requests()
        await self._service.start()
        await self._service.until_up()  # what can't serve yet must not be given requests

    async def share(self, texts: list[str], seconds: float, sender: str) -> Answer | None:
        """Texts of a request that another replica has (see `emoray.on_ray.shares`); None where that is this one."""
        if sender == self._name:
            return None
        assert self._service is not None
        return await self._service.classify_here(texts, time.monotonic() + seconds)

    async def _elsewhere(self, texts: Sequence[str], seconds: float) -> Answer:
        if self._others is None:
            context = serve.get_replica_context()
            self._others = serve.get_deployment_handle(context.deployment, context.app_name)
        for _ in range(_ASKED):  # Ray Serve may choose this very replica
            answer: Answer | None = await self._others.share.remote(list(texts), seconds, self._name)
            if answer is not None:
                return answer
        raise unavailable("no other replica was found")

    async def check_health(self) -> None:
        if self._service is None:
            return
        if self._service.state == "failed":
            raise RuntimeError("the model could not be loaded")
        if await self._service.is_broken():  # Ray Serve starts another replica
            raise RuntimeError("the model fails on any text")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `emoray.on_ray.autoscaling`; Ray Serve asks every second or so."""
        if self._service is None:
            return {QUEUED: 0.0, BUSY: 0.0}
        since, busy = self._before
        now, total = time.monotonic(), self._service.busy_s
        self._before = (now, total)
        share = max(0.0, total - busy) / max(now - since, 1e-3)  # negative where the model was changed
        return {QUEUED: float(self._service.queued_tokens), BUSY: min(1.0, share)}

    async def __del__(self) -> None:
        if self._service is not None:
            await self._service.close()


def _write_logs(name: str) -> None:
    """Our logs go where Ray Serve's do, so that the dashboard shows them: one JSON object a request in `access`."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    for logger, kind, form in (
        (logging.getLogger("emoray"), "replica", "%(asctime)s %(levelname)s %(message)s"),
        (access_log, "access", "%(message)s"),
    ):
        handler = RotatingFileHandler(folder / f"emoray_{kind}_{name}.log", maxBytes=_LOG_BYTES, backupCount=2)
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def build(args: ServeConfig) -> serve.Application:
    """The application for `serve run`, `serve deploy` and RayService.

    Raises:
        ConfigError: the keys can't be read, here where the application is built.
    """
    return application(args, api_keys.load(args.auth.keys_file), os.getcwd())


def application(config: ServeConfig, keys: Keys, base: str) -> serve.Application:
    """Bind the deployment.

    Args:
        base: folder that a relative `config.model` is meant from.
    """
    cpus, gpus = resources(config.replicas)
    target = config.replicas.target_queued_tokens
    policy = {
        "policy_function": "emoray.on_ray.autoscaling:ByQueuedTokens",
        "policy_kwargs": {"target": 2 * config.batching.max_tokens if target == "auto" else target},
    }
    settings = {"config": config.model_dump(mode="json"), "keys": keys.lines(), "base": base}
    deployment = serve.deployment(
        name="endpoint",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # More than the queue holds: it is the endpoint that refuses, in JSON, and batches fill from all that waits.
        max_ongoing_requests=3 * config.limits.max_queued_requests,
        autoscaling_config={
            "min_replicas": config.replicas.min,
            "max_replicas": config.replicas.max,
            "upscale_delay_s": config.replicas.upscale_delay_s,
            "downscale_delay_s": config.replicas.downscale_delay_s,
            "look_back_period_s": _LOOK_BACK_S,
            # Ray Serve no longer reads it, but wants it below the look-back; the environment variable that it reads
            # instead is set by serve_command.py.
            "metrics_interval_s": REPORT_EVERY_S,
            "policy": policy,
        },
        user_config=settings,
        logging_config={"enable_access_log": False},  # there is one of ours
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=30,
    )(Replica)
    # The same code is the same version, so that another config is given to the replicas that run. Without one, Ray
    # Serve takes every deployment of `serve.run` for new code, and starts all replicas anew.
    deployment = deployment.options(version=__version__, _internal=True)
    return deployment.bind(threads=max(1, int(cpus)), settings=settings)


def resources(replicas: ReplicasConfig) -> tuple[float, float]:
    """CPUs and GPUs of a replica."""
    nodes = cluster.live_nodes() if ray.is_initialized() else []
    gpus = replicas.num_gpus
    if gpus == "auto":
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    cpus = replicas.num_cpus
    if cpus == "auto":
        # Whole threads: an even share of the largest node. Two threads of one replica answer few callers twice as fast
        # as two replicas of one, and many as fast.
        most = int(max((node.get("CPU", 0) for node in nodes), default=1))
        cpus = float(max(1, min(2, most), most // replicas.max))
    return cpus, gpus
