"""The server process, from its start to Ctrl-C."""

import logging
import socket
import time

import uvicorn
from starlette.applications import Starlette

LAST_ANSWERS = 5  # seconds that running texts get after Ctrl-C


class Server(uvicorn.Server):
    """A server that on Ctrl-C gives running texts LAST_ANSWERS seconds and then ends their responses properly, a
    second before uvicorn would cut the connections."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_ANSWERS + 1))
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.ends = time.monotonic() + LAST_ANSWERS
        if self.server_state.tasks:
            print(f"dsv3: stopping; texts in the making get {LAST_ANSWERS} seconds", flush=True)
        # After a second Ctrl-C, or if a client doesn't read, uvicorn still cuts connections, with a traceback each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
