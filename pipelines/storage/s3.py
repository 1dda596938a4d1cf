"""Objects below a prefix of an S3 bucket.

Uploads carry a checksum that S3 verifies, and whole reads are verified against it (boto3's CRC; for a server that lacks
it, AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required turn it off).
Failed requests are retried within the limits of `pipelines.storage.waiting`.
S3 has no checksum of a part of an object: what `read_range` and `open` return is guarded by TCP and TLS only.
"""

import functools
import io
import os
import sys
import threading
import time
import uuid
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from pipelines.storage.errors import Conflict, Faulty, explained
from pipelines.storage.interface import ANYTHING, Entry, Expected, Storage, Upload
from pipelines.storage.waiting import Wait

TRANSFERS = 16  # objects in flight at a time: an S3 request is mostly waiting
_ATTEMPTS = 10  # to read an object that arrives damaged or is replaced meanwhile
_CONNECT_SECONDS, _READ_SECONDS = 10, 30  # without an answer for so long, a request is tried again
_ONE_PUT = 8 << 20  # bytes; what is larger is uploaded in parts, since S3 takes 5 GB in one
_PIECE = 64 << 10  # bytes of a body taken at a time: no more is lost where it breaks
_DELETED_AT_ONCE = 1000  # S3's limit
_making_a_client = threading.Lock()  # else concurrent threads would make a client each
_WRITER = "deedsr-write"  # metadata that identifies a conditional write


