"""The download program is killed at any moment, twice at once, and on volumes with locks of all kinds: what is visible is whole.

The seeds are fixed, so that a failure can be had again.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.fixtures.hub import HubServer
from lora_operator.wire.jobs import Manifest
from tests.component.fetch_support import Fetcher, make_base
from tests.component.fetch_zygote import ForkedJob, Zygote

BIG = "model.safetensors"
REPO = "org/base"
KILLS = 50  # by a signal in mid-download, or at one of the some 140 audited events of a whole run, 90 where nothing is to be downloaded
MIB = 1 << 20
RATE = 8 * MIB
CHUNK = RATE // 10  # what the throttled server sends at once, and so what a kill can lose on the way


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Some base models of 1.5 MiB, each with other weights."""
    folder = make_base(tmp_path_factory.mktemp("models") / "base", vocab=6000)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    size = len(files[BIG])
    noise = [random.Random(number).randbytes(MIB) for number in range(8)]
    # The end of the file is embeddings and norms of some layer: any bytes will do there.
    return [files | {BIG: files[BIG][: size - MIB] + tail} for tail in noise]


@pytest.fixture
def hub(models: list[dict[str, bytes]]) -> Iterator[HubServer]:
    with HubServer() as server:
        server.create_repo(REPO)
        server.commit(REPO, models[0])
        yield server


def request(hub: HubServer, cache: Path) -> dict[str, Any]:
    source = {"kind": "huggingFace", "repo": REPO, "revision": "main", "endpoint": hub.url}
    cache.mkdir(exist_ok=True)
    return {"artifact": "base", "type": "BaseModel", "source": source, "cacheRoot": str(cache)}


def require_whole(cache: Path) -> int:
    """That nothing half done is visible; returns how many views there are."""
    views = [path for path in cache.glob("artifacts/*") if not path.name.startswith(".")]
    for view in views:
        manifest = Manifest.model_validate_json((view / ".lora-operator.json").read_bytes())
        found = {str(path.relative_to(view)) for path in view.rglob("*") if not path.is_dir()}
        assert found == {file.path for file in manifest.files} | {".lora-operator.json"}
        for file in manifest.files:
            data = (view / file.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size, file.sha256), file.path
    for blob in cache.glob("hub/*/blobs/*"):
        if ".incomplete" not in blob.name and not blob.name.startswith("tmp_"):  # an empty file, never a content's name
            data = blob.read_bytes()
            sums = hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            assert blob.name in sums, blob.name
    return len(views)


def kill_once(job: ForkedJob, hub: HubServer, *, after: int) -> None:
    """Kills a Job once the server has sent so many bytes since the counters began, if it is not over by then."""
    while not job.is_over and sum(hub.sent_bytes(REPO).values()) < after:
        time.sleep(0.002)
    job.kill()


