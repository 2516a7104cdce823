"""What went wrong with a request, told the same way for every client: does it pass by itself, or is it final?"""

import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from time import time

from histoscale.data.secrets import scrub

_PACKAGES = ("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "obstore", "requests", "s3fs",
             "urllib3")  # fmt: skip
_REFUSED = {"ClientAuthenticationError", "CredentialUnavailableError", "NoCredentialsError", "PartialCredentialsError",
            "PermissionDeniedError", "RefreshError", "TokenRetrievalError", "UnauthenticatedError"}  # fmt: skip
_OBSTORE_STATUS = re.compile(r"status code: (\d{3})\b|\((\d{3}) [A-Z][A-Za-z ]+\)")


class StorageError(OSError):
    """A file could not be read for a reason outside the file; the message names the file and the cause."""


class Missing(StorageError):
    """There is no such file."""


class Changed(StorageError):
    """The file is not the one that was catalogued, or is shorter than it was."""


class Short(Exception):
    """Fewer bytes than asked for: a cut connection, or a file that became shorter."""


class Whole(Exception):
    """The server sends the whole file where a range was asked for."""


class Refusal(Exception):
    """A reply that is not the bytes. status: HTTP."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"{status} {reason}".strip())
        self.status, self.headers = status, headers


def unframed(error: BaseException) -> BaseException:
    """The error, without the frames that it and its causes came through. Where an error is a value those frames hold it in turn,
    with the bytes and pixels of a whole visit, until the garbage collector looks: once in hours, with as many objects as torch
    brings."""
    for cause in list(_causes(error)):
        cause.__traceback__ = None
    return error


def told(error: BaseException) -> str:
    """Name and text of an error on one line, without credentials."""
    text = scrub(" ".join(str(error).split()))
    return f"{type(error).__name__}{': ' + text[:300] if text else ''}"


def final(uri: str, option: str, error: BaseException) -> Exception | None:
    """What to raise at once, or None for what may pass by itself. option: the storage options that hold the credential."""
    status = status_of(error)
    names = {type(cause).__name__ for cause in _causes(error)}
    if isinstance(error, Whole):
        return StorageError(f"{scrub(uri)}: {error}; the server may not support ranges")
    absent = isinstance(error, FileNotFoundError) and status is None and not _cut(error)
    if absent or status in (404, 410) or "NotFoundError" in names:
        return Missing(f"{scrub(uri)}: no such file")
    if isinstance(error, PermissionError) or status in (401, 403) or names & _REFUSED:
        return StorageError(f"{scrub(uri)}: the store refuses the credential in {option} ({told(error)})")
    if status == 416:
        return Changed(f"{scrub(uri)} is shorter than it was: {told(error)}")
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        return StorageError(f"{scrub(uri)}: the store refuses the request ({told(error)})")
    known = isinstance(error, OSError | TimeoutError | EOFError | Short) or status is not None
    if known or type(error).__module__.split(".")[0] in _PACKAGES:
        return None
    return error if isinstance(error, Exception) else StorageError(f"{scrub(uri)}: {told(error)}")


def retry_after_s(error: BaseException) -> float:
    """Seconds that the store asks to wait (Retry-After: seconds or a date, RFC 9110 10.2.3); 0 where it does not say."""
    for cause in _causes(error):
        reply = getattr(cause, "response", None)
        meta = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}) if isinstance(reply, dict) else {}
        headers = (getattr(cause, "headers", None), getattr(reply, "headers", None), meta)
        for found in (found for found in headers if isinstance(found, Mapping)):
            said = {str(name).lower(): value for name, value in found.items()}
            value = said.get("retry-after")
            if isinstance(value, str) and value.strip():
                return _seconds(value.strip(), said.get("date"))
    return 0.0


def _seconds(value: str, date: str | None) -> float:
    """date: when the reply was sent by the store's clock, which ours may differ from."""
    if value.isdigit():
        return float(value)
    try:
        now = parsedate_to_datetime(date).timestamp() if date else time()
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return 0.0


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an exception of any client."""
    for cause in _causes(error):
        module = type(cause).__module__
        if module == "aiohttp.http_exceptions":
            continue  # a body that was cut calls itself 400
        if module.startswith("obstore"):
            found = _OBSTORE_STATUS.search(str(cause))
            return int(found[1] or found[2]) if found else None
        reply = getattr(cause, "response", None)
        meta = reply.get("ResponseMetadata", {}) if isinstance(reply, dict) else {}
        for value in (getattr(cause, "status", None), getattr(cause, "status_code", None), getattr(cause, "code", None),
                      meta.get("HTTPStatusCode")):  # fmt: skip
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None


def _cut(error: BaseException) -> bool:
    """Whether a "not found" is a connection that failed: fsspec's http client says so of every failure of `info`."""
    causes = list(_causes(error))[1:]
    return any(isinstance(c, TimeoutError | ConnectionError) or type(c).__module__.startswith("aiohttp") for c in causes)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