class S3Storage(Storage):
    """Endpoint, region and keys come from the standard AWS environment, never from the URI."""

    def __init__(self, bucket: str, prefix: str):
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")

    @property
    def _client(self) -> Any:
        variables = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        with explained("open", self.uri), _making_a_client:
            return _s3_client(variables)

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def _path(self, key: str) -> str:
        return key[len(self.prefix) + 1 if self.prefix else 0 :]

    def list(self, prefix: str = "", within: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        for item in self._items(prefix):
            if not item["Key"].endswith("/"):  # the empty objects by which consoles show folders
                yield Entry(self._path(item["Key"]), item["Size"], item["ETag"].strip('"'))

    def _items(self, prefix: str) -> Iterator[dict[str, Any]]:
        folder = self._key(prefix.strip("/")).strip("/")
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{folder}/" if folder else ""
        )
        with explained("list", self.uri):
            for page in pages:
                yield from page.get("Contents", ())

    def read(self, path: str) -> bytes:
        buffer = io.BytesIO()
        self._fetch(path, buffer)
        return buffer.getvalue()

    def download(self, path: str, target: Path) -> None:
        with explained("write", str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                self._fetch(path, file)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        if not size:
            self.stat(path)
        return b"".join(self._pieces(path, offset, offset + size)) if size else b""

    def open(self, path: str, read_ahead: int = 4 << 20) -> BinaryIO:
        file = _ObjectFile(self, self.stat(path))
        return io.BufferedReader(file, read_ahead) if read_ahead else cast(BinaryIO, file)

    def _fetch(self, path: str, file: BinaryIO) -> None:
        """Writes the whole object to `file`, verified; from the start again if another version appears meanwhile."""
        for left in reversed(range(_ATTEMPTS)):
            file.seek(0)
            file.truncate()
            try:
                for piece in self._pieces(path):
                    file.write(piece)
                return
            except (Conflict, _Damaged):
                if not left:
                    raise

    def _pieces(self, path: str, begin: int = 0, end: int | None = None, version: str | None = None) -> Iterator[bytes]:
        """The object's bytes from `begin` to `end`, all of one version.

        A body that breaks, where boto3 itself does not try again, continues with the first byte that is missing.
        """
        from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError

        place, crc, expected_crc = begin, 0, None
        wait: Wait | None = None
        with explained("read", f"{self.uri}/{path}"):
            while True:
                options = {"IfMatch": f'"{version}"'} if version else {}
                if place or end is not None:
                    options["Range"] = f"bytes={place}-{'' if end is None else end - 1}"
                try:
                    response = self._client.get_object(Bucket=self.bucket, Key=self._key(path), **options)
                except ClientError as error:
                    if _code(error) in ("InvalidRange", "416"):  # it begins at the end of the object or after it
                        return
                    raise
                if version is None:
                    version = response["ETag"].strip('"')
                    expected_crc = None if options else _crc32(response)
                end = place + response["ContentLength"]
                try:
                    while piece := response["Body"].read(_PIECE):
                        wait = None
                        place += len(piece)
                        crc = zlib.crc32(piece, crc)
                        yield piece
                except (HTTPClientError, IncompleteReadError) as error:
                    wait = wait or Wait()
                    if not wait.sleep(f"cannot read {self.uri}/{path} ({type(error).__name__})"):
                        raise
                    continue
                except FlexibleChecksumError:
                    raise _Damaged(f"{self.uri}/{path}") from None
                # boto3 has verified a body that came in one response, but not one put together here.
                if expected_crc not in (None, crc):
                    raise _Damaged(f"{self.uri}/{path}")
                return

    def write(self, path: str, data: bytes | Path, *, expected: Expected = ANYTHING) -> str:
        with explained("write", f"{self.uri}/{path}"):
            if expected != ANYTHING:
                return self._write_if(path, data, expected)
            size = data.stat().st_size if isinstance(data, Path) else len(data)
            if size <= _ONE_PUT:
                return self._put(path, data)
            self._upload(path, data)
        return self.stat(path).version

    def _upload(self, path: str, data: bytes | Path) -> None:
        """In parts, aborted when one fails."""
        from boto3.s3.transfer import TransferConfig
        from s3transfer.manager import TransferManager

        with (
            data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as body,
            TransferManager(self._client, TransferConfig(), executor_cls=_Threads) as manager,
        ):
            manager.upload(body, self.bucket, self._key(path)).result()

    def _put(self, path: str, data: bytes | Path, **options: Any) -> str:
        with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as body:
            answer = self._client.put_object(Bucket=self.bucket, Key=self._key(path), Body=body, **options)
        return answer["ETag"].strip('"')

    def _write_if(self, path: str, data: bytes | Path, expected: str | None) -> str:
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": f'"{expected}"'}
        writer = uuid.uuid4().hex
        for left in reversed(range(_ATTEMPTS)):
            try:
                return self._put(path, data, Metadata={_WRITER: writer}, **condition)
            except ClientError as error:
                code = _code(error)
                if code in ("NotImplemented", "501"):  # two processes that write in the same moment may both succeed
                    if expected != self.version(path):
                        raise Conflict(f"{self.uri}/{path}") from None
                    return self._put(path, data)
                if code == "ConditionalRequestConflict" and left:  # another write was under way
                    time.sleep(0.1)
                elif code in ("PreconditionFailed", "412", "NoSuchKey", "404"):
                    # The response to a successful attempt may have been lost, after which boto3 has tried again.
                    with suppress(FileNotFoundError):
                        head = self._head(path)
                        if head["Metadata"].get(_WRITER) == writer:
                            return head["ETag"].strip('"')
                    raise Conflict(f"{self.uri}/{path}") from None
                else:
                    raise
        raise AssertionError("unreachable")

    def stat(self, path: str) -> Entry:
        head = self._head(path)
        return Entry(path, head["ContentLength"], head["ETag"].strip('"'))

    def _head(self, path: str) -> dict[str, Any]:
        with explained("read", f"{self.uri}/{path}"):
            return self._client.head_object(Bucket=self.bucket, Key=self._key(path))

    def delete(self, path: str) -> None:
        with explained("delete", f"{self.uri}/{path}"):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def delete_many(self, paths: Iterable[str]) -> None:
        rest = iter(paths)
        while batch := [{"Key": self._key(path)} for path in islice(rest, _DELETED_AT_ONCE)]:
            with explained("delete", self.uri):
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True})
            for failed in answer.get("Errors", ()):
                self.delete(self._path(failed["Key"]))  # tried again, or explained

    def delete_all(self) -> None:
        self.delete_many(self._path(item["Key"]) for item in self._items(""))
        self.abort_uploads(timedelta(0))

    def child(self, path: str) -> Storage:
        return S3Storage(self.bucket, self._key(path))

    def require_writable(self, needed_bytes: int | None = None) -> None:
        # To begin an upload takes the permission to write, and until it ends there is no object.
        with explained("write", self.uri):
            key = self._key(f".writable-{uuid.uuid4().hex[:12]}")
            upload = self._client.create_multipart_upload(Bucket=self.bucket, Key=key)
        self.abort(Upload(self._path(key), upload["UploadId"], datetime.now().astimezone()))

    def uploads(self) -> Iterator[Upload]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=f"{self.prefix}/" if self.prefix else ""
        )
        with explained("list the uploads of", self.uri):
            for page in pages:
                for upload in page.get("Uploads", ()):
                    yield Upload(self._path(upload["Key"]), upload["UploadId"], upload["Initiated"])

    def abort(self, upload: Upload) -> None:
        from botocore.exceptions import ClientError

        with explained("abort an upload to", f"{self.uri}/{upload.path}"):
            try:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=self._key(upload.path), UploadId=upload.id)
            except ClientError as error:
                if _code(error) != "NoSuchUpload":
                    raise


