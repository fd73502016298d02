"""A server in a thread, as clients meet it."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import uvicorn

from dsv3_lightning.inference.batching import Engine
from dsv3_lightning.inference.server.app import Service, build_app
from dsv3_lightning.inference.server.refusals import Json


class Served:
    """A server on a free port, in a thread. options: of build_app."""

    def __init__(self, model, tokenizer, rows=4, waiting=64, seconds=60.0, **options) -> None:
        self.engine = Engine(model, tokenizer, rows, waiting, seconds)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(build_app(self.engine, tokenizer, "small", **options), log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()

    def idle(self) -> bool:
        """Whether no text is being written or waits, within ten seconds."""
        for _ in range(500):
            if not self.engine.running and not self.engine.queue:
                return True
            time.sleep(0.02)
        return False

    def ask(self, method: str, path: str, data: bytes | None = None, **headers: str):
        """Status, headers and body of any request, which needs no valid client."""
        named = {"Content_Type": "application/json"} | headers
        headers = {name.replace("_", "-"): value for name, value in named.items()}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()


def assert_refused(served, path, body, status, message) -> dict:
    """In OpenAI's form; gives the error."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, _, answer = served.ask("POST", path, data)
    error = json.loads(answer)["error"]
    assert got == status and message in error["message"], error
    assert error.keys() == {"message", "type", "param", "code"}
    return error


__all__ = ["Engine", "Json", "Served", "Service", "assert_refused"]
