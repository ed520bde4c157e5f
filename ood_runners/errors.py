"""Errors a person can act on: one sentence, one code, one HTTP status.

Everything this package raises for a cause outside itself (a file, a request, a full disk, a missing
version) is an `OODError`. The command line prints the sentence and exits with 1; the service
answers ``{"error": {"code", "message"}}`` with the status. Anything else is a bug.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class OODError(Exception):
    """Base of all errors that a user, a client or an operator can mend.

    The message is one sentence that says what is wrong and, where it can, what to do next.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    @property
    def message(self) -> str:
        return str(self)

    def to_dict(self) -> dict[str, str]:
        """The body of an error answer, without its outer ``{"error": …}``."""
        return {"code": self.code, "message": self.message}


class MalformedRequest(OODError):
    """The request itself cannot be read (a missing field, a string where a file belongs)."""

    code = "malformed"
    status = 400


class Unauthorised(OODError):
    """An API key is required and none, or a wrong one, was sent."""

    code = "unauthorised"
    status = 401


class NotFound(OODError):
    """No such product or version; the message names those that exist."""

    code = "not_found"
    status = 404


class MethodNotAllowed(OODError):
    """The path exists and is asked with another method."""

    code = "method_not_allowed"
    status = 405


class TooLarge(OODError):
    """More bytes, pixels or pictures than the limits allow."""

    code = "too_large"
    status = 413


class PictureError(OODError):
    """Bytes that are not a picture we read: empty, truncated, another format."""

    code = "not_a_picture"
    status = 415


class UnsupportedMediaType(OODError):
    """The body is of a kind that is not read here, such as pickle."""

    code = "unsupported_media_type"
    status = 415


class BadParameter(OODError):
    """A parameter is readable but out of range (``alpha=2``)."""

    code = "bad_parameter"
    status = 422


class Overloaded(OODError):
    """The queue is longer than can be served in time, or a runner is away; try again in `retry_after` seconds."""

    code = "overloaded"
    status = 503

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = max(1, retry_after)


class DeadlineExceeded(OODError):
    """The request did not finish within its deadline."""

    code = "deadline_exceeded"
    status = 504


class ArtifactError(OODError):
    """A stored version is damaged, foreign, from the future, or does not reproduce its golden picture."""

    code = "artifact_refused"
    status = 503


class DataError(OODError):
    """The folder of pictures cannot be fitted or evaluated as it is."""

    code = "data"


class WeightsError(OODError):
    """Backbone weights are missing, unreachable or do not fit the network."""

    code = "weights"


_KINDS = {kind.code: kind for kind in OODError.__subclasses__()}


def error_from_dict(error: Mapping[str, str]) -> OODError:
    """The error that `OODError.to_dict` wrote in another process."""
    return _KINDS.get(error["code"], OODError)(error["message"])
