"""What the server takes on, and how it says no: every bound in one place, in OpenAI's error format."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from persona_probe.errors import InputError, PersonaProbeError


@dataclass(frozen=True)
class Limits:
    """Bounds on what one client may ask and on what all of them may ask at once.

    Raises `InputError` for a bound that would refuse everything.
    """

    max_tokens: int = 512
    """Longest answer, in tokens; also how long one may get where a request does not say."""
    max_batch: int = 64
    """Answers written at the same time."""
    max_queue: int = 512
    """Answers that wait for a place; one more is refused with 429."""
    max_gain: float = 4.0
    """Largest gain that a request may put in the place of a fix's own."""
    timeout: float = 120.0
    """Seconds from the end of the request's body to the end of its answer."""
    body_limit: int = 1 << 20
    """Bytes of one request's body."""
    grace: float = 30.0
    """Seconds that running answers are given to end, once the server is told to stop."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("grace", "max_gain") else 1e-3
            if not least <= value < float("inf"):
                raise InputError(f"{field.name} must be a positive number, not {value}")


class Refusal(PersonaProbeError):
    """A request that is answered with an HTTP status instead of text."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        fix: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message, fix=fix)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's name for this family of errors."""
        return {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI writes errors, so that its clients raise the right exception."""
        message = self.message if self.fix is None else f"{self.message} ({self.fix})"
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` where coming back later helps; a new connection where this one is to end."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        # the rest of a body that was not read would be taken for the next request
        return headers | ({"Connection": "close"} if self.status in (408, 413, 503) else {})


def as_refusal(error: Exception) -> Refusal:
    """Any error in the client's terms: what a request caused is 400, what we caused is 500 and says
    no more than its kind.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InputError):
        return Refusal(400, error.message, fix=error.fix)
    if isinstance(error, PersonaProbeError):
        return Refusal(500, error.message, fix=error.fix)
    return Refusal(500, f"internal error: {type(error).__name__}", code="internal_error")
