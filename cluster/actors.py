"""The Ray actors: shells that hold a worker, the controller or a gateway. KV and tokens never pass through Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import ray
import uvicorn
from transformers import AutoTokenizer

from cluster.backend_zmq import ClusterBackend
from cluster.gateway import create_app
from cluster.membership import Membership, Role, WorkerInfo, follow
from cluster.openai_answers import ModelCard
from cluster.policy_reload import POLICY_NUMBER
from cluster.prefix_index import IndexFeed, IndexSource, PrefixIndex
from cluster.prefix_lookup import PrefixLookup
from cluster.route_costs import MAY_AGGREGATE
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.disk_store import StoreError
from prefill.model import ModelRefused
from prefill.runtime import load_runtime
from prefill.store import ChunkStore
from prefill.worker import PrefillWorker
from transport.curve import CurveKeys
from transport.errors import TransportError

log = logging.getLogger("kvstream.actors")

# Looked up by name: a handle among an actor's arguments would keep Ray from restarting the actor.
CONTROLLER = "kvstream-controller"
REPORT_S = 1.0
POLL_S = 0.5


class Controller:
    """Knows who is in the cluster and who holds what. Soft state: after a restart the workers' reports fill it again.

    A worker's reports come in the order they were sent: Ray keeps the order of one caller's calls to an actor.
    """

    def __init__(self) -> None:
        self._membership = Membership()
        self._index = PrefixIndex()
        self._started_at = time.monotonic()

    def report(self, info: dict[str, Any], changes: dict[str, Any] | None = None) -> tuple[int | None, bool]:
        """`changes`: of what the worker holds (IndexFeed). What the index has of it now, see prefix_index.Ack."""
        worker = WorkerInfo.from_wire(info)
        self._membership.report(worker, time.monotonic())
        if changes is None:
            return None, False
        ack = self._index.apply(worker.id, worker.incarnation, changes)
        return ack.epoch, ack.is_cut

    def table(self) -> tuple[float, list[dict[str, Any]]]:
        """How long this controller has been up, seconds, and whom it knows."""
        now = time.monotonic()
        known = self._membership.table(now)
        self._index.retain({info.incarnation for info in known})
        return now - self._started_at, [info.to_wire() for info in known]

    def holders(self, keys: bytes) -> dict[str, tuple[str, int, int, int]]:
        """Who holds which of these chunks (keys of 16 bytes, one after the other): Coverage on the wire, by worker."""
        return {worker_id: coverage.to_wire() for worker_id, coverage in self._index.holders(keys).items()}

    def index_stats(self) -> dict[str, float]:
        return self._index.stats()


@runtime_checkable
class ServesChunks(Protocol):
    """A decode worker that may give what it has stored to others; where, None: it stores nothing."""

    @property
    def kv_endpoint(self) -> str | None: ...


class WorkerActor:
    """A prefill or decode worker in a process of its own.

    A refusal (the model, the port) is kept and told by `ready`, so that the launcher can show it in one line.
    """

    def __init__(
        self,
        *,
        role: Role,
        worker_id: str,
        runtime: dict[str, Any],
        worker: dict[str, Any],
        store: dict[str, Any] | None,
        advertise: str | None,
        kv_advertise: str | None = None,
    ) -> None:
        """advertise, kv_advertise: HOST:PORT under which others reach `endpoint` and `kv_endpoint`, None: as bound. One
        without the other: what a decode worker has stored stays its own."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._refused: str | None = None
        self._policy_number = 0  # the one that it is started with
        self._is_cut = False  # whether the index leaves out some of what this worker holds
        self._worker: PrefillWorker | DecodeWorker | None = None
        self._store: ChunkStore | None = None
        try:
            loaded = load_runtime(**runtime)
            kind = PrefillWorker if role == "prefill" else DecodeWorker
            self._store = None if store is None else loaded.open_store(**store)
            self._worker = kind(loaded, store=self._store, worker_id=worker_id, **_with_node_address(worker))
        except (ModelRefused, StoreError, TransportError) as error:
            self._refused = str(error)
            return
        curve = worker.get("curve")
        self._info = WorkerInfo(
            id=worker_id,
            role=role,
            incarnation=f"{worker_id}-{os.getpid()}-{time.time_ns()}",
            endpoint=f"tcp://{advertise}" if advertise else self._worker.endpoint,
            public_key=curve.public if curve is not None else None,
            kv_endpoint=_kv_endpoint(self._worker, advertise, kv_advertise) if role == "decode" else None,
        )
        self._feed = IndexFeed(self._worker) if isinstance(self._worker, IndexSource) else None
        self._may_aggregate = role == "prefill" or may_aggregate(worker["policy"])
        self._model = {
            "max_context": loaded.model.max_context,
            "vocab_size": loaded.model.vocab_size,
            "eos_token_ids": loaded.model.eos_token_ids,
            "levels": loaded.profile.level_names,
            "fingerprint": loaded.model.fingerprint,
        }
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def ready(self) -> dict[str, Any]:
        """{"refused": why} or what the gateway needs to know of the model."""
        return {"refused": self._refused} if self._refused is not None else self._model

    def endpoint(self) -> str:
        return self._info.endpoint

    def pid(self) -> int:
        return os.getpid()

    def stats(self) -> dict[str, float]:
        assert self._worker is not None
        stats = {**self._worker.stats(), POLICY_NUMBER: self._policy_number}
        return stats if self._info.role == "prefill" else {**stats, MAY_AGGREGATE: float(self._may_aggregate)}

    def set_policy(self, number: int, policy: SLOPolicy) -> None:
        """For later requests, and for what the store holds of tenants. Reported from now on under this number, see
        cluster/policy_reload.py."""
        if isinstance(self._worker, DecodeWorker):
            self._worker.set_policy(policy)
        if self._store is not None:
            self._store.set_shares(policy.store_shares())
        self._policy_number, self._may_aggregate = number, may_aggregate(policy)

    def check_integrity(self) -> None:
        """For tests: raises AssertionError when something does not add up."""
        assert self._worker is not None
        self._worker.check_integrity()

    def _report(self) -> None:
        """A thread of its own, so that a busy engine is not taken for a dead one."""
        assert self._worker is not None
        controller = answer = None
        while True:
            try:
                if not self._worker.is_alive:
                    break
                controller = controller or ray.get_actor(CONTROLLER)
                if answer is not None and self._hear(answer):
                    answer = None
                told = replace(self._info, stats=self.stats()).to_wire()
                if self._feed is None or answer is not None:
                    controller.report.remote(told)
                else:
                    answer = controller.report.remote(told, self._feed.next_changes())
            except Exception:
                # A silent worker is forgotten by all; whatever it was, the next second is another chance.
                log.exception("%s could not report", self._info.id)
            time.sleep(REPORT_S)
        # Without one of its threads it would take requests and never answer: Ray starts it anew.
        log.error("%s has lost a thread; the process ends", self._info.id)
        logging.shutdown()
        os._exit(1)

    def _hear(self, answer: Any) -> bool:
        """The controller's answer to the last changes, if it has come: the next ones start where it says."""
        assert self._feed is not None
        if not ray.wait([answer], timeout=0)[0]:
            return False
        try:
            epoch, is_cut = ray.get(answer)
        except ray.exceptions.RayError as error:
            log.warning("%s: the controller was lost: %s", self._info.id, type(error).__name__)
            return True
        if is_cut and not self._is_cut:
            log.warning("%s holds more chunks than the index keeps of a worker; others find a part", self._info.id)
        self._is_cut = is_cut
        self._feed.confirmed(epoch)
        return True


