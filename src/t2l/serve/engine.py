"""Continuous batching with an adapter a row: requests join and leave the batch between two tokens.

One thread owns the model. In each round it takes what came in, reads a piece of the prompts that wait, and gives every
row that has read its prompt one more token, all in one forward pass over one cache.

Transformers has a continuous batching of its own, which cannot carry this: it shares the keys and values of equal
prompts whatever adapter made them, draws all rows' tokens from one generator, and ends all requests when one fails.

Knows threads, the queue and the batch. Knows no HTTP and no files.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from t2l.errors import AnswerError, BusyError, ClosingError, RequestError
from t2l.serve.answers import Answer, End, Generation, Piece, log
from t2l.serve.batch import Batch
from t2l.serve.limits import Limits

Result = TypeVar("Result")


class Engine:
    """Answers requests on one base model, many at once.

    Args:
        model: A causal language model, of a kind that `Batch` takes. From now on only the engine runs it.
        tokenizer: Its tokenizer.
        limits: What is taken on at once.
        on_end: Called with each answer that has ended and the reason, from the engine's thread.

    Raises:
        ConfigError: if it cannot be served.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        limits: Limits | None = None,
        *,
        on_end: Callable[[Answer, End], None] = lambda answer, end: None,
    ) -> None:
        self.limits, self.tokenizer, self.config = limits or Limits(), tokenizer, model.config
        self._batch = Batch(model, tokenizer, prompt_piece=self.limits.prompt_piece, on_end=on_end)
        self._waiting: deque[Answer] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._news = threading.Condition()
        self._closing = self._aborting = self._lost = False
        self._thread = threading.Thread(target=self._run, name="t2l-engine", daemon=True)
        self._thread.start()

    @property
    def most_tokens(self) -> int:
        """Of a request, prompt and answer together."""
        return min(self._batch.most_tokens, self.limits.tokens)

    @property
    def counts(self) -> Counter[str]:
        """What was done since the start: tokens read and written, forward passes and their rows, retries."""
        return self._batch.counts

    @property
    def state(self) -> dict[str, int]:
        """Answers under way, requests and jobs that wait, and memory that rows take in bytes."""
        now = {"running": len(self._batch.rows), "waiting": len(self._waiting), "jobs": len(self._jobs)}
        return now | self._batch.memory

    @property
    def alive(self) -> bool:
        """Whether requests are served; not after `close`, or when the device has failed for good."""
        return self._thread.is_alive() and not self._closing

    def submit(self, generation: Generation, listener: Callable[[Piece], None] | None = None) -> Answer:
        """Queues a request.

        Args:
            generation: What is asked for.
            listener: Where pieces go in place of the answer's iterator; called from the engine's thread.

        Raises:
            RequestError: if the request can never be served.
            BusyError: if the queue is full.
            ClosingError: if the engine closes.
            AnswerError: if its device has failed for good.
        """
        answer = Answer(generation, listener)
        if not generation.prompt or generation.max_tokens < 1:
            raise RequestError("An answer needs a prompt of at least one token, and max_tokens of at least 1")
        if answer.most_tokens > self.most_tokens:
            raise RequestError(
                f"The prompt has {answer.prompt_tokens:,} tokens; with {generation.max_tokens:,} for the answer that "
                f"is {answer.most_tokens:,}, and at most {self.most_tokens:,} fit. Shorten the prompt, or ask for "
                "fewer tokens"
            )
        with self._news:
            self._refuse_if_closing()
            if len(self._waiting) >= self.limits.waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already, which is the limit; try again later")
            self._waiting.append(answer)
            self._news.notify()
        return answer

    def run(self, job: Callable[[], Result]) -> "Future[Result]":
        """Runs what needs the model for itself between two tokens, on the plain base model.

        Raises:
            BusyError: if too many jobs wait.
            ClosingError: if the engine closes.
            AnswerError: if its device has failed for good.
        """
        future: Future[Result] = Future()
        with self._news:
            self._refuse_if_closing()
            if len(self._jobs) >= self.limits.waiting:
                raise BusyError(f"{len(self._jobs)} adapters wait to be written, which is the limit; try again later")
            self._jobs.append((job, future))
            self._news.notify()
        return future

    def abort(self) -> None:
        """Takes nothing new and ends what is under way before its next token, without waiting for it."""
        with self._news:
            self._closing = self._aborting = True
            self._news.notify()

    def close(self, patience: float = 0.0) -> None:
        """Takes nothing new, lets what is under way end for so many seconds, ends the rest and stops."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join(patience)
        self.abort()
        self._thread.join()
        self._batch.close()

    def _refuse_if_closing(self) -> None:
        if self._lost:
            raise AnswerError("The server's engine stopped; its log says why")
        if self._closing:
            raise ClosingError("The server is shutting down; try again later")

    # --------------------------------------------------------------------------------------- the engine's thread

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._news:
                while not (self._waiting or self._jobs or self._batch.rows or self._closing):
                    self._news.wait()
                if not (self._waiting or self._jobs or self._batch.rows):
                    return
            try:
                self._round()
            except Exception as error:  # no request may wait for ever because of a fault in here
                log.exception("a round failed; its answers end")
                self._batch.counts["rounds_failed"] += 1
                try:
                    self._batch.fail(error)
                except Exception:  # such as a device that does nothing any more
                    log.exception("the engine cannot go on")
                    self._give_up()
                    return

    def _give_up(self) -> None:
        """Tells everybody who waits, without the model or its device."""
        with self._news:
            self._closing = self._lost = True
            answers = [*(row.answer for row in self._batch.rows), *self._waiting]
            self._batch.rows.clear()
            self._waiting.clear()
            jobs = [future for _, future in self._jobs]
            self._jobs.clear()
        for answer in answers:
            self._batch.end(answer, Piece(end="error", error="the server's engine stopped; its log says why"))
        for future in jobs:
            future.set_exception(AnswerError("The server's engine stopped; its log says why"))

    def _round(self) -> None:
        self._do_a_job()
        if self._aborting:
            for answer in (*self._waiting, *(row.answer for row in self._batch.rows)):
                answer.cancel()
        self._batch.drop_overdue()
        self._admit()
        self._batch.step()

    def _do_a_job(self) -> None:
        """One at a time, so that the rows go on in between."""
        with self._news:
            job, future = self._jobs.popleft() if self._jobs else (None, None)
        if job is None or future is None or not future.set_running_or_notify_cancel():
            return
        if self._aborting:
            future.set_exception(ClosingError("The adapter was not written: the server is shutting down"))
            return
        self._batch.plain()
        try:
            future.set_result(job())
        except Exception as error:  # whoever asked for it is told
            future.set_exception(error)

    def _admit(self) -> None:
        """Lets waiting requests join, in order, as far as there is room for what they may come to need."""
        joining: list[Answer] = []
        with self._news:
            overdue = [(answer, why) for answer in self._waiting if (why := answer.overdue()) is not None]
            for answer, _ in overdue:
                self._waiting.remove(answer)
            under_way = [row.answer.most_tokens for row in self._batch.rows]
            while self._waiting and not self._batch.reading and len(under_way) < self.limits.rows:
                under_way.append(self._waiting[0].most_tokens)
                if len(under_way) * max(under_way) > self.limits.tokens:
                    break
                joining.append(self._waiting.popleft())
        for answer, why in overdue:
            self._batch.end(answer, Piece(end=why))
        if joining:
            self._batch.join(joining)
