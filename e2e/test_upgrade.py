"""Upgrades under load, Lazy adapters and crashes on a real vLLM process: no request is lost, none is answered by a mixture.

One engine for all of it, with two slots: old and new content fill them while others are loaded beside.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from e2e.engine_client import Stream, models, request, token_ids
from e2e.engine_process import SERVED, EngineProcess
from e2e.stack import tiny_fixtures
from lora_operator.engine_plugin.loads import LOADING_FILE, read_loading

A, B = "one", "one-v2"
CLIENTS, STREAMS, HOT_LOADS = 8, 4, 8
TOKENS = 8
LONG = 1200  # tokens of a stream that outlasts a swap, also where clients stall for seconds
PROMPT = "Once upon a time"  # of streams: its tokens are far enough from ties that a batch of any size says the same
STORY = "The engineer looked at the clock again, wrote the number of the night's deployment down, and began to count: "


def prompt_of(number: int) -> str:
    """A prompt that fills more than one block of the prefix cache (128 tokens, one per letter) before it tells who it is."""
    return f"{STORY}{number} {STORY}"


@dataclass
class Setting:
    """The engine, its cache's paths by adapter, and what contents answer that are loaded afresh under names of their own."""

    engine: EngineProcess
    paths: dict[str, str]
    known: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    def reference(self, adapter: str, number: int) -> list[int]:
        """What the adapter's content answers; asked under a name that nothing else was ever loaded under."""
        if (adapter, number) not in self.known:
            self.known[adapter, number] = token_ids(
                self.engine.url, f"fresh-{adapter}", prompt_of(number), tokens=TOKENS
            )
        return self.known[adapter, number]

    def copy(self, adapter: str, name: str) -> str:
        """The path of the same files at a place of their own: other content, as far as the plugin can tell."""
        if name not in self.paths:
            self.paths[name] = self.engine.publish(Path(self.paths[adapter]), name)
        return self.paths[name]

    @property
    def fresh(self) -> dict[str, str]:
        """The entries of the contents' own names."""
        return {f"fresh-{name}": self.paths[name] for name in (A, B)}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    tiny = tiny_fixtures()
    engine = EngineProcess(tmp_path_factory.mktemp("upgrade"), tiny / "base")
    names = (A, B, "two", "three")
    setting = Setting(engine, {name: engine.publish(tiny / "adapters" / name, f"{name}-published") for name in names})
    try:
        engine.start()
        engine.wait_up()
        yield setting
    finally:
        engine.kill()


@dataclass
class Load:
    """Clients that never stop asking for `sql`, each time with a prompt that nobody sent before, until they are told to."""

    setting: Setting
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[int, int, list[Any]]] = field(default_factory=list)  # status, number of the prompt, token ids
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    def ask(self) -> None:
        body = {
            "model": "sql",
            "temperature": 0,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        while not self.stop.is_set():
            number = next(self.numbers)
            url = f"{self.setting.engine.url}/v1/completions"
            status, answer = request("POST", url, body | {"prompt": prompt_of(number)})
            self.answers.append((status, number, answer["choices"][0]["token_ids"] if status == 200 else [str(answer)]))


def begin_stream(setting: Setting) -> Stream:
    """A stream that has begun."""
    stream = Stream(setting.engine.url, "sql", PROMPT, tokens=LONG)
    while len(stream.token_ids) < 2:
        assert stream.running, stream.error
        time.sleep(0.001)
    return stream


def is_plain(setting: Setting) -> bool:
    """Whether `sql` has its plain name, and nothing is left of other contents."""
    state = setting.engine.state()
    internal = [one["internalName"] for one in state["loaded"] if one["name"] == "sql"]
    return internal == ["sql"] and not state["retired"]


def test_upgrades_there_and_back_twice_under_load_lose_and_mix_nothing(setting: Setting) -> None:
    engine, load = setting.engine, Load(setting)
    engine.put({"sql": setting.paths[A]} | setting.fresh)
    pid = engine.pid
    streams: list[tuple[str, Stream]] = []
    others: dict[str, str] = {}
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients: list[Future[None]] = [pool.submit(load.ask) for _ in range(CLIENTS)]
        try:
            for turn, (old, new) in enumerate(((A, B), (B, A)) * 2):
                if turn % 2 == 0:
                    with ThreadPoolExecutor(STREAMS) as starting:
                        begun = [starting.submit(begin_stream, setting) for _ in range(STREAMS)]
                    streams += [(old, one.result()) for one in begun]
                before = [one for _, one in streams if one.running]
                others |= {f"beside-{turn}-{each}": setting.paths["three"] for each in range(HOT_LOADS)}
                state = engine.put({"sql": setting.paths[new]} | setting.fresh | others)
                assert state["failures"] == []
                assert before, "no stream outlasts the swap: make them longer"
                assert all(one.running for one in before[-STREAMS:]), f"turn {turn}: a stream ended within a swap"
                seen = len(load.answers)
                while len(load.answers) < seen + 2 * CLIENTS:  # so many answers by the new content alone
                    assert not any(client.done() for client in clients)
                    time.sleep(0.01)
            for _, one in streams:
                one.join(300)
            engine.await_state(lambda _: is_plain(setting))  # under the same load
        finally:
            load.stop.set()
        for client in clients:
            client.result()
    assert [answer for answer in load.answers if answer[0] != 200] == []
    assert engine.pid == pid
    listed = models(engine.url)
    assert (listed["sql"]["root"], listed["sql"]["parent"]) == (setting.paths[A], SERVED[0])
    assert {name for name in listed if name.startswith("sql")} == {"sql"}

    # What was asked during swaps is answered by one content or the other, never by a mixture, and is not remembered wrongly.
    engine.put({"sql": setting.paths[A]} | setting.fresh)
    chosen = random.Random(5).sample(load.answers, min(40, len(load.answers)))
    for _, number, tokens in chosen:
        assert tokens in (setting.reference(A, number), setting.reference(B, number)), number
        assert token_ids(engine.url, "sql", prompt_of(number), tokens=TOKENS) == setting.reference(A, number)
    whole = {name: token_ids(engine.url, f"fresh-{name}", PROMPT, tokens=LONG) for name in (A, B)}
    assert whole[A] != whole[B]
    assert all(one.token_ids == whole[adapter] for adapter, one in streams), "a stream is a mixture"

    # And the plain name itself goes over to the other content, and back, with prompts that it has answered before.
    for adapter in (B, A):
        engine.put({"sql": setting.paths[adapter]} | setting.fresh)
        engine.await_state(lambda _: is_plain(setting))
        assert models(engine.url)["sql"]["root"] == setting.paths[adapter]
        for _, number, _ in chosen[:10]:
            assert token_ids(engine.url, "sql", prompt_of(number), tokens=TOKENS) == setting.reference(adapter, number)
    assert engine.pid == pid


def test_more_adapters_than_memory_all_answer_eager_and_lazy(setting: Setting) -> None:
    """Four are kept in memory; twelve are loaded, and twelve more wait for their first request."""
    engine, contents = setting.engine, (A, B, "two")
    eager = {f"eager-{each}": setting.paths[contents[each % 3]] for each in range(12)}
    lazy = {f"lazy-{each}": setting.paths[contents[each % 3]] for each in range(12)}
    state = engine.put(eager | lazy, lazy=lazy)
    assert {one["name"] for one in state["loaded"]} == set(eager)
    assert {one["name"] for one in state["waiting"]} == set(lazy)
    assert not set(lazy) & set(models(engine.url))
    names = [*lazy, *eager] * 2
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda name: token_ids(engine.url, name, prompt_of(1), tokens=TOKENS), names))
    by_content: dict[str, set[tuple[int, ...]]] = {}
    for name, answer in zip(names, answers, strict=True):
        by_content.setdefault((eager | lazy)[name], set()).add(tuple(answer))
    assert all(len(one) == 1 for one in by_content.values()), by_content
    assert len({next(iter(one)) for one in by_content.values()}) == 3
    assert set(lazy) <= set(models(engine.url))
    state = engine.state()
    assert (state["waiting"], state["failures"]) == ([], [])


