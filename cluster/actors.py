"""The Ray actors: shells that hold a worker, the controller or a gateway. KV and tokens never pass through Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import ray
import uvicorn
from transformers import AutoTokenizer

from cluster.backend_zmq import ClusterBackend
from cluster.gateway import create_app
from cluster.openai_answers import ModelCard
from cluster.policy_reload import POLICY_NUMBER
from cluster.routing import Membership, Role, WorkerInfo, follow
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.model import ModelRefused
from prefill.runtime import load_runtime
from prefill.worker import PrefillWorker
from transport.curve import CurveKeys
from transport.errors import TransportError

log = logging.getLogger("kvstream.actors")

# Looked up by name: a handle among an actor's arguments would keep Ray from restarting the actor.
CONTROLLER = "kvstream-controller"
REPORT_S = 1.0
POLL_S = 0.5


class Controller:
    """Knows who is in the cluster. Soft state: after a restart the workers' reports fill it again."""

    def __init__(self) -> None:
        self._membership = Membership()
        self._started_at = time.monotonic()

    def report(self, info: dict[str, Any]) -> None:
        self._membership.report(WorkerInfo.from_wire(info), time.monotonic())

    def table(self) -> tuple[float, list[dict[str, Any]]]:
        """How long this controller has been up, seconds, and whom it knows."""
        now = time.monotonic()
        return now - self._started_at, [info.to_wire() for info in self._membership.table(now)]


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
        advertise: str | None,
    ) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._refused: str | None = None
        self._policy_number = 0  # the one that it is started with
        self._worker: PrefillWorker | DecodeWorker | None = None
        try:
            loaded = load_runtime(**runtime)
            kind = PrefillWorker if role == "prefill" else DecodeWorker
            self._worker = kind(loaded, worker_id=worker_id, **_with_node_address(worker))
        except (ModelRefused, TransportError) as error:
            self._refused = str(error)
            return
        curve = worker.get("curve")
        self._info = WorkerInfo(
            id=worker_id,
            role=role,
            incarnation=f"{worker_id}-{os.getpid()}-{time.time_ns()}",
            endpoint=f"tcp://{advertise}" if advertise else self._worker.endpoint,
            public_key=curve.public if curve is not None else None,
        )
        self._model = {
            "max_context": loaded.model.max_context,
            "vocab_size": loaded.model.vocab_size,
            "eos_token_ids": loaded.model.eos_token_ids,
            "levels": loaded.profile.level_names,
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
        stats = self._worker.stats()
        return {**stats, POLICY_NUMBER: self._policy_number} if self._info.role == "decode" else stats

    def set_policy(self, number: int, policy: SLOPolicy) -> None:
        """For later requests. Reported from now on under this number, see cluster/policy_reload.py."""
        assert isinstance(self._worker, DecodeWorker)
        self._worker.set_policy(policy)
        self._policy_number = number

    def check_integrity(self) -> None:
        """For tests: raises AssertionError when something does not add up."""
        assert self._worker is not None
        self._worker.check_integrity()

    def _report(self) -> None:
        """A thread of its own, so that a busy engine is not taken for a dead one."""
        assert self._worker is not None
        controller = None
        while True:
            try:
                if not self._worker.is_alive:
                    break
                controller = controller or ray.get_actor(CONTROLLER)
                controller.report.remote(replace(self._info, stats=self.stats()).to_wire())
            except Exception:
                # A silent worker is forgotten by all; whatever it was, the next second is another chance.
                log.exception("%s could not report", self._info.id)
            time.sleep(REPORT_S)
        # Without one of its threads it would take requests and never answer: Ray starts it anew.
        log.error("%s has lost a thread; the process ends", self._info.id)
        logging.shutdown()
        os._exit(1)


def _with_node_address(worker: dict[str, Any]) -> dict[str, Any]:
    """`tcp://NODE:PORT` binds to the address that Ray knows this node by."""
    bind = str(worker["bind"]).replace("NODE", ray.util.get_node_ip_address())
    return {**worker, "bind": bind}


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
