"""Memory is given back; how much, the tests with real processes show."""

import asyncio

import pytest

import shared_graph.memory as module
from shared_graph.memory import GROWN_PAGES, LOOK_EVERY_S, keep_memory_low


@pytest.mark.simulated
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("can't start new thread")])
async def test_a_moment_without_files_or_threads_does_not_end_it(monkeypatch, error):
    pages, given_back, fails = 10_000, [], True

    async def in_own_thread(give_back) -> None:
        if fails:
            raise error
        given_back.append(give_back)

    def resident_pages() -> int:
        if fails and pages > 10_000 and isinstance(error, OSError):
            raise error
        return pages

    monkeypatch.setattr(module, "in_own_thread", in_own_thread)
    monkeypatch.setattr(module, "_resident_pages", resident_pages)
    monkeypatch.setattr(module, "_glibc", lambda: type("Glibc", (), {"mallopt": lambda self, *setting: 1})())
    keeping = asyncio.create_task(keep_memory_low())
    await asyncio.sleep(LOOK_EVERY_S)
    pages += GROWN_PAGES + 1
    await asyncio.sleep(3 * LOOK_EVERY_S)
    assert not keeping.done() and not given_back
    fails = False
    await asyncio.sleep(2 * LOOK_EVERY_S)
    assert given_back == [module.give_memory_back]
    keeping.cancel()
