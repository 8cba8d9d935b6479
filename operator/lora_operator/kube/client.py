"""Talks to the Kubernetes API: the only importer of its client. Raw objects in and out, every call has a time-out.

Whatever goes wrong is translated here, once, into errors.KubeError and its subclasses. Nothing is retried here: the work queue
does that. Nothing is cached here: the store does that.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config as client_config
from kubernetes.aio.client import ApiClient, ApiException, Configuration

from lora_operator.constants import FIELD_MANAGER
from lora_operator.errors import ConflictError, KubeError, NotFoundError, UnavailableError
from lora_operator.kube.answers import Body, build_event, parsed, refusal
from lora_operator.kube.kinds import (
    EVENTS,
    PODS,
    ResourceType,
    type_of,
)
from lora_operator.kube.watch_lines import Lines, drop_items

log = logging.getLogger(__name__)

REQUEST_TIMEOUT: Final = 15.0
CONNECTIONS: Final = 64
PAGE: Final = 50  # objects, of a megabyte each at most
STATUS_ATTEMPTS: Final = 3
MAX_LOG_BYTES: Final = 2**20
SERVICE_ACCOUNT_TOKEN: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

_JSON: Final = "application/json"
_METADATA_ONLY: Final = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_APPLY: Final = "application/apply-patch+yaml"  # JSON is YAML
_MERGE: Final = "application/merge-patch+json"


async def load_configuration(kubeconfig: str | None = None) -> Configuration:
    """Where the API server is and who we are: the pod's service account, else the kubeconfig (argument, or $KUBECONFIG).

    In a pod the address comes from KUBERNETES_SERVICE_HOST and _PORT, and the token is read again every minute.
    """
    configuration = Configuration(connection_pool_maxsize=CONNECTIONS)
    # Chain and name are verified; RFC 5280 strictness (Python 3.13) is not asked for: many clusters' CAs lack an extension.
    configuration.disable_strict_ssl_verification = True
    configuration.client_session_kwargs = {"trust_env": False}
    try:
        if kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST") and SERVICE_ACCOUNT_TOKEN.exists():
            client_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            await client_config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=kubeconfig, client_configuration=configuration
            )
    except (client_config.ConfigException, OSError) as error:
        raise KubeError(f"no way to the Kubernetes API: {error}") from error
    return configuration


class Kube:
    """The API server. Use it in `async with`; all methods raise errors.KubeError subclasses, `event` raises nothing."""

    def __init__(self, configuration: Configuration | None = None, *, request_timeout: float = REQUEST_TIMEOUT) -> None:
        self._configuration = configuration
        self._request_timeout = request_timeout
        self._client: ApiClient | None = None

    async def __aenter__(self) -> Self:
        if self._configuration is None:
            self._configuration = await load_configuration()
        self._client = ApiClient(self._configuration)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections; the end of the `async with` block does it too."""
        if self._client is not None:
            await self._client.close()  # type: ignore[no-untyped-call]

    # Reading

    async def list(
        self,
        rt: ResourceType,
        *,
        namespace: str | None = None,
        label_selector: str | None = None,
        field_selector: str | None = None,
    ) -> tuple[builtins.list[Body], str]:
        """All objects of a type, and the list's resourceVersion."""
        items: builtins.list[Body] = []
        version = ""
        pages = self.pages(rt, namespace=namespace, label_selector=label_selector, field_selector=field_selector)
        async for page, version in pages:  # noqa: B007  the last one's
            items += page
        return items, version

    async def pages(
        self,
        rt: ResourceType,
        *,
        namespace: str | None = None,
        label_selector: str | None = None,
        field_selector: str | None = None,
        metadata_only: bool = False,
    ) -> AsyncIterator[tuple[builtins.list[Body], str]]:
        """The objects of a type page by page, each with the list's resourceVersion; all are of one moment.

        A page has PAGE objects at most, and REQUEST_TIMEOUT for itself. `metadata_only`: the API server leaves out all else.
        """
        selectors = {"labelSelector": label_selector, "fieldSelector": field_selector}
        query = {"limit": str(PAGE), **{name: value for name, value in selectors.items() if value}}
        what, accept = f"list {rt.plural}", _METADATA_LIST if metadata_only else _JSON
        while True:
            chunk = await self._json(what, "GET", rt.path(namespace), query=query, accept=accept)
            about = {"apiVersion": rt.api_version, "kind": rt.kind}
            metadata = chunk.get("metadata") or {}
            yield [{**item, **about} for item in chunk.get("items") or ()], metadata.get("resourceVersion") or ""
            if not metadata.get("continue"):
                return
            query["continue"] = metadata["continue"]

    async def get(self, rt: ResourceType, namespace: str, name: str) -> Body:
        """One object as it is now; raises NotFoundError."""
        return await self._json(_what("get", rt, namespace, name), "GET", rt.path(namespace, name))

    async def get_metadata(self, rt: ResourceType, namespace: str, name: str) -> Body:
        """One object's metadata (as PartialObjectMetadata); the API server does not send the rest."""
        what = _what("get metadata of", rt, namespace, name)
        return await self._json(what, "GET", rt.path(namespace, name), accept=_METADATA_ONLY)

    async def pod_log(
        self, namespace: str, name: str, *, container: str, tail_lines: int, previous: bool = False
    ) -> str:
        """The last lines of a container's log, of its previous run with `previous`; at most 1 MiB."""
        query = {"container": container, "tailLines": str(tail_lines), "limitBytes": str(MAX_LOG_BYTES)}
        if previous:
            query["previous"] = "true"
        what = _what("read log of", PODS, namespace, name)
        answer = await self._request(what, "GET", PODS.path(namespace, name, "log"), query=query, accept="*/*")
        return answer.decode(errors="replace")

    # Writing

    async def apply(self, obj: Mapping[str, Any], *, dry_run: bool = False) -> Body:
        """Server-side apply of the fields in `obj` as ours, over whoever holds them; fields that we had and left out go."""
        rt, namespace, name = _identity(obj)
        query = {
            "fieldManager": FIELD_MANAGER,
            "force": "true",
            **({"dryRun": "All"} if dry_run else {}),
        }
        what = _what("apply (dry run)" if dry_run else "apply", rt, namespace, name)
        return await self._json(what, "PATCH", rt.path(namespace, name), query=query, body=obj, content=_APPLY)

    async def apply_status(
        self,
        rt: ResourceType,
        namespace: str,
        name: str,
        status: Mapping[str, Any],
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> Body:
        """Server-side apply of the whole status; raises NotFoundError (an object is never made by it), and with `uid`
        ConflictError when another object has the name by now, or the object changes too often to be sure.

        `resource_version` is one that the object of that uid had: as long as it is current, it saves a request.
        """
        if uid is None:
            return await self._apply_status(rt, namespace, name, status)
        if resource_version:
            try:
                return await self._apply_status(rt, namespace, name, status, resource_version)
            except ConflictError:
                pass  # the object changed, or it is another one
        # The API server ignores a uid in a custom resource's status (tried with 1.34); a resourceVersion it does check.
        for attempts_left in reversed(range(STATUS_ATTEMPTS)):
            metadata = (await self.get_metadata(rt, namespace, name))["metadata"]
            if metadata["uid"] != uid:
                raise ConflictError(
                    f"{_what('apply status of', rt, namespace, name)}: another object has this name now"
                )
            try:
                return await self._apply_status(rt, namespace, name, status, metadata["resourceVersion"])
            except ConflictError:
                if not attempts_left:
                    raise
        raise AssertionError("unreachable")

    async def _apply_status(
        self, rt: ResourceType, namespace: str, name: str, status: Mapping[str, Any], resource_version: str = ""
    ) -> Body:
        metadata = {"name": name, "namespace": namespace, "resourceVersion": resource_version}
        body = {
            "apiVersion": rt.api_version,
            "kind": rt.kind,
            "metadata": {key: value for key, value in metadata.items() if value},
            "status": status,
        }
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        what, path = _what("apply status of", rt, namespace, name), rt.path(namespace, name, "status")
        return await self._json(what, "PATCH", path, query=query, body=body, content=_APPLY)

    async def create(self, obj: Mapping[str, Any]) -> Body:
        """Makes the object; raises AlreadyExistsError when one of that name exists."""
        rt, namespace, name = _identity(obj)
        what, query = _what("create", rt, namespace, name), {"fieldManager": FIELD_MANAGER}
        return await self._json(what, "POST", rt.path(namespace), query=query, body=obj)

    async def patch(
        self,
        rt: ResourceType,
        namespace: str,
        name: str,
        merge_patch: Mapping[str, Any],
        *,
        subresource: str | None = None,
    ) -> Body:
        """JSON merge patch: null removes a field, lists are replaced whole."""
        what = _what(f"patch {subresource} of" if subresource else "patch", rt, namespace, name)
        path, query = rt.path(namespace, name, subresource), {"fieldManager": FIELD_MANAGER}
        return await self._json(what, "PATCH", path, query=query, body=merge_patch, content=_MERGE)

    async def delete(
        self,
        rt: ResourceType,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
    ) -> None:
        """Has the object gone; that it is absent, or with `uid` that another one has its name by now, is fine."""
        options: Body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            await self._json(_what("delete", rt, namespace, name), "DELETE", rt.path(namespace, name), body=options)
        except NotFoundError:
            return
        except ConflictError:
            if uid is None:
                raise

    async def event(
        self,
        regarding: Mapping[str, Any],
        *,
        type: Literal["Normal", "Warning"],  # noqa: A002 - the field's own name
        reason: str,
        message: str,
    ) -> None:
        """An Event about an object, beside it; equal ones are counted in one. Never raises.

        `regarding` is the object itself, or a reference (apiVersion, kind, namespace, name, uid).
        """
        event = build_event(regarding, event_type=type, reason=reason, message=message)
        namespace, name = event["metadata"]["namespace"], event["metadata"]["name"]
        try:
            try:
                await self.create(event)
            except ConflictError:
                known = await self.get(EVENTS, namespace, name)
                seen = {"count": int(known.get("count") or 1) + 1, "lastTimestamp": event["lastTimestamp"]}
                await self.patch(EVENTS, namespace, name, seen)
        except KubeError as error:
            log.info("an event (%s: %s) could not be written: %s", reason, message, error)

    # kopf

    async def watch_session(
        self, listed: Callable[[str], None], *, collections: Collection[str] = (), metadata_only: Collection[str] = ()
    ) -> tuple[str, Any]:
        """(server, aiohttp session) for kopf's watches: our address, our TLS, and the token as it is at each request.

        `listed` is called with the path of each of the `collections` that was listed over it, of which kopf only gets to know from
        where on to watch: what is there is for who hears of it to list, page by page. Of those in `metadata_only` watches tell no more.
        """
        client = self._open()

        async def authenticate(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
            headers: dict[str, str] = {}
            await client.update_params_for_auth(headers, [], ["BearerToken"], request.url.path, request.method, None)
            path, watches = request.url.path, "watch" in request.url.query
            lists = request.method == "GET" and path in collections and not watches
            if lists:
                headers["Accept"] = _METADATA_LIST
            elif watches and path in metadata_only:
                headers["Accept"] = _METADATA_ONLY
            for name, value in headers.items():
                request.headers[name] = value
            response = await handler(request)
            if response.status == 200 and lists:
                await drop_items(response)
                listed(path)
            elif response.status == 200 and watches:
                response.content = Lines(response.content)
            return response

        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=client.rest_client.ssl_context),
            middlewares=(authenticate,),
            proxy=client.configuration.proxy,
            trust_env=False,
        )
        return client.configuration.host, session

    # Inside

    def _open(self) -> ApiClient:
        if self._client is None:
            raise RuntimeError("Kube is used outside its async with block")
        return self._client

    async def _json(self, what: str, method: str, path: str, **options: Any) -> Body:
        answer = await self._request(what, method, path, **options)
        return parsed(what, answer)

    async def _request(
        self,
        what: str,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        accept: str = _JSON,
        content: str = _JSON,
    ) -> bytes:
        client = self._open()
        url = client.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": accept, "Content-Type": content, "User-Agent": FIELD_MANAGER}
        try:
            await client.update_params_for_auth(headers, [], ["BearerToken"], path, method, None)
            async with asyncio.timeout(self._request_timeout):
                response = await client.rest_client.request(  # type: ignore[no-untyped-call]
                    method, url, headers=headers, body=body, _request_timeout=self._request_timeout
                )
                answer: bytes = await response.read()
        except TimeoutError as error:
            raise UnavailableError(
                f"{what}: no answer from the API server within {self._request_timeout:g} s"
            ) from error
        except (aiohttp.ClientError, OSError, ApiException, client_config.ConfigException) as error:
            raise UnavailableError(f"{what}: {type(error).__name__}: {error}") from error
        if not 200 <= response.status < 300:
            raise refusal(what, response.status, answer)
        return answer


def _what(verb: str, rt: ResourceType, namespace: str | None, name: str) -> str:
    return f"{verb} {rt.kind} {namespace}/{name}" if rt.namespaced else f"{verb} {rt.kind} {name}"


def _identity(obj: Mapping[str, Any]) -> tuple[ResourceType, str, str]:
    metadata = obj["metadata"]
    return type_of(obj), metadata.get("namespace") or "", metadata["name"]
