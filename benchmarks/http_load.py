"""Load over HTTP with Locust: clients that send one picture after the other."""

from __future__ import annotations

import locust  # first: it makes the standard library cooperative

# isort: split
import time
from collections.abc import Iterator

import gevent
from locust.env import Environment
from locust.exception import StopUser
from locust.stats import RequestStats
from urllib3 import encode_multipart_formdata

PATIENCE_S = 60.0


def client_class(url: str, pictures: list[bytes], product: str, tickets: Iterator[int], refused: list[int]) -> type:
    """A Locust user who sends one picture after the other for as long as there are tickets."""
    forms = [
        encode_multipart_formdata({"image": ("picture", data, _kind(data)), "product": product}) for data in pictures
    ]

    class Client(locust.FastHttpUser):
        host = url
        network_timeout = connection_timeout = PATIENCE_S

        @locust.task
        def detect(self) -> None:
            ticket = next(tickets, None)
            if ticket is None:
                raise StopUser
            body, kind = forms[ticket % len(forms)]
            request = self.client.post(
                "/detect",
                data=body,  # type: ignore[arg-type]  # bytes are taken as they are
                headers={"Content-Type": kind},
                catch_response=True,
            )
            with request as answer:
                if answer.status_code == 503 and answer.headers.get("Retry-After"):
                    refused.append(ticket)
                    answer.request_meta["name"] = "refused"
                    answer.success()
                    gevent.sleep(float(answer.headers["Retry-After"]))
                elif answer.status_code == 200 and '"verdict"' not in answer.text:
                    answer.failure("200 without a verdict")

    return Client


def send(
    url: str, pictures: list[bytes], product: str, requests: int, clients: int, seconds: float
) -> tuple[RequestStats, int]:
    """Send `requests` requests from `clients` clients at once; Locust's statistics, and how many were refused."""
    refused: list[int] = []
    user = client_class(url, pictures, product, iter(range(requests)), refused)
    # Who waits for an answer when the time is up still gets it: the next measurement finds the server idle.
    environment = Environment(user_classes=[user], stop_timeout=PATIENCE_S)
    runner = environment.create_local_runner()
    environment.stats.use_response_times_cache = False
    runner.start(clients, spawn_rate=clients)
    end = time.monotonic() + seconds
    gevent.sleep(0.5)
    while runner.user_count and time.monotonic() < end:
        gevent.sleep(0.1)
    runner.quit()
    return environment.stats, len(refused)


def _kind(data: bytes) -> str:
    return "image/jpeg" if data.startswith(b"\xff\xd8") else "image/png"
