"""Load test of the server with 32 clients for a minute: errors, mixed-up answers, memory, tokens per second.

python benchmarks/serving.py runs/laptop [--clients 32] [--seconds 60]

Starts `dsv3 serve` as a separate process. Each client repeats greedy requests for its prompts, every other one as a
stream; all answers to a prompt must equal the first.
"""

import argparse
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import psutil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dsv3_lightning", "serve", arguments.run, "--name", "m", "--port", str(port)]
    server = subprocess.Popen([*command, "--threads", "1"])
    try:
        wait_for(f"http://127.0.0.1:{port}/v1/models")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        options = {"model": "m", "max_tokens": arguments.tokens, "temperature": 0}
        prompts = [f"def f{i}(x):\n" for i in range(arguments.clients)]
        wanted = [client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts]
        end = time.monotonic() + arguments.seconds
        answers, errors, mixed = [0] * len(prompts), [0] * len(prompts), [0] * len(prompts)

        def ask(i: int) -> None:
            while time.monotonic() < end:
                try:
                    if answers[i] % 2:
                        events = client.completions.create(prompt=prompts[i], stream=True, **options)
                        text = "".join(event.choices[0].text for event in events)
                    else:
                        text = client.completions.create(prompt=prompts[i], **options).choices[0].text
                    mixed[i] += text != wanted[i]
                    answers[i] += 1
                except openai.OpenAIError:
                    errors[i] += 1

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        time.sleep(arguments.seconds / 6)
        process = psutil.Process(server.pid)
        early, done = process.memory_info().rss, sum(answers)
        start = time.monotonic()
        time.sleep(max(end - time.monotonic() - 0.5, 0))
        rate = (sum(answers) - done) * arguments.tokens / (time.monotonic() - start)
        late = process.memory_info().rss
        for thread in threads:
            thread.join()
        print(
            f"answers {sum(answers)}, errors {sum(errors)}, differing answers {sum(mixed)}, about {rate:,.0f} token/s"
        )
        print(f"memory after a sixth of the time {early / 2**20:.1f} MiB, at the end {late / 2**20:.1f} MiB")
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
