"""A real vLLM as a local process under the engine plugin's launcher, as a pod runs it, without a cluster.

For what the plugin promises about one engine: it starts, stops and kills the process, lays out a cache, and speaks to the plugin as the
operator does. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from e2e.cluster import paths, tools
from e2e.engine_client import Json, request

TOKEN = "gate-token-of-the-tests"
SERVED = ("tiny/base", "tiny/alias")
PLUGIN = paths.REPO / "operator" / "lora_operator" / "engine_plugin"


def engine_python() -> str:
    """The engine venv's Python; LORA_OPERATOR_ENGINE_PYTHON names another one."""
    return os.environ.get("LORA_OPERATOR_ENGINE_PYTHON") or str(tools.engine_venv() / "bin" / "python")


class EngineProcess:
    """One engine below `root`, with its cache, state folder and token."""

    def __init__(
        self,
        root: Path,
        base: Path,
        *,
        middleware: str = "lora_operator_plugin.plugin.Plugin",
        args: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.cache = root / "model-cache"
        self.state_dir = root / "state"
        self.token_file = root / "token"
        self.log = root / "engine.log"
        self.middleware = middleware
        self.arguments = list(args)  # behind all others, and so instead of them
        self.env: dict[str, str] = {}
        self.starts = 0
        self.generation = 0
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.home = paths.cache_dir("engine-home")  # what vLLM finds out about the model's class once takes it 13 s
        for folder in (self.cache / "artifacts", self.state_dir):
            folder.mkdir(parents=True)
        shutil.copytree(PLUGIN, root / "plugin" / "lora_operator_plugin", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(PLUGIN / "__main__.py", root / "plugin")
        shutil.copytree(base, self.base)
        self.token_file.write_text(TOKEN)

    @property
    def base(self) -> Path:
        """The base model in the cache."""
        return self.cache / "artifacts" / "base"

    @property
    def pid(self) -> int:
        """Of the engine's API server."""
        assert self._process is not None
        return self._process.pid

    def publish(self, source: Path, name: str) -> str:
        """Copy an adapter into the cache; its path."""
        path = self.cache / "artifacts" / name
        shutil.copytree(source, path)
        return str(path)

    def start(self) -> None:
        """Start the launcher, which becomes the engine."""
        argv = [engine_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.base)]
        argv += ["--served-model-name", *SERVED, "--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        argv += ["--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", "16", "--enforce-eager"]
        argv += ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4", "--max-lora-rank", "16"]
        argv += ["--middleware", self.middleware, "--api-server-count", "1", *self.arguments]
        env = {
            **os.environ,
            "LORA_OPERATOR_MODULES": str(self.root / "modules.json.gz"),
            "LORA_OPERATOR_STATE": str(self.state_dir),
            "LORA_OPERATOR_TOKEN_FILE": str(self.token_file),
            "LORA_OPERATOR_CACHE_ROOT": str(self.cache),
            "LORA_OPERATOR_MODEL_PATH": str(self.base),
            "LORA_OPERATOR_SERVED_NAMES": json.dumps(SERVED),
            "LORA_OPERATOR_MAX_LORA_RANK": "16",
            "LORA_OPERATOR_MAX_CPU_LORAS": "4",
            "LORA_OPERATOR_KIT": "test",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self.home),
            **self.env,
        }
        launcher = [engine_python(), str(self.root / "plugin"), *argv]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                launcher, env=env, stdout=log, stderr=log, cwd=self.root, start_new_session=True
            )
        self.starts += 1

    def wait_up(self, timeout: float = 600) -> None:
        """Wait for the first /health 200, starting the process again when it exits, as the kubelet does."""
        deadline = time.monotonic() + timeout
        while request("GET", f"{self.url}/health", timeout=2)[0] != 200:
            assert self._process is not None
            if self._process.poll() is not None:
                self.start()
            assert time.monotonic() < deadline, f"the engine is not up after {timeout} s, see {self.log}"
            time.sleep(0.05)

    def kill(self) -> None:
        """End all of the engine's processes as a crash would."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)
        # The engine's core is told by a signal that its parent died, and holds the memory until it has gone.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)

    def ask_plugin(self, method: str, path: str, body: Any = None, *, token: str = TOKEN) -> tuple[int, Any]:
        """A request with the gate's token."""
        return request(method, f"{self.url}{path}", body, headers={"X-LoRA-Operator-Token": token})

    def state(self) -> Json:
        """What the plugin says."""
        status, answer = self.ask_plugin("GET", "/lora-operator/v1/state")
        assert status == 200, answer
        return dict(answer)

    def put_on_disk(self, modules: dict[str, str], *, lineage: str) -> None:
        """The list as an earlier process of this pod acknowledged it."""
        (self.state_dir / "modules.json").write_text(json.dumps(self._list(modules, lineage=lineage)))

    def _list(self, modules: dict[str, str], *, lineage: str, lazy: Collection[str] = ()) -> Json:
        self.generation += 1
        entries = [
            {"name": name, "path": path, "baseModelName": lineage, "revision": Path(path).name}
            | ({"loadPolicy": "Lazy"} if name in lazy else {})
            for name, path in modules.items()
        ]
        return {"version": 1, "deployment": "test/tiny", "generation": self.generation, "modules": entries}

    def put(
        self, modules: dict[str, str], *, wait: float = 30, lineage: str = SERVED[0], lazy: Collection[str] = ()
    ) -> Json:
        """Send a new list of name to path; the plugin's state once it is settled, or after `wait` seconds."""
        body = self._list(modules, lineage=lineage, lazy=lazy)
        status, answer = self.ask_plugin("PUT", f"/lora-operator/v1/modules?wait={wait:g}", body)
        assert status == 200, answer
        assert answer["listGeneration"] == self.generation
        return dict(answer)

    def await_state(self, holds: Callable[[Json], bool], *, timeout: float = 30) -> Json:
        """The first state for which `holds` is true."""
        deadline = time.monotonic() + timeout
        while True:
            state = self.state()
            if holds(state):
                return state
            assert time.monotonic() < deadline, state
            time.sleep(0.05)