def test_fifty_kills_at_any_moment_leave_nothing_half_done_and_lose_little(
    hub: HubServer, tmp_path: Path, models: list[dict[str, bytes]]
) -> None:
    cache, choice = tmp_path / "cache", random.Random(6)
    hub.throttle(RATE)
    kills = rounds = 0
    with Zygote(request(hub, cache), tmp_path / "jobs") as zygote:
        while kills < KILLS:
            files = models[rounds % len(models)]
            commit = hub.commit(REPO, {**files, "README.md": str(rounds).encode()})
            before = require_whole(cache)
            # Weights that another commit had are there already; so each round after the first few is one of verifying and publishing.
            fresh = rounds < len(models)
            hub.reset_counters()
            killed_here = 0
            for _ in range(12):
                sent = sum(hub.sent_bytes(REPO).values())
                if fresh and choice.random() < 0.5 and sent < len(files[BIG]):
                    job = zygote.start()
                    kill_once(job, hub, after=sent + choice.randrange(len(files[BIG]) // 2))
                else:
                    job = zygote.start(die_at=choice.randrange(1, 150 if fresh else 95))
                died = job.died()
                assert require_whole(cache) >= before
                if not died:
                    break
                kills, killed_here = kills + 1, killed_here + 1
            result = job.ok if not died else None
            if result is None:
                job = zygote.start()
                assert not job.died()
                result = job.ok
            assert result.resolved_revision == commit
            manifest = Manifest.model_validate_json((cache / result.path / ".lora-operator.json").read_bytes())
            assert manifest.digest == result.digest
            assert (cache / result.path / BIG).read_bytes() == files[BIG]
            wanted = sum(len(data) for name, data in files.items() if name != "README.md")
            small = wanted - len(files[BIG])
            assert sum(hub.sent_bytes(REPO).values()) <= wanted + killed_here * (small + 2 * CHUNK)
            rounds += 1
    assert kills >= KILLS
    assert list(cache.glob("hub/*/blobs/*.incomplete")) == []


FLOCKS = {
    "locks": "",
    "no locks": "def flock(*_):\n    raise OSError(errno.ENOSYS, 'no locks here')\nfcntl.flock = flock\n",
    "no locks, said otherwise": "def flock(*_):\n    raise OSError(errno.ENOTSUP, 'no locks here')\nfcntl.flock = flock\n",
    "locks that hold nobody back": "fcntl.flock = lambda *_: None\n",
}


@pytest.mark.parametrize("kind", FLOCKS)
def test_jobs_of_two_clusters_on_one_volume_leave_what_they_publish_right(
    kind: str, hub: HubServer, tmp_path: Path, models: list[dict[str, bytes]]
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import errno, fcntl\n{FLOCKS[kind]}")
    env = {"PYTHONPATH": f"{tmp_path / 'site'}:{Path(__file__).parents[2] / 'operator'}:{Path(__file__).parents[2]}"}
    cache = tmp_path / "cache"
    # What a Job that was killed left of locks made by a file's presence, and what one of long ago left unfinished.
    etag = hashlib.sha256(models[0][BIG]).hexdigest()
    locks = cache / "hub/.locks/models--org--base"
    locks.mkdir(parents=True)
    for name in (etag, *(hashlib.sha1(b"blob %d\0" % len(d) + d).hexdigest() for d in models[0].values())):
        (locks / f"{name}.lock").write_text("1\nanother-host\n")
    hub.throttle(RATE)
    with Zygote(request(hub, cache), tmp_path / "jobs", env=env) as zygote:
        killed = zygote.start()
        kill_once(killed, hub, after=MIB // 2)
        assert killed.died()
        jobs = [zygote.start(artifact=name) for name in ("base", "base", "other")]
        ended = [job.died() for job in jobs]
        assert ended == [False] * 3
        answers = [json.loads((job.folder / "termination-log").read_bytes()) for job in jobs]
        good = [answer for answer in answers if answer["ok"]]
        assert good
        if kind != "locks that hold nobody back":  # there a Job may find that its own bytes were mixed up, and says so
            assert len(good) == 3, answers
        assert {answer["reason"] for answer in answers if not answer["ok"]} <= {"ChecksumMismatch"}
        for answer in good:
            assert (cache / answer["path"] / BIG).read_bytes() == models[0][BIG]
        assert require_whole(cache) >= 1
        sent = sum(hub.sent_bytes(REPO).values())
        again = zygote.start()
        assert not again.died()
        assert again.ok.digest == good[0]["digest"]
        assert (kind, sum(hub.sent_bytes(REPO).values()) - sent) == (kind, 0) or len(good) < 3
    if kind == "locks":
        assert sent < len(models[0][BIG]) * 1.5


def test_a_view_that_was_never_published_goes_and_one_that_is_being_made_stays(hub: HubServer, tmp_path: Path) -> None:
    import os

    fetcher = Fetcher(hub.url, tmp_path / "cache", tmp_path / "jobs")
    for name, age in (("dead", 3600.0), ("alive", 1.0)):
        staging = fetcher.cache / f"artifacts/.tmp-{name}"
        staging.mkdir(parents=True)
        (staging / BIG).symlink_to("nowhere")
        os.utime(staging, (time.time() - age,) * 2)
    assert fetcher.run(REPO, type="BaseModel").ok
    assert [path.name for path in fetcher.cache.glob("artifacts/.tmp-*")] == [".tmp-alive"]
