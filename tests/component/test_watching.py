"""kopf, sync, store and queue together, against a real API server: every word arrives, and nothing is done on half of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import ControlPlane, tools
from lora_operator import main
from lora_operator.errors import UnavailableError
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import LORA_ADAPTERS, PODS, Kind, ResourceType
from lora_operator.main import Operator
from lora_operator.reconcile.queue import WorkQueue
from lora_operator.reconcile.store import Key, Store
from tests.component.conftest import Kubectl

ROOT = Path(__file__).parents[2]
DEADLINE = 90.0


@pytest.fixture
async def kube(control_plane: ControlPlane, kubectl: Kubectl) -> AsyncIterator[Kube]:
    """A client of the test's own; the API server has the CRDs."""
    async with Kube(await load_configuration(str(control_plane.kubeconfig))) as client:
        yield client


class HeldBack(Kube):
    """A client that can't list one kind until it is let go."""

    held: ResourceType | None = None

    async def pages(self, rt: ResourceType, **options: Any) -> AsyncIterator[tuple[list[dict[str, Any]], str]]:
        """As Kube's."""
        if rt is self.held:
            raise UnavailableError(f"list {rt.plural}: held back")
        async for page in super().pages(rt, **options):
            yield page


class Running:
    """The machinery with a handler that only remembers."""

    def __init__(self, kube: HeldBack) -> None:
        self.kube = kube
        self.store = Store()
        self.seen: list[Key] = []
        self.queue = WorkQueue(self._remember)
        self.stop = asyncio.Event()
        self.operator = Operator(kube, self.store, self.queue, self.stop)

    @property
    def watched(self) -> set[Kind]:
        """Kinds that kopf watches."""
        return self.operator._watched

    async def _remember(self, key: Key) -> None:
        self.seen.append(key)


@asynccontextmanager
async def running(control_plane: ControlPlane, *, held: ResourceType | None = None) -> AsyncIterator[Running]:
    """The machinery at work inside the block; it must end without failure."""
    async with HeldBack(await load_configuration(str(control_plane.kubeconfig))) as kube:
        kube.held = held
        found = Running(kube)
        task = asyncio.create_task(found.operator.run())
        try:
            yield found
            await until(
                lambda: found.watched == set(Kind)
            )  # kopf logs errors when it is stopped in the middle of starting
        finally:
            found.stop.set()
            await asyncio.wait_for(task, DEADLINE)


async def until(met: Callable[[], bool]) -> None:
    """Waits until a condition of the store or the queue holds."""
    async with asyncio.timeout(DEADLINE):
        while not met():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def adapter(namespace: str, name: str, **spec: Any) -> dict[str, Any]:
    """A LoRAAdapter."""
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"source": {"huggingFace": {"repo": "org/sql"}}, "vllmDeploymentRef": {"name": "llama"}, **spec},
    }


