"""Local directories and S3 prefixes behind the same few calls; what appears under a name is always a whole object."""

import errno
import functools
import hashlib
import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from deedsr.errors import DeeDSRError, UsageError

__all__ = ["Entry", "Storage", "localize", "open_storage", "publish"]

_TRANSFERS = 16  # objects in flight at a time: an S3 request is mostly waiting
_BODY_ATTEMPTS = 4
_PARTIAL = ".partial"  # suffix of a file whose writing has not ended


class Entry(NamedTuple):
    """One object: path relative to its storage, bytes, and a version that changes when the content does."""

    path: str
    size: int
    version: str  # modification time in ns, or the ETag


class Conflict(DeeDSRError):
    pass


class Storage(ABC):
    """Objects below one location, addressed by relative paths with `/`. Pickles: a client is made where it is used."""

    uri: str

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object below the folder `prefix`, recursive, sorted by path; nothing if there is no such folder."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none."""

    @abstractmethod
    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end. Raises FileNotFoundError if there is no such object."""

    @abstractmethod
    def write(self, path: str, data: bytes | Path, expected=None) -> None:
        """Puts an object, from memory or from a local file. Readers see the old object or the new one, never a part."""

    @abstractmethod
    def stat(self, path: str) -> Entry:
        """Size and version of one object. Raises FileNotFoundError if there is none."""

    def exists(self, path: str) -> bool:
        try:
            self.stat(path)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes an object; none there is fine."""

    @abstractmethod
    def child(self, path: str) -> "Storage":
        """The storage below the folder `path`."""

    @abstractmethod
    def download(self, path: str, target: Path) -> None:
        """Copies an object to a local file."""

    def open(self, path):
        import io

        return io.BytesIO(self.read(path))

    def require_writable(self, needed_bytes=None):
        self.write("_probe", b"")
        self.delete("_probe")

    def delete_many(self, paths):
        for path in paths:
            self.delete(path)

    def local_path(self, path: str) -> Path | None:
        """The object's place in the local file system, None where it has none."""
        return None


