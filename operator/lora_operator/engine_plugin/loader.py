"""Loads content that the engine has never loaded: the checks before it, the engine's answer, and what is kept of a refusal.

It decides nothing about names: what was loaded has an internal name and an id then, and answers under no public one. One load at a
time, for the reconciler alone.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from .basemodel import BaseModel
from .clean_text import clean
from .history import ContentKey, History, LoadedContent
from .launcher import check_listed, read_base
from .list_file import ListedAdapter
from .loads import UNANSWERED, UNREADY_SECONDS, Loads
from .plugin_settings import PluginSettings
from .state_files import REFUSED_FILE, read_refused, write_refused
from .versions import Version
from .vllm_adapter import EngineClient, EngineRegistry, log, make_request


class Loader:
    """The loads of one engine process. All methods but `check` run on the engine's event loop."""

    def __init__(
        self, settings: PluginSettings, registry: EngineRegistry, client: EngineClient, history: History
    ) -> None:
        self.loads = Loads(settings.state_dir)
        self.engine: Version | None = None  # of vLLM; None: not known
        self._settings = settings
        self._registry = registry
        self._client = client
        self._history = history
        self._refused = read_refused(settings.state_dir / REFUSED_FILE)
        self._base: BaseModel | None = None
        self._base_read = False

    def check(self, entry: ListedAdapter) -> str | None:
        """Why an entry can't be served by what its files say, or None. Reads files, so it is for a thread."""
        if not self._base_read:
            self._base, self._base_read = read_base(self._settings), True
        return check_listed(entry, settings=self._settings, base=self._base, engine=self.engine)

    async def load(self, entry: ListedAdapter, list_generation: int) -> LoadedContent | str:
        """The content of an entry, loaded under an internal name that was never used; or why the engine did not load it."""
        internal = self._history.mint(entry, list_generation)
        request = make_request(internal=internal, int_id=None, path=entry.path, base_model_name=entry.base_model_name)
        cause = await self._try(entry, request)
        if not self._registry.atomic:
            self._history.withdraw(entry.name, time.monotonic())  # what answered under the name made way for this
        refused = {key: why for key, why in self._refused.items() if key != (entry.name, entry.path)}
        await self._keep_refused(refused | ({(entry.name, entry.path): cause} if cause else {}))
        if cause is not None:
            return cause
        content = LoadedContent(entry.name, entry.path, internal, request.lora_int_id, entry.base_model_name)
        self._history.remember(content)
        return content

    async def forget_others(self, keys: set[ContentKey]) -> None:
        """Forget what is kept of content that is none of these: nobody lists it any more."""
        if not self.loads.suspects <= (paths := {path for _, path in keys}):
            await asyncio.to_thread(self.loads.keep_suspects, paths)
        await self._keep_refused({key: cause for key, cause in self._refused.items() if key in keys})

    async def _try(self, entry: ListedAdapter, request: Any) -> str | None:
        """Make the engine load content; why it did not, or None. Waits for its answer, however long that takes.

        Where the engine ends in it, or is ended because it never answers, the note of `loads` stays on disk: the next process of
        this pod leaves the content out.
        """
        if not await self._client.is_alive():
            return "the engine has ended"  # by something else than this adapter
        self.loads.begin(entry, note=not self._history.has_loaded_path(entry.path))
        late = asyncio.get_running_loop().call_later(
            UNREADY_SECONDS, log.error, "lora-operator: %s: %s", entry.name, UNANSWERED
        )
        blameless = False
        try:
            cause = await self._ask_engine(entry, request)
            blameless = cause is None or await self._client.is_alive()
            return cause
        except asyncio.CancelledError:
            # The server is shut down: in a load that goes as it should, or for this very one, which hangs.
            blameless = self.loads.unanswered() < UNREADY_SECONDS
            raise
        finally:
            late.cancel()
            self.loads.end(blameless=blameless)

    async def _ask_engine(self, entry: ListedAdapter, request: Any) -> str | None:
        try:
            if await self._registry.load(entry.name, request):
                return None
            self.loads.ask_again()
            return await self._client.diagnose(entry.path) or "the engine did not load it, but did when asked again"
        except Exception as error:
            return clean(f"{type(error).__name__}: {error}")

    async def _keep_refused(self, refused: dict[ContentKey, str]) -> None:
        """Keep on disk what the engine refused, so that the launcher does not pass it."""
        if refused != self._refused:
            self._refused = refused
            await asyncio.to_thread(write_refused, self._settings.state_dir / REFUSED_FILE, refused)