@pytest.mark.parametrize("moment", ["any", "in a load"])
def test_killed_at_any_moment_it_comes_back_as_it_was_told(setting: Setting, moment: str) -> None:
    """The operator sends a list that swaps, adds, and removes, and the engine is killed somewhere in it.

    What was being loaded just then may be what ended the engine: it, and nothing else, is left out and said so.
    """
    engine, note = setting.engine, setting.engine.state_dir / LOADING_FILE
    wanted = {"sql": setting.paths[A], "old": setting.paths["two"]} | setting.fresh
    engine.put(wanted)
    wanted = {"sql": setting.paths[B], "lazy": setting.paths["two"]} | setting.fresh
    wanted |= {name: setting.copy("three", name) for name in (f"new-{each}" for each in range(HOT_LOADS))}
    engine.generation += 1  # the next list has the number that the operator would send again
    number = engine.generation
    sending = threading.Thread(target=lambda: request_quietly(engine, wanted))
    sending.start()
    if moment == "any":
        time.sleep(random.Random(1).random() * 0.15)
    else:
        later = {
            f"new-{each}" for each in range(4, HOT_LOADS)
        }  # the first ones are passed as arguments at the next start
        while sending.is_alive() and (read_loading(note) or ("", ""))[0] not in later:
            pass
    engine.kill()
    sending.join()
    suspect = read_loading(note)
    engine.start()
    engine.wait_up()
    began = engine.state()
    names = {one["name"] for one in began["loaded"]}
    blamed = {(one["name"], one["path"]) for one in began["failures"]}
    left_out = {name for name, _ in blamed}
    assert names | left_out in ({"sql", "old", *setting.fresh}, set(wanted) - {"lazy"}), "one list or the other, whole"
    assert blamed <= {suspect}
    assert all("while it loaded this adapter" in one["message"] for one in began["failures"])
    engine.generation = number - 1
    state = engine.put(wanted, lazy={"lazy"})
    assert {one["name"]: one["path"] for one in state["loaded"]} == {
        name: path for name, path in wanted.items() if name not in {"lazy", *left_out}
    }
    assert ({one["name"] for one in state["failures"]}, state["retired"], state["settled"]) == (left_out, [], True)
    for name in {"sql", "fresh-one-v2"} - left_out:
        assert token_ids(engine.url, name, prompt_of(3), tokens=TOKENS) == setting.reference(B, 3)
    assert "lazy" not in models(engine.url)
    assert token_ids(engine.url, "lazy", prompt_of(3), tokens=TOKENS)


def request_quietly(engine: EngineProcess, wanted: dict[str, str]) -> None:
    """Send the list; the engine may die meanwhile."""
    modules = [
        {"name": name, "path": path, "baseModelName": SERVED[0], "revision": Path(path).name}
        | ({"loadPolicy": "Lazy"} if name == "lazy" else {})
        for name, path in wanted.items()
    ]
    body = {"version": 1, "deployment": "test/tiny", "generation": engine.generation, "modules": modules}
    engine.ask_plugin("PUT", "/lora-operator/v1/modules?wait=10", body)
