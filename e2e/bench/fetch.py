"""How fast the download program is beside the tools that people use by hand, and beside the bare bytes. Needs no cluster.

    make bench-fetch            (or: python -m e2e.bench.fetch [--bytes 2000000000] [--rounds 2] [--files 1,20,1996])

The same model, in so many files of weights (and four small ones: 1,996 make the 2,000 that a Job takes at most), comes from a Hub (the tests' own, in a process of its own) and from an S3 service (versitygw) on
loopback into an empty folder of the same disk. Every way gets an own folder, and the time of a `sync` counts: what is in memory only is
not downloaded. `fetch` is the Job's program with all that it does: authorising, listing, downloading, verifying every file, checking the
model, publishing. Beside it `hf download` and `aws s3 cp --recursive`, which verify less; and curl, four at a time, as the limit of
what this machine can move. Ways take turns within a round; the figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from e2e.cluster import paths, tools
from e2e.fixtures.adapters import Tensor, write_tensors
from e2e.fixtures.s3 import ROOT_KEYS, S3Server

REPO, BUCKET = "bench/model", "bench"
PARALLEL = 4  # as many as the program's own downloads
_LOOK_SECONDS = 0.02


@dataclass
class Run:
    """One way, once."""

    seconds: float
    verifying: float = 0  # of these, for the program
    memory: int = 0  # the process's largest resident set, in bytes


def main(words: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m e2e.bench.fetch", description=__doc__)
    parser.add_argument("--bytes", type=int, default=2_000_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--files", default="1,20,1996")
    parser.add_argument("--sources", default="hub,s3")
    options = parser.parse_args(words)
    sources = {"hub": hub, "s3": s3}
    tools.apt_packages()  # curl is one
    with tempfile.TemporaryDirectory(prefix="bench-fetch-", dir=paths.cache_root()) as work:
        for files in (int(text) for text in options.files.split(",")):
            content = make_model(Path(work, "content", *REPO.split("/")), files=files, size=options.bytes)
            for name in options.sources.split(","):
                with sources[name](content) as ways:
                    report(
                        f"{name}, {options.bytes / 1e9:g} GB in {files} files",
                        measure(ways, options.rounds, Path(work)),
                    )
            shutil.rmtree(content)
    return 0


Ways = Mapping[str, Callable[[Path], Run]]


def measure(ways: Ways, rounds: int, work: Path) -> dict[str, list[Run]]:
    """Every way in every round, each into a folder of its own, in another order each time."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            target = Path(work, "target")
            target.mkdir()
            os.sync()
            started = time.monotonic()
            run = ways[name](target)
            os.sync()
            run.seconds = time.monotonic() - started
            runs[name].append(run)
            shutil.rmtree(target)
    return runs


def report(title: str, runs: Mapping[str, list[Run]]) -> None:
    """Print the medians, and how many times as fast as each other way the program was."""
    medians = {name: statistics.median(run.seconds for run in found) for name, found in runs.items()}
    print(title)
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        extra = "" if name == "fetch" else f"   fetch is {seconds / medians['fetch']:.2f} × as fast"
        print(f"  {name:12} {seconds:7.2f} s{extra}")
    last = runs["fetch"][-1]
    share = f"{last.verifying / last.seconds:.0%}"
    print(
        f"  fetch: verifying took {last.verifying:.2f} s ({share}), largest resident set {last.memory / 2**20:.0f} MiB",
        flush=True,
    )


def make_model(folder: Path, *, files: int, size: int) -> Path:
    """A model that the program takes for whole: one tensor a file, random bytes. Returns the folder that holds all repositories."""
    folder.mkdir(parents=True)
    noise = random.Random(files)
    rows = size // files // 1024
    names = [f"model-{n:05}-of-{files:05}.safetensors" for n in range(1, files + 1)]
    index = {}
    for number, name in enumerate(names if files > 1 else ["model.safetensors"]):
        # Small numbers, none of them NaN, repeated: making 2 GB of noise would take longer than moving it.
        block = b"".join(noise.randbytes(3) + b"\x3c" for _ in range(256))
        write_tensors(folder / name, {f"model.layers.{number}.mlp.up_proj.weight": Tensor((rows, 256), block * rows)})
        index[f"model.layers.{number}.mlp.up_proj.weight"] = name
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": files,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder.parents[1]


# The ways


