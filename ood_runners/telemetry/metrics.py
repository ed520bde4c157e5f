"""The service's own Prometheus metrics, on the same ``/metrics`` page as BentoML's; docs/metrics.md explains each.

Labels take few values, whatever clients send: products and versions are those in the store, codes are those of
`ood_runners.errors`, stages are named in the code. BentoML sets the folder in which the processes of a server add up
their figures before it imports this, and empties it when it starts.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

P_VALUES = (0.01, 0.02, 0.05, *(i / 10 for i in range(1, 11)))
RELATIVE_SCORES = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

verdicts = Counter("ood_verdicts", "Judged pictures.", ["product", "version", "verdict"])
p_values = Histogram("ood_p_value", "p-values of judged pictures.", ["product", "detector"], buckets=P_VALUES)
relative_scores = Histogram(
    "ood_relative_score",
    "Scores of judged pictures; 0 is the median normal picture, 1 the score at which alpha is reached.",
    ["product", "detector"],
    buckets=RELATIVE_SCORES,
)
rejected_requests = Counter("ood_rejected_requests", "Requests answered with an error.", ["code"])
rejected_pictures = Counter("ood_rejected_pictures", "Pictures that could not be judged.", ["code"])
stage_seconds = Histogram("ood_stage_seconds", "Time that a stage of a request took.", ["stage"], buckets=SECONDS)
queue_seconds = Histogram(
    "ood_queue_seconds", "Time before a stage was computed, the way to its runner included.", ["stage"], buckets=SECONDS
)
compute_seconds = Histogram("ood_compute_seconds", "Time that a runner computed a batch.", ["stage"], buckets=SECONDS)
batch_pictures = Histogram(
    "ood_batch_pictures", "Pictures that a runner computed at once.", ["stage"], buckets=PICTURES
)

# Only the newest value counts: that of a process which was killed must not stay.
loaded_versions = Gauge(
    "ood_loaded_versions", "Versions that a runner holds in memory.", ["stage"], multiprocess_mode="mostrecent"
)
loaded_bytes = Gauge("ood_loaded_bytes", "Bytes that they take.", ["stage"], multiprocess_mode="mostrecent")
alpha = Gauge(
    "ood_alpha",
    "False-alarm rate that a version was fitted for.",
    ["product", "version"],
    multiprocess_mode="mostrecent",
)
served_products = Gauge("ood_served_products", "Products that can be asked for.", multiprocess_mode="mostrecent")
refused_products = Gauge(
    "ood_refused_products",
    "Products whose version in production was refused; the one before answers, if any.",
    multiprocess_mode="mostrecent",
)
# Of all gateways together; `setup.forget_killed` takes out those of a gateway that was killed.
pending_pictures = Gauge("ood_pending_pictures", "Pictures on their way.", multiprocess_mode="livesum")