def may_aggregate(policy: SLOPolicy) -> bool:
    """Whether a decode worker may compute all of a prompt, for whomever: what the router may do without a source."""
    tenants = [policy.for_tenant(tenant) for tenant in policy.tenants]
    return all(one.allow_recompute and one.max_recompute_share >= 1 for one in (policy, *tenants))


def _kv_endpoint(worker: PrefillWorker | DecodeWorker, advertise: str | None, kv_advertise: str | None) -> str | None:
    if kv_advertise is not None:
        return f"tcp://{kv_advertise}"
    return worker.kv_endpoint if advertise is None and isinstance(worker, ServesChunks) else None


def _with_node_address(worker: dict[str, Any]) -> dict[str, Any]:
    """`tcp://NODE:PORT` binds to the address that Ray knows this node by."""
    node = ray.util.get_node_ip_address()
    binds = {name: str(worker[name]).replace("NODE", node) for name in ("bind", "kv_bind") if name in worker}
    return {**worker, **binds}


class GatewayActor:
    """The HTTP front: uvicorn in the actor's own event loop."""

    def __init__(
        self,
        *,
        model_path: str,
        model_name: str,
        chunk_tokens: int,
        host: str,
        port: int,
        api_keys: dict[str, str],
        curve: CurveKeys | None,
    ) -> None:
        self._controller = ray.get_actor(CONTROLLER)
        self._chunk_tokens = chunk_tokens
        self._backend = ClusterBackend(chunk_tokens=chunk_tokens, curve=curve)
        self._model_name, self._api_keys = model_name, api_keys
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))

    def ping(self) -> None:
        """Returns while the gateway is alive."""

    async def start(self, model: dict[str, Any], num_workers: int, timeout_s: float) -> int:
        """Begin to serve once all workers have reported; the port. `model`: what a worker's `ready` told."""
        app = create_app(
            self._backend,
            models=[ModelCard(id=self._model_name, max_context=model["max_context"], vocab_size=model["vocab_size"])],
            tokenizer=self._tokenizer,
            levels=model["levels"],
            eos_token_ids=model["eos_token_ids"],
            api_keys=self._api_keys,
        )
        self._backend.lookup = PrefixLookup(
            lambda keys: _awaitable(self._controller.holders.remote(keys)),
            fingerprint=model["fingerprint"],
            chunk_tokens=self._chunk_tokens,
        )
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75)
        self._server = uvicorn.Server(config)
        self._tasks = [asyncio.create_task(self._follow_controller())]
        deadline = time.monotonic() + timeout_s
        while len(self._backend.table) < num_workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self._backend.table)} of {num_workers} workers reported")
            await asyncio.sleep(0.02)
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        self._tasks.append(serving)
        while not self._server.started:  # uvicorn has no event for it
            if serving.done():
                serving.result()
                raise RuntimeError("the HTTP server ended while it started; see the log")
            await asyncio.sleep(0.01)
        return int(self._socket.getsockname()[1])

    async def _follow_controller(self) -> None:
        while True:
            try:
                age_s, table = await asyncio.wait_for(_awaitable(self._controller.table.remote()), 2.0)
                told = [WorkerInfo.from_wire(info) for info in table]
                self._backend.table = follow(self._backend.table, told, controller_age_s=age_s)
                await asyncio.sleep(POLL_S if self._server.started else 0.05)
            except Exception as error:
                # The last table keeps serving while the controller restarts; nothing may end this task.
                log.warning("the controller does not answer: %s: %s", type(error).__name__, error)
                await asyncio.sleep(POLL_S)


async def _awaitable(reference: Any) -> Any:
    return await reference
