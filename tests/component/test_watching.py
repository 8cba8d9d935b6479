"""kopf, sync, store and queue together, against a real API server: every word arrives, and nothing is done on half of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import ControlPlane, tools
from lora_operator.errors import UnavailableError
from lora_operator.kube import LORA_ADAPTERS, PODS, Kube, ResourceType, load_configuration
from lora_operator.main import Operator
from lora_operator.reconcile.queue import WorkQueue
from lora_operator.reconcile.store import Key, Kind, Store

ROOT = Path(__file__).parents[2]
NAMESPACE = "team-a"
DEADLINE = 30.0


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server with the CRDs and a namespace."""
    with ControlPlane(dir=tmp_path_factory.mktemp("control-plane")) as control_plane:
        kubectl(control_plane, "apply", "--server-side", "-f", str(ROOT / "crds"))
        kubectl(control_plane, "wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        kubectl(control_plane, "create", "namespace", NAMESPACE)
        yield control_plane


def kubectl(plane: ControlPlane, *words: str) -> None:
    """kubectl as the administrator."""
    command = [str(tools.kubectl()), f"--kubeconfig={plane.kubeconfig}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture
async def kube(plane: ControlPlane) -> AsyncIterator[Kube]:
    """A client of the test's own; what a test made is deleted after it."""
    async with Kube(await load_configuration(str(plane.kubeconfig))) as client:
        yield client
        for rt in (LORA_ADAPTERS, PODS):
            for item in (await client.list(rt))[0]:
                await client.delete(rt, item["metadata"]["namespace"], item["metadata"]["name"])


class HeldBack(Kube):
    """A client that can't list one kind until it is let go."""

    held: ResourceType | None = None

    async def list(self, rt: ResourceType, **options: Any) -> tuple[list[dict[str, Any]], str]:
        """As Kube's."""
        if rt is self.held:
            raise UnavailableError(f"list {rt.plural}: held back")
        return await super().list(rt, **options)


class Running:
    """The machinery with a handler that only remembers."""

    def __init__(self, kube: HeldBack) -> None:
        self.kube = kube
        self.store = Store()
        self.seen: list[Key] = []
        self.queue = WorkQueue(self._remember)
        self.stop = asyncio.Event()
        self.operator = Operator(kube, self.store, self.queue, self.stop)

    async def _remember(self, key: Key) -> None:
        self.seen.append(key)


@asynccontextmanager
async def running(plane: ControlPlane, *, held: ResourceType | None = None) -> AsyncIterator[Running]:
    """The machinery at work inside the block; it must end without failure."""
    async with HeldBack(await load_configuration(str(plane.kubeconfig))) as kube:
        kube.held = held
        found = Running(kube)
        task = asyncio.create_task(found.operator.run())
        try:
            yield found
        finally:
            found.stop.set()
            await asyncio.wait_for(task, DEADLINE)


async def until(met: Callable[[], bool]) -> None:
    """Waits until a condition of the store or the queue holds."""
    async with asyncio.timeout(DEADLINE):
        while not met():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def adapter(name: str, **spec: Any) -> dict[str, Any]:
    """A LoRAAdapter."""
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"source": {"huggingFace": {"repo": "org/sql"}}, "vllmDeploymentRef": {"name": "llama"}, **spec},
    }


