"""Bytes to a store and back, in blocks, a few at a time: a large file is never whole in memory.

Every block is tried again by itself. A file goes to S3 as a multipart upload, of which nothing
exists before its last step; https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
has the sizes that are possible.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore, Event
from typing import Any, TypeVar

from lightning_sbckpt._io.open_regular import open_below
from lightning_sbckpt._io.progress import Told
from lightning_sbckpt._remote.retries import Retries, StoppedError, clean, patiently, said
from lightning_sbckpt._remote.stores import Store
from lightning_sbckpt.errors import RemoteError

T = TypeVar("T")

BLOCK = 8 * 2**20
THREADS = 4
# S3 takes 10,000 parts; a file that grew would need a few more.
_MOST_PARTS = 9_000
# A server that restarts may have forgotten an upload that was under way.
_FILE_ATTEMPTS = 3


def in_parallel(
    work: Callable[[T], object], items: Iterable[T], stop: Event, threads: int = THREADS
) -> None:
    """Call `work` with each item; the first failure sets `stop`, and is raised when all have ended."""
    failure: BaseException | None = None
    with ThreadPoolExecutor(threads, "sbckpt-remote") as pool:
        futures = [pool.submit(_unless_stopped, work, item, stop) for item in items]
        try:
            for future in futures:
                error = future.exception()
                # What was given up because of the failure says nothing about it.
                if error is not None and (failure is None or isinstance(failure, StoppedError)):
                    failure = error
        except BaseException:
            stop.set()
            raise
    if failure is not None:
        raise failure


def _unless_stopped(work: Callable[[T], object], item: T, stop: Event) -> None:
    if stop.is_set():
        raise StoppedError
    try:
        work(item)
    except BaseException:
        stop.set()
        raise


class Sender:
    """The files of one checkpoint on their way to a store; blocks in memory are bounded together.

    Args:
        store: Where they go.
        retries: How often each block is tried.
        progress: Is told how many bytes more have arrived, by several threads; fewer, if they have to
            be sent again.
    """

    def __init__(self, store: Store, retries: Retries, progress: Told | None = None) -> None:
        self.stop = Event()
        self._store = store
        self._retries = retries
        self._progress = progress or _tell_nobody
        self._slots = BoundedSemaphore(THREADS)

    def put(self, folder: Path, name: str, path: str, doing: str) -> int:
        """Put one file there, of a folder here by its relative name, and return its size.

        Raises:
            RemoteError: It can't be put.
            StoppedError: Another file could not be put.
            OSError: The local file can't be read.
        """
        with open_below(folder, name) as stream:
            size = os.fstat(stream.fileno()).st_size
            for attempt in range(1, _FILE_ATTEMPTS + 1):
                try:
                    self._put(stream.fileno(), size, path, doing)
                    break
                except FileNotFoundError as error:
                    if attempt == _FILE_ATTEMPTS:
                        raise RemoteError(
                            f"can't {doing}: {said(error)}, {attempt} times. Check that the bucket "
                            "or folder is there, and that nothing removes unfinished uploads"
                        ) from clean(error)
        return size

    def _put(self, descriptor: int, size: int, path: str, doing: str) -> None:
        if size > BLOCK and self._store.is_s3:
            self._put_parts(descriptor, size, path, doing)
        elif size > BLOCK:
            self._try(lambda: self._put_stream(descriptor, size, path), doing)
        else:
            with self._slots:
                data = _read(descriptor, 0, size)
                self._try(lambda: put_whole(self._store, path, data), doing)
            self._progress(size)

    def _put_stream(self, descriptor: int, size: int, path: str) -> None:
        sent = 0
        try:
            with self._store.use() as filesystem:
                make_parents(self._store, filesystem, path)
                with filesystem.open(path, "wb", block_size=BLOCK) as stream:
                    for start in range(0, size, BLOCK):
                        data = _read(descriptor, start, min(BLOCK, size - start))
                        stream.write(data)
                        sent += len(data)
                        self._progress(len(data))
        except BaseException:
            self._take_back(sent)
            raise

    def _put_parts(self, descriptor: int, size: int, path: str, doing: str) -> None:
        filesystem = self._store.filesystem
        bucket, key, _ = filesystem.split_path(path)
        where = {"Bucket": bucket, "Key": key}
        made = self._try(lambda: filesystem.call_s3("create_multipart_upload", **where), doing)
        where["UploadId"] = made["UploadId"]
        block = max(BLOCK, -(-size // _MOST_PARTS))
        tags: dict[int, str] = {}
        sent: list[int] = []
        patience = self._store.patience(block)

        def put_part(number: int) -> None:
            start = (number - 1) * block
            count = min(block, size - start)
            with self._slots:
                data = _read(descriptor, start, count)
                done = self._try(
                    lambda: filesystem.call_s3(
                        "upload_part", PartNumber=number, Body=data, **where, **patience
                    ),
                    f"{doing} (bytes from {start:,})",
                )
            tags[number] = done["ETag"]
            sent.append(count)
            self._progress(count)

        def complete() -> None:
            parts = [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]
            try:
                filesystem.call_s3(
                    "complete_multipart_upload", MultipartUpload={"Parts": parts}, **where
                )
            except FileNotFoundError:
                # An attempt whose answer was lost may have done it.
                if filesystem.info(path)["size"] != size:
                    raise

        try:
            # A lost upload ends its other parts, and not the other files.
            in_parallel(put_part, range(1, -(-size // block) + 1), Event())
            self._try(complete, doing)
        except BaseException:
            self._take_back(sum(sent))
            # Parts that stay behind cost money and are seen nowhere.
            with suppress(Exception):
                filesystem.call_s3("abort_multipart_upload", **where)
            raise

    def _take_back(self, sent: int) -> None:
        """Say that so many bytes have not arrived after all."""
        if sent:
            self._progress(-sent)

    def _try(self, work: Callable[[], T], doing: str) -> T:
        try:
            return patiently(work, self._retries, doing, stop=self.stop)
        except RemoteError:
            # The others need not wait for their own last attempt.
            self.stop.set()
            raise


def give_up_parts(store: Store, before: float) -> None:
    """Give up multipart uploads that were begun before then; not all servers can list them."""
    if not store.is_s3:
        return
    with suppress(Exception), store.use() as filesystem:
        bucket, prefix, _ = filesystem.split_path(store.path())
        found = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
        for upload in found.get("Uploads", ()):
            if upload["Initiated"].timestamp() < before:
                where = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                filesystem.call_s3("abort_multipart_upload", Bucket=bucket, **where)


def _tell_nobody(_count: int) -> None:
    pass


def put_whole(store: Store, path: str, data: bytes) -> None:
    """Put one small file in one step: readers see it whole, or what was there before."""
    with store.use() as filesystem:
        if store.of_objects:
            filesystem.pipe_file(path, data, **store.patience(len(data)))
            return
        make_parents(store, filesystem, path)
        if store.is_sftp:
            filesystem.pipe_file(path, data)
            return
        folder, _, name = path.rpartition("/")
        beside = f"{folder}/.{name}.part"
        filesystem.pipe_file(beside, data)
        try:
            filesystem.mv(beside, path)
        except FileExistsError:
            filesystem.rm_file(path)
            filesystem.mv(beside, path)


def is_on_its_way(file: str) -> bool:
    """Return whether a file has the name that one has before its rename."""
    name = file.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".part")


def make_parents(store: Store, filesystem: Any, path: str) -> None:
    """Make the folders above a file, on stores that have folders."""
    folder = path.rpartition("/")[0]
    if store.of_objects or filesystem.isdir(folder):
        return
    try:
        filesystem.makedirs(folder, exist_ok=True)
    except OSError:
        # Another process may have made them at this instant.
        if not filesystem.isdir(folder):
            raise


def read_blocks(
    store: Store, path: str, size: int, retries: Retries, doing: str
) -> Iterator[bytes]:
    """Give the bytes of a file in order, a few blocks read ahead.

    Raises:
        RemoteError: They can't be read.
        FileNotFoundError: It isn't there.
    """
    stop = Event()

    def read(start: int) -> bytes:
        end = min(size, start + BLOCK)

        def once() -> bytes:
            with store.use() as filesystem:
                data: bytes = filesystem.cat_file(path, start=start, end=end)
            if len(data) != end - start:
                raise ConnectionError(f"{len(data):,} bytes came, expected {end - start:,}")
            return data

        return patiently(once, retries, f"{doing} (bytes from {start:,})", stop=stop)

    starts = range(0, size, BLOCK)
    if len(starts) < 2 or not store.parallel:
        yield from map(read, starts)
        return
    ahead: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(THREADS, "sbckpt-remote") as pool:
        try:
            for start in starts:
                ahead.append(pool.submit(read, start))
                if len(ahead) == THREADS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            stop.set()
            for future in ahead:
                future.cancel()


def _read(descriptor: int, start: int, count: int) -> bytes:
    data = os.pread(descriptor, count, start)
    if len(data) != count:
        # pread(2) may give less at once only for huge counts; here the file has become shorter.
        raise RemoteError(
            f"a file became shorter while it was uploaded: {len(data):,} bytes at {start:,}, "
            f"expected {count:,}. Nothing may write to a checkpoint that is being saved"
        )
    return data
