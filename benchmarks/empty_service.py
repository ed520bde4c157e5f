"""Five BentoML services that do nothing, for `startup.py`: the least that a composition of five can take."""

from __future__ import annotations

import bentoml


@bentoml.service
class First:
    """One of four."""


@bentoml.service
class Second:
    """One of four."""


@bentoml.service
class Third:
    """One of four."""


@bentoml.service
class Fourth:
    """One of four."""


@bentoml.service
class Alone:
    """No dependencies: one process, as the fused profile."""


@bentoml.service
class Composed:
    """Depends on four, as the gateway on its runners."""

    first = bentoml.depends(First)
    second = bentoml.depends(Second)
    third = bentoml.depends(Third)
    fourth = bentoml.depends(Fourth)