def pod(namespace: str, name: str, **labels: str) -> dict[str, Any]:
    """A Pod that no node runs."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"containers": [{"name": "main", "image": "images.example/x"}]},
    }


async def test_what_was_there_and_what_comes_changes_and_goes_is_known_and_queued(
    control_plane: ControlPlane, kube: Kube, namespace: str
) -> None:
    await kube.apply(adapter(namespace, "early"))
    async with running(control_plane) as found:
        adapters = found.store.adapters
        await until(lambda: Key(Kind.LORA_ADAPTER, namespace, "early") in found.seen)
        await kube.apply(adapter(namespace, "late"))
        await until(lambda: (namespace, "late") in adapters)
        found.seen.clear()
        await kube.apply(adapter(namespace, "late", servedName="other"))
        await until(lambda: adapters[namespace, "late"].served_name == "other")
        await until(lambda: Key(Kind.LORA_ADAPTER, namespace, "late") in found.seen)
        await kube.delete(LORA_ADAPTERS, namespace, "early")
        await until(lambda: (namespace, "early") not in adapters)
        assert (namespace, "late") in adapters
        assert ("", namespace) in found.store.namespaces


async def test_nothing_of_ours_is_left_on_an_object(control_plane: ControlPlane, kube: Kube, namespace: str) -> None:
    made = await kube.apply(adapter(namespace, "untouched"))
    async with running(control_plane) as found:
        await until(lambda: Key(Kind.LORA_ADAPTER, namespace, "untouched") in found.seen)
        await kube.apply(adapter(namespace, "later"))
        await until(lambda: (namespace, "later") in found.store.adapters)
        seen = await kube.get(LORA_ADAPTERS, namespace, "untouched")
    assert seen["metadata"] == made["metadata"]
    assert not {"finalizers", "annotations"} & set(seen["metadata"])


async def test_only_pods_of_ours_are_watched(control_plane: ControlPlane, kube: Kube, namespace: str) -> None:
    async with running(control_plane) as found:
        await until(lambda: found.store.all_synced)
        await kube.create(pod(namespace, "foreign"))
        await kube.create(pod(namespace, "ours", **{"app.kubernetes.io/managed-by": "lora-operator"}))
        await until(lambda: (namespace, "ours") in found.store.pods)
        await kube.patch(PODS, namespace, "ours", {"metadata": {"labels": {"app.kubernetes.io/managed-by": None}}})
        await until(lambda: (namespace, "ours") not in found.store.pods)
        assert (namespace, "foreign") not in found.store.pods


async def test_nothing_is_done_before_every_kind_was_listed(
    control_plane: ControlPlane, kube: Kube, namespace: str
) -> None:
    await kube.apply(adapter(namespace, "early"))
    async with running(control_plane, held=LORA_ADAPTERS) as found:
        await until(lambda: set(found.operator.sync.missing().values()) == {"list loraadapters: held back"})
        assert set(found.operator.sync.missing()) == {Kind.LORA_ADAPTER}
        assert not found.seen
        found.kube.held = None
        await until(lambda: Key(Kind.LORA_ADAPTER, namespace, "early") in found.seen)
        assert found.operator.sync.missing() == {}


async def test_what_vanished_unseen_is_dropped_when_kopf_lists_again(
    control_plane: ControlPlane, kube: Kube, namespace: str
) -> None:
    async with running(control_plane) as found:
        await until(lambda: found.watched == set(Kind))
        ghost = adapter(namespace, "ghost")
        ghost["metadata"].update(uid="gone", resourceVersion="1")
        found.store.upsert(Kind.LORA_ADAPTER, ghost)
        found.operator.listed_by_kopf(Kind.LORA_ADAPTER)
        await until(lambda: (namespace, "ghost") not in found.store.adapters)
        await until(lambda: Key(Kind.LORA_ADAPTER, namespace, "ghost") in found.seen)


async def test_a_fault_in_taking_an_event_ends_the_process(
    control_plane: ControlPlane, kube: Kube, namespace: str
) -> None:
    async with HeldBack(await load_configuration(str(control_plane.kubeconfig))) as client:
        found = Running(client)
        task = asyncio.create_task(found.operator.run())
        await until(lambda: found.store.all_synced)

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        found.store.upsert = broken  # type: ignore[assignment]
        await kube.apply(adapter(namespace, "late"))
        with pytest.raises((ZeroDivisionError, ExceptionGroup)):
            await asyncio.wait_for(task, DEADLINE)


async def test_a_kind_that_kopf_does_not_watch_ends_the_process(
    control_plane: ControlPlane, kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "WATCH_DEADLINE", 3.0)
    async with HeldBack(await load_configuration(str(control_plane.kubeconfig))) as client:
        found = Running(client)
        hear = found.operator.listed_by_kopf
        monkeypatch.setattr(found.operator, "listed_by_kopf", lambda kind: None if kind is Kind.JOB else hear(kind))
        with pytest.raises(RuntimeError, match=r"not watched within 3 s: Job$"):
            await asyncio.wait_for(found.operator.run(), DEADLINE)


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


class Process:
    """The operator as a process of its own, with the API server of a kubeconfig."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    def log(self) -> str:
        """What it wrote so far."""
        return self._log.read_text()

    async def wait_for_line(self, words: str) -> None:
        """Until its log has the words."""
        async with asyncio.timeout(DEADLINE):
            while words not in self.log():
                assert self.process.returncode is None, self.log()
                await asyncio.sleep(0.05)


@asynccontextmanager
async def operator_process(plane: ControlPlane, folder: Path) -> AsyncIterator[Process]:
    """`lora-operator run`, killed at the end of the block if it is still there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("KUBERNETES_")},
        "KUBECONFIG": str(plane.kubeconfig),
        "OPERATOR_IMAGE": "images.example/operator",
        "OPERATOR_NAMESPACE": "default",
        "HEALTH_PORT": str(port),
        "PYTHONPATH": str(ROOT / "operator"),
    }
    log = folder / "operator.log"
    with log.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lora_operator.cli", "run"), env=environment, stderr=output
        )
    try:
        yield Process(process, port, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_process_gets_ready_and_ends_within_seconds_when_told_to(
    control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path
) -> None:
    async with operator_process(control_plane, tmp_path) as operator:
        await operator.wait_for_line("every kind is watched")
        assert await asyncio.to_thread(probe, operator.port, "/readyz") == (200, "ok\n")
        assert await asyncio.to_thread(probe, operator.port, "/healthz") == (200, "ok\n")
        operator.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(operator.process.wait(), 5) == 0, operator.log()
        lines = [json.loads(line) for line in operator.log().splitlines()]
    assert not [line for line in lines if line["level"] in ("ERROR", "CRITICAL")], operator.log()


async def test_a_watch_that_fails_for_good_ends_the_process(tmp_path: Path) -> None:
    with ControlPlane(dir=tmp_path / "plane") as plane:
        administrator = Kubectl(tools.kubectl(), plane.kubeconfig)
        administrator("apply", "--server-side", "-f", str(ROOT / "crds"))
        administrator("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        async with operator_process(plane, tmp_path) as operator:
            await operator.wait_for_line("every kind is watched")
            administrator("delete", "crd", "loraadapters.lora-operator.dev")
            assert await asyncio.wait_for(operator.process.wait(), DEADLINE) == 1, operator.log()
            assert "the operator ends" in operator.log()


async def test_the_process_says_what_its_environment_lacks() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lora_operator.cli", "run"),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "operator")},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode() == "lora-operator: environment variable OPERATOR_IMAGE is required\n"
