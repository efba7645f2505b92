"""What `emoray serve` reads: `configs/serve.yaml`, in the manner of config.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from emoray.config_files import Number, PositiveInt, Section, load_as
from emoray.engines import Wanted

Port = Annotated[int, Number, Field(ge=1, le=65535)]


class HttpConfig(Section):
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 127.0.0.1 is this machine alone, 0.0.0.0 is every network it is in."""
    port: Annotated[int, Number, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 takes a free one."""
    proxy: Literal["auto", "haproxy", "ray"] = "auto"
    """What stands before the replicas: HAProxy, or Ray Serve's own proxies, which cost as much as a small model. `auto`
    takes HAProxy where `emoray serve` starts Ray on this machine; a Ray Serve that runs keeps what it has.
    """
    proxy_ports: tuple[Port, Port, Port] | Literal["auto"] = "auto"
    """TCP ports of HAProxy's metrics and statistics, on this machine alone, and of Ray Serve's proxy that answers where
    no replica can, on `host`; `auto` takes free ones."""
    replica_ports: tuple[Port, Port] = (30000, 31000)
    """First and last TCP port that replicas behind HAProxy listen on, on `host`."""

    @model_validator(mode="after")
    def _ports_are_ordered(self) -> HttpConfig:
        if self.replica_ports[0] >= self.replica_ports[1]:
            raise ValueError(f"http.replica_ports is {list(self.replica_ports)}, but must go from a lower to a higher")
        return self


class ReplicasConfig(Section):
    min: Annotated[int, Number, Field(ge=0)] = 1
    """Replicas that always run; 0 lets the endpoint sleep until a request comes."""
    max: PositiveInt = 4
    """Replicas at the most."""
    target_queued_tokens: PositiveInt | Literal["auto"] = "auto"
    """One more replica for every this many tokens that wait; `auto` is two batches."""
    num_cpus: Annotated[float, Number, Field(gt=0)] | Literal["auto"] = "auto"
    """CPUs, and threads, of a replica; `auto` is an even share of the machine, and two where it has them."""
    num_gpus: Annotated[float, Number, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs of a replica; `auto` is one where the cluster has any."""
    upscale_delay_s: Annotated[float, Number, Field(ge=0)] = 3.0
    """Seconds for which more replicas must be wanted before they are started."""
    downscale_delay_s: Annotated[float, Number, Field(ge=0)] = 60.0
    """Seconds for which fewer replicas must be enough before any is stopped."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> ReplicasConfig:
        if self.min > self.max:
            raise ValueError(f"replicas.min is {self.min}, more than replicas.max, {self.max}")
        return self


class BatchingConfig(Section):
    max_tokens: Annotated[int, Number, Field(ge=16)] = 4096
    """Tokens of a batch at the most; one text always fits."""


class LimitsConfig(Section):
    max_texts: PositiveInt = 1024
    """Texts of a request at the most; more are answered with 413."""
    max_body_bytes: Annotated[int, Number, Field(ge=1024)] = 2_000_000
    """Bytes of a request's body at the most; more are answered with 413."""
    max_queued_requests: PositiveInt = 512
    """Requests that may wait at once; more are answered with 429."""
    max_queue_s: Annotated[float, Number, Field(gt=0)] = 2.0
    """A request that would wait longer than this for its turn, in seconds, is answered with 429 at once."""
    timeout_s: Annotated[float, Number, Field(gt=0, le=3600)] = 10.0
    """A request that has no answer after so many seconds gets 504, and is not computed if it hasn't been."""


class AuthConfig(Section):
    keys_file: str | None = None
    """File of API keys, one `[admin] NAME SHA256` a line; null takes EMORAY_API_KEYS, or no keys at all."""


class GateConfig(Section):
    """What a model must have reached, by the test metrics stored with it, to be served."""

    metric: Literal["f1", "macro_f1", "accuracy"] = "f1"
    """Which of the test metrics that are stored with a model."""
    at_least: Annotated[float, Number] | None = None
    """Refuse a model below this; null takes any."""
    may_lose: Annotated[float, Number, Field(ge=0)] | None = None
    """Refuse a model that is worse than the one in service by more than this; null doesn't compare."""


class LoggingConfig(Section):
    texts: bool = False
    """Write the texts of each request into the access log: they are people's, so only where that is wanted."""


class ServeConfig(Section):
    """A whole endpoint: `configs/serve.yaml`."""

    model: Annotated[str, Field(min_length=1)] = "runs/emotion/best"
    """Folder or URI of a model, or the name of a run or sweep, whose best checkpoint is taken."""
    served_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    """What clients call the model, in Triton's URLs say; null is the run's name, which changes with the model."""
    engine: Wanted = "auto"
    """What runs the model; `auto` takes the fastest that agrees."""
    http: HttpConfig = HttpConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    batching: BatchingConfig = BatchingConfig()
    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    gate: GateConfig = GateConfig()
    logging: LoggingConfig = LoggingConfig()


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> ServeConfig:
    """A serving config: defaults < YAML file < `key.path=value` overrides.

    Raises:
        ConfigError: with every problem found.
    """
    return load_as(ServeConfig, path, overrides)
