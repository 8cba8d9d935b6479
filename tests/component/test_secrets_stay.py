"""A credential is in its Secrets and nowhere else: every object of the API server, the Job's output and the operator's log are looked through.

Downloads are real here: for each Job that the operator makes, the program runs with what stands in the Job and in the Secret that it mounts,
and its result becomes the pod's.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import ControlPlane
from e2e.fixtures.hub import HubServer
from lora_operator.kube.kinds import JOBS, SECRETS
from tests.component.conftest import Kubectl
from tests.component.fetch_support import ROOT, Fetcher, Job
from tests.component.manifests import manifest
from tests.component.reconcile_support import NEVER, World, running_operator, until

MARKER = "hf_aMarkerThatMustNotBeSeenAnywhere"
FORMS = (MARKER, base64.b64encode(MARKER.encode()).decode(), MARKER.encode().hex())
BOOM = (
    "import lora_operator.fetch.content.select as c, os\n"
    "def boom(*a, **k):\n"
    "    raise RuntimeError('boom with ' + open(os.environ['MARKER_FILE']).read())\n"
    "c.choose = boom\n"
)
# What an adapter's repository meets, and the reason that its status ends with.
PATHS = {
    "good": "Ready",
    "refused": "RepositoryNotFound",
    "unknown": "RepositoryNotFound",
    "down": "SourceUnreachable",
    "denied": "Unauthorized",
    "crashes": "JobFailed",
}


@pytest.fixture
def hub(content: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for name in PATHS:
            if name != "unknown":
                server.create_repo(f"org/{name}", private=True)
                server.commit(f"org/{name}", content / "good")
        server.add_token(MARKER, repos=[f"org/{name}" for name in PATHS if name not in ("refused", "unknown")])
        server.fail("org/down", "api/info", status=503)
        server.fail("org/denied", "api/tree", status=403)
        yield server


async def downloaded(world: World, fetcher: Fetcher, name: str, tmp_path: Path) -> Job:
    """The run of the one Job for a repository: its program with what it would find in its pod; the pod then ends as it did."""

    async def made() -> dict[str, Any] | None:
        for job in (await world.kube.list(JOBS, namespace=world.serving))[0]:
            (container,) = job["spec"]["template"]["spec"]["containers"]
            if f'"org/{name}"' in container["env"][0]["value"] and not job["spec"].get("suspend"):
                return job
        return None

    job = await until(made, f"a Job for org/{name} goes")
    spec = job["spec"]["template"]["spec"]
    request = json.loads(spec["containers"][0]["env"][0]["value"])
    secret = next(volume["secret"]["secretName"] for volume in spec["volumes"] if volume["name"] == "credentials")
    data = (await world.kube.get(SECRETS, world.serving, secret))["data"]
    values = {key: base64.b64decode(value).decode() for key, value in data.items()}
    assert values == {"token": MARKER}
    env = {}
    if name == "crashes":
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(BOOM)
        (tmp_path / "marker").write_text(MARKER)
        env = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT / 'operator'}", "MARKER_FILE": str(tmp_path / "marker")}
    # The base model is played, so there is nothing to compare an adapter with.
    wanted = request["source"]
    source = {wanted["kind"]: {key: value for key, value in wanted.items() if key != "kind"}}
    run = fetcher.launch(source, credentials=values, env=env, artifact=request["artifact"], type=request["type"])
    await asyncio.to_thread(run.wait)
    world.outcomes[f"org/{name}"] = run.result
    await world._end_job(job)
    return run


async def test_a_token_is_nowhere_but_in_its_secrets(
    control_plane: ControlPlane,
    kubectl: Kubectl,
    world: World,
    hub: HubServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    world.outcomes = {f"org/{name}": NEVER for name in PATHS}
    (tmp_path / "cache").mkdir()
    kubectl("create", "secret", "generic", "hf", "-n", world.team_a, f"--from-literal=token={MARKER}")
    async with running_operator(control_plane):
        await world.make_fleet()
        await world.kube.apply(
            manifest("ModelCache", {"spec.huggingFace.endpoint": hub.url}, name="default", namespace=world.serving)
        )
        await world.run_pods()
        for name in PATHS:
            source = {"huggingFace": {"repo": f"org/{name}", "tokenSecretRef": {"name": "hf"}}}
            await world.adapter(name, world.team_a, source=source)
        fetchers = [Fetcher(hub.url, tmp_path / "cache", tmp_path / f"jobs-{name}") for name in PATHS]
        runs = [await downloaded(world, fetcher, name, tmp_path) for fetcher, name in zip(fetchers, PATHS, strict=True)]
        for name, reason in PATHS.items():
            if reason == "Ready":
                await world.ready(name, world.team_a)
            else:
                await world.refused(name, world.team_a, reason)
    kinds = kubectl("api-resources", "--verbs=list", "-o", "name").split()
    wanted = ",".join(kind for kind in kinds if kind != "secrets")
    objects = kubectl("get", wanted, "--all-namespaces", "-o", "json")
    for kind in ("Job", "LoRAAdapter", "ModelArtifact", "ConfigMap", "Event"):
        assert f'"kind": "{kind}"' in objects, f"{kind} was looked through"
    texts = {
        "an object": objects,
        "the operator's log": "\n".join(record.getMessage() + str(record.args) for record in caplog.records)
        + caplog.text,
        **{f"output of {name}": run.stdout + run.stderr for name, run in zip(PATHS, runs, strict=True)},
        **{f"result of {name}": run.result.model_dump_json() for name, run in zip(PATHS, runs, strict=True)},
    }
    for where, text in texts.items():
        for form in FORMS:
            assert form not in text, f"the token is in {where}"
    assert "Traceback" in runs[list(PATHS).index("crashes")].stderr
    secrets = json.loads(kubectl("get", "secrets", "--all-namespaces", "-o", "json"))["items"]
    holders = {one["metadata"]["namespace"] for one in secrets if FORMS[1] in (one.get("data") or {}).values()}
    assert holders <= {world.team_a, world.serving}
    shutil.rmtree(tmp_path / "cache")
