"""How a running server stops: the requests under way end, or are told that they will not; new ones are told 503.

uvicorn alone closes its door at the first signal and cuts the connections of what takes too long. Knows uvicorn, the
application and the engine.
"""

import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from t2l.serve.answers import log
from t2l.serve.engine import Engine

LAST_WORDS = 5
"""Seconds in which answers that were cut off may tell so, before their connections are closed."""


class PatientServer(uvicorn.Server):
    """uvicorn's server, which lets requests under way end when it is told to stop.

    The first signal begins the end: whatever comes then is answered with 503. When nothing is under way any more, when
    the time is up, or at a second signal, the answers that are left end with an error, and the server stops. A third
    signal does not wait for that either.

    Args:
        app: The application; its `state.closing` becomes true.
        engine: Writes the answers.
        grace: Seconds that requests under way have from the first signal on.
        on_start: Called when it can be connected to.
        options: Of `uvicorn.Config`.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        *,
        grace: float,
        on_start: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=LAST_WORDS, **options))
        self._app, self._engine, self._grace, self._on_start = app, engine, grace, on_start
        self._signals, self._until = 0, 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal; what follows from it is the next tick's to do, as a signal may come at any moment."""
        super().handle_exit(sig, frame)
        self._signals += 1
        self.should_exit = self._signals > 2

    async def on_tick(self, counter: int) -> bool:
        """Looks, ten times a second, whether it is time to stop."""
        if self._signals and not self._app.state.closing:
            self._app.state.closing, self._until = True, time.monotonic() + self._grace
            fields = {"requests": len(self.server_state.tasks), "grace": self._grace}
            log.info("closing: requests under way may end", extra={"fields": fields})
        if self._app.state.closing:
            left = len(self.server_state.tasks)
            if not left or self._signals > 1 or time.monotonic() >= self._until:
                if left:
                    log.warning("closing: requests are cut off", extra={"fields": {"requests": left}})
                self._engine.abort()
                self.should_exit = True
        return await super().on_tick(counter)
