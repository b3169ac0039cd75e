"""Everything that can go wrong in operation, as one tree of exceptions.

A handler lets these rise; `core.web.ErrorMiddleware` renders them in the caller's dialect.
Each class fixes the HTTP status, the machine-readable code and whether a retry can help.
"""

from typing import ClassVar


class CortexError(Exception):
    """Base of every operational error.

    Args:
        message: one or two sentences for the caller; names the thing and the way out.
        param: the request field at fault, when there is one.
        retry_after_s: seconds after which a retry makes sense; sent as `Retry-After`.
        extras: further fields placed inside the error object (JSON scalars, lists, dicts).
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_server_error"
    kind: ClassVar[str] = "api_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        extras: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.extras = extras or {}


class InternalError(CortexError):
    """A fault of ours that the caller can do nothing about."""


class ConfigError(CortexError):
    """A configuration file cannot be used; the message names the file and the key."""

    code = "invalid_config"


class StartupError(CortexError):
    """A service cannot start (port in use, missing file); shown on the terminal."""

    code = "startup_failed"


class RemoteError(CortexError):
    """An error another Cortex process answered with, carried on with its own status and code."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        kind: str = "api_error",
        param: str | None = None,
        retry_after_s: float | None = None,
        extras: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s, extras=extras)
        # Instance values shadow the class defaults: this error speaks for its sender.
        self.status = status  # type: ignore[misc]
        self.code = code  # type: ignore[misc]
        self.kind = kind  # type: ignore[misc]


class BadRequestError(CortexError):
    """The request cannot be honoured as sent."""

    status = 400
    code = "invalid_request"
    kind = "invalid_request_error"


class MalformedJsonError(BadRequestError):
    """The body is not JSON."""

    code = "malformed_json"


class MissingModelError(BadRequestError):
    """The body names no model."""

    code = "missing_model_field"


class UnsupportedFieldError(BadRequestError):
    """A field asks for something that would change the answer and is not supported."""

    code = "unsupported_field"


class InvalidImageError(BadRequestError):
    """An image is broken, of an unknown type, over a bound or not to be had."""

    code = "invalid_image"


class ContextLengthExceededError(BadRequestError):
    """The prompt does not fit the model's context window."""

    code = "context_length_exceeded"


class PreviousResponseNotFoundError(BadRequestError):
    """The response that a request goes on from is not kept, or is another key's."""

    code = "previous_response_not_found"


class ModelCapabilityError(BadRequestError):
    """The model is not made for what is asked of it."""

    code = "model_capability"


class TemplateRenderError(BadRequestError):
    """The model's chat template refused the messages."""

    code = "template_render_failed"


class AuthenticationError(CortexError):
    """The key is missing or unknown."""

    status = 401
    code = "invalid_api_key"
    kind = "invalid_request_error"


class PermissionDeniedError(CortexError):
    """The key is known and may not do this."""

    status = 403
    code = "permission_denied"
    kind = "invalid_request_error"


class FleetSecretError(CortexError):
    """A neuron was asked by someone who does not show the fleet secret."""

    status = 401
    code = "fleet_secret_required"
    kind = "invalid_request_error"


class NodeNotFoundError(CortexError):
    """The gateway has no node of that name."""

    status = 404
    code = "node_not_found"
    kind = "invalid_request_error"


class ModelNotFoundError(CortexError):
    """No node and no catalogue entry knows the model."""

    status = 404
    code = "model_not_found"
    kind = "invalid_request_error"


class UnknownRequestError(CortexError):
    """No decision about a request of that id is kept."""

    status = 404
    code = "unknown_request"
    kind = "invalid_request_error"


class ResponseNotFoundError(CortexError):
    """No response of that id is kept for this key."""

    status = 404
    code = "response_not_found"
    kind = "invalid_request_error"


class ItemNotFoundError(CortexError):
    """A request refers to an item that is not kept for this key."""

    status = 404
    code = "item_not_found"
    kind = "invalid_request_error"


class RouteNotFoundError(CortexError):
    """The path is not part of the API."""

    status = 404
    code = "route_not_found"
    kind = "invalid_request_error"


class MethodNotAllowedError(CortexError):
    """The path exists under another method."""

    status = 405
    code = "method_not_allowed"
    kind = "invalid_request_error"


class ConflictError(CortexError):
    """The request contradicts the current state."""

    status = 409
    code = "conflict"
    kind = "invalid_request_error"


class InsufficientMemoryError(CortexError):
    """A load needs more memory than is free; extras carry needed and free bytes and residents."""

    status = 409
    code = "insufficient_memory"
    retryable = True


class BodyTooLargeError(CortexError):
    """The body is over the configured limit."""

    status = 413
    code = "body_too_large"
    kind = "invalid_request_error"


class CheckpointError(CortexError):
    """A checkpoint cannot be read or is not of a supported family; the message names what."""

    status = 422
    code = "unreadable_checkpoint"
    kind = "invalid_request_error"


class RateLimitError(CortexError):
    """The key has used up what it may for the moment."""

    status = 429
    code = "rate_limit_exceeded"
    kind = "rate_limit_error"
    retryable = True


class QuotaExceededError(CortexError):
    """The key has used up a budget that does not come back by itself."""

    status = 429
    code = "insufficient_quota"
    kind = "insufficient_quota"


class ServiceUnavailableError(CortexError):
    """Nothing can serve this now; retry later."""

    status = 503
    code = "service_unavailable"
    retryable = True


class LimitsUnavailableError(ServiceUnavailableError):
    """The store of rates and budgets does not answer."""

    code = "limits_unavailable"


class ResponseStoreError(ServiceUnavailableError):
    """The store of responses does not answer."""

    code = "response_store_unavailable"


class QueueFullError(ServiceUnavailableError):
    """The model's queue is at its bound."""

    code = "queue_full"


class ModelLoadingError(ServiceUnavailableError):
    """The model is still loading; extras carry the progress."""

    code = "model_loading"


class ModelRecoveringError(ServiceUnavailableError):
    """The model's engine ended unexpectedly and is being restarted."""

    code = "model_recovering"


class LoadFailedError(ServiceUnavailableError):
    """The model could not be loaded; the message carries the cause."""

    code = "load_failed"


class ShuttingDownError(ServiceUnavailableError):
    """The process is draining before it ends."""

    code = "shutting_down"


class EngineDiedError(CortexError):
    """The engine process ended while it served the request."""

    status = 502
    code = "engine_died"
    retryable = True


class UpstreamConnectionError(CortexError):
    """A node could not be reached or went silent."""

    status = 502
    code = "upstream_connection_error"
    retryable = True


class UpstreamMalformedError(CortexError):
    """A node answered something that is not part of the protocol."""

    status = 502
    code = "upstream_malformed_response"
