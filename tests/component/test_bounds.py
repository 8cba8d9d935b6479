"""What a cache may hold, and what its Jobs may take: the program on real volumes, and the operator's turns on a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e.cluster import ControlPlane
from e2e.fixtures.hub import HubServer
from e2e.fixtures.s3 import S3Server
from lora_operator.api import VLLMDeployment
from lora_operator.desired.children import build_modules_config_map
from lora_operator.errors import InvalidObjectError
from lora_operator.kube.kinds import JOBS, LORA_ADAPTERS, MODEL_ARTIFACTS, MODEL_CACHES, VLLM_DEPLOYMENTS
from lora_operator.plan.adapter_list import decode_from_config_map, encode_for_config_map
from lora_operator.plan.list_limits import give_way
from lora_operator.wire.jobs import FetchResult, VolumeState
from tests.component.fetch_support import Fetcher, Job, make_base, until
from tests.component.manifests import manifest
from tests.component.reconcile_support import COMMIT, NEVER, Json, World, running_operator
from tests.component.reconcile_support import until as until_it
from tests.unit.test_plan_list_limits import crowd, without

MIB = 1 << 20
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")


@pytest.fixture
def hub(content: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.create_repo("org/base")
        server.commit("org/base", content / "base")
        server.create_repo("org/big")
        server.commit("org/big", content / "big")  # 6.1 MiB
        yield server


@pytest.fixture
def fetcher(hub: HubServer, tmp_path: Path) -> Fetcher:
    (tmp_path / "cache").mkdir()
    return Fetcher(hub.url, tmp_path / "cache", tmp_path / "jobs")


@contextmanager
def volume(folder: Path, mebibytes: int) -> Iterator[None]:
    """A file system of its own over the folder, gone afterwards whatever happens."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def run(fetcher: Fetcher, repo: str, **limits: int) -> Job:
    return fetcher.run(repo, type="BaseModel", want={"limits": limits})


def test_what_is_too_big_or_does_not_fit_downloads_nothing(hub: HubServer, fetcher: Fetcher) -> None:
    reason, message = run(fetcher, "org/big", maxArtifactBytes=6 * MIB).failed
    assert reason == "TooLarge"
    assert "has 6.1 MiB in 5 files, and the ModelCache takes 6.0 MiB at most (spec.maxArtifactSize)" in message
    assert not (fetcher.cache / "hub").exists()

    small = run(fetcher, "org/base", capacityBytes=6 * MIB).ok
    assert small.volume is not None
    assert small.size_bytes == small.volume.used_bytes, "what a Job tells of the volume is what it put there"
    hub.reset_counters()
    reason, message = run(fetcher, "org/big", capacityBytes=6 * MIB).failed
    assert reason == "InsufficientSpace"
    assert "6.1 MiB are to be downloaded, but the cache holds" in message
    assert "of the 6.0 MiB that it may (spec.capacity)" in message
    assert sum(hub.downloads("org/big").values()) == 0
    assert run(fetcher, "org/big", capacityBytes=8 * MIB).ok
    assert run(fetcher, "org/big", capacityBytes=1).ok, "what is there already needs no room"


@as_root
def test_what_is_to_stay_free_stays_free(hub: HubServer, fetcher: Fetcher) -> None:
    with volume(fetcher.cache, 10):
        reason, message = run(fetcher, "org/big", minFreeBytes=5 * MIB).failed
        assert reason == "InsufficientSpace"
        assert "10.0 MiB free of which 5.0 MiB stay free (spec.minFree)" in message
        found = run(fetcher, "org/big", minFreeBytes=3 * MIB).ok.volume
        assert found is not None
        assert found.total_bytes == 10 * MIB
        assert 3 * MIB < found.free_bytes < 4 * MIB


