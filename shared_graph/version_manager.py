"""What is served: loads, switches and unloads the versions of models. No Ray in it, and no TensorFlow.

A version goes through TensorFlow Serving's states: LOADING, AVAILABLE, UNLOADING, and END when it has failed. It is
AVAILABLE when every worker that there is has it. A label, or the latest, comes to stand for another version in two
steps: first every worker gives up the old one, and lets requests wait; only then do they answer with the new one. So no
client sees a version go back. Workers are told by snapshots, which are numbered, and tell what they have by reports.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable

from shared_graph.errors import Error, ModelError, Unavailable, first_sentence
from shared_graph.model_source import Found, ModelSource
from shared_graph.models import LoadedVersion, ModelKey, ModelVersion, Snapshot, WorkerReport, not_found

log = logging.getLogger(__name__)

SILENT_LIMIT_S = 150.0  # in which workers that lack a version tell of one thing or another; they have shorter limits
EVIDENCE = 3  # so many observations decide whether the requests of a signature may share runs


@dataclasses.dataclass(eq=False)
class Version:
    """One version of a model, from the moment at which it is tried until it is gone."""

    source: ModelSource
    files: list = dataclasses.field(default_factory=list)  # as they were seen when it was tried
    state: str = "LOADING"
    error: str | None = None
    loaded: LoadedVersion | None = None
    weights_ids: set[str] = dataclasses.field(default_factory=set)  # that it has had since it was loaded
    was_ready: bool = False  # in any worker: then it may have answered somebody
    evidence: collections.Counter[tuple[str, bool]] = dataclasses.field(default_factory=collections.Counter)

    def is_ready_in(self, report: WorkerReport) -> bool:
        """Not if that tells of a load before this one."""
        return report.ready.get(self.key) in self.weights_ids

    def what_is_odd(self, found: Found) -> str | None:
        number = self.source.version
        if number not in found.versions:
            return f"Model {self.key} is not in its folder any more."
        if found.files_seen[number] != self.files:
            return f"The files of model {self.key} have changed since it was loaded: give others another number."
        return None

    @property
    def key(self) -> ModelKey:
        return ModelKey(self.source.name, self.source.version)


class VersionManager:
    """Everything that it acts on is passed in: ``look`` into a model's folder, ``load`` and ``unload`` a version where
    the variables are, ``publish`` a snapshot to the workers."""

    def __init__(
        self,
        sources: list[ModelSource],
        look: Callable[[ModelSource], Awaitable[Found]],
        load: Callable[[ModelSource], Awaitable[LoadedVersion]],
        unload: Callable[[ModelKey], Awaitable[None]],
        publish: Callable[[Snapshot], None],
    ):
        self.sources = {source.name: source for source in sources}
        self.snapshot = Snapshot(loading=frozenset(self.sources))
        self._look, self._load, self._unload, self._publish = look, load, unload, publish
        self._versions: dict[ModelKey, Version] = {}
        self._pointers: dict[str, dict[str | None, int | None]] = {name: {} for name in self.sources}
        self._reports: dict[int, WorkerReport] = {}  # of each worker that there is
        self._files_seen: dict[str, dict[int, list]] = {}  # of each model's versions, at the last look
        self._loading = set(self.sources)  # those that have never been looked at to the end
        self._turns = {name: asyncio.Lock() for name in self.sources}  # one change of a model at a time
        self._changed, self._told = asyncio.Event(), asyncio.Event()  # each another one once it is set

    # -- what workers tell ---------------------------------------------------------------------------------------------

    def report(self, report: WorkerReport) -> None:
        self._reports[report.index] = report
        for key in report.ready.keys() & self._versions.keys():
            self._versions[key].was_ready |= self._versions[key].is_ready_in(report)
        self._update(is_told=True)

    def worker_lost(self, index: int, incarnation: str) -> None:
        if (report := self._reports.get(index)) and report.incarnation == incarnation:
            del self._reports[index]
            self._update(is_told=True)

    def observe(self, key: ModelKey, weights_id: str, signature: str, agrees: bool) -> None:
        """What a run showed of whether requests for a signature may share runs. One run may be an accident, so it takes
        EVIDENCE of them; but while a signature is undecided, one that disagrees is enough."""
        version = self._versions.get(key)
        if version is None or version.loaded is None or version.loaded.weights_id != weights_id:
            return
        loaded, is_undecided = version.loaded, signature in version.loaded.undecided
        if not is_undecided and (agrees or signature not in loaded.batchable):
            if agrees and version.evidence[signature, False]:  # that was an accident, such as of rounding near zero
                version.evidence[signature, False] -= 1
            return
        version.evidence[signature, agrees] += 1
        if version.evidence[signature, agrees] < EVIDENCE and (agrees or not is_undecided):
            return
        batchable = {*loaded.batchable, signature} if agrees else {*loaded.batchable} - {signature}
        undecided = {*loaded.undecided} - {signature}
        log.info("model %s: requests for %r %s runs", key, signature, "share" if agrees else "do not share")
        version.loaded = loaded._replace(batchable=tuple(sorted(batchable)), undecided=tuple(sorted(undecided)))
        self._update()

    # -- what is to be served ------------------------------------------------------------------------------------------

    async def reconcile(self, name: str, at_once: bool = False) -> str | None:
        """Serve the highest version of a model that is there and can be loaded, and those that labels stand for. Unless
        ``at_once``, files that still change, or that have failed as they are, are left alone. A version in use goes on,
        and says so, when its files have changed, or have gone and none takes its place. Returns what is odd in the
        folder; raises Unavailable when that cannot be read."""
        async with self._turns[name]:
            found = await self._look_at(name)
            await self._end_what_fails_everywhere(name)
            await self._switch(name, await self._load_aspired(name, found, at_once))
            self._loading.discard(name)
            await self._drop_unused(name, found)
            return found.oddity

    async def change_weights(self, key: ModelKey, change: Callable[[LoadedVersion], Awaitable[LoadedVersion]]) -> None:
        """``change`` sets weights; it is given what was found out about the old ones, and returns the same of the new.
        Meanwhile no two requests share a run, since that was decided for other weights. When this returns no worker
        has the old ones any more."""
        async with self._turns.get(key.name, contextlib.nullcontext()):
            version = self._versions.get(key)
            if version is None or version.loaded is None:
                raise not_found(*key)
            before, version.loaded = version.loaded, version.loaded._replace(batchable=(), undecided=())
            self._update()
            await self._until_settled(key.name)
            try:
                version.loaded = await change(before)
                version.weights_ids.add(version.loaded.weights_id)
            except Exception:
                version.loaded = before
                raise
            finally:
                version.evidence.clear()
                self._update()
            await self._until_settled(key.name)
            allowed = (None, version.loaded.weights_id)
            await self._until(lambda: all(r.ready.get(key) in allowed for r in self._reports.values()))
            version.weights_ids = {version.loaded.weights_id}

    async def _look_at(self, name: str) -> Found:
        try:
            return await self._look(self.sources[name])
        except OSError as error:
            why = f"The folder of model {name} cannot be read: {error.strerror or error}"
        for version in self._loaded(name):
            version.error = why
        self._loading.discard(name)  # nobody is to wait for it
        self._update()
        raise Unavailable(why)

    async def _end_what_fails_everywhere(self, name: str) -> None:
        """Versions that were loaded when there were no workers yet, and that none of them can have."""
        for version in self._loaded(name):
            failures = self._failures(version)
            if not version.was_ready and failures and len(failures) == len(self._reports):
                number, pointers = version.source.version, self._pointers[name].items()
                self._pointers[name] = {choice: None if n == number else n for choice, n in pointers}  # who asks waits
                await self._fail(version, ModelError(failures[0]))

    async def _load_aspired(self, name: str, found: Found, at_once: bool) -> dict[str | None, int]:
        """What the latest and the labels are to stand for: what the folder says, where that can be loaded, else what
        they stand for already."""
        before, self._files_seen[name] = self._files_seen.get(name, {}), found.files_seen
        at_rest = {number for number, files in found.files_seen.items() if before.get(number) == files}
        pointers, loaded = self._pointers[name], {version.source.version for version in self._loaded(name)}
        aspired = {choice: pointers[choice] for choice in [None, *found.labels] if pointers.get(choice) in loaded}
        for number in sorted(found.versions, reverse=True):
            if await self._ensure_loaded(found, number, number in at_rest, at_once):
                aspired[None] = number
                break
        for label, number in sorted(found.labels.items()):
            if number in found.versions:
                if await self._ensure_loaded(found, number, number in at_rest, at_once):
                    aspired[label] = number
            elif ModelKey(name, number) not in self._versions:
                why = f"The label {label!r} of model {name} stands for version {number}, which is not there."
                source = self.sources[name]._replace(version=number)
                self._versions[ModelKey(name, number)] = Version(source, [], "END", why)
        return aspired

    async def _drop_unused(self, name: str, found: Found) -> None:
        """Unload what nothing stands for any more; of the rest tell what is odd."""
        in_use = self._pointers[name].values()
        for version in self._loaded(name):
            version.error = version.what_is_odd(found) if version.source.version in in_use else None
        self._update()
        for version in [v for v in self._versions.values() if v.source.name == name]:
            if version.loaded and version.source.version not in in_use:
                await self._drop(version, "UNLOADING")
            if not version.loaded and version.source.version not in {*found.versions, *found.labels.values()}:
                self._forget(version)

    async def _ensure_loaded(self, found: Found, number: int, is_at_rest: bool, at_once: bool) -> bool:
        """Is this version loaded? If not it is tried, unless its files still change, or have failed as they are."""
        source, files = found.versions[number], found.files_seen[number]
        key = ModelKey(source.name, number)
        version = self._versions.get(key)
        if version and version.loaded:
            return True
        has_failed = version is not None and version.state == "END" and version.files == files
        if (has_failed or not is_at_rest) and not at_once:
            return False
        version = self._versions[key] = Version(source, files)
        self._update()
        try:
            version.loaded = await self._load(source)
            version.weights_ids.add(version.loaded.weights_id)
            self._update()
            await self._until_brought_up(version)
        except Exception as error:
            await self._fail(version, error)
            return False
        return True

    async def _fail(self, version: Version, error: Exception) -> None:
        """End it, with why: it is not tried again until its files change, or at once is asked for."""
        error.__traceback__ = None  # it holds what is to be given back now
        why = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {first_sentence(error)}"
        prefix = "" if str(version.source) in why else f"Model {version.source} cannot be loaded: "
        await self._drop(version, "END", prefix + why)

    async def _until_brought_up(self, version: Version) -> None:
        """Raises ModelError with what a worker says that could not."""
        with contextlib.suppress(TimeoutError):
            while self._lacking(version) and not self._failures(version):
                async with asyncio.timeout(SILENT_LIMIT_S):
                    await self._told.wait()
        missing = [f"worker {index} does not have it" for index in self._lacking(version)]
        if why := self._failures(version) or missing:
            raise ModelError(why[0])

    async def _switch(self, name: str, aspired: dict[str | None, int]) -> None:
        """Let the latest and the labels stand for other versions, in two steps."""
        now = self._pointers[name]
        if now == aspired:
            return
        self._pointers[name] = {choice: n if now.get(choice, n) == n else None for choice, n in aspired.items()}
        self._update()
        await self._until_settled(name)
        self._pointers[name] = aspired
        self._update()

    async def _drop(self, version: Version, state: str, error: str | None = None) -> None:
        """Give back the memory of a version that is of no use any more, or has failed, when all on it is answered."""
        version.state, version.error, version.loaded = state, error, None
        self._update()
        await self._until_settled(version.source.name)
        await self._until(lambda: not any(version.key in report.ready for report in self._reports.values()))
        try:
            await self._unload(version.key)
        except Exception as failure:  # it must not hide why it was dropped
            log.warning("model %s: its memory could not be given back: %s", version.key, first_sentence(failure))
        if state != "END":
            self._forget(version)

    def _forget(self, version: Version) -> None:
        self._versions.pop(version.key, None)
        self._update()

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def _loaded(self, name: str) -> list[Version]:
        return [version for version in self._versions.values() if version.source.name == name and version.loaded]

    def _failures(self, version: Version) -> list[str]:
        failed = {report.index: report.failed.get(version.key) for report in self._reports.values()}
        return [f"worker {index}: {why}" for index, why in failed.items() if why is not None]

    def _lacking(self, version: Version) -> tuple[int, ...]:
        return tuple(sorted(report.index for report in self._reports.values() if not version.is_ready_in(report)))

    def _update(self, is_told: bool = False) -> None:
        """Publish what there is now, if that is something else than before; and look again at what is waited for.
        ``is_told``: a worker has told of itself."""
        versions = {key: self._described(version) for key, version in self._versions.items()}
        pointers = {(name, choice): n for name, of_model in self._pointers.items() for choice, n in of_model.items()}
        now = versions, frozenset(self._loading), pointers
        if now != self.snapshot[1:]:
            self.snapshot = Snapshot(self.snapshot.snapshot_id + 1, *now)
            self._publish(self.snapshot)
        self._changed.set()
        self._changed = asyncio.Event()
        if is_told:
            self._told.set()
            self._told = asyncio.Event()

    def _described(self, version: Version) -> ModelVersion:
        """For a snapshot. This is also where a loaded version becomes AVAILABLE, or LOADING again."""
        if version.loaded is None:
            return ModelVersion(version.source, version.state, version.error)
        missing = self._lacking(version)
        failed = [f"Model {version.key}: {why}" for why in self._failures(version)]
        version.state = "LOADING" if missing else "AVAILABLE"
        return ModelVersion(version.source, version.state, next(iter(failed), version.error), version.loaded, missing)

    async def _until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._changed.wait()

    async def _until_settled(self, name: str) -> None:
        """Until each worker has done for this model what the last snapshot wants, or is gone."""
        wanted = self.snapshot.snapshot_id
        await self._until(lambda: all(report.settled.get(name, 0) >= wanted for report in self._reports.values()))
