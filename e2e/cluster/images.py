"""Container images without a registry: a pause image, a Debian base with Python, and the operator's own.

buildah makes them (chroot isolation: no user namespace needed) from a staging folder that holds nothing but the files
hashed into the image's name. Each function returns the path of a docker archive in the cache.
What the machine needs to reach a package index (pip's configuration, certificate authorities) enters a build only as a
secret mount: it is in no image.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from e2e.cluster import binaries, paths
from e2e.cluster.steps import ToolingError, run_logged, say, step

PAUSE_IMAGE = "lora-operator.test/pause:1"
BASE_IMAGE = "lora-operator.test/base:1"
_OPERATOR_REPOSITORY = "lora-operator.test/operator"
# libnuma1 is what vLLM for CPU links beside its own wheels.
_BASE_PACKAGES = "python3,python3-venv,ca-certificates,libnuma1"
_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")

# What the Dockerfile copies; a change of anything here, and of nothing else, makes another image.
_OPERATOR_FILES = (
    "Dockerfile",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "requirements/build.txt",
    "requirements/operator.txt",
    "operator/lora_operator",
)


@cache
def pause_image() -> Path:
    """The image of the container that holds a pod's namespaces."""
    program = binaries.pause()
    archive = paths.cache_dir("images") / f"{program.parent.name}.tar"
    if not archive.exists():
        with step("making the pause image"):
            config = ["--entrypoint", '["/pause"]', "--user", "65535:65535"]
            _image_from_files(PAUSE_IMAGE, archive, files=program, into="/pause", config=config)
    return archive


@cache
def base_image() -> Path:
    """Debian of this machine's release with its Python, which runs the engine's venv and is the operator's base here."""
    release = _debian_release()
    name = f"base-{release}-{paths.content_key(_BASE_PACKAGES, release)}"
    archive = paths.cache_dir("images") / f"{name}.tar"
    if not archive.exists():
        binaries.apt_packages()
        rootfs = paths.cache_dir("rootfs") / name
        with step(f"making a Debian {release} root with debootstrap"):
            shutil.rmtree(rootfs, ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", release, str(rootfs)]
            run_logged([*command, *_debian_mirror()], log=paths.cache_dir("logs") / "debootstrap.log")
            for waste in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
                shutil.rmtree(rootfs / waste, ignore_errors=True)
        with step("making the base image"):
            _image_from_files(BASE_IMAGE, archive, files=rootfs, into="/", config=["--env", "LANG=C.UTF-8"])
        shutil.rmtree(rootfs)
    return archive


@dataclass(frozen=True)
class Image:
    """An image: the name pods use, and the docker archive to import into the node."""

    name: str
    archive: Path


@cache
def operator_image(*, plugin_comment: str = "") -> Image:
    """The operator's image, built from the project's Dockerfile on the base image; its tag is the hash of what went into it.

    With `plugin_comment` it is that of a later operator: its engine plugin has one more line, and so another hash.
    """
    context = paths.cache_dir("build") / "operator"
    shutil.rmtree(context, ignore_errors=True)
    for name in _OPERATOR_FILES:
        _stage(paths.REPO / name, context / name)
    if plugin_comment:
        with (context / "operator" / "lora_operator" / "engine_plugin" / "clean_text.py").open("a") as file:
            file.write(f"# {plugin_comment}\n")
    base = base_image()
    key = paths.content_key(base.stem, context, relative_to=context)  # of the copy: the work tree may change meanwhile
    image = Image(f"{_OPERATOR_REPOSITORY}:{key}", paths.cache_dir("images") / f"operator-{key}.tar")
    if image.archive.exists():
        return image
    with step("building the operator's image from the Dockerfile"):
        logs = paths.cache_dir("logs")
        if not _has_image(BASE_IMAGE):
            run_logged(_buildah("pull", f"docker-archive:{base}"), log=logs / "buildah-pull.log", env=_ENV)
        run_logged(
            _buildah(
                *("build", "--layers", "--network=host", "--pull=never", "--build-arg", f"BASE_IMAGE={BASE_IMAGE}"),
                *(*_index_secrets(), "--tag", image.name, str(context)),
            ),
            log=logs / "build-operator.log",
            env=_ENV,
        )
        _save(image.name, image.archive)
        _forget_older(image.archive.parent)
    return image


_ENV = {"BUILDAH_ISOLATION": "chroot", "TMPDIR": "/var/tmp"}


def _buildah(*words: str | Path) -> list[str | Path]:
    storage = paths.cache_dir("buildah")
    driver = "overlay" if paths.overlay_works() else "vfs"
    return ["buildah", f"--storage-driver={driver}", "--root", storage / "root", "--runroot", storage / "run", *words]


def _has_image(name: str) -> bool:
    command = [str(word) for word in _buildah("inspect", "--type", "image", name)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **_ENV}, check=False).returncode == 0


