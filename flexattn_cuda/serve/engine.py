"""The thread that owns the model, and answers jobs in batches.

It starts as soon as a job is there, with all that wait by then: a batch never waits for others to come. Decoding is
greedy, so an answer is what it would be alone, up to the rounding of sums over batches of other shapes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from flexattn_cuda.mechanism.trace import Trace
from flexattn_cuda.serve.errors import RequestError, timed_out
from flexattn_cuda.serve.images import ImageCache, ServedImage, encode
from flexattn_cuda.serve.jobs import Failed, Job
from flexattn_cuda.serve.metrics import Metrics
from flexattn_cuda.serve.rows import Row, Rows
from flexattn_cuda.tasks.ask import end_ids, generate_greedily
from flexattn_cuda.tasks.encoded import prompt_inputs
from flexattn_cuda.tasks.models import HRModel, TrainingProcessor

_HR_INPUTS = ("hr_features", "valid_rect")
_LOG = logging.getLogger(__name__)


class Engine:
    """Answers jobs.

    Args:
        model: The model, which nothing else may use.
        processor: Its processor.
        cache: Where encoded images are kept.
        batch_size: Maximum number of jobs to answer together.
        metrics: Counters.
    """

    def __init__(
        self, model: HRModel, processor: TrainingProcessor, cache: ImageCache, batch_size: int, metrics: Metrics
    ):
        self._model, self._processor, self._cache, self._metrics = model, processor, cache, metrics
        self._batch_size = batch_size
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="flexattn-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Refuse what waits, and wait until the current batch is answered."""
        with self._changed:
            self._stopping = True
            left, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for job in left:
            job.emit(Failed(RequestError("the server is stopping", status=503, code="stopping")))
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Number of jobs that are not begun."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Answer a job when its turn comes; its events follow.

        Raises:
            RequestError: If the server is stopping.
        """
        with self._changed:
            if not self.alive:
                raise RequestError("the server is stopping", status=503, code="stopping")
            self._waiting.append(job)
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._metrics.batch.observe(len(batch))
            try:
                self._answer(batch)
            except Exception as error:
                _LOG.exception("a batch of %d failed", len(batch))
                failed = Failed(_error_of(error, len(batch)))
                for job in batch:
                    job.emit(failed)

    def _next_batch(self) -> list[Job]:
        """Return the job that has waited longest and others that can share its forward calls; [] to stop."""
        with self._changed:
            while True:
                self._drop_ended()
                if self._waiting or self._stopping:
                    break
                self._changed.wait()
            alike = [job for job in self._waiting if job.wanted.hr == self._waiting[0].wanted.hr]
            batch = alike[: self._batch_size]
            for job in batch:
                self._waiting.remove(job)
        return batch

    def _drop_ended(self) -> None:
        for job in list(self._waiting):
            if job.cancelled or job.late:
                self._waiting.remove(job)
                job.emit(Failed(timed_out(job.timeout)))

    def _answer(self, batch: Sequence[Job]) -> None:
        images = [[self._encoded(image) for image in job.prompt.images] for job in batch]
        trace = Trace() if any(job.wanted.trace for job in batch) else None
        ends = end_ids(self._model, self._processor)
        rows = [Row(job, number, self._processor.tokenizer, ends) for number, job in enumerate(batch)]
        watching = Rows(rows, trace, self._metrics.tokens.inc)
        generate_greedily(
            self._model,
            self._processor,
            self._inputs(batch, images),
            max(job.wanted.max_tokens for job in batch),
            stopping_criteria=[watching],
            flexattn_trace=trace,
        )

    def _encoded(self, image: ServedImage) -> ServedImage:
        kept = image if image.encoded else self._cache.find(image.digest)
        self._metrics.images.labels("encoded" if kept is None else "kept").inc()
        if kept is None:
            kept = encode(self._model, image)
            self._cache.keep(kept)
        return kept

    def _inputs(self, batch: Sequence[Job], images: Sequence[Sequence[ServedImage]]) -> dict[str, Any]:
        """Return what `generate` takes of the prompts of a batch and of their images."""
        flat = [image.inputs for of_job in images for image in of_job]
        inputs = prompt_inputs([job.prompt.inputs for job in batch], flat, self._processor.pad_id, self._model.device)
        return inputs if batch[0].wanted.hr else self._without_hr(inputs)

    def _without_hr(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave HR tokens out or, for families that take no features, without weight."""
        if "pixel_values_hr" in inputs:
            return inputs | {"hr_alpha": 0.0}
        return {name: value for name, value in inputs.items() if name not in _HR_INPUTS}


def _error_of(error: Exception, count: int) -> RequestError:
    if isinstance(error, torch.OutOfMemoryError):
        return RequestError(
            f"the GPU does not have enough memory for {count} requests together; start the server with a smaller "
            "--batch-size, or ask for less",
            status=503,
            code="out_of_memory",
        )
    return RequestError("the model failed to answer; the server's log says why", status=500, code="internal_error")