def run(command: list[str], *, env: Mapping[str, str], log: Path) -> Run:
    """A program to its end; raises CalledProcessError, and shows the end of its output.

    Its memory is read while it runs, from when it was executed on: what the kernel tells of a process that has ended (ru_maxrss)
    counts what this one held before.
    """
    peak = 0
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={"PATH": os.environ["PATH"], **env}, stdout=out, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
            peak = max(peak, int(found[1]) * 1024) if found else peak  # one that has just ended has no memory
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)
    if process.returncode:
        print(log.read_text()[-2000:], file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return Run(0, memory=peak)


def fetch(source: Mapping[str, object], target: Path, credentials: Mapping[str, str] | None = None) -> Run:
    """The Job's program."""
    request: dict[str, object] = {
        "artifact": "bench",
        "type": "BaseModel",
        "cacheRoot": str(target),
        "path": "",
        "source": source,
    }
    if credentials is not None:
        folder = target.with_name("credentials")
        folder.mkdir(exist_ok=True)
        for name, value in credentials.items():
            (folder / name).write_text(value)
        request["credentials"] = str(folder)
    log = target.with_name("log")
    env = {
        "PYTHONPATH": str(paths.REPO / "operator"),
        "LORA_OPERATOR_FETCH": json.dumps(request),
        "LORA_OPERATOR_TERMINATION_LOG": str(target.with_name("result")),
    }
    done = run([sys.executable, "-m", "lora_operator.cli", "fetch"], env=env, log=log)
    done.verifying = between(log.read_text(), "verifying", "checking")
    return done


def between(log: str, start: str, end: str) -> float:
    """Seconds between two lines of the program's log."""
    times: dict[str, datetime] = {}
    for line in log.splitlines():
        found = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \S+ \S+ (\w+)", line)
        if found:
            times.setdefault(found[2], datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f"))
    return (times[end] - times[start]).total_seconds()


def curl(urls: Mapping[str, str], target: Path) -> Run:
    """The bare bytes, several files at a time, over connections that are kept."""
    config = target.with_name("curl")
    for name in urls:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    config.write_text("".join(f'url = "{url}"\noutput = "{target / name}"\n' for name, url in urls.items()))
    words = [
        "curl",
        "--silent",
        "--fail",
        "--location",
        "--parallel",
        "--parallel-max",
        str(PARALLEL),
        "--config",
        str(config),
    ]
    return run(words, env={}, log=target.with_name("log"))


def names_in(content: Path) -> list[str]:
    """The model's files."""
    return sorted(path.name for path in (content / REPO).iterdir())


@contextmanager
def hub(content: Path) -> Iterator[Ways]:
    """The tests' Hub in a process of its own, and who downloads from it."""
    words = [sys.executable, "-m", "e2e.fixtures.hub", "--host", "127.0.0.1", "--port", "0", "--load", str(content)]
    env = {**os.environ, "PYTHONPATH": str(paths.REPO)}
    with subprocess.Popen(words, cwd=paths.REPO, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            assert found is not None, "the Hub did not say where it is"
            url = found[0]

            def hf(target: Path) -> Run:
                env = {
                    "HF_ENDPOINT": url,
                    "HF_HOME": str(target),
                    "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1",
                }
                words = [str(tools.dev_venv() / "bin" / "hf"), "download", REPO, "--max-workers", str(PARALLEL)]
                return run(words, env=env, log=target.with_name("log"))

            urls = {name: f"{url}/{REPO}/resolve/main/{name}" for name in names_in(content)}
            yield {
                "fetch": lambda target: fetch({"kind": "huggingFace", "repo": REPO, "endpoint": url}, target),
                "hf download": hf,
                "curl": lambda target: curl(urls, target),
            }
        finally:
            server.terminate()


@contextmanager
def s3(content: Path) -> Iterator[Ways]:
    """A real S3 service, and who downloads from it."""
    aws = tools.bench_venv() / "bin" / "aws"
    with S3Server() as server:
        server.create_bucket(BUCKET, "*")  # everybody may read: curl signs nothing
        for name in names_in(content):
            server.admin.upload_file(str(content / REPO / name), BUCKET, f"model/{name}")
        url = server.direct_url
        keys = {"AWS_ACCESS_KEY_ID": ROOT_KEYS[0], "AWS_SECRET_ACCESS_KEY": ROOT_KEYS[1]}

        def copy(target: Path) -> Run:
            env = {**keys, "AWS_DEFAULT_REGION": "us-east-1", "HOME": str(target.parent)}
            words = [
                str(aws),
                "s3",
                "cp",
                "--recursive",
                "--only-show-errors",
                "--endpoint-url",
                url,
                f"s3://{BUCKET}/model",
                str(target),
            ]
            return run(words, env=env, log=target.with_name("log"))

        urls = {name: f"{url}/{BUCKET}/model/{name}" for name in names_in(content)}
        yield {
            "fetch": lambda target: fetch(
                {"kind": "s3", "bucket": BUCKET, "prefix": "model", "endpoint": url}, target, keys
            ),
            "aws s3 cp": copy,
            "curl": lambda target: curl(urls, target),
        }


if __name__ == "__main__":
    sys.exit(main())
