"""Keys for links off loopback: CURVE encryption, and who may connect. Knows ZeroMQ's authentication protocol (ZAP)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from transport.errors import InsecureBind

ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveKeys:
    """Z85 text keys (40 characters) as `zmq.curve_keypair()` makes them. A server with no allowed client keys admits
    nobody."""

    public: str
    secret: str = field(repr=False)
    server_public: str | None = None  # for clients: the server they expect
    allowed_client_keys: tuple[str, ...] = ()  # for servers: who may connect

    @classmethod
    def generate(cls, **others: object) -> CurveKeys:
        public, secret = zmq.curve_keypair()
        return cls(public=public.decode(), secret=secret.decode(), **others)  # type: ignore[arg-type]


def secure_client(socket: zmq.Socket, keys: CurveKeys | None, server_public: str | None = None) -> None:
    if keys is None:
        return
    server_key = server_public or keys.server_public
    if server_key is None:
        raise ValueError("CURVE keys were given but not the server's public key: set server_public")
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    socket.curve_serverkey = server_key.encode()


def secure_server(socket: zmq.Socket, bind: str, keys: CurveKeys | None, *, insecure: bool) -> None:
    """Before the bind. Raises InsecureBind for an address that others can reach, without keys."""
    if keys is not None:
        socket.curve_server = True
        socket.curve_secretkey = keys.secret.encode()
        socket.zap_domain = b"kvstream"
    elif not insecure and not is_loopback(bind):
        raise InsecureBind(
            f"{bind} can be reached from other machines: give CURVE keys, or bind to 127.0.0.1, "
            "or say insecure=True on a network you trust"
        )


def is_loopback(endpoint: str) -> bool:
    scheme, _, rest = endpoint.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ZapHandler:
    """Answers libzmq's question "may this client key connect?" in the thread that polls `socket`."""

    def __init__(self, context: zmq.Context, keys: CurveKeys) -> None:
        self._allowed = {z85.decode(key.encode()) for key in keys.allowed_client_keys}
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP_ENDPOINT)

    def answer(self) -> None:
        try:
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        # version, request id, domain, address, identity, mechanism, credentials (32 bytes of public key)
        version, request_id, mechanism = frames[0], frames[1], frames[5]
        known = version == b"1.0" and mechanism == b"CURVE" and len(frames) == 7 and frames[6] in self._allowed
        status, text = (b"200", b"OK") if known else (b"400", b"client key is not allowed here")
        self.socket.send_multipart([b"1.0", request_id, status, text, b"", b""])

    def close(self) -> None:
        self.socket.close()