class _Threads(ThreadPoolExecutor):
    """Threads that inherit the waiting limits of the submitting thread (`pipelines.storage.waiting.within`)."""

    def submit(self, call: Any, /, *values: Any, **named: Any) -> Any:
        return super().submit(copy_context().run, call, *values, **named)


class _ObjectFile(io.RawIOBase):
    """One version of an object as an unbuffered file."""

    def __init__(self, storage: S3Storage, entry: Entry):
        self._storage, self._entry, self._place = storage, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._entry.size}[whence]
        if place < 0:
            raise ValueError(f"cannot seek to {place}, before the begin of {self._entry.path}")
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._place + len(view), self._entry.size)
        filled = 0
        if self._place < end:
            for piece in self._storage._pieces(self._entry.path, self._place, end, self._entry.version):
                view[filled : filled + len(piece)] = piece
                filled += len(piece)
        self._place += filled
        return filled

    def readall(self) -> bytes:
        data = bytearray(max(self._entry.size - self._place, 0))
        return bytes(data[: self.readinto(data)])


class _Damaged(Faulty):
    def __init__(self, uri: str):
        super().__init__(f"{uri} arrived damaged: its checksum is another")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _crc32(response: dict[str, Any]) -> int | None:
    """The CRC32 of a whole object, None where S3 has none or one of its parts' checksums."""
    text = response.get("ChecksumCRC32", "")
    return int.from_bytes(b64decode(text)) if text and "-" not in text else None


@functools.lru_cache(maxsize=1)
def _s3_client(environment: tuple[tuple[str, str], ...]) -> Any:
    """One client per process (they are thread-safe and slow to make), a new one when the AWS variables change."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # botocore counts attempts: `_Retries` has the time
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        max_pool_connections=2 * TRANSFERS,
        region_name=os.environ.get("AWS_REGION"),  # boto3 itself only reads AWS_DEFAULT_REGION
    )
    client = boto3.session.Session().client("s3", config=config)
    client.meta.events.register("needs-retry.s3", _Retries())
    return client


class _Retries:
    """Botocore's handler of failed requests: tries again what botocore counts as transient, for as long as `Wait`."""

    def __init__(self) -> None:
        from botocore.retries.standard import RetryEventAdapter, StandardRetryConditions

        self._context_of = RetryEventAdapter().create_retry_context
        self._transient = StandardRetryConditions(max_attempts=sys.maxsize)

    def __call__(self, **event: Any) -> float | None:
        context = self._context_of(**event)
        if not self._transient.is_retryable(context):
            return None
        failure = context.get_error_code() or type(event["caught_exception"]).__name__
        wait = context.request_context.setdefault("deedsr-wait", Wait())
        return wait.pause(f"S3 at {urlsplit(event['endpoint'].host).hostname} fails ({failure})")
