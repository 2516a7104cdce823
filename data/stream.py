"""The stream: owners read the visits of their slots ahead; whole uint8 batches are put together by slot, never by arrival."""

import json
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from signal import Signals
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

from histoscale.data.catalog import CatalogError
from histoscale.data.journal import append_rows, keep_rows
from histoscale.data.memory import StreamConfig, budget, fitted, steps_ahead
from histoscale.data.plan import ATTEMPTS, Place, Plan, Visit, rank_slots
from histoscale.data.processes import follow, out_of_the_way, settle, worker_context
from histoscale.data.secrets import scrub
from histoscale.data.tally import Tally
from histoscale.data.visit import Patches, Source, VisitFailed

_SEEN_S = 2.0  # until the server of the workers tells that one ended
_NOTICED_S = 12.0  # DataLoader looks after its workers every five seconds


class StreamError(OSError):
    """The stream cannot go on; the message names the slide and the cause."""


@dataclass(frozen=True)
class Batch:
    """The patches of a rank's slots at one step, in the order of the slots.

    slots: int64 [B]. pixels: uint8 [B, 3, S, S], channels last in memory. slide: row of the catalog, int64 [B]. mpp: true um/px,
    float32 [B]. level, x, y: where the patch was cut, level px, int64 [B]. target: index into plan.targets, int64 [B].
    """

    step: int
    slots: Tensor
    pixels: Tensor
    slide: Tensor
    mpp: Tensor
    level: Tensor
    x: Tensor
    y: Tensor
    target: Tensor


@dataclass(frozen=True)
class Lost:
    """An attempt at a visit that failed: one row of lost.jsonl."""

    slot: int
    lane: int
    visit: int
    attempt: int
    slide: int
    target: int
    tested: int
    reason: str


@dataclass(frozen=True)
class _Read:
    """A visit that was read, after its failed attempts. left: the pixels of `patches` by number, until they are taken."""

    visit: Visit
    patches: Patches
    left: dict[int, np.ndarray]
    lost: list[Lost]


@dataclass(frozen=True)
class _Part:
    """What one owner hands over for one step. where: int64 [b, 6]: slot, slide, target, level, x, y.
    opened: int64 [v, 5]: slide, target, tested, passed, repeated of visits that are first used here.
    traffic: int64 [3]: requests, bytes and repeated requests since the owner's last part."""

    step: int
    pixels: Tensor
    where: np.ndarray
    mpp: np.ndarray
    opened: np.ndarray
    lost: list[Lost]
    traffic: np.ndarray


@dataclass(frozen=True)
class _Fault:
    reason: str


def read_visit(plan: Plan, source: Source, place: Place, numbers: list[int]) -> _Read:
    """The visit of a place, or the first of its replacements that can be read; of its patches those `numbers` that are to come.

    Raises StreamError when every attempt failed, when the store does not answer, or when the cache's disk is full.
    """
    lost: list[Lost] = []
    for attempt in range(ATTEMPTS + 1):
        visit = plan.visit(place.slot, place.lane, place.turn, attempt)
        try:
            patches = source.read(visit)
            return _Read(visit, replace(patches, pixels=()), {number: patches.pixels[number] for number in numbers}, lost)
        except VisitFailed as failed:
            reason = scrub(str(failed))
            lost.append(Lost(place.slot, place.lane, visit.number, attempt, visit.slide, visit.target, failed.tested, reason))
        except OSError as error:  # of a store, or of the disk that slides are copied to
            raise StreamError(f"slide {source.slide_ids[visit.slide]}: {scrub(str(error))}") from error
    slides = ", ".join(source.slide_ids[one.slide] for one in lost)
    raise StreamError(f"{ATTEMPTS + 1} slides in a row could not be read ({slides}); the last one: {lost[-1].reason}")


class Buffers:
    """uint8 tensors for the pixels of parts: new ones, or of a worker, shared ones in turn.

    Fresh shared memory costs more to touch than a patch costs to filter. A worker is never more than `prefetch` parts ahead of
    the main process, which copies a part before it asks for the next step: `count` = prefetch + 2 buffers are never overtaken.
    """

    def __init__(self, shape: tuple[int, ...], count: int, shared: bool) -> None:
        self.shape, self.turn = shape, 0
        self.ring = [torch.empty(shape, dtype=torch.uint8).share_memory_() for _ in range(count)] if shared else []

    def next(self) -> Tensor:
        if not self.ring:
            return torch.empty(self.shape, dtype=torch.uint8)
        self.turn += 1
        return self.ring[self.turn % len(self.ring)]


