"""TLS for gRPC, which Ray Serve's proxy does not offer: a servicer function that adds a secure port to its server.

Owns that port, what a Serve config says of it, and that calls in plain text are refused. HTTP's certificates are
Serve's own `http_options.ssl_*`. Needs no Ray: it uses the server that it is given.

A Serve config can give a servicer function no arguments, only name it; so they are the name, which this module's
`__getattr__` parses: `actors.ingress.tls:port=9443,ssl_certfile=FILE,ssl_keyfile=FILE`, as in deploy/local-tls.yaml. It
stands before the functions whose services it guards.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec

from actors.errors import ConfigError

PLAIN_TEXT_PROBLEM = "this service is spoken to over TLS, on another port"


class SecurePort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A secure port of Serve's gRPC server. Certificates and keys are PEM files on every node that has a proxy."""

    port: int
    ssl_certfile: str  # the server's, followed by those between it and the root
    ssl_keyfile: str
    ssl_ca_certs: str = ""  # who signs clients' certificates; stated, every client must show one
    host: str = "[::]"

    @staticmethod
    def parse(text: str) -> "SecurePort":
        """From "key=value,key=value". Raises ConfigError."""
        pairs = [setting.partition("=") for setting in text.split(",")]
        try:
            return msgspec.convert({key: value for key, _, value in pairs}, SecurePort, strict=False)
        except msgspec.ValidationError as e:
            raise ConfigError("grpc_servicer_functions", f"{__name__}:{text}: {e}") from e

    def __call__(self, servicer: Any, server: Any) -> None:
        """Called by Serve with its gRPC server before that starts. Raises ConfigError where a file cannot be used."""
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
            # Every ingress replica would open the port, and HAProxy, which speaks plain text to them, be refused.
            raise ConfigError(
                "grpc_servicer_functions", "TLS ends in Serve's own proxy: unset RAY_SERVE_ENABLE_HA_PROXY"
            )
        credentials = grpc.ssl_server_credentials(
            [(_read("ssl_keyfile", self.ssl_keyfile), _read("ssl_certfile", self.ssl_certfile))],
            root_certificates=_read("ssl_ca_certs", self.ssl_ca_certs) if self.ssl_ca_certs else None,
            require_client_auth=bool(self.ssl_ca_certs),
        )
        try:
            server.add_secure_port(f"{self.host}:{self.port}", credentials)
        except RuntimeError as e:
            raise ConfigError("port", f"{self.host}:{self.port} cannot be used with these certificates: {e}") from e
        server.service_handler_factory = _refusing_plain_text(server.service_handler_factory)


def __getattr__(name: str) -> SecurePort:
    if "=" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return SecurePort.parse(name)


def _refusing_plain_text(make_handler: Callable[..., Any]) -> Callable[..., Any]:
    """Serve has opened its plain port before we are called, and gRPC cannot close it: so nothing is served there."""

    def make_guarded(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)

        async def unary(request: Any, context: Any) -> Any:
            await _check_secure(context)
            return await handler(request, context)

        async def stream(request: Any, context: Any) -> Any:
            await _check_secure(context)
            async for message in handler(request, context):
                yield message

        return stream if streaming_type.value.endswith("_stream") else unary

    return make_guarded


async def _check_secure(context: Any) -> None:
    if b"ssl" not in context.auth_context().get("transport_security_type", ()):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, PLAIN_TEXT_PROBLEM)


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ConfigError(key, f"{path}: {e.strerror}") from e
