"""Runs the download program as its Job would: a process of its own, with an environment of its own, told by one JSON request.

Content is made here without torch: a Llama-shaped base model and adapters that fit it, with random weights.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.fixtures.adapters import Tensor, write_tensors
from lora_operator.wire.jobs import FetchResult, Manifest

ROOT = Path(__file__).parents[2]
HIDDEN, WIDE, VOCAB = 64, 128, 300
DEADLINE_S = 180.0
_MODULES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN)}


@dataclass
class Job:
    """A started program. `result` and the like wait for its end."""

    process: subprocess.Popen[bytes]
    folder: Path

    def wait(self, timeout: float = DEADLINE_S) -> Job:
        """Waits for the end; kills the program and fails after `timeout` seconds."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still running after {timeout} s:\n{self.stderr}") from None
        return self

    def kill(self) -> None:
        """SIGKILL, as an eviction or a node's death does."""
        self.process.kill()
        self.process.wait()

    @property
    def stdout(self) -> str:
        """All of it so far."""
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """All of it so far."""
        return (self.folder / "stderr").read_text()

    @property
    def result(self) -> FetchResult:
        """What stands in the termination log; fails with the program's log when that is empty."""
        self.wait()
        data = (self.folder / "termination-log").read_bytes()
        assert data, self.stderr
        assert len(data) <= 3072
        found = FetchResult.model_validate_json(data)
        assert self.process.returncode == (0 if found.ok else 1)
        return found

    @property
    def ok(self) -> FetchResult:
        """The result of a program that must have succeeded."""
        found = self.result
        assert found.ok, f"{found.reason}: {found.message}\n{self.stderr}"
        return found

    @property
    def failed(self) -> tuple[str, str]:
        """Reason and message of a program that must have failed."""
        found = self.result
        assert not found.ok, found
        return str(found.reason), found.message

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The progress lines."""
        return [json.loads(line) for line in self.stdout.splitlines()]


@dataclass
class Fetcher:
    """Starts programs against one endpoint and one cache."""

    endpoint: str
    cache: Path
    scratch: Path
    base: str | None = None
    user: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def start(
        self,
        repo: str,
        *,
        type: str = "Adapter",  # noqa: A002 - as in the request
        revision: str = "main",
        token: str | None = None,
        artifact: str | None = None,
        path: str = "",
        groups: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        want: Mapping[str, Any] | None = None,
        **source: Any,
    ) -> Job:
        """Starts a program that downloads from the Hub; `want` are further members of the request, `source` of its huggingFace."""
        return self.launch(
            {"huggingFace": {"repo": repo, "revision": revision, "endpoint": self.endpoint, **source}},
            credentials={"token": token} if token is not None else None,
            type=type,
            artifact=artifact,
            path=path,
            groups=groups,
            env=env,
            want=want,
        )

    def launch(
        self,
        source: Mapping[str, Any],
        *,
        credentials: Mapping[str, str] | None = None,
        type: str = "Adapter",  # noqa: A002 - as in the request
        artifact: str | None = None,
        path: str = "",
        groups: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        want: Mapping[str, Any] | None = None,
    ) -> Job:
        """Starts a program; `source` is its one kind of source with what is said of it."""
        ((kind, wanted),) = source.items()
        self._count += 1
        folder = self.scratch / f"job-{self._count}"
        folder.mkdir(mode=0o777, parents=True)
        folder.chmod(0o777)
        request = {
            "artifact": artifact or f"artifact-{self._count}",
            "type": type,
            "source": {"kind": kind, **wanted},
            "path": path,
            "cacheRoot": str(self.cache),
            "baseModelPath": self.base if type == "Adapter" else None,
            **(want or {}),
        }
        if credentials is not None:
            (folder / "credentials").mkdir()
            for name, value in credentials.items():
                (folder / "credentials" / name).write_text(value)
            request["credentials"] = str(folder / "credentials")
        (folder / "termination-log").touch(mode=0o666)
        (folder / "termination-log").chmod(0o666)
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [*self._as_user(groups), sys.executable, "-m", "lora_operator.cli", "fetch"],
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(ROOT / "operator"),
                    "LORA_OPERATOR_FETCH": json.dumps(request),
                    "LORA_OPERATOR_TERMINATION_LOG": str(folder / "termination-log"),
                    **self.env,
                    **(env or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd="/",
            )
        return Job(process, folder)

    def _as_user(self, groups: Sequence[int]) -> list[str]:
        """Another user who may read everything (the interpreter may lie in a private home), but write only what modes allow."""
        if self.user is None:
            return []
        sets = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
        may_read = [
            "--inh-caps=+dac_read_search",
            "--ambient-caps=+dac_read_search",
            "--bounding-set=-all,+dac_read_search",
        ]
        return ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", sets, *may_read]

    def run(self, repo: str, **options: Any) -> Job:
        """Starts a program and waits for its end."""
        return self.start(repo, **options).wait()

    def manifest(self, result: FetchResult) -> Manifest:
        """The published manifest; fails when the view holds anything else than its files."""
        view = self.cache / result.path
        manifest = Manifest.model_validate_json((view / ".lora-operator.json").read_bytes())
        found = {str(path.relative_to(view)) for path in view.rglob("*") if not path.is_dir()}
        assert found == {file.path for file in manifest.files} | {".lora-operator.json"}
        for file in manifest.files:
            link = view / file.path
            assert not link.readlink().is_absolute()
            assert link.stat().st_size == file.size
        return manifest

    def leaked(self) -> list[str]:
        """What lies in the cache that is no finished content: unfinished downloads and staging directories."""
        return sorted(str(path) for path in self.cache.rglob("*") if ".incomplete" in path.name or ".tmp" in path.name)


def without_volume(result: FetchResult) -> FetchResult:
    """What a Job told of its content; the volume's figures move by themselves."""
    return result.model_copy(update={"volume": None})


def until(condition: Callable[[], object], *, timeout: float = DEADLINE_S) -> None:
    """Waits for a condition; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the awaited condition did not come true"
        time.sleep(0.02)


def _tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    # Small numbers, none of them NaN: the upper byte of a little-endian float is its sign and exponent.
    noise = random.Random(seed)
    return Tensor(shape, b"".join(noise.randbytes(3) + b"\x3c" for _ in range(count)))


def make_base(folder: Path, *, vocab: int = VOCAB) -> Path:
    """A base model; a vocabulary of 16,384 makes the weights 4 MiB bigger."""
    folder.mkdir(parents=True)
    tensors = {"model.embed_tokens.weight": Tensor((vocab, HIDDEN), random.Random(vocab).randbytes(vocab * HIDDEN * 4))}
    tensors |= {f"model.layers.0.{name}.weight": _tensor(shape, 2) for name, shape in _MODULES.items()}
    tensors |= {"model.norm.weight": _tensor((HIDDEN,), 3), "lm_head.weight": _tensor((VOCAB, HIDDEN), 4)}
    write_tensors(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    (folder / "README.md").write_text("# base\n")
    return folder


def make_adapter(folder: Path, *, rank: int = 8, seed: int = 1) -> Path:
    """An adapter for `make_base`'s model."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, (out, width) in _MODULES.items():
        prefix = f"base_model.model.model.layers.0.{name}"
        tensors[f"{prefix}.lora_A.weight"] = _tensor((rank, width), seed)
        tensors[f"{prefix}.lora_B.weight"] = _tensor((out, rank), seed + 1)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "up_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(f"# adapter {seed}\n")
    return folder