class Owner:
    """Reads the visits of some slots; each visit is read once and kept until its last patch is taken."""

    def __init__(self, plan: Plan, source: Source, slots: range, config: StreamConfig, shared: bool) -> None:
        self.plan, self.source, self.slots, self.config = plan, source, slots, config
        self.ahead = steps_ahead(plan.sampler, len(slots), config)
        self.buffers = Buffers((len(slots), plan.sampler.patch_px, plan.sampler.patch_px, 3), config.prefetch + 2, shared)

    def parts(self, start: int) -> Iterator[_Part]:
        """The parts of steps start, start + 1, … without end. Raises StreamError."""
        self.source.decode_threads(self.config.threads)
        pool = ThreadPoolExecutor(self.config.in_flight, thread_name_prefix="visit")
        traffic = self.source.traffic()
        reading: dict[tuple[int, int, int], Future[_Read]] = {}
        seen: set[tuple[int, int, int]] = set()
        ahead: dict[int, list[Place]] = {}
        try:
            for step in count(start):
                for future_step in range(max(ahead, default=step - 1) + 1, step + self.ahead + 1):
                    ahead[future_step] = [self.plan.place(future_step, slot) for slot in self.slots]
                    for place in ahead[future_step]:
                        name = (place.slot, place.lane, place.turn)
                        if name not in reading:
                            numbers = self.plan.numbers_left(place)
                            reading[name] = pool.submit(read_visit, self.plan, self.source, place, numbers)
                part = self._part(step, ahead.pop(step), reading, seen)
                now = self.source.traffic()
                part.traffic[:] = np.subtract(now, traffic)
                traffic = now
                yield part
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _part(
        self, step: int, places: list[Place], reading: dict[tuple[int, int, int], Future[_Read]], seen: set[tuple[int, int, int]]
    ) -> _Part:
        pixels = self.buffers.next()
        image, where, mpp = pixels.numpy(), np.empty((len(places), 6), np.int64), np.empty(len(places))
        opened, lost = [], []
        for i, place in enumerate(places):
            name = (place.slot, place.lane, place.turn)
            read = reading[name].result()
            patches, visit = read.patches, read.visit
            if name not in seen:
                seen.add(name)
                opened.append((visit.slide, visit.target, patches.tested, patches.passed, patches.repeated))
                lost += read.lost
            image[i] = read.left.pop(place.number)
            where[i] = place.slot, visit.slide, visit.target, patches.level, patches.x[place.number], patches.y[place.number]
            mpp[i] = patches.mpp
            if place.last:
                del reading[name]
                seen.discard(name)
        traffic = np.zeros(3, np.int64)
        return _Part(step, pixels, where, mpp, np.array(opened, np.int64).reshape(-1, 5), lost, traffic)


class _Owners(IterableDataset[_Part | _Fault]):
    """One owner a worker: the slots of the rank by slot mod workers."""

    def __init__(self, plan: Plan, source: Source, slots: range, config: StreamConfig, start: int) -> None:
        self.plan, self.slots, self.config, self.start = plan, slots, config, start
        self.source: Source | bytes = source

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "source": pickle.dumps(self.source)}  # what opening it again says is for `__iter__` to tell

    def __iter__(self) -> Iterator[_Part | _Fault]:
        worker = get_worker_info()
        slots = self.slots if worker is None else self.slots[worker.id :: worker.num_workers]
        try:
            source: Source = pickle.loads(self.source) if isinstance(self.source, bytes) else self.source
            self.source = source
            yield from Owner(self.plan, source, slots, self.config, worker is not None).parts(self.start)
        except (OSError, CatalogError) as error:
            yield _Fault(str(error))  # a plain value: the main process raises it without a worker's traceback around it


def _begin(worker: int) -> None:
    follow(settle)


