"""Starting and stopping a cluster: a Ray of its own or a running one, the actors on it, by resources.

The launcher makes the CURVE keys, places workers on nodes that offer the resource `prefill` or `decode`, waits until
all are ready, and opens the gateway last.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from cluster.actors import CONTROLLER, Controller, GatewayActor, WorkerActor
from cluster.config import DecodeLink, ServeConfig, StartRefused, WorkerLink
from cluster.membership import Role, WorkerInfo, host_id
from cluster.policy import why_not_in_pages, why_unservable
from cluster.policy_reload import PolicyKeeper
from decode.slo import SLOPolicy
from prefill.runtime import limit_threads
from transport.curve import CurveKeys, is_loopback

log = logging.getLogger("kvstream.launch")

NAMESPACE = "kvstream"
START_TIMEOUT_S = 180.0
GATEWAY_CHECK_S = 5.0
POLICY_LOOK_S = 1.0
CALL_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 80 << 20  # Ray's least; nothing of ours goes through it
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(slots=True, kw_only=True)
class RunningCluster:
    """What `running_cluster` gives: where it serves, and its actors for whoever tests it."""

    base_url: str
    model_name: str
    controller: Any
    gateway: Any
    workers: dict[str, Any] = field(default_factory=dict)  # id -> actor handle
    levels: tuple[str, ...] = ()  # of the model's codec profile


@contextlib.contextmanager
def running_cluster(config: ServeConfig) -> Iterator[RunningCluster]:
    """A cluster for the length of a with-block. Raises StartRefused, in words that say what to do."""
    _connect(config)
    try:
        yield _start(config)
    finally:
        ray.shutdown()  # ends the actors: none of them is detached


def serve(config: ServeConfig) -> None:
    """`kvstream serve`: run until interrupted."""
    console = Console(stderr=True)
    stopped = threading.Event()
    with console.status("starting workers ..."):
        context = running_cluster(config)
        cluster = context.__enter__()
    for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets a handler of its own
        signal.signal(number, lambda *_: stopped.set())
    try:
        console.print(
            f"serving [bold]{cluster.model_name}[/bold] at [bold]{cluster.base_url}[/bold] with "
            f"{config.num_prefill} prefill and {config.num_decode} decode workers; Ctrl-C stops"
        )
        if not config.api_keys and not is_loopback(f"tcp://{config.host}:{config.port}"):
            console.print("[yellow]anyone who can reach this address may use it: set api_keys or --api-key[/yellow]")
        keeper = policy_keeper(config, cluster, say=lambda line: console.print(line, markup=False))
        checked_at = time.monotonic()
        while not stopped.wait(POLICY_LOOK_S):
            if keeper is not None:
                keeper.tick(time.monotonic())
            if time.monotonic() - checked_at >= GATEWAY_CHECK_S:
                _check_gateway(cluster)
                checked_at = time.monotonic()
    finally:
        context.__exit__(None, None, None)


def _check_gateway(cluster: RunningCluster) -> None:
    """Workers are restarted by Ray; without its gateway the server is of no use to anybody."""
    try:
        ray.get(cluster.gateway.ping.remote(), timeout=60)
    except ray.exceptions.RayError as error:
        raise StartRefused(f"the gateway has ended: {_cause(error)}; start the server again") from error


def policy_keeper(config: ServeConfig, cluster: RunningCluster, *, say: Callable[[str], None]) -> PolicyKeeper | None:
    """Brings changes of the policy's file to the decode workers; None: the policy has no file of its own."""
    if config.policy_file is None:
        return None

    def table() -> list[WorkerInfo]:
        try:
            _, infos = ray.get(cluster.controller.table.remote(), timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            log.warning("the controller does not answer: %s", _cause(error))
            return []  # the next tick is another chance
        return [WorkerInfo.from_wire(info) for info in infos]

    def tell(worker_id: str, number: int, policy: SLOPolicy) -> None:
        try:
            ray.get(cluster.workers[host_id(worker_id)].set_policy.remote(number, policy), timeout=CALL_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            say(f"{worker_id} has not taken policy {number} yet: {_cause(error)}")

    def why_not(policy: SLOPolicy) -> list[str]:
        reasons = why_unservable(policy, levels=cluster.levels, num_prefill=config.num_prefill)
        return reasons + why_not_in_pages(policy, config.kv_cache_dtype)

    return PolicyKeeper(config.policy_file, config.policy, why_not=why_not, say=say, table=table, tell=tell)


def _connect(config: ServeConfig) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {
        "namespace": f"{NAMESPACE}-{uuid.uuid4().hex[:8]}",  # several clusters may share a Ray
        "logging_level": logging.WARNING,
        "log_to_driver": os.environ.get("KVSTREAM_WORKER_LOGS", "") == "1",
    }
    try:
        if config.address == "local":
            ray.init(
                address="local",  # never one that happens to run here
                num_cpus=os.cpu_count(),
                resources={"prefill": max(config.num_prefill, 1), "decode": config.num_decode},
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **options,
            )
        else:
            ray.init(address=config.address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StartRefused(
            f"cannot reach the Ray cluster {config.address!r}: {_first_line(error)}. Is `ray start` or `ray up` done, "
            "and is RAY_AUTH_MODE the same here as there?"
        ) from error


def _start(config: ServeConfig) -> RunningCluster:
    is_local = config.address == "local"
    _check_room(config)
    client_keys, make_server_keys = _keys(enabled=not is_local and not config.insecure)
    threads = config.threads or _threads(config)
    gpus = gpus_each(config.device, ray.nodes())
    environment = {"env_vars": {**ENVIRONMENT, **limit_threads(threads)}}
    # Gateway and controller stay on the launcher's node: `host` and `port` are an address of this machine.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    controller = (
        ray.remote(Controller).options(name=CONTROLLER, num_cpus=0, max_restarts=-1, runtime_env=environment).remote()
    )
    runtime = {
        "path": str(Path(config.model).resolve()),
        "dtype": config.dtype,
        "num_blocks": config.kv_blocks,
        "kv_memory_bytes": config.kv_memory,
        "page_ttl_s": config.page_ttl_s,
        "threads": threads,
        "device": config.device if gpus else "cpu",
    }
    actor = ray.remote(WorkerActor)
    workers: dict[str, Any] = {}
    for role, count in (("prefill", config.num_prefill), ("decode", config.num_decode)):
        for number in range(count):
            link = _link(config, role, number)
            worker: dict[str, Any] = {
                "bind": _bind(link, is_local),
                "insecure": config.insecure,
                "curve": make_server_keys(),
            }
            worker_id = f"{role}-{number}"
            decoding = {
                "policy": config.policy,
                "chunk_tokens": config.chunk_tokens,
                "prefix_caching": config.prefix_caching,
                **({} if config.max_num_seqs is None else {"max_sequences": config.max_num_seqs}),
            }
            companion = None
            if role == "decode":
                worker |= {**decoding, "kv_bind": _bind(WorkerLink(bind=link.kv_bind), is_local)}
            elif _has_companion(config, link):
                companion = {**worker, **decoding, "bind": _bind(WorkerLink(), is_local)}
            workers[worker_id] = actor.options(
                num_cpus=0, num_gpus=gpus, resources={role: 1}, max_restarts=-1, runtime_env=environment
            ).remote(
                role=role,
                worker_id=worker_id,
                runtime=runtime if role == "prefill" else {**runtime, **_pages(config)},
                worker=worker,
                store=_store(config, worker_id) if role == "prefill" or config.prefix_caching else None,
                advertise=link.advertise,
                kv_advertise=link.kv_advertise if role == "decode" else None,
                companion=companion,
            )
    name = config.model_name or Path(config.model).resolve().name
    gateway = (  # made while the workers load, so that its own imports do not add to the start
        ray.remote(GatewayActor)
        .options(scheduling_strategy=here, num_cpus=0, runtime_env={"env_vars": {**ENVIRONMENT, **limit_threads(1)}})
        .remote(
            model_path=runtime["path"],
            model_name=name,
            chunk_tokens=config.chunk_tokens,
            host=config.host,
            port=config.port,
            api_keys=config.api_keys,
            curve=client_keys,
        )
    )
    model, num_workers = _wait_until_ready(workers)
    if reasons := why_unservable(config.policy, levels=model["levels"], num_prefill=config.num_prefill):
        raise StartRefused("; ".join(reasons))
    try:
        port = ray.get(gateway.start.remote(model, num_workers, START_TIMEOUT_S), timeout=START_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise StartRefused(f"the gateway could not start on {config.host}:{config.port}: {_cause(error)}") from error
    host = f"[{config.host}]" if ":" in config.host else config.host
    return RunningCluster(
        base_url=f"http://{host}:{port}",
        model_name=name,
        controller=controller,
        gateway=gateway,
        workers=workers,
        levels=tuple(model["levels"]),
    )


def _check_room(config: ServeConfig) -> None:
    offered = ray.cluster_resources()
    for role, count in (("prefill", config.num_prefill), ("decode", config.num_decode)):
        if offered.get(role, 0) < count:
            raise StartRefused(
                f"{count} {role} workers were asked for and the cluster has room for {offered.get(role, 0):g}: start "
                f"nodes with `ray start --resources='{{\"{role}\": 1}}'`, or ask for fewer with --num-{role}"
            )


def _threads(config: ServeConfig) -> int:
    """Compute threads of a worker: the cores of the smallest node that takes workers, divided among its workers."""
    if config.address == "local":
        return max(1, (os.cpu_count() or 1) // (config.num_prefill + config.num_decode))
    shares = []
    for node in ray.nodes():
        resources = node["Resources"]
        num_workers = resources.get("prefill", 0) + resources.get("decode", 0)
        if node["Alive"] and num_workers:
            shares.append(int(resources.get("CPU", 1) // num_workers))
    return max(1, min(shares, default=1))


def gpus_each(device: str, nodes: Sequence[dict[str, Any]]) -> float:
    """How many GPUs a worker gets from Ray: one, or the same share of one on every node (as `ray.nodes` lists them)
    that takes workers; 0: they compute on CPUs. Raises StartRefused."""
    if device == "cpu":
        return 0.0
    shares = []
    for node in nodes:
        resources = node["Resources"]
        num_workers = resources.get("prefill", 0) + resources.get("decode", 0)
        if node["Alive"] and num_workers:
            shares.append(min(1.0, resources.get("GPU", 0) / num_workers))
    least = min(shares, default=0.0)
    if device == "cuda" and not least:
        raise StartRefused(
            "device cuda was asked for and Ray knows of no GPU on some node that takes workers: look at `nvidia-smi` "
            "and `ray status` there, or use device cpu (or auto)"
        )
    return math.floor(least * 1e4) / 1e4  # Ray counts ten-thousandths


def _keys(*, enabled: bool) -> tuple[CurveKeys | None, Any]:
    """The cluster's client keys, and a maker of server keys that admit only these."""
    if not enabled:
        return None, lambda: None
    client = CurveKeys.generate()

    def make() -> CurveKeys:
        # A decode worker is a server to gateways and a client to prefill workers: one key pair does for both, so
        # every worker's public key has to be known to the others. They share the client's.
        return CurveKeys(public=client.public, secret=client.secret, allowed_client_keys=(client.public,))

    return client, make


def _link(config: ServeConfig, role: Role | str, number: int) -> Any:
    """WorkerLink or, of a decode worker, DecodeLink."""
    links = getattr(config.link, role)
    return links[number] if number < len(links) else DecodeLink() if role == "decode" else WorkerLink()


def _has_companion(config: ServeConfig, link: WorkerLink) -> bool:
    """Whether a prefill worker decodes too. Not where nobody says how others would reach it; nor beside quantized
    pages, for its own are exact: what is refused, and what an answer is, would depend on the worker."""
    return config.prefill_decodes and link.advertise is None and config.kv_cache_dtype == "auto"


def _pages(config: ServeConfig) -> dict[str, Any]:
    """Those of decode workers. Prefill workers' are exact: what they send is encoded from them."""
    return {"kv_cache_dtype": config.kv_cache_dtype, "max_sequences": config.max_num_seqs}


def _store(config: ServeConfig, worker_id: str) -> dict[str, Any]:
    return {
        "ram_bytes": config.store_bytes,
        "chunk_tokens": config.chunk_tokens,
        "path": None if config.store_path is None else str(Path(config.store_path) / worker_id),
        "disk_bytes": config.store_disk_bytes,
        "ttl_s": config.store_ttl_s,
        "tenant_shares": config.policy.store_shares(),
    }


def _bind(link: WorkerLink, is_local: bool) -> str:
    if link.bind:
        return f"tcp://{link.bind}"
    return "tcp://127.0.0.1:0" if is_local else "tcp://NODE:0"


def _wait_until_ready(workers: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What the gateway needs to know of the model, and how many workers there are, companions with them."""
    model: dict[str, Any] = {}
    num_workers = 0
    for worker_id, worker in workers.items():
        try:
            model = ray.get(worker.ready.remote(), timeout=START_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise StartRefused(f"{worker_id} was not ready after {START_TIMEOUT_S:.0f} s") from error
        except ray.exceptions.RayError as error:
            raise StartRefused(
                f"{worker_id} could not start: {_cause(error)}. If it never ran, see that RAY_AUTH_MODE is the same "
                "here as where the cluster was started"
            ) from error
        if model.get("refused") is not None:
            raise StartRefused(f"{worker_id} could not start: {model['refused']}")
        num_workers += len(model["workers"])
    return model, num_workers


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _cause(error: BaseException) -> str:
    """The last line of a Ray error's traceback: what went wrong, without the way there."""
    text = str(error).strip()
    return text.splitlines()[-1].strip() if text else type(error).__name__
