"""The Ray actors: shells that hold a worker, the controller or a gateway. KV and tokens never pass through Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from typing import Any

import ray
import uvicorn
from transformers import AutoTokenizer

from cluster.backend_zmq import ClusterBackend
from cluster.gateway import create_app
from cluster.hosted_worker import HostedWorker, ServesChunks
from cluster.membership import Membership, Role, WorkerInfo, companion_id, follow
from cluster.openai_answers import ModelCard
from cluster.prefix_index import PrefixIndex
from cluster.prefix_lookup import PrefixLookup
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.disk_store import StoreError
from prefill.model import ModelRefused
from prefill.runtime import ModelRuntime, load_runtime
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


class WorkerActor:
    """A prefill or decode worker in a process of its own; or a prefill worker and its companion, which decodes.

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
        companion: dict[str, Any] | None = None,
    ) -> None:
        """advertise, kv_advertise: HOST:PORT under which others reach `endpoint` and `kv_endpoint`, None: as bound. One
        without the other: what a decode worker has stored stays its own. companion: of a prefill worker, what a
        DecodeWorker of the same process takes."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._refused: str | None = None
        self._hosted: list[HostedWorker] = []
        self._store: ChunkStore | None = None
        try:
            loaded = load_runtime(**runtime, spares_blocks=companion is not None)
            opened = self._store = None if store is None else loaded.open_store(**store)
            options = _with_node_address(worker)
            if role == "decode":
                decode = DecodeWorker(loaded, store=opened, worker_id=worker_id, **options)
                kv_endpoint = _kv_endpoint(decode, advertise, kv_advertise)
                self._host(worker_id, decode, options, advertise=advertise, kv_endpoint=kv_endpoint)
            else:
                prefill = PrefillWorker(loaded, store=opened, worker_id=worker_id, **options)
                self._host(worker_id, prefill, options, advertise=advertise)
                if companion is not None and loaded.spare_blocks:
                    self._host_companion(prefill, loaded, _with_node_address(companion))
        except (ModelRefused, StoreError, TransportError) as error:
            self._refused = str(error)
            return
        self._model = {
            "max_context": loaded.model.max_context,
            "vocab_size": loaded.model.vocab_size,
            "eos_token_ids": loaded.model.eos_token_ids,
            "levels": loaded.profile.level_names,
            "fingerprint": loaded.model.fingerprint,
            "workers": [hosted.info.id for hosted in self._hosted],
        }
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def _host_companion(self, prefill: PrefillWorker, loaded: ModelRuntime, options: dict[str, Any]) -> None:
        worker_id = companion_id(prefill.worker_id)
        source = prefill if options["prefix_caching"] else None
        beside = loaded.with_pool(loaded.spare_blocks)
        decode = DecodeWorker(beside, source=source, worker_id=worker_id, **options)
        self._host(worker_id, decode, options, companion_of=prefill.worker_id)

    def _host(
        self,
        worker_id: str,
        worker: PrefillWorker | DecodeWorker,
        options: dict[str, Any],
        *,
        advertise: str | None = None,
        kv_endpoint: str | None = None,
        companion_of: str | None = None,
    ) -> None:
        curve = options.get("curve")
        info = WorkerInfo(
            id=worker_id,
            role="decode" if isinstance(worker, DecodeWorker) else "prefill",
            incarnation=f"{worker_id}-{os.getpid()}-{time.time_ns()}",
            endpoint=f"tcp://{advertise}" if advertise else worker.endpoint,
            public_key=curve.public if curve is not None else None,
            kv_endpoint=kv_endpoint,
            companion_of=companion_of,
        )
        self._hosted.append(HostedWorker(worker, info, policy=options.get("policy")))

    def ready(self) -> dict[str, Any]:
        """{"refused": why} or what the gateway needs to know of the model, and the ids of the workers here."""
        return {"refused": self._refused} if self._refused is not None else self._model

    def endpoint(self) -> str:
        return self._hosted[0].info.endpoint

    def pid(self) -> int:
        return os.getpid()

    def stats(self, worker_id: str | None = None) -> dict[str, float]:
        """Of one of the workers here; the first, if none is named."""
        return next(hosted for hosted in self._hosted if worker_id in (None, hosted.info.id)).stats()

    def set_policy(self, number: int, policy: SLOPolicy) -> None:
        """For later requests, and for what the store holds of tenants. Reported from now on under this number, see
        cluster/policy_reload.py."""
        for hosted in self._hosted:
            hosted.set_policy(number, policy)
        if self._store is not None:
            self._store.set_shares(policy.store_shares())

    def check_integrity(self) -> None:
        """For tests: raises AssertionError when something does not add up."""
        for hosted in self._hosted:
            hosted.worker.check_integrity()

    def _report(self) -> None:
        """A thread of its own, so that a busy engine is not taken for a dead one."""
        controller = None
        while True:
            try:
                if not all(hosted.worker.is_alive for hosted in self._hosted):
                    break
                controller = controller or ray.get_actor(CONTROLLER)
                for hosted in self._hosted:
                    hosted.report(controller)
            except Exception:
                # A silent worker is forgotten by all; whatever it was, the next second is another chance.
                log.exception("%s could not report", self._hosted[0].info.id)
            time.sleep(REPORT_S)
        # Without one of its threads it would take requests and never answer: Ray starts it anew.
        log.error("%s has lost a thread; the process ends", self._hosted[0].info.id)
        logging.shutdown()
        os._exit(1)


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
