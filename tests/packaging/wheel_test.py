"""Builds the sdist and from it the wheel, installs the wheel alone, and uses it as a user would.

Two new environments: a client's, which must do without the server's packages, and a server's. Run by
`make wheel-test`; not a pytest module, because it needs no checkout and must not see one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

CLIENT = """
import importlib.util
absent = ["torch", "redis", "pydantic", "typer", "rich", "grpc_health"]
assert not any(map(importlib.util.find_spec, absent)), "the client's environment has a server's package"

import numpy as np
import ml_dtypes
import kvstore_codec as codec
from kvstore_client import Client, KVLayout, RoPE

layout = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, dtype="bfloat16",
                          chunk_tokens=16, rope=RoPE(theta=10000.0))
kv = np.random.default_rng(1).standard_normal((2, 2, 16, 2, 16)).astype(ml_dtypes.bfloat16)
restored = codec.decode(codec.encode(kv, layout, quality="lossless"), layout)
assert (restored == kv).all()
with Client("127.0.0.1:9", deadline=0.5) as client:  # nothing answers there: a miss, not an error
    kv, tokens = client.namespace(layout).get(list(range(16)))
    assert tokens == 0
print("client: ok")
"""

SERVER = """
import json, subprocess, sys
from pathlib import Path
import numpy as np
from kvstore_client import Client, KVLayout

layout = KVLayout.uniform(model="m", revision="r", num_layers=2, kv_heads=2, head_dim=16, dtype="float16",
                          chunk_tokens=16)
command = Path(sys.executable).with_name("kvstore")
node = subprocess.Popen([command, "serve", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE)
try:
    address = json.loads(node.stdout.readline())["addresses"][0]
    kv = np.random.default_rng(1).standard_normal((2, 2, 32, 2, 16)).astype(np.float16)
    with Client(address, strict=True) as client:
        cache = client.namespace(layout)
        assert cache.put(list(range(32)), kv, quality="lossless").stored == 2
        got, tokens = cache.get(list(range(32)))
        assert tokens == 32 and (got == kv).all()
    node.terminate()
    assert node.wait(30) == 0
finally:
    node.kill()
print("server: ok")
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kvstore-wheel-") as scratch:
        folder = Path(scratch)
        run([sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(REPOSITORY)], folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
        for name, requirement, script in (
            ("client", str(wheel), CLIENT),
            ("server", f"{wheel}[server]", SERVER),
        ):
            python = new_environment(folder / name)
            run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement], folder)
            run([python, "-c", script], folder)


def new_environment(folder: Path) -> str:
    venv.create(folder, with_pip=True)
    return str(folder / "bin" / "python")


def run(command: list[str], folder: Path) -> None:
    """In `folder`, so that no checkout is importable; ends this process when it fails."""
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise SystemExit(f"wheel test: failed: {' '.join(command)[:200]}")


if __name__ == "__main__":
    main()
