"""Errors of the file system and S3, as FileNotFoundError or one message that names the remedy."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from deedsr.errors import DeeDSRError, UsageError

_FULL = ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage", "507")
_FAULTY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.ENOTCONN)
_NO_SUCH_NAME = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)  # nothing can be called so
_NO_PERMISSION = ("AccessDenied", "403", "Forbidden", "AllAccessDisabled")
_WRONG_KEYS = (
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
    *("InvalidClientTokenId", "AuthFailure", "TokenRefreshRequired"),
)


class Away(DeeDSRError):
    """S3 did not answer, or with server errors, for as long as the retries last."""


class Full(DeeDSRError):
    """No space is left."""


class Refused(UsageError):
    """A right is missing."""


class Faulty(DeeDSRError):
    """A file system failed, as a network file system does while its server is down, or returned damaged data."""


FAILURES = (Away, Full, Refused, Faulty)  # may be temporary


class Conflict(DeeDSRError):
    """A conditional write found another version than the expected one."""

    def __init__(self, uri: str):
        self.uri = uri
        super().__init__(f"{uri} was changed by another process meanwhile: run the same command again")


def not_shared(place: str) -> UsageError:
    """The error of a worker that has no `place`, a file or folder of another machine's disk."""
    return UsageError(
        f"on {socket.gethostname()}: {place} is missing, or another folder than where the command was given. Workers "
        "read and write by themselves: give folders that all nodes share, or s3:// locations"
    )


@contextmanager
def explained(verb: str, uri: str) -> Iterator[None]:
    """Within it, only FileNotFoundError and DeeDSRError leave. Messages hold no credentials."""
    try:
        yield
    except (FileNotFoundError, DeeDSRError):
        raise
    except Exception as error:
        # Some errors of botocore are OSErrors as well, without a number.
        if isinstance(error, OSError) and error.errno is not None:
            if verb == "read" and error.errno in _NO_SUCH_NAME:
                raise FileNotFoundError(error.errno, error.strerror, uri) from None
            reason: Exception | None = _explain_file_system(verb, uri, error)
        else:
            reason = _explain_s3(verb, uri, error)
        if reason is None:
            raise
        raise reason from (None if _tells_secret(error) else error)


def _explain_file_system(verb: str, uri: str, error: OSError) -> DeeDSRError:
    if isinstance(error, PermissionError):
        return Refused(f"no permission to {verb} {uri}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Full(f"cannot write {uri}: no space left; free some and run the same command again")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UsageError(f"cannot {verb} {uri}: part of that path is a file, not a directory")
    if error.errno == errno.EROFS:
        return Refused(f"cannot {verb} {uri}: that file system is read-only")
    if error.errno in _FAULTY:
        return Faulty(f"cannot {verb} {uri}: {error.strerror}")
    return DeeDSRError(f"cannot {verb} {uri}: {error.strerror or error}")


def _explain_s3(verb: str, uri: str, error: Exception) -> Exception | None:
    # Imported here: where botocore raised, it is loaded already, and local work does not need it.
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as aws

    bucket = uri.split("/")[2] if uri.startswith("s3://") else uri
    if isinstance(error, Boto3Error) and isinstance(error.__context__, aws.ClientError):
        error = error.__context__  # upload_file hides the server's answer in its own exception
    if isinstance(error, aws.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code == "NoSuchBucket":
            return UsageError(f"there is no bucket {bucket!r}: create it, or correct {uri} (and AWS_ENDPOINT_URL)")
        if code in ("NoSuchKey", "404", "NotFound"):
            return FileNotFoundError(uri)
        if code in ("PreconditionFailed", "412"):
            return Conflict(uri)
        if code in _NO_PERMISSION:
            return Refused(f"no permission to {verb} {uri}: these AWS credentials may not do that")
        if code in _WRONG_KEYS:
            return UsageError(f"cannot {verb} {uri}: the AWS credentials are not valid ({code})")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _FULL or status == 507:
            return Full(f"cannot {verb} {uri}: no space left in the bucket ({code})")
        return (Away if status >= 500 or status == 429 else DeeDSRError)(f"cannot {verb} {uri}: S3 answered {code}")
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError | aws.ProfileNotFound):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return UsageError(f"cannot {verb} {uri}: no AWS credentials found; {remedy}")
    if isinstance(error, aws.NoRegionError):
        return UsageError(f"cannot {verb} {uri}: no AWS region; set AWS_REGION")
    if isinstance(error, aws.ReadTimeoutError | aws.ConnectTimeoutError):
        return Away(f"cannot {verb} {uri}: the S3 endpoint does not answer; check AWS_ENDPOINT_URL and the network")
    if isinstance(error, aws.ConnectionError | aws.HTTPClientError):
        return Away(f"cannot {verb} {uri}: no connection to the S3 endpoint; check AWS_ENDPOINT_URL")
    if isinstance(error, aws.BotoCoreError | Boto3Error):
        return DeeDSRError(f"cannot {verb} {uri}: {_without_secrets(str(error))}")
    if isinstance(error, ValueError) and any(word in str(error) for word in ("endpoint", "URL")):
        return UsageError(f"cannot {verb} {uri}: AWS_ENDPOINT_URL is no URL; write http://host:port or https://host")
    return None


def _tells_secret(error: BaseException | None) -> bool:
    """Whether a traceback of `error`, as Ray logs it, would show keys: those of the environment or in the endpoint."""
    while error is not None:
        if any(secret in str(error) for secret in _secrets()):
            return True
        error = error.__cause__ or error.__context__
    return False


def _without_secrets(text: str) -> str:
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text


def _secrets() -> list[str]:
    held = [os.environ.get(name, "") for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")]
    endpoints = [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")]
    held += [endpoint.rpartition("@")[0].rpartition("/")[2] for endpoint in endpoints]
    return [secret for secret in held if secret]
