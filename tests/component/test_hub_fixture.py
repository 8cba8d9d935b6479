"""The Hub fixture against the unmodified huggingface_hub: if these fail, nothing that is tested with the fixture says anything."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import (
    HfApi,
    close_session,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFolder
from huggingface_hub.utils.tqdm import disable_progress_bars

from e2e.fixtures.hub import HubServer, load

REPO, PRIVATE, GATED = "org/open", "org/secret", "org/gated"
FILES = {
    "README.md": b"# tiny\n",
    "adapter_config.json": b'{"r": 8}\n',
    "adapter_model.safetensors": bytes(range(256)) * 1024,  # 256 KiB, in LFS
    "checkpoint-5/adapter_config.json": b'{"r": 16}\n',
}
WEIGHTS = "adapter_model.safetensors"
RIGHT, POOR, WRONG = "hf_right", "hf_poor", "hf_wrong"


@pytest.fixture(name="hub")
def _hub() -> Iterator[HubServer]:
    disable_progress_bars()
    with HubServer() as server:
        for name in (REPO, PRIVATE, GATED):
            server.create_repo(name, private=name == PRIVATE, gated=name == GATED)
            server.commit(name, FILES)
        server.add_token(RIGHT, repos=[PRIVATE, GATED])
        server.add_token(POOR)
        yield server
    close_session()


def _api(hub: HubServer, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def _snapshot(hub: HubServer, cache: Path, repo: str = REPO, *, token: str | bool = False) -> Path:
    return Path(snapshot_download(repo, endpoint=hub.url, token=token, cache_dir=cache))


def _head(hub: HubServer, repo: str, path: str = "README.md", *, token: str | bool = False) -> None:
    get_hf_file_metadata(hf_hub_url(repo, path, endpoint=hub.url), token=token, endpoint=hub.url)


Call = Callable[[HubServer], object]
REFUSALS: dict[str, tuple[Call, type[HfHubHTTPError], int]] = {
    "an unknown repository without a token": (lambda hub: _api(hub).auth_check("org/no"), RepositoryNotFoundError, 401),
    "an unknown organisation, by file": (lambda hub: _head(hub, "no/no"), RepositoryNotFoundError, 401),
    "an unknown repository with a token": (
        lambda hub: _api(hub, POOR).auth_check("org/no"),
        RepositoryNotFoundError,
        404,
    ),
    "a private repository without a token": (
        lambda hub: _api(hub).auth_check(PRIVATE),
        RepositoryNotFoundError,
        401,
    ),
    "a private repository's info without a token": (
        lambda hub: _api(hub).model_info(PRIVATE),
        RepositoryNotFoundError,
        401,
    ),
    "a private repository's file without a token": (lambda hub: _head(hub, PRIVATE), RepositoryNotFoundError, 401),
    "a private repository with a token that does not open it": (
        lambda hub: _api(hub, POOR).model_info(PRIVATE),
        RepositoryNotFoundError,
        404,
    ),
    "a private repository with an invalid token": (
        lambda hub: _api(hub, WRONG).auth_check(PRIVATE),
        HfHubHTTPError,
        401,
    ),
    "a public repository with an invalid token": (lambda hub: _head(hub, REPO, token=WRONG), HfHubHTTPError, 401),
    "a gated repository's auth check without a token": (
        lambda hub: _api(hub).auth_check(GATED),
        GatedRepoError,
        401,
    ),
    "a gated repository's file without a token": (lambda hub: _head(hub, GATED), GatedRepoError, 401),
    "a gated repository's file without access": (lambda hub: _head(hub, GATED, token=POOR), GatedRepoError, 403),
    "an unknown branch": (lambda hub: _api(hub).model_info(REPO, revision="no"), RevisionNotFoundError, 404),
    "an unknown full commit": (
        lambda hub: _api(hub).model_info(REPO, revision="0" * 40),
        RevisionNotFoundError,
        404,
    ),
    "an abbreviated commit": (
        lambda hub: _api(hub).model_info(REPO, revision=hub.head(REPO)[:8]),
        RevisionNotFoundError,
        404,
    ),
    "an unknown file": (lambda hub: _head(hub, REPO, "no.json"), RemoteEntryNotFoundError, 404),
    "an unknown folder": (lambda hub: list(_api(hub).list_repo_tree(REPO, "no")), RemoteEntryNotFoundError, 404),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_each_refusal_is_the_exception_that_the_real_hub_leads_to(hub: HubServer, case: str) -> None:
    call, expected, status = REFUSALS[case]
    with pytest.raises(HfHubHTTPError) as caught:
        call(hub)
    assert type(caught.value) is expected
    assert caught.value.response.status_code == status


def test_an_invalid_token_is_told_from_a_missing_one(hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        _api(hub, WRONG).model_info(REPO)
    with pytest.raises(RepositoryNotFoundError, match="Invalid username or password"):
        _api(hub).model_info(PRIVATE)


def test_without_the_error_code_the_wire_is_the_real_one_and_the_client_only_has_the_status() -> None:
    with HubServer(code_for_anonymous=False) as bare:
        with pytest.raises(HfHubHTTPError) as caught:
            _api(bare).model_info("org/no")
        assert caught.value.response.status_code == 401
        assert "X-Error-Code" not in caught.value.response.headers
    close_session()


def test_the_right_token_opens_private_and_gated_repositories(hub: HubServer, tmp_path: Path) -> None:
    for repo in (PRIVATE, GATED):
        _api(hub, RIGHT).auth_check(repo)
        assert _snapshot(hub, tmp_path, repo, token=RIGHT).joinpath(WEIGHTS).read_bytes() == FILES[WEIGHTS]
    hub.remove_token(RIGHT)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        _api(hub, RIGHT).auth_check(PRIVATE)


def test_the_info_of_a_gated_repository_is_public(hub: HubServer) -> None:
    info = _api(hub).model_info(GATED)
    assert (info.gated, info.private, info.sha) == ("manual", False, hub.head(GATED))
    assert WEIGHTS in _api(hub).list_repo_files(GATED)


def test_hashes_are_those_of_git_and_lfs(hub: HubServer) -> None:
    sha256 = hashlib.sha256(FILES[WEIGHTS]).hexdigest()
    blob = hashlib.sha1(b"blob %d\0" % len(FILES["README.md"]) + FILES["README.md"]).hexdigest()
    siblings = {one.rfilename: one for one in _api(hub).model_info(REPO, files_metadata=True).siblings or ()}
    tree = {one.path: one for one in _api(hub).list_repo_tree(REPO, recursive=True, expand=True)}
    lfs = siblings[WEIGHTS].lfs
    assert lfs is not None
    assert (lfs.sha256, lfs.size) == (sha256, len(FILES[WEIGHTS]))
    assert (siblings["README.md"].blob_id, siblings["README.md"].lfs) == (blob, None)
    assert set(siblings) == set(FILES)
    assert set(tree) == {*FILES, "checkpoint-5"}
    metadata = get_hf_file_metadata(hf_hub_url(REPO, WEIGHTS, endpoint=hub.url), token=False, endpoint=hub.url)
    assert (metadata.etag, metadata.size, metadata.commit_hash) == (sha256, len(FILES[WEIGHTS]), hub.head(REPO))
    assert "/cdn/" in metadata.location
    plain = get_hf_file_metadata(hf_hub_url(REPO, "README.md", endpoint=hub.url), token=False, endpoint=hub.url)
    assert (plain.etag, plain.size) == (blob, len(FILES["README.md"]))


def test_a_folder_has_gits_tree_id(hub: HubServer) -> None:
    blob = hashlib.sha1(b"blob 10\0" + FILES["checkpoint-5/adapter_config.json"]).digest()
    entry = b"100644 adapter_config.json\0" + blob
    (folder,) = (one for one in _api(hub).list_repo_tree(REPO) if isinstance(one, RepoFolder))
    assert (folder.path, folder.tree_id) == (
        "checkpoint-5",
        hashlib.sha1(b"tree %d\0" % len(entry) + entry).hexdigest(),
    )


def test_branches_tags_and_commits_name_immutable_trees(hub: HubServer, tmp_path: Path) -> None:
    first = hub.head(REPO)
    second = hub.commit(REPO, {"README.md": b"new\n"})
    side = hub.commit(REPO, {"README.md": b"side\n"}, branch="dev/x")
    hub.tag(REPO, "v1", first)
    api = _api(hub)
    revisions = {name: api.model_info(REPO, revision=name).sha for name in ("main", "dev/x", "v1", first)}
    assert revisions == {"main": second, "dev/x": side, "v1": first, first: first}
    assert len({first, second, side}) == 3
    refs = api.list_repo_refs(REPO)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": second, "dev/x": side}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    old = hf_hub_download(REPO, "README.md", revision="v1", endpoint=hub.url, token=False, cache_dir=tmp_path)
    assert Path(old).read_bytes() == FILES["README.md"]


def test_a_snapshot_has_the_exact_bytes_and_a_second_one_gets_no_body(hub: HubServer, tmp_path: Path) -> None:
    snapshot = _snapshot(hub, tmp_path)
    assert {path: (snapshot / path).read_bytes() for path in FILES} == FILES
    assert hub.downloads(REPO) == dict.fromkeys(FILES, 1)
    assert hub.sent_bytes(REPO) == {path: len(content) for path, content in FILES.items()}
    hub.reset_counters()
    assert _snapshot(hub, tmp_path) == snapshot
    assert hub.downloads(REPO) == {}
    assert {method for method, path, _ in hub.requests(REPO) if "/api/" not in path} <= {"HEAD"}


def test_requests_for_what_does_not_exist_are_counted_too(hub: HubServer) -> None:
    with pytest.raises(RepositoryNotFoundError):
        _api(hub, POOR).auth_check("org/no")
    assert hub.requests("org/no") == [("GET", "/api/models/org/no/auth-check", 404)]


def test_long_listings_come_in_pages(tmp_path: Path) -> None:
    with HubServer(page_size=2) as hub:
        hub.create_repo(REPO)
        hub.commit(REPO, FILES)
        assert set(_api(hub).list_repo_files(REPO)) == set(FILES)
        assert sum("/tree/" in path for _, path, _ in hub.requests(REPO)) == 3
    close_session()


def test_a_cut_download_resumes_with_a_range(hub: HubServer, tmp_path: Path) -> None:
    mib = 1024 * 1024
    content = random.Random(1).randbytes(12 * mib)  # the client keeps what it has in pieces of 10 MiB
    hub.commit(REPO, {WEIGHTS: content})
    hub.cut(REPO, WEIGHTS, after_bytes=11 * mib)
    assert _snapshot(hub, tmp_path).joinpath(WEIGHTS).read_bytes() == content
    bodies = [status for method, path, status in hub.requests(REPO) if method == "GET" and "/cdn/" in path]
    assert bodies == [200, 206]
    assert hub.downloads(REPO)[WEIGHTS] == 2
    assert hub.sent_bytes(REPO)[WEIGHTS] == (11 + 2) * mib


def test_the_cdn_wants_its_signature_and_not_the_token(hub: HubServer) -> None:
    location = get_hf_file_metadata(
        hf_hub_url(PRIVATE, WEIGHTS, endpoint=hub.url), token=RIGHT, endpoint=hub.url
    ).location
    assert not location.startswith(hub.url)
    with urllib.request.urlopen(location) as answer:
        assert answer.read() == FILES[WEIGHTS]
    for url, headers in (
        (location.partition("?")[0], {}),
        (location[:-1] + ("0" if location[-1] != "0" else "1"), {}),
        (location, {"Authorization": f"Bearer {RIGHT}"}),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(url, headers=headers))
        assert caught.value.code in (400, 403)
        caught.value.close()


RANGES = {
    "bytes=0-9": (206, FILES[WEIGHTS][:10]),
    "bytes=100-": (206, FILES[WEIGHTS][100:]),
    "bytes=-7": (206, FILES[WEIGHTS][-7:]),
    "bytes=262144-": (416, None),
}


@pytest.mark.parametrize("asked", RANGES)
def test_ranges_are_answered_exactly(hub: HubServer, asked: str) -> None:
    status, content = RANGES[asked]
    url = get_hf_file_metadata(hf_hub_url(REPO, WEIGHTS, endpoint=hub.url), token=False, endpoint=hub.url).location
    request = urllib.request.Request(url, headers={"Range": asked})
    if content is None:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == status
        caught.value.close()
    else:
        with urllib.request.urlopen(request) as answer:
            assert (answer.status, answer.read()) == (status, content)


def test_faults_of_the_api_and_of_files_are_switched_apart(hub: HubServer, tmp_path: Path) -> None:
    hub.fail(REPO, "api/info", status=503, times=1)
    with pytest.raises(HfHubHTTPError) as caught:
        _api(hub).model_info(REPO)
    assert caught.value.response.status_code == 503
    assert _api(hub).model_info(REPO).sha == hub.head(REPO)
    hub.fail(REPO, "*.safetensors", method="GET")
    with pytest.raises(HfHubHTTPError) as caught:
        hf_hub_download(REPO, WEIGHTS, endpoint=hub.url, token=False, cache_dir=tmp_path)
    assert caught.value.response.status_code == 500
    assert hf_hub_download(REPO, "README.md", endpoint=hub.url, token=False, cache_dir=tmp_path)
    hub.clear_faults()
    assert hf_hub_download(REPO, WEIGHTS, endpoint=hub.url, token=False, cache_dir=tmp_path)


def test_a_rate_limit_is_an_ordinary_status(hub: HubServer) -> None:
    hub.fail(REPO, "*", status=429)
    with pytest.raises(HfHubHTTPError) as caught:
        _api(hub).model_info(REPO)
    assert caught.value.response.status_code == 429


def test_a_throttle_is_shared_by_all_that_download(hub: HubServer, tmp_path: Path) -> None:
    rate = 256 * 1024
    hub.throttle(rate, REPO)
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_snapshot, hub, tmp_path / str(index)) for index in range(2)]
        assert all(job.result().exists() for job in jobs)
    seconds = time.monotonic() - started
    wanted = 2 * len(FILES[WEIGHTS]) / rate
    assert wanted / 2 < seconds < wanted * 2
    hub.throttle(None, REPO)
    started = time.monotonic()
    _snapshot(hub, tmp_path / "fast")
    assert time.monotonic() - started < wanted / 2


def test_a_stalled_body_hangs_until_it_is_released_and_others_go_on(hub: HubServer, tmp_path: Path) -> None:
    hub.stall(REPO, WEIGHTS)
    done: list[Path] = []
    hung = threading.Thread(target=lambda: done.append(_snapshot(hub, tmp_path / "hung")))
    hung.start()
    _wait_until(lambda: hub.stalled == 1)
    assert _snapshot(hub, tmp_path / "other", GATED, token=RIGHT).exists()
    assert done == []
    hub.release()
    hung.join(10)
    assert done[0].joinpath(WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert hub.stalled == 0


def test_it_stops_while_a_body_hangs(tmp_path: Path) -> None:
    hub = HubServer().start()
    hub.create_repo(REPO)
    hub.commit(REPO, FILES)
    hub.stall(REPO, "README.md")
    with urllib.request.urlopen(f"{hub.url}/{REPO}/resolve/main/README.md") as answer:
        _wait_until(lambda: hub.stalled == 1)
        started = time.monotonic()
        hub.stop()
        assert time.monotonic() - started < 30
        assert answer.status == 200


def test_a_taken_port_is_an_error(hub: HubServer) -> None:
    port = int(hub.url.rsplit(":", 1)[1])
    with pytest.raises(OSError, match="in use"):
        HubServer(port=port).start()


def test_a_folder_of_repositories_is_loaded_and_served_by_the_command(tmp_path: Path) -> None:
    for name in ("one", "two"):
        tmp_path.joinpath("team", name).mkdir(parents=True)
        tmp_path.joinpath("team", name, "README.md").write_text(name)
    settings = {"private": ["team/two"], "tokens": {"hf_a": ["team/two"], "hf_b": None}}
    tmp_path.joinpath("hub.json").write_text(json.dumps(settings))
    with HubServer() as server:
        load(server, tmp_path)
        assert _api(server).list_repo_files("team/one") == ["README.md"]
        assert _api(server, "hf_a").model_info("team/two").private
        with pytest.raises(RepositoryNotFoundError):
            _api(server, "hf_b").model_info("team/two")
    command = [sys.executable, "-m", "e2e.fixtures.hub", "--load", str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert HfApi(endpoint=url, token=False).list_repo_files("team/one") == ["README.md"]
        process.terminate()
        assert process.wait(10) == 0
    close_session()


def _wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.01)
