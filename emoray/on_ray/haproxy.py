"""What stands before the replicas: HAProxy in Ray Serve's throughput mode, all of it on the address that is configured.

Ray Serve 2.60 offers HAProxy, but its statistics listen on all interfaces, its own errors are plain text with status
500, and it gives up requests whose replica died. `RAY_SERVE_HAPROXY_BINARY_PATH` names the program that it starts: the
script that `prepare` writes mends the configuration, which Ray writes anew at each change, and then becomes HAProxy.

It also refuses what replicas can't take on. A refusal costs a replica as much as a tenth of an answer: at ten times the
load it would do nothing else, its health checks would fail, and all would fall on Ray Serve's slower proxy.
"""

from __future__ import annotations

import math
import shlex
import shutil
import socket
from pathlib import Path

from emoray.folders import private_folder
from emoray.http.errors import KINDS, RequestError, no_answer_in_time, no_replica, replica_ended, replicas_full
from emoray.serve_config import HttpConfig

RETRIES = 12
"""How often a request is tried again; a replica that has just died is marked down after the third failure."""
UNDER_WAY = 128
"""Requests at a replica at once, at the most: enough for full batches. More would only make all of them wait longer."""
HEAD_S = 10
"""Seconds in which a request's head must have come."""
BUFFER = 256 << 10
"""Bytes of a request that can be sent again: a larger one is not kept."""
_TEXTS = {
    400: RequestError("malformed", "this is not an HTTP request"),
    408: RequestError("slow_body", "the request did not arrive in time"),
    429: replicas_full(),
    500: RequestError("internal", "a fault of the proxy: try again"),
    502: replica_ended(),
    503: no_replica(),
    504: no_answer_in_time(),
}
"""HAProxy's own answers: status there -> the endpoint's error."""
_REASONS = {400: "Bad Request", 408: "Request Timeout", 429: "Too Many Requests", 500: "Internal Server Error"}
_REASONS |= {503: "Service Unavailable", 504: "Gateway Timeout"}


def is_there() -> bool:
    """Whether an HAProxy binary is installed: ray[serve] brings one for Linux."""
    try:
        _binary()
    except OSError:
        return False
    return True


def _binary() -> str:
    from ray.serve._private.haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def environment(folder: Path, http: HttpConfig, cpus: int, timeout_s: float, most: int) -> dict[str, str]:
    """What Ray Serve's controller must find in its environment, and hands on to proxies and replicas.

    Args:
        folder: for the script and the error pages.
        cpus: of the machine.
        timeout_s: for which a request may wait for its answer.
        most: requests that a replica takes on at once.
    """
    metrics, statistics, fallback = _free_ports(3) if http.proxy_ports == "auto" else http.proxy_ports
    private = private_folder()  # Ray's own place, /tmp/haproxy-serve, is whoever came first's
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(private / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(private / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(private),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(private / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(private / "metrics.sock"),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(
            write_wrapper(folder, _binary(), (metrics, statistics), min(most, UNDER_WAY))
        ),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http.replica_ports[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http.replica_ports[1]),
        # A line of log a request, parsed by a Python process: the endpoint counts its requests itself.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, cpus // 4))),
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(math.ceil(timeout_s)),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(timeout_s)),  # Ray's hour is a long time for half a body
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER),
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        # A replica that is dead shows in its connections. One that is only slow must not be given up.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "6",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "60",
    }


def tidy(node: str) -> None:
    """Remove what HAProxy left on this machine for a Ray that is ended.

    Args:
        node: id of its only node.
    """
    shutil.rmtree(private_folder() / node, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def write_wrapper(folder: Path, binary: str, ports: tuple[int, ...], most: int) -> Path:
    """Write the script that stands for HAProxy, and its error pages.

    Args:
        ports: that must listen on this machine alone.
        most: requests at a replica at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["sed", "-i", "-E", *(f"-e {shlex.quote(edit)}" for edit in _edits(folder, ports, most))])
    script = folder / "haproxy"
    # Where Ray is killed, HAProxy must not go on to hold the port and say that no replica answers.
    last_words = 'if command -v setpriv > /dev/null; then set -- setpriv --pdeathsig KILL -- "$@"; fi'
    script.write_text(
        "#!/bin/sh\n# -db -f CONFIG ...: mends Ray Serve's configuration, then becomes HAProxy.\n"
        f'{command} "$3"\nset -- {shlex.quote(binary)} "$@"\n{last_words}\nexec "$@"\n'
    )
    script.chmod(0o700)
    return script


def _edits(folder: Path, ports: tuple[int, ...], most: int) -> list[str]:
    """What sed does to the configuration that Ray Serve writes (its `haproxy_templates.py`), and our error pages:

    bind :9101                                       bind 127.0.0.1:9101
    errorfile ..., log ..., option httplog           (gone)
    frontend http_frontend                           and below it: no second try of a PUT; a name for each answer
    http-request return status 404 content-type ...  http-request return status 503 default-errorfiles
    server <replica> <address> check ...             server <replica> <address> check maxconn 128 ...
    # Servers in this backend                        http-request return status 429 where no replica has room
    defaults                                         and below it: time for a request's head; our error pages
    """
    edits = [rf"s/^( *bind) [*]?:{port}$/\1 127.0.0.1:{port}/" for port in ports]
    edits += ["/^ *errorfile /d", "/^ *log /d", "/^ *option (httplog|log-health-checks)$/d"]
    # What changes something is not sent again: the model's change.
    named = "http-after-response set-header x-request-id %[uuid()] unless { res.hdr(x-request-id) -m found }"
    edits.append(rf"s/^frontend http_frontend$/&\n    http-request disable-l7-retry if METH_PUT\n    {named}/")
    # Where no application is (yet), Ray has a plain 404, after which no client would try again.
    edits.append(r"s/^( *http-request return status) 404 content-type .*$/\1 503 default-errorfiles/")
    pages = [f"    timeout http-request {HEAD_S}s"]
    for status, error in _TEXTS.items():
        page = folder / f"{status}.http"
        page.write_bytes(_page(error))
        pages.append(f"    errorfile {status} {page}")
    edits.append(rf"s/^( *server .* check)( |$)/\1 maxconn {most}\2/")
    full = "http-request return status 429 default-errorfiles if METH_POST { nbsrv ge 1 } { be_conn_free lt 1 }"
    edits.append(f"s/^ *# Servers in this backend$/    {full}/")
    return [*edits, "s|^defaults$|defaults\\n" + "\\n".join(pages) + "|"]


def _page(error: RequestError) -> bytes:
    """An error as HAProxy wants it: the whole answer."""
    body, status = error.body(), KINDS[error.kind].status
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}".encode(), b"content-type: application/json"]
    lines += [name + b": " + value for name, value in error.all_headers()]
    lines += [b"content-length: " + str(len(body)).encode(), b"cache-control: no-store", b"", body]
    return b"\r\n".join(lines)