class LocalStorage(Storage):
    def __init__(self, directory: Path):
        self.directory = Path(os.path.abspath(directory))
        self.uri = str(self.directory)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        yield from sorted(self._walk(prefix.strip("/"), ()), key=lambda entry: os.fsencode(entry.path))

    def _walk(self, folder: str, above: tuple[str, ...]) -> Iterator[Entry]:
        here = self.directory / folder
        identity = os.path.realpath(here)
        if identity in above:  # a symbolic link to one of its own parents
            return
        try:
            with _explained("list", str(here)):
                found = list(os.scandir(here))
        except FileNotFoundError:
            return
        for item in found:
            path = f"{folder}/{item.name}" if folder else item.name
            if item.is_dir():
                yield from self._walk(path, (*above, identity))
            elif not item.name.endswith(_PARTIAL):
                try:
                    status = item.stat()
                except OSError:  # a dangling link: reading it will say so
                    yield Entry(path, 0, "")
                else:
                    yield Entry(path, status.st_size, str(status.st_mtime_ns))

    def read(self, path: str) -> bytes:
        with _explained("read", str(self.directory / path)):
            return (self.directory / path).read_bytes()

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        with _explained("read", str(self.directory / path)), (self.directory / path).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def write(self, path: str, data: bytes | Path, expected=None) -> None:
        target = self.directory / path
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{_PARTIAL}")
        with _explained("write", str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    if isinstance(data, Path):
                        with data.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
                    else:
                        file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    def stat(self, path: str) -> Entry:
        with _explained("read", str(self.directory / path)):
            status = (self.directory / path).stat()
        return Entry(path, status.st_size, str(status.st_mtime_ns))

    def delete(self, path: str) -> None:
        with _explained("delete", str(self.directory / path)):
            (self.directory / path).unlink(missing_ok=True)
            # As on S3, a folder is gone with its last object.
            for folder in (self.directory / path).parents:
                if folder == self.directory or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def child(self, path: str) -> Storage:
        return LocalStorage(self.directory / path)

    def download(self, path: str, target: Path) -> None:
        with _explained("read", str(self.directory / path)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.directory / path, target)

    def local_path(self, path: str) -> Path:
        return self.directory / path


class S3Storage(Storage):
    """Endpoint, region and keys come from the standard AWS environment, never from the URI."""

    def __init__(self, bucket: str, prefix: str):
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")

    @property
    def _client(self) -> Any:
        with _explained("open", self.uri):
            return _s3_client(tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._key(prefix.strip("/")).strip("/")
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{folder}/" if folder else ""
        )
        with _explained("list", self.uri):
            for page in pages:
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # the empty objects by which consoles show folders
                        path = item["Key"][len(self.prefix) + 1 if self.prefix else 0 :]
                        yield Entry(path, item["Size"], item["ETag"].strip('"'))

    def read(self, path: str) -> bytes:
        return self._get(path)

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        return self._get(path, Range=f"bytes={offset}-{offset + size - 1}")

    def _get(self, path: str, **options: str) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        with _explained("read", f"{self.uri}/{path}"):
            for left in reversed(range(_BODY_ATTEMPTS)):
                response = self._client.get_object(Bucket=self.bucket, Key=self._key(path), **options)
                try:
                    return response["Body"].read()
                except (HTTPClientError, IncompleteReadError):  # cut off within the body, where boto3 does not retry
                    if not left:
                        raise
        raise AssertionError("unreachable")

    def write(self, path: str, data: bytes | Path, expected=None) -> None:
        with _explained("write", f"{self.uri}/{path}"):
            if isinstance(data, Path):
                self._client.upload_file(str(data), self.bucket, self._key(path))
            else:
                self._client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    def stat(self, path: str) -> Entry:
        with _explained("read", f"{self.uri}/{path}"):
            head = self._client.head_object(Bucket=self.bucket, Key=self._key(path))
        return Entry(path, head["ContentLength"], head["ETag"].strip('"'))

    def delete(self, path: str) -> None:
        with _explained("delete", f"{self.uri}/{path}"):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def child(self, path: str) -> Storage:
        return S3Storage(self.bucket, self._key(path))

    def download(self, path: str, target: Path) -> None:
        with _explained("read", f"{self.uri}/{path}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self.bucket, self._key(path), str(target))


@functools.lru_cache(maxsize=1)
def _s3_client(environment: tuple[tuple[str, str], ...]) -> Any:
    """One client per process (they are thread-safe and slow to make), a new one when the AWS variables change."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": 10},
        max_pool_connections=2 * _TRANSFERS,
        region_name=os.environ.get("AWS_REGION"),  # boto3 itself only reads AWS_DEFAULT_REGION
    )
    return boto3.session.Session().client("s3", config=config)


def open_storage(uri: str | Path) -> Storage:
    """The storage at `s3://bucket/prefix`, `file:///dir` or a plain path; nothing is created or contacted yet."""
    text = str(uri)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if not text:
        raise UsageError("an empty location: give s3://bucket/prefix, file:///dir or a path")
    if scheme is None:
        return LocalStorage(Path(text).expanduser())
    rest = text[scheme.end() :]
    if scheme[1].lower() == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise UsageError(f"{text} names no local directory: write file:///dir, with three slashes")
        return LocalStorage(Path("/" + unquote(path)))
    if scheme[1].lower() == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise UsageError(f"{text} names no bucket: write s3://bucket/prefix")
        return S3Storage(bucket, prefix)
    raise UsageError(f"{text}: locations are s3://bucket/prefix, file:///dir or a path, not {scheme[1]}://")


def localize(uri: str | Path, without: str = "") -> Path:
    """A local directory with what lies at `uri`: the directory itself, or an S3 prefix downloaded once.

    `without`: a folder below it that is not downloaded.

    Downloads are kept under `$XDG_CACHE_HOME/deedsr` (else `~/.cache/deedsr`) by location and ETags, so that changed
    objects get another directory. Raises UsageError if there is nothing at `uri`.
    """
    storage = open_storage(uri)
    local = storage.local_path("")
    if local is not None:
        if not local.is_dir():
            raise UsageError(f"{storage.uri} is not a directory" if local.exists() else f"{storage.uri} does not exist")
        return local
    entries = [entry for entry in storage.list() if not (without and entry.path.startswith(f"{without}/"))]
    if not entries:
        raise UsageError(f"there is nothing below {storage.uri}")
    name = hashlib.sha256(repr((storage.uri, [tuple(entry) for entry in entries])).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deedsr"
    target = cache / name
    if target.is_dir():
        return target
    partial = cache / f"{name}.{uuid.uuid4().hex[:12]}{_PARTIAL}"
    try:
        _each(lambda entry: storage.download(entry.path, partial / entry.path), entries)
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def publish(folder: Path, uri: str | Path) -> None:
    """Copies a local directory to `uri`. JSON files go last, outermost at the very end: they vouch for the rest."""
    source, target = LocalStorage(folder), open_storage(uri)
    if target.uri == source.uri:
        return
    paths = [entry.path for entry in source.list()]
    vouching = sorted((path for path in paths if path.endswith(".json")), key=lambda path: -path.count("/"))
    _each(lambda path: target.write(path, source.local_path(path)), [path for path in paths if path not in vouching])
    for path in vouching:
        target.write(path, source.local_path(path))


def _each(transfer: Any, items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_TRANSFERS) as threads:
        for done in [threads.submit(transfer, item) for item in items]:
            done.result()


@contextmanager
def _explained(verb: str, uri: str) -> Iterator[None]:
    """Turns what the file system or S3 says into FileNotFoundError or one message that names the remedy."""
    try:
        yield
    except (FileNotFoundError, DeeDSRError):
        raise
    except PermissionError as error:
        raise UsageError(f"no permission to {verb} {uri}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"cannot write {uri}: no space left; free some and run the same command again"
            raise DeeDSRError(message) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UsageError(f"cannot {verb} {uri}: part of that path is a file, not a directory") from error
        raise DeeDSRError(f"cannot {verb} {uri}: {error.strerror or error}") from error
    except Exception as error:
        explained = _explain_s3(verb, uri, error)
        if explained is None:
            raise
        raise explained from error


def _explain_s3(verb: str, uri: str, error: Exception) -> Exception | None:
    # Imported here: whoever got an exception of botocore has it loaded, and local work never needs it.
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        NoRegionError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    bucket = uri.split("/")[2] if uri.startswith("s3://") else uri
    if isinstance(error, Boto3Error) and isinstance(error.__context__, ClientError):
        error = error.__context__  # upload_file hides the server's answer in its own exception
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code == "NoSuchBucket":
            return UsageError(f"there is no bucket {bucket!r}: create it, or correct {uri} (and AWS_ENDPOINT_URL)")
        if code in ("NoSuchKey", "404", "NotFound"):
            return FileNotFoundError(uri)
        if code in ("AccessDenied", "403", "Forbidden", "AllAccessDisabled"):
            return UsageError(f"no permission to {verb} {uri}: these AWS credentials may not do that")
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return UsageError(f"cannot {verb} {uri}: the AWS credentials are not valid ({code})")
        return DeeDSRError(f"cannot {verb} {uri}: S3 answered {code}")
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return UsageError(f"cannot {verb} {uri}: no AWS credentials found; {remedy}")
    if isinstance(error, NoRegionError):
        return UsageError(f"cannot {verb} {uri}: no AWS region; set AWS_REGION")
    if isinstance(error, ConnectionError | HTTPClientError):
        return DeeDSRError(f"cannot {verb} {uri}: no connection to the S3 endpoint; check AWS_ENDPOINT_URL")
    if isinstance(error, BotoCoreError | Boto3Error):
        return DeeDSRError(f"cannot {verb} {uri}: {error}")
    return None
