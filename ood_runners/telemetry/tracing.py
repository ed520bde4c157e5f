"""OpenTelemetry spans of the stages of a request, through BentoML's tracer.

BentoML follows a request from the gateway into a runner, but a runner computes several requests at once, in a task
that keeps the trace of the first request it ever saw. So each item carries its own trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ood_runners.telemetry import requests

KEY = "traceparent"  # in the items that runners get, as in the W3C's header
_propagator = TraceContextTextMapPropagator()


@cache
def tracer() -> trace.Tracer:
    """BentoML's: what is sampled and where it goes is set in BentoML's configuration.

    Where nothing is sampled, one that does nothing: BentoML's sampler would have every span recorded and then dropped,
    about a tenth of the gateway's work for a request.
    """
    if not BentoMLContainer.config.tracing.sample_rate.get():
        return trace.NoOpTracer()
    provider: trace.TracerProvider = BentoMLContainer.tracer_provider.get()
    return provider.get_tracer("ood_runners")


def span(stage: str) -> AbstractContextManager[trace.Span]:
    """A span around a stage, below the current one."""
    return tracer().start_as_current_span(stage, record_exception=False)


def baggage() -> dict[str, str]:
    """What an item carries so that a runner knows which request it belongs to."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    own = {requests.KEY: requests.current(), KEY: carrier.get(KEY, "")}
    return {key: value for key, value in own.items() if value}


@contextmanager
def batch(stage: str, items: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """A span around a batch in the trace of each request that has items in it.

    What is logged within names the trace where there is one only, and no trace rather than a wrong one otherwise.
    """
    parents = dict.fromkeys(str(item[KEY]) for item in items if item.get(KEY))
    spans = [
        tracer().start_span(
            f"{stage} compute",
            context=_propagator.extract({KEY: parent}, context.Context()),
            attributes={"batch.pictures": len(items), "batch.requests": len(parents)},
        )
        for parent in parents
    ]
    alone = trace.set_span_in_context(spans[0], context.Context()) if len(spans) == 1 else context.Context()
    token = context.attach(alone)
    try:
        yield
    finally:
        context.detach(token)
        for one in spans:
            one.end()
