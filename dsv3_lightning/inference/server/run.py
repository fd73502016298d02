"""The server as a process: from its start to Ctrl-C."""

import logging
import socket
import time

import uvicorn
from starlette.applications import Starlette

LAST_ANSWERS = 5  # seconds that texts in the making get after Ctrl-C


class Server(uvicorn.Server):
    """Whose Ctrl-C gives the texts in the making LAST_ANSWERS seconds and then tells their clients: a second before
    uvicorn would cut them off in mid-text."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_ANSWERS + 1))
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.ends = time.monotonic() + LAST_ANSWERS
        if self.server_state.tasks:
            print(f"dsv3: stopping; texts in the making get {LAST_ANSWERS} seconds", flush=True)
        # A second Ctrl-C, or a client that doesn't read, still ends in uvicorn's cut: a traceback each, and no news.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
