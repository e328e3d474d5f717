"""cluster/local.yaml for real: `ray up` by ssh, `serve deploy`, an answer over HTTP and gRPC, `ray down`.

On a host of its own in namespaces (`host.sh`), since `ray stop` ends every Ray process that it can see. The package
and what it needs are installed as on any node, so it takes minutes; `make test-cluster` runs it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
NEEDED = ("sshd", "ssh-keygen", "rsync", "unshare", "ip", "curl", "openssl")

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]


@pytest.fixture
def host() -> Iterator[Path]:
    """The folder of a host whose root has what Corral needs installed, as `ray up` leaves it."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(NEEDED)}; missing: {missing}")
    folder = Path(tempfile.mkdtemp(prefix="corral-host-", dir="/var/tmp"))
    try:
        _install(folder / "root")
        yield folder
    finally:
        shutil.rmtree(folder)


def _install(home: Path) -> None:
    """What `ray up` would download, before the host is cut off from the network; `ray up` then installs the package
    again, from what is there.
    """
    environment = home / ".corral" / "venv"
    venv.create(environment, with_pip=True)
    subprocess.run([environment / "bin" / "pip", "install", "--quiet", "setuptools>=77", ROOT], check=True)
    (home / ".bashrc").write_text("export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0\n")  # pip's 0 means: no isolation


def test_up_deploy_ask_down(host: Path) -> None:
    keep = ":".join({sys.base_prefix, sys.prefix, str(ROOT)})
    result = subprocess.run(
        [HERE / "host.sh", host, keep, HERE / "ray_up.sh"],
        cwd=ROOT,
        env=os.environ | {"RAY_BIN": str(Path(sys.executable).parent)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0
    assert result.stdout.rstrip().endswith("== done")
    _, _, answers = result.stdout.partition("== ask")
    assert "HTTP http://127.0.0.1:8000" in answers and "gRPC 127.0.0.1:9000" in answers
    assert answers.count("tokens/s") == 2
