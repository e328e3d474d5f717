"""The secret that the processes of one pipeline share, kept by Ray's control store.

Owns where it is and that it is made once. Whoever Ray lets in can read it, and could run code in any of these processes
anyway; nobody else can. Why there: docs/decisions/0005-channels-have-keys.md.
"""

import secrets

from ray.experimental import internal_kv

from actors.wire import SECRET_BYTES

_NAMESPACE = "corral"


def pipeline_secret(application: str) -> bytes:
    """The application's secret, made by whoever asks first and the same for as long as the cluster lives.

    For `ChannelKeys.from_secret`. Call it in a process that Ray knows; it blocks for two round trips to the head.
    """
    key = f"secret/{application}"
    internal_kv._internal_kv_put(key, secrets.token_bytes(SECRET_BYTES), overwrite=False, namespace=_NAMESPACE)
    secret: bytes = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    return secret