def pod(name: str, **labels: str) -> dict[str, Any]:
    """A Pod that no node runs."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": {"containers": [{"name": "main", "image": "images.example/x"}]},
    }


async def test_what_was_there_and_what_comes_changes_and_goes_is_known_and_queued(
    plane: ControlPlane, kube: Kube
) -> None:
    await kube.apply(adapter("early"))
    async with running(plane) as found:
        adapters = found.store.adapters
        await until(lambda: Key(Kind.LORA_ADAPTER, NAMESPACE, "early") in found.seen)
        await kube.apply(adapter("late"))
        await until(lambda: (NAMESPACE, "late") in adapters)
        found.seen.clear()
        await kube.apply(adapter("late", servedName="other"))
        await until(lambda: adapters[NAMESPACE, "late"].served_name == "other")
        await until(lambda: Key(Kind.LORA_ADAPTER, NAMESPACE, "late") in found.seen)
        await kube.delete(LORA_ADAPTERS, NAMESPACE, "early")
        await until(lambda: set(adapters) == {(NAMESPACE, "late")})
        assert ("", NAMESPACE) in found.store.namespaces


async def test_nothing_of_ours_is_left_on_an_object(plane: ControlPlane, kube: Kube) -> None:
    made = await kube.apply(adapter("untouched"))
    async with running(plane) as found:
        await until(lambda: Key(Kind.LORA_ADAPTER, NAMESPACE, "untouched") in found.seen)
        await kube.apply(adapter("later"))
        await until(lambda: (NAMESPACE, "later") in found.store.adapters)
        seen = await kube.get(LORA_ADAPTERS, NAMESPACE, "untouched")
    assert seen["metadata"] == made["metadata"]
    assert not {"finalizers", "annotations"} & set(seen["metadata"])


async def test_only_pods_of_ours_are_watched(plane: ControlPlane, kube: Kube) -> None:
    async with running(plane) as found:
        await until(lambda: found.store.all_synced)
        await kube.create(pod("foreign"))
        await kube.create(pod("ours", **{"app.kubernetes.io/managed-by": "lora-operator"}))
        await until(lambda: (NAMESPACE, "ours") in found.store.pods)
        await kube.patch(PODS, NAMESPACE, "ours", {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}})
        await until(lambda: not found.store.pods)


async def test_nothing_is_done_before_every_kind_was_listed(plane: ControlPlane, kube: Kube) -> None:
    await kube.apply(adapter("early"))
    async with running(plane, held=LORA_ADAPTERS) as found:
        await until(lambda: set(found.operator.sync.missing().values()) == {"list loraadapters: held back"})
        assert set(found.operator.sync.missing()) == {Kind.LORA_ADAPTER}
        assert not found.seen
        found.kube.held = None
        await until(lambda: Key(Kind.LORA_ADAPTER, NAMESPACE, "early") in found.seen)
        assert found.operator.sync.missing() == {}


async def test_what_vanished_unseen_is_dropped_by_the_next_list(plane: ControlPlane) -> None:
    async with running(plane) as found:
        await until(lambda: found.store.all_synced)
        ghost = adapter("ghost")
        ghost["metadata"].update(uid="gone", resourceVersion="1")
        found.store.upsert(Kind.LORA_ADAPTER, ghost)
        found.seen.clear()
        found.operator.sync.request(Kind.LORA_ADAPTER)
        await until(lambda: Key(Kind.LORA_ADAPTER, NAMESPACE, "ghost") in found.seen)
        assert found.store.adapters == {}


async def test_kopf_listing_a_kind_has_it_listed_by_us_as_well(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[Kind] = set()
    async with running(plane) as found:
        monkeypatch.setattr(found.operator.sync, "request", asked.add)
        await until(lambda: asked == set(Kind))


async def test_a_fault_in_taking_an_event_ends_the_process(plane: ControlPlane, kube: Kube) -> None:
    async with HeldBack(await load_configuration(str(plane.kubeconfig))) as client:
        found = Running(client)
        task = asyncio.create_task(found.operator.run())
        await until(lambda: found.store.all_synced)

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        found.store.upsert = broken  # type: ignore[assignment]
        await kube.apply(adapter("late"))
        with pytest.raises((ZeroDivisionError, ExceptionGroup)):
            await asyncio.wait_for(task, DEADLINE)


async def test_a_kind_that_is_taken_away_ends_the_process(tmp_path: Path) -> None:
    with ControlPlane(dir=tmp_path) as plane:
        kubectl(plane, "apply", "--server-side", "-f", str(ROOT / "crds"))
        kubectl(plane, "wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        async with HeldBack(await load_configuration(str(plane.kubeconfig))) as client:
            found = Running(client)
            task = asyncio.create_task(found.operator.run())
            await until(lambda: found.store.all_synced)
            kubectl(plane, "delete", "crd", "loraadapters.lora-operator.dev")
            with pytest.raises(Exception, match="not find|NotFound"):
                await asyncio.wait_for(task, 60)


def probe(port: int, path: str) -> tuple[int, str]:
    """Status and text of a health route; 0 when nothing answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


async def test_the_process_gets_ready_and_ends_within_seconds_when_told_to(plane: ControlPlane, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "operator.log"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("KUBERNETES_")},
        "KUBECONFIG": str(plane.kubeconfig),
        "OPERATOR_IMAGE": "images.example/operator",
        "OPERATOR_NAMESPACE": "default",
        "HEALTH_PORT": str(port),
        "PYTHONPATH": str(ROOT / "operator"),
    }
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lora_operator.cli", "run"), env=environment, stderr=output
        )
    try:
        async with asyncio.timeout(DEADLINE):
            while (await asyncio.to_thread(probe, port, "/readyz"))[0] != 200:
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.1)
        assert await asyncio.to_thread(probe, port, "/healthz") == (200, "ok\n")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 5) == 0, log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert not [line for line in lines if line["level"] in ("WARNING", "ERROR", "CRITICAL")], log.read_text()


async def test_the_process_says_what_its_environment_lacks() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lora_operator.cli", "run"),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "operator")},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode() == "lora-operator: environment variable OPERATOR_IMAGE is required\n"


def test_the_crds_of_the_tests_are_the_four_kinds() -> None:
    kinds = {yaml.safe_load(path.read_text())["spec"]["names"]["kind"] for path in (ROOT / "crds").glob("*.yaml")}
    assert kinds == {"LoRAAdapter", "VLLMDeployment", "ModelCache", "ModelArtifact"}