def _dead(loading: _BaseDataLoaderIter) -> str | None:
    """What ended a worker and how to go on, in words; None while all live."""
    workers = loading._workers  # type: ignore[attr-defined]
    wait([worker.sentinel for worker in workers], _SEEN_S)  # a torn message comes before the word that its writer is gone
    for worker in workers:
        if worker.exitcode is not None:
            by = f"was killed by {Signals(-worker.exitcode).name}" if worker.exitcode < 0 else f"ended with {worker.exitcode}"
            why = ", as the system does when memory runs out" if worker.exitcode == -Signals.SIGKILL else ""
            less = " (where memory is short, with less stream.workers or stream.memory_share)" if why else ""
            return f"the reading worker {worker.pid} {by}{why}; the same command goes on from the newest checkpoint{less}"
    return None


def _end_broken(loading: _BaseDataLoaderIter, closing: threading.Event) -> None:
    """A worker that is killed in the middle of a message leaves half of it in the pipe, and whoever reads waits for the rest for
    ever: when one has gone and the loader does not notice, the others are ended and the pipe is closed, which it must."""
    workers = loading._workers  # type: ignore[attr-defined]
    wait([worker.sentinel for worker in workers])
    if not closing.wait(_NOTICED_S):
        for worker in workers:
            worker.kill()
        loading._worker_result_queue._writer.close()  # type: ignore[attr-defined]


def forget_lost(path: Path, step: int) -> None:
    """Take out of lost.jsonl what a stream that begins with `step` writes again."""
    keep_rows(path, lambda row: row["step"] < step)


def _told(path: Path, since: int) -> Iterator[tuple[int, int, int, int]]:
    """The failed attempts that lost.jsonl has from step `since` on: of visits that may be open when a run goes on."""
    if path.exists():
        for row in map(json.loads, path.read_text().splitlines()):
            if row["step"] > since:
                yield row["slot"], row["lane"], row["visit"], row["attempt"]