@as_root
@pytest.mark.parametrize("bound", ["capacity", "minFree"])
def test_jobs_that_start_together_hold_the_bound_together(
    hub: HubServer, fetcher: Fetcher, content: Path, bound: str
) -> None:
    repos = ["org/big", *(f"org/big{n}" for n in range(3))]
    for repo in repos[1:]:
        hub.create_repo(repo)
        hub.commit(repo, content / "big")
    limits = {"capacityBytes": 14 * MIB} if bound == "capacity" else {"minFreeBytes": 50 * MIB}
    for repo in repos:
        hub.throttle(MIB // 2, repo)
    with volume(fetcher.cache, 64):
        jobs = [
            fetcher.start(repo, type="BaseModel", want={"limits": limits | {"holder": repo.replace("/", "-")}})
            for repo in repos
        ]
        until(lambda: sum(job.process.poll() is not None for job in jobs) >= 2)
        for repo in repos:
            hub.throttle(None, repo)
        ended = [job.result for job in jobs]
        assert sorted(found.ok for found in ended) == [False, False, True, True], "two of 6.1 MiB fit into 14 MiB"
        for found in ended:
            assert found.ok or "other Jobs will write" in found.message
        assert run(fetcher, "org/base", **limits).ok, "nothing is kept for Jobs that have ended"


@as_root
def test_a_volume_that_fills_loses_all_unfinished_files_of_the_job_and_none_of_another(
    hub: HubServer, fetcher: Fetcher, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    make_base(parts)
    for number in (1, 2, 3):
        (parts / f"model-0000{number}-of-00003.safetensors").write_bytes(
            (parts / "model.safetensors").read_bytes() + os.urandom(4 * MIB)
        )
    (parts / "model.safetensors").unlink()
    hub.create_repo("org/parts")
    hub.commit("org/parts", parts)
    hub.throttle(2 * MIB, "org/parts")
    hub.throttle(MIB, "org/big")
    with volume(fetcher.cache, 24):
        other = fetcher.start("org/big", type="BaseModel")
        until(lambda: hub.sent_bytes("org/big").get("model.safetensors", 0) > 3 * MIB)
        other.process.send_signal(signal.SIGSTOP)  # it holds what it has, and writes nothing meanwhile
        job = fetcher.start("org/parts", type="BaseModel")
        until(lambda: sum(hub.sent_bytes("org/parts").values()) > 3 * MIB)
        free = os.statvfs(fetcher.cache)
        (fetcher.cache / "ballast").write_bytes(b"\0" * (free.f_bavail * free.f_frsize - MIB // 2))
        reason, message = job.failed
        assert (reason, "is full" in message) == ("InsufficientSpace", True)
        assert [name for name in fetcher.leaked() if "org--parts" in name] == []
        (fetcher.cache / "ballast").unlink()
        assert [name for name in fetcher.leaked() if "org--big" in name] != [], "the other one's work is not touched"
        other.kill()
        hub.throttle(None, "org/big")
        hub.reset_counters()
        assert fetcher.run("org/big", type="BaseModel").ok
        assert hub.sent_bytes("org/big")["model.safetensors"] < 5.5 * MIB, "it goes on from where it was"


@as_root
def test_a_volume_that_fills_while_objects_of_a_bucket_arrive(fetcher: Fetcher, content: Path) -> None:
    with S3Server() as s3, volume(fetcher.cache, 8):
        s3.add_account("AKTESTSOFTHEBOUNDS", "secret-of-the-bounds-0123456789")
        s3.create_bucket("models", "AKTESTSOFTHEBOUNDS")
        s3.upload("models", "big", content / "big")
        (fetcher.cache / "ballast").write_bytes(b"\0" * MIB)
        keys = {
            "AWS_ACCESS_KEY_ID": "AKTESTSOFTHEBOUNDS",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-bounds-0123456789",
        }
        source = {"s3": {"bucket": "models", "prefix": "big", "endpoint": s3.url}}
        job = fetcher.launch(source, type="BaseModel", credentials=keys)
        until(lambda: fetcher.leaked() or job.process.poll() is not None)
        free = os.statvfs(fetcher.cache)
        with contextlib.suppress(OSError):  # the Job may have filled it meanwhile
            (fetcher.cache / "ballast2").write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize))
        found = job.result
        if not found.ok:  # it may have been faster than the ballast
            assert found.reason == "InsufficientSpace"
        assert fetcher.leaked() == []


def peak_of(job: Job) -> int:
    """The most memory that a program had by its end. The kernel's ru_maxrss would count this very process, which it was forked from."""
    most = [0]

    def is_over() -> bool:
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{job.process.pid}/status").read_text())
            most.append(int(found[1]) * 1024 if found else 0)
        return job.process.poll() is not None

    until(is_over)
    return max(most)


def test_a_jobs_memory_does_not_grow_with_its_content(hub: HubServer, fetcher: Fetcher, tmp_path: Path) -> None:
    huge = make_base(tmp_path / "huge", vocab=600_000)  # 147 MiB
    hub.create_repo("org/huge")
    hub.commit("org/huge", huge)
    peaks = {}
    for repo in ("org/base", "org/huge"):
        job = fetcher.start(repo, type="BaseModel")
        peaks[repo] = peak_of(job)
        assert job.ok
    assert peaks["org/huge"] - peaks["org/base"] < 48 * MIB, peaks
    assert peaks["org/huge"] < 300 * MIB, peaks


# The operator


def repo_of(job: Json) -> str:
    text: str = job["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"]
    return text.split('"repo":"')[1].split('"')[0].removeprefix("org/")


async def test_namespaces_take_turns_and_those_that_wait_say_so(control_plane: ControlPlane, world: World) -> None:
    await world.make_fleet()
    changes = {"spec.storage": {"existingClaim": "models"}, "spec.download": {"maxConcurrent": 1, "timeout": "90m"}}
    await world.kube.apply(manifest("ModelCache", changes, name="default", namespace=world.serving))
    repos = {f"a{n}": world.team_a for n in range(3)} | {"b0": world.team_b}
    for repo in repos:
        world.outcomes[f"org/{repo}"] = NEVER
    async with running_operator(control_plane):
        names: dict[str, str] = {}
        for name, namespace in repos.items():
            await world.adapter(name, namespace)
            status = await world.wait_for(LORA_ADAPTERS, name, namespace, "Downloaded", "False", "Queued")
            names[name] = status["artifactRef"]["name"]
            await asyncio.sleep(1.1)  # creation times are whole seconds

        started: list[str] = []

        async def another() -> Json | None:
            jobs = [job for job in (await world.kube.list(JOBS, namespace=world.serving))[0] if repo_of(job) in repos]
            new = [job for job in jobs if repo_of(job) not in started]
            assert len(new) <= 1
            return new[0] if new else None

        async def says(name: str, words: str) -> None:
            async def look() -> bool:
                status = ((await world.find(MODEL_ARTIFACTS, world.serving, names[name])) or {}).get("status") or {}
                return any(words in c["message"] for c in status.get("conditions", []) if c["type"] == "Ready")

            await until_it(look, f"{name} says {words!r}")

        for _ in repos:
            job = await until_it(another, "the next one's Job is made")
            started.append(repo_of(job))
            assert job["spec"]["activeDeadlineSeconds"] == 5400
            if len(started) == 1:
                for place, name in enumerate(("b0", "a1", "a2"), start=1):
                    await says(
                        name,
                        f"{place} download{' is' if place == 1 else 's are'} ahead of it in ModelCache {world.serving}/default",
                    )
            await world.delete_adapter(started[-1], repos[started[-1]])
        assert started == ["a0", "b0", "a1", "a2"]


async def test_what_a_job_tells_of_the_volume_is_the_caches(control_plane: ControlPlane, world: World) -> None:
    room = VolumeState(total_bytes=20 * 2**30, free_bytes=2**30, used_bytes=131072)
    world.outcomes["org/sql"] = FetchResult(
        ok=True,
        resolved_revision=COMMIT,
        digest="sha256:aa",
        size_bytes=131072,
        files=2,
        path="artifacts/sql-aa",
        rank=8,
        volume=room,
    )
    await world.make_fleet()
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        status = await world.wait_for(MODEL_CACHES, "default", world.serving, "SpaceLow", "True", "NearlyFull")
        assert (status["used"], status["free"]) == ("128Ki", "1Gi")


async def test_a_list_of_all_is_refused_and_what_there_is_room_for_is_not(world: World) -> None:
    """Adapters of one source with the longest names, as one tenant may make them."""
    await world.make_deployment()
    body = await world.kube.get(VLLM_DEPLOYMENTS, world.serving, "llama")
    deployment = VLLMDeployment.model_validate(body)
    modules = crowd(4000)
    everybody = without(modules, frozenset())
    with pytest.warns(ResourceWarning), pytest.raises(InvalidObjectError, match="may not be more than 1048576 bytes"):
        await world.kube.apply(build_modules_config_map(deployment, encode_for_config_map(everybody)))
    fitting = without(modules, give_way(everybody, {}))
    made = await world.kube.apply(build_modules_config_map(deployment, encode_for_config_map(fitting)))
    assert decode_from_config_map(made["binaryData"]["modules.json.gz"]) == fitting
