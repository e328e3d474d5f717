"""A certificate authority of a test's own, made with openssl."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


@dataclass(frozen=True)
class Identity:
    """Files in PEM."""

    certfile: str
    keyfile: str


class Authority:
    """Signs certificates for 127.0.0.1 and localhost. `certfile` is what those who trust it are given."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder / name
        self._folder.mkdir()
        self.certfile = str(self._folder / "ca.crt")
        self._keyfile = str(self._folder / "ca.key")
        _openssl("req", "-x509", *_KEY, "-subj", f"/CN={name}", "-keyout", self._keyfile, "-out", self.certfile)

    def issue(self, name: str) -> Identity:
        made = Identity(str(self._folder / f"{name}.crt"), str(self._folder / f"{name}.key"))
        _openssl(
            *("req", "-x509", *_KEY, "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-CA", self.certfile, "-CAkey", self._keyfile, "-keyout", made.keyfile, "-out", made.certfile),
        )
        return made


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
