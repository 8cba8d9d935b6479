"""Requests to a registry: manifests and blobs, with the registry's own token where it wants one.

Only the registry and what the cache allows beside it is asked, also for tokens; the login goes to the registry and to the token
service that it names itself, and to nobody else, whatever servers that it sends us to may ask for. No other place is looked at for a login.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

import httpx2

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.sources.http_client import PLAIN, Bearer, Client, new_transport, origin, unreachable

_DOCUMENT_BYTES: Final = 4 << 20
_PARAMETER: Final = re.compile(r'(\w+)="([^"]*)"')
MANIFESTS: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)


@dataclass
class OciRegistry(Client):
    """One repository of one registry."""

    base: str = ""  # <scheme>://<registry>/v2/<repository>
    repository: str = ""
    login: tuple[str, str] | None = None
    token: str | None = None
    basic: bool = False  # whether the registry asked for the login itself
    scheme: str = "oci"

    @classmethod
    def to(cls, home: str, repository: str, *, allowed: tuple[str, ...], login: tuple[str, str] | None) -> OciRegistry:
        """A client that sends nothing yet; `home` is the registry's origin."""
        return cls(
            allowed=frozenset(map(origin, allowed)),
            named=frozenset([origin(home)]),
            credentials=None if login is None else {},
            transport=new_transport(),
            base=f"{home}/v2/{repository}",
            repository=repository,
            login=login,
        )

    def blob(self, digest: str) -> str:
        """The address of a blob."""
        return f"{self.base}/blobs/{digest}"

    def document(self, url: str, *, accept: str = "application/json") -> bytes:
        """A manifest or the like, of a bounded size."""
        with self.get(url, {"Accept": accept}) as answer:
            return _bounded(answer, url)

    def manifest(self, reference: str) -> tuple[str, dict[str, Any]]:
        """A manifest by tag or digest, and its own digest."""
        url = f"{self.base}/manifests/{reference}"
        data = self.document(url, accept=", ".join((*MANIFESTS, *INDEXES)))
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if reference.startswith("sha256:") and digest != reference:
            raise ReasonError(
                Reason.CHECKSUM_MISMATCH,
                f"{text.clean(url, limit=400)} has the digest {digest}; it will be asked for again",
            )
        try:
            found = json.loads(data)
        except ValueError as error:
            raise unreachable(url, "it does not answer like a registry: that is no manifest") from error
        if not isinstance(found, dict):
            raise unreachable(url, "it does not answer like a registry: that is no manifest")
        return digest, found

    def auth(self, target: httpx2.URL) -> httpx2.Auth:
        if origin(str(target)) not in self.named:
            return httpx2.Auth()
        if self.token is not None:
            return Bearer(self.token)
        return httpx2.BasicAuth(*self.login) if self.login is not None and self.basic else httpx2.Auth()

    def challenged(self, url: str, answer: httpx2.Response) -> bool:
        """Gets the token that the registry asks for, with the login where there is one."""
        kind, _, rest = answer.headers.get("WWW-Authenticate", "").partition(" ")
        if kind.lower() == "basic":
            self.basic = True
            return self.login is not None
        asked = dict(_PARAMETER.findall(rest))
        realm = asked.get("realm", "")
        if kind.lower() != "bearer" or not realm.startswith(("https://", "http://")):
            return False
        query = {
            "scope": f"repository:{self.repository}:pull",
            **({"service": asked["service"]} if "service" in asked else {}),
        }
        self.require_allowed(url, realm)
        login = httpx2.BasicAuth(*self.login) if self.login is not None else httpx2.Auth()
        request = self.transport.build_request("GET", f"{realm}?{urlencode(query)}", headers=PLAIN)
        found = self.transport.send(request, stream=True, auth=login)
        try:
            if found.status_code in (401, 403):
                return False
            if found.status_code != 200:
                raise unreachable(realm, f"the registry's token service answered {found.status_code}")
            document = _bounded(found, realm)
        finally:
            found.close()
        try:
            given = json.loads(document)
            self.token = str(given.get("token") or given["access_token"])
        except (ValueError, KeyError, AttributeError) as error:
            raise unreachable(realm, "the registry's token service gave no token") from error
        text.protect(self.token)
        return True


def _bounded(answer: httpx2.Response, url: str) -> bytes:
    data = bytearray()
    for chunk in answer.iter_raw():  # as it is: what unpacks itself has no bound
        data += chunk
        if len(data) > _DOCUMENT_BYTES:
            raise unreachable(url, "its answer is too long")
    return bytes(data)


def login_of(document: str, registry: str) -> tuple[str, str]:
    """The login for a registry in a Docker configuration. Raises ReasonError."""
    try:
        entries: Mapping[str, Any] = json.loads(document)["auths"]
        for name, entry in entries.items():
            host = name.partition("://")[2] or name
            if host.partition("/")[0] == registry:
                user, _, password = (
                    base64.b64decode(entry["auth"]).decode().partition(":") if entry.get("auth") else ("", "", "")
                )
                user, password = user or str(entry["username"]), password or str(entry["password"])
                text.protect(password)
                text.protect(str(entry.get("auth", "")))
                return user, password
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReasonError(
            Reason.UNAUTHORIZED,
            f"the Secret's .dockerconfigjson can't be used ({type(error).__name__}); put a valid one into it",
        ) from error
    raise ReasonError(Reason.UNAUTHORIZED, f"the Secret's .dockerconfigjson has no login for {registry}; add one")