class Stream:
    """The batches of one rank from step `start` on, without end; close it, or use it as a context.

    `lost`: the file that failed visits are appended to. Raises ValueError when the ranks do not divide the global batch, and
    MemoryTooSmall.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        config: StreamConfig,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        lost: Path | None = None,
    ) -> None:
        if min(config.threads, config.in_flight, config.prefetch) < 1 or config.workers < 0:
            raise ValueError(f"{config}: expected at least 1 for threads, in_flight and prefetch, and at least 0 for workers")
        self.plan, self.source, self.start, self.step = plan, source, start, start  # step: of the next batch
        self.slots = rank_slots(plan.global_batch, rank, world)
        self.config, _ = fitted(plan.seed, plan.sampler, self.slots, config, budget(config))
        self._pinned = torch.cuda.is_available()  # copies to the GPU then run beside it
        self._traffic = np.zeros(3, np.int64)
        self.tally = Tally(source, plan.targets)
        self._lost, self._visits = lost, 0
        self._told = set(_told(lost, start - plan.lanes * plan.per_visit)) if lost is not None else set()
        self._waited, self._since = 0.0, time.perf_counter()
        self._loading: _BaseDataLoaderIter | None = None
        self._batches: Iterator[Batch] | None = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises StreamError when a store does not answer or too many slides in a row cannot be read."""
        if self._batches is None:
            self._batches = self._run()
        asked = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - asked
        return batch

    def close(self) -> None:
        """Stop the workers and threads."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
        self._batches = None

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are running."""
        return [worker.pid for worker in self._loading._workers] if self._loading is not None else []  # type: ignore[attr-defined]

    def stats(self) -> dict[str, float]:
        """For a metric row: share of the time since the last call that the caller waited; counts since the stream began."""
        now = time.perf_counter()
        waited, self._waited = self._waited / max(now - self._since, 1e-9), 0.0
        self._since = now
        totals = self.tally.totals()
        return {
            "data/wait_fraction": min(1.0, waited),
            "data/patches": totals["served"],
            "data/accepted": totals["passed"] / max(1, totals["tested"]),
            "data/repeated": totals["repeated"],
            "data/failed": totals["failed"],
            "data/requests": int(self._traffic[0]),
            "data/bytes": int(self._traffic[1]),
            "data/retried": int(self._traffic[2]),
        }

    def check_lost(self, total: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """Raises StreamError when failed visits, summed over ranks by `total` (Ranks.sum), pass config.max_lost of all."""
        failed, read = total(torch.tensor([self.tally.totals()["failed"], self._visits])).tolist()
        if failed > self.config.max_lost * (failed + read):
            limit = f"stream.max_lost={self.config.max_lost:g}"
            raise StreamError(f"{failed} of {failed + read} visits failed, more than {limit}: see lost.jsonl")

    def _run(self) -> Iterator[Batch]:
        owners = min(self.config.workers, len(self.slots))
        dataset = _Owners(self.plan, self.source, self.slots, self.config, self.start)
        if owners:
            context = worker_context()
            ahead = self.config.prefetch
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="This DataLoader will create")  # than there are cores
                loader = DataLoader(
                    dataset,
                    batch_size=None,
                    num_workers=owners,
                    prefetch_factor=ahead,
                    multiprocessing_context=context,
                    worker_init_fn=_begin,
                )
                with out_of_the_way():
                    self._loading = iter(loader)
            parts: Iterator[_Part | _Fault] = self._loading
        else:
            parts = iter(dataset)
        closing = threading.Event()
        if self._loading is not None:
            threading.Thread(target=_end_broken, args=(self._loading, closing), daemon=True, name="workers").start()
        try:
            while True:
                batch = self._batch([self._part(parts) for _ in range(max(1, owners))])
                self.step = batch.step + 1
                yield batch
        finally:
            closing.set()
            if self._loading is None:
                parts.close()  # type: ignore[attr-defined]
            else:
                self._loading._shutdown_workers()  # type: ignore[attr-defined]  # now, not when garbage is collected
                self._loading = None

    def _part(self, parts: Iterator[_Part | _Fault]) -> _Part:
        """The next part. Raises StreamError for a fault, and for a worker that died."""
        try:
            part = next(parts)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:  # whatever its end tore apart
            dead = _dead(self._loading) if self._loading is not None else None
            if dead is None:
                raise
            raise StreamError(f"step {self.step}: {dead}") from error
        if isinstance(part, _Fault):
            raise StreamError(part.reason)
        return part

    def _batch(self, parts: list[_Part]) -> Batch:
        steps = {part.step for part in parts}
        assert len(steps) == 1, f"workers are at different steps: {sorted(steps)}"
        pixels, where = parts[0].pixels, parts[0].where
        mpp = parts[0].mpp
        if self._loading is not None or self._pinned:  # a worker's buffer is used again
            pixels = torch.empty((len(self.slots), *pixels.shape[1:]), dtype=torch.uint8, pin_memory=self._pinned)
            where, mpp = np.empty((len(self.slots), 6), np.int64), np.empty(len(self.slots))
            for worker, part in enumerate(parts):
                pixels[worker :: len(parts)] = part.pixels
                where[worker :: len(parts)] = part.where
                mpp[worker :: len(parts)] = part.mpp
        self._record(parts, where)
        columns = torch.from_numpy(where)
        slots, slide, target, level, x, y = columns.unbind(1)
        return Batch(parts[0].step, slots, pixels.permute(0, 3, 1, 2), slide, torch.from_numpy(mpp).float(), level, x, y, target)

    def _record(self, parts: list[_Part], where: np.ndarray) -> None:
        tally = self.tally
        tally.serve(where[:, 1], where[:, 2])
        rows = []
        for part in parts:
            self._visits += len(part.opened)
            self._traffic += part.traffic
            for slide, target, tested, passed, repeated in part.opened:
                tally.counts[[tally.TESTED, tally.PASSED, tally.REPEATED], slide, target] += tested, passed, repeated
            for one in part.lost:
                tally.counts[[tally.TESTED, tally.FAILED], one.slide, one.target] += one.tested, 1
                name = (one.slot, one.lane, one.visit, one.attempt)
                if name in self._told:
                    self._told.remove(name)  # another epoch may have the same visit
                else:
                    rows.append({"step": part.step, "slide_id": self.source.slide_ids[one.slide], **vars(one)})
        if rows and self._lost is not None:
            rows.sort(key=lambda row: (row["slot"], row["attempt"]))
            append_rows(self._lost, rows)
