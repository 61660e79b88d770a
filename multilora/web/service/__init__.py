"""The service behind the web app: a queue, and a worker process per device that owns pipeline and LoRA state.

    service = Service("embedded")
    session = service.session("token of a browser, or a user's name")
    for entry in service.library(session): ...
    job = service.submit(Compose(recipe=recipe), session)        # Refused says why not, in words
    for event in job.events():                                   # queued, progress, preview, then one of
        ...                                                      # done, error, cancelled
    job.cancel()

Nothing here imports torch before a file is uploaded: models live in the workers.
"""

from multilora.web.service.front import Service
from multilora.web.service.jobs import Job
from multilora.web.service.limits import Limits, Refused
from multilora.web.service.sessions import Entry, Session
from multilora.web.service.spec import (
    Base,
    Compare,
    Compose,
    Event,
    Fisher,
    GateMap,
    Gram,
    Inspect,
    Merge,
    Output,
    Overlap,
    Picture,
    Request,
    Result,
    Score,
    Share,
    Text,
)

__all__ = [
    "Base", "Compare", "Compose", "Entry", "Event", "Fisher", "GateMap", "Gram", "Inspect", "Job", "Limits", "Merge",
    "Output", "Overlap", "Picture", "Refused", "Request", "Result", "Score", "Service", "Session", "Share", "Text",
]  # fmt: skip
