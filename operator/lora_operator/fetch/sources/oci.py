"""OCI artifacts and images as a source. Imports httpx2, so `environment.prepare` comes first.

A tag is resolved to the digest of its manifest, and everything after it is of that digest. A layer with a title is a file of that name;
one that is a tar archive is extracted, later ones over earlier ones, as an image's layers are. Every blob has the digest that the
manifest declares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment, text
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.progress import Reporter
from lora_operator.fetch.sources import unpack
from lora_operator.fetch.sources.archives import Packed, PackedStore, collecting
from lora_operator.fetch.sources.base import FilteredSource
from lora_operator.fetch.sources.http_client import translate, unreachable
from lora_operator.fetch.sources.object_place import ObjectPlace, blob_name
from lora_operator.fetch.sources.object_store import ObjectStore, translated
from lora_operator.fetch.sources.oci_registry import INDEXES, OciRegistry, login_of
from lora_operator.fetch.volume import layout
from lora_operator.wire.jobs import FetchRequest, OciRequest

FOLDER: Final = "oci"
_PROBES: Final = 8  # at once
_MAX_LAYERS: Final = 2000
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_TITLE: Final = "org.opencontainers.image.title"
_UNPACK: Final = "io.deis.oras.content.unpack"  # ORAS's mark on a folder that was packed
_TAR: Final = re.compile(r".*[.+/-]tar([.+-]gzip)?")
_WHITEOUT: Final = ".wh."
_OPAQUE: Final = ".wh..wh..opq"


@dataclass(frozen=True)
class Layer:
    """One blob of the manifest: a file of the name `title`, or an archive where that is empty."""

    digest: str
    size: int
    title: str

    @property
    def sha256(self) -> str:
        """The digest without its algorithm, in hex."""
        return self.digest.partition(":")[2]


@dataclass
class OciSource(FilteredSource):
    """One artifact or image, at the digest that its tag had when it was asked for."""

    request: OciRequest
    job: FetchRequest
    registry: OciRegistry
    title_: str
    reference: str  # tag or digest
    unfit: Reason  # of one that can't be used
    layers: tuple[Layer, ...] = ()
    files: dict[str, RemoteFile] = field(default_factory=dict)
    packed: dict[str, tuple[Packed, str]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # by the path of a file, or of an archive
    place: ObjectPlace = field(default_factory=lambda: ObjectPlace(Path()))

    @classmethod
    def open(cls, oci: OciRequest, job: FetchRequest) -> OciSource:
        """The artifact as the Job's login, or nobody, sees it; sends nothing. Raises ReasonError for an unusable login."""
        host, _, rest = oci.reference.partition("/")
        named, _, digest = rest.partition("@")
        repository, _, tag = named.partition(":")
        keys = environment.read_keys(job)
        home = next((one for one in oci.allowed_endpoints if one.partition("://")[2] == host), f"https://{host}")
        login = login_of(keys[".dockerconfigjson"], host) if keys is not None else None
        registry = OciRegistry.to(home, repository, allowed=oci.allowed_endpoints, login=login)
        unfit = Reason.INVALID_ADAPTER if job.type == "Adapter" else Reason.INCOMPLETE_MODEL
        return cls(oci, job, registry, f"oci://{host}/{repository}", digest or tag or "latest", unfit)

    @property
    def title(self) -> str:
        return self.title_

    @property
    def folder(self) -> str:
        return FOLDER

    def authorise(self) -> str:
        with translated(self):
            digest, manifest = self.registry.manifest(self.reference)
            if manifest.get("mediaType") in INDEXES or "manifests" in manifest:
                digest, manifest = self.registry.manifest(self._first(manifest))
            self.layers = self._layers(manifest)
        return digest

    @contextmanager
    def collected(self, root: Path, reporter: Reporter) -> Iterator[None]:
        layout.prepare(root, self.folder)
        self.place = ObjectPlace.of(root, FOLDER, name=self.title.rpartition("/")[2], identity=(self.registry.base,))
        with translated(self):
            self.place.prepare()
        archives = [self._archive(layer, root) for layer in self.layers if not layer.title]
        with collecting(self.job, self.place, archives):
            waiting = iter(archives)
            left = self.request.max_bytes
            for layer in self.layers:
                if layer.title:
                    self._add_file(layer)
                    continue
                archive = next(waiting)
                names = archive.names(reporter)
                left -= sum(names.values())
                if left < 0:
                    raise ReasonError(
                        self.unfit,
                        f"{self.title}'s layers hold more than the {text.size(self.request.max_bytes)} of maxSize; raise it if that is right",
                    )
                self._add_archive(archive, names)
            yield

    def listing(self) -> Sequence[RemoteFile]:
        return list(self.files.values())

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """A byte of every blob: registries may keep blobs of one repository from readers of another."""
        wanted = {self.digests[file.path] for file in files if file.path in self.digests}
        wanted |= {f"sha256:{self.packed[file.path][0].archive.sha256}" for file in files if file.path in self.packed}
        with ThreadPoolExecutor(_PROBES, thread_name_prefix="authorise") as pool, translated(self):
            for _ in pool.map(lambda digest: self.registry.probe(self.registry.blob(digest)), wanted):
                pass

    def open_store(self, root: Path) -> PackedStore:
        return PackedStore(ObjectStore(self, self.place, self.workers), self.packed)

    def stalled(self, seconds: float) -> ReasonError:
        return unreachable(self.title, f"nothing arrived for {seconds:.0f} s; what was downloaded is kept")

    def chunks(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        return self.registry.read(self.registry.blob(f"sha256:{file.sha256}"), start, "")

    def translate(self, error: Exception) -> ReasonError:
        if isinstance(error, unpack.UnfitError):
            return ReasonError(self.unfit, text.clean(f"a layer of {self.title} {error}"))
        return translate(error, self.title)

    def confirm(self) -> None:
        """Nothing to compare: everything was read by digest."""

    def _first(self, index: dict[str, Any]) -> str:
        """The manifest of an index that holds content: what is in it is the same for every platform."""
        for entry in index.get("manifests") or ():
            if isinstance(entry, dict) and _DIGEST.fullmatch(str(entry.get("digest"))):
                platform = entry.get("platform") or {}
                if platform.get("os") != "unknown":  # as the attestations beside an image have it
                    return str(entry["digest"])
        raise ReasonError(self.unfit, f"{self.title}:{self.reference} is an index without a manifest")

    def _layers(self, manifest: dict[str, Any]) -> tuple[Layer, ...]:
        found = []
        for entry in manifest.get("layers") or ():
            digest, size = str(entry.get("digest")), entry.get("size")
            if not _DIGEST.fullmatch(digest) or not isinstance(size, int) or size < 0:
                raise unreachable(self.title, "its manifest has no usable digests (sha256) or sizes")
            notes = entry.get("annotations") or {}
            kind = str(entry.get("mediaType"))
            title = "" if notes.get(_UNPACK) == "true" else str(notes.get(_TITLE) or "")
            if not title and not _TAR.fullmatch(kind) and notes.get(_UNPACK) != "true":
                raise ReasonError(
                    self.unfit,
                    f"a layer of {self.title} is of type {text.clean(kind, limit=100)} and has no title: only files with a title "
                    f"({_TITLE}) and tar archives, plain or by gzip, can be read",
                )
            found.append(Layer(digest, size, title))
        if not found or len(found) > _MAX_LAYERS:
            raise ReasonError(self.unfit, f"{self.title} has {len(found)} layers; it must have 1 to {_MAX_LAYERS}")
        return tuple(found)

    def _archive(self, layer: Layer, root: Path) -> Packed:
        # Each has a key of its own: under one they would count as versions of each other, of which the older ones go.
        stored = blob_name(f"{self.registry.base}\0{layer.digest}", layer.digest, layer.size)
        archive = RemoteFile(layer.digest, layer.size, sha256=layer.sha256, stored_as=stored)
        return Packed(
            self,
            self.place,
            archive,
            key=self.registry.base,
            limit=self.request.max_bytes,
            root=root,
            limits=self.job.limits,
        )

    def _add_file(self, layer: Layer) -> None:
        name = layer.title.removeprefix("./")
        stored = blob_name(f"{self.registry.base}\0{name}", layer.digest, layer.size)
        self.files[name] = RemoteFile(name, layer.size, sha256=layer.sha256, stored_as=stored)
        self.digests[name] = layer.digest
        self.packed.pop(name, None)

    def _add_archive(self, archive: Packed, names: dict[str, int]) -> None:
        for name in names:
            folder, _, last = name.rpartition("/")
            inside = f"{folder}/" if folder else ""
            if last == _OPAQUE:
                self._hide(inside)
            elif last.startswith(_WHITEOUT):
                self._hide(inside + last.removeprefix(_WHITEOUT))
        for name, size in names.items():
            if not name.rpartition("/")[2].startswith(_WHITEOUT):
                self.files[name] = archive.member(name, size)
                self.packed[name] = (archive, name)
                self.digests.pop(name, None)

    def _hide(self, path: str) -> None:
        """Removes what earlier layers had at a path, or below it."""
        below = path if path.endswith("/") or not path else f"{path}/"
        for name in [name for name in self.files if name == path or name.startswith(below)]:
            for known in (self.files, self.packed, self.digests):
                known.pop(name, None)
