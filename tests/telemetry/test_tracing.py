from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ood_runners.gateway.timing import Timing
from ood_runners.telemetry import tracing
from ood_runners.telemetry.requests import working_for


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", lambda: provider.get_tracer("test"))
    yield exporter


def by_name(spans: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in spans.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def item(request: str) -> dict[str, str]:
    """What the gateway sends with a picture of a request."""
    timing = Timing()
    with tracing.span(request), working_for([{"request_id": request}]), timing.stage("features"):
        return tracing.baggage()


def test_a_batch_is_a_span_in_the_trace_of_each_request(spans: InMemorySpanExporter) -> None:
    items = [item("a"), item("b")]
    with tracing.batch("features", [items[0], items[1], items[0]]):
        assert not trace.get_current_span().get_span_context().is_valid  # of both, so of none
    found = by_name(spans)
    stages = {span.context.span_id: span for span in found["features"]}
    assert len(found["features compute"]) == 2
    for computed, request in zip(found["features compute"], (found["a"][0], found["b"][0]), strict=True):
        assert computed.parent is not None
        stage = stages[computed.parent.span_id]
        assert stage.parent is not None
        assert stage.parent.span_id == request.context.span_id
        assert computed.context.trace_id == request.context.trace_id
        assert computed.attributes == {"batch.pictures": 3, "batch.requests": 2}


def test_within_the_batch_of_one_request_its_trace_is_current(spans: InMemorySpanExporter) -> None:
    first, second = item("a"), item("b")
    seen = []
    with tracing.span("the first request this runner ever saw"):
        for one in (first, second):
            with tracing.batch("vae", [one, one]):
                seen.append(format(trace.get_current_span().get_span_context().trace_id, "032x"))
    assert seen == [one["traceparent"].split("-")[1] for one in (first, second)]
    assert seen[0] != seen[1]


def test_items_without_a_trace_or_with_a_wrong_one_make_no_trouble(spans: InMemorySpanExporter) -> None:
    with tracing.batch("vae", [{}, {"traceparent": ""}]):
        pass
    assert not spans.get_finished_spans()
    with tracing.batch("vae", [{"traceparent": "no trace"}]):
        pass
    [span] = spans.get_finished_spans()
    assert span.parent is None


def test_an_item_carries_nothing_where_there_is_nothing() -> None:
    assert tracing.baggage() == {}
    with working_for([{"request_id": "abc"}]):
        assert tracing.baggage() == {"request_id": "abc"}
