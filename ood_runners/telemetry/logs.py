"""The request id on every line of BentoML's log and, where it is asked for, one JSON object a line."""

from __future__ import annotations

import logging
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from ood_runners.telemetry import requests

LOGGERS = ("bentoml", "uvicorn.error", "")
# What BentoML adds to a record for its line of text.
TEXT_ATTRIBUTES = ("levelname_bracketed", "trace_msg", "service_name", "color_message", "ctx")


class RequestIdFilter(logging.Filter):
    """Adds the current request's id to a record, BentoML's access log included."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        request_id = requests.current()
        record.__dict__["request_id"] = request_id or None  # BentoML's is the number of a span
        if request_id:
            record.__dict__["trace_msg"] = f"{getattr(record, 'trace_msg', '')} (request={request_id})"
        return True


class Lines(JsonFormatter):
    """One JSON object a line: time, level, logger, component, message, request and trace, and an event's own fields."""

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            reserved_attrs=[*RESERVED_ATTRS, *TEXT_ATTRIBUTES],
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Add the trace, and leave out what is not there."""
        from bentoml._internal.context import trace_context

        if trace_context.trace_id:
            log_data["trace_id"] = format(trace_context.trace_id, "032x")
            log_data["span_id"] = format(trace_context.span_id, "016x")
        return {name: value for name, value in super().process_log_record(log_data).items() if value is not None}


def configure(form: str) -> None:
    """Set up the handlers that BentoML has made in this process; `form` is "text" or "json"."""
    handlers = {handler for name in LOGGERS for handler in logging.getLogger(name).handlers}
    for handler in handlers:
        if any(isinstance(one, RequestIdFilter) for one in handler.filters):
            continue
        handler.addFilter(RequestIdFilter())
        if form == "json":
            handler.setFormatter(Lines())


def event(logger: logging.Logger, name: str, **fields: object) -> None:
    """Log that something happened: ``name key=value …`` as text, and the fields by name in JSON."""
    pairs = " ".join(f"{key}={value}" for key, value in fields.items())
    logger.info("%s %s", name, pairs, extra=fields)