def _image_from_files(image: str, archive: Path, *, files: Path, into: str, config: list[str]) -> None:
    """One layer: `files` (a file, or a folder's content) copied to the path `into`."""
    log = paths.cache_dir("logs") / f"image-{archive.stem}.log"
    created = subprocess.run(
        [str(word) for word in _buildah("from", "scratch")],
        capture_output=True,
        text=True,
        env={**os.environ, **_ENV},
        check=False,
    )
    if created.returncode:
        raise ToolingError(f"`buildah from scratch` failed: {created.stderr.strip()}")
    container = created.stdout.strip()
    try:
        run_logged(_buildah("copy", "--quiet", container, files, into), log=log, env=_ENV)
        run_logged(_buildah("config", *config, container), log=log, env=_ENV)
        run_logged(_buildah("commit", "--quiet", "--rm", container, image), log=log, env=_ENV)
        _save(image, archive)
    except ToolingError:
        subprocess.run([str(word) for word in _buildah("rm", container)], capture_output=True, check=False)
        raise


def _save(image: str, archive: Path) -> None:
    unfinished = archive.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    log = paths.cache_dir("logs") / f"save-{archive.stem}.log"
    run_logged(_buildah("push", "--quiet", image, f"docker-archive:{unfinished}:{image}"), log=log, env=_ENV)
    unfinished.rename(archive)


def _forget_older(folder: Path) -> None:
    """Remove all but the five newest of the operator's images: each change of its code makes one."""
    archives = sorted(folder.glob("operator-*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
    for archive in archives[5:]:
        say(f"forgetting {archive.name}")
        archive.unlink()
        name = f"{_OPERATOR_REPOSITORY}:{archive.stem.removeprefix('operator-')}"
        subprocess.run([str(word) for word in _buildah("rmi", name)], capture_output=True, check=False, timeout=120)


def _stage(source: Path, target: Path) -> None:
    if not source.exists():
        raise ToolingError(f"the operator's image needs {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy2(source, target)


def _index_secrets() -> list[str]:
    """Build-time secrets with this machine's way to the package index: pip's settings and the trusted authorities."""
    folder = paths.cache_dir("build")
    lines = ["[global]", "disable-pip-version-check = true"]
    if index := os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX"):
        lines.append(f"index-url = {index}")
    bundle = Path(os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or _CA_BUNDLE)
    secrets = []
    if bundle.exists():
        lines.append("cert = /run/secrets/ca.crt")
        secrets += ["--secret", f"id=ca.crt,src={bundle}"]
    settings = folder / "pip.conf"
    settings.write_text("\n".join(lines) + "\n")
    settings.chmod(0o600)
    return [*secrets, "--secret", f"id=pip.conf,src={settings}"]


def _debian_release() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise ToolingError("/etc/os-release names no Debian release (VERSION_CODENAME)")


def _debian_mirror() -> list[str]:
    """The mirror that this machine's own apt uses for Debian, as an argument; none where debootstrap's default has to do."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for file in files:
        if not file.is_file():
            continue
        for line in file.read_text(errors="replace").splitlines():
            for word in line.partition("#")[0].split():
                if word.startswith(("http://", "https://")) and word.rstrip("/").endswith("/debian"):
                    return [word]
    return []
