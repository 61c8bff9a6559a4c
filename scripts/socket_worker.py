"""One worker in a process of its own, without Ray: its orders come on stdin, and it ends when stdin does.

    {"role": "prefill", "worker_id": "prefill-0", "bind": "tcp://10.77.9.2:0", "keys": {...}, ...}   one line of JSON in
    {"endpoint": "tcp://10.77.9.2:40001"}                                                            one line out

Because it ends when stdin does, no worker outlives whoever started it. Keys come this way and not as arguments, which
others on the machine can read.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading

from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.runtime import load_runtime
from prefill.store import ChunkStore
from prefill.worker import PrefillWorker
from transport.curve import CurveKeys


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    orders = json.loads(sys.stdin.readline())
    keys = orders["keys"]
    curve = CurveKeys(**{**keys, "allowed_client_keys": tuple(keys["allowed_client_keys"])})
    runtime = load_runtime(orders["model"], num_blocks=orders["num_blocks"])
    worker: PrefillWorker | DecodeWorker
    if orders["role"] == "prefill":
        worker = PrefillWorker(
            runtime,
            bind=orders["bind"],
            store=ChunkStore(orders["store_bytes"]),
            worker_id=orders["worker_id"],
            curve=curve,
        )
        endpoint = worker.endpoint
    else:
        policy = SLOPolicy(**{**orders["policy"], "levels": tuple(orders["policy"]["levels"])})
        worker = DecodeWorker(
            runtime,
            policy=policy,
            bind=orders["bind"],
            worker_id=orders["worker_id"],
            curve=curve,
            prefix_caching=False,  # every request is to cross the link
        )
        endpoint = worker.endpoint
    print(json.dumps({"endpoint": endpoint, "pid": os.getpid()}), flush=True)
    sys.stdin.read()
    ending = threading.Timer(20.0, os._exit, args=(1,))  # a thread that hangs must not keep the process
    ending.daemon = True
    ending.start()
    worker.shutdown()
    worker.check_integrity()
    return 0


if __name__ == "__main__":
    sys.exit(main())
