"""Twenty visitors at once on this machine's own loopback: errors, mix-ups, response times, memory of the server.

    python -m benchmarks.load
    python -m benchmarks.load --minutes 30
    python -m benchmarks.load --visitors 5 --rounds 2 --url http://127.0.0.1:7860/

Every visitor has an image of its own, and in each round classifies it by the API, explores it as the page does and
fetches the maps of every block. All answers must be those that the image gets when it is alone. With --minutes the
visitors come again until the time is over, while a stranger sends hostile images, checkpoints and requests. Without
--url a server is started, on an untrained checkpoint if the project has none; the run then fails, too, if the server's
resident memory ever exceeds the bound that docs/app.md states, or if it prints a traceback of this project's code.
"""

import argparse
import base64
import io
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

import vca
from app.ui import LAUNCH, WEIGHTS, build
from benchmarks.hostile import Stranger
from training.core.cli import interruptible

MOST_VISITORS, MOST_ROUNDS, PATIENCE = 50, 20, 300
MOST_MEGABYTES = 6144  # docs/app.md says what it consists of


def serve(weights: str, port: int) -> None:
    """Serves the app of a folder of checkpoints, until the process ends."""
    build(Path(weights)).launch(**LAUNCH, server_name="127.0.0.1", server_port=port, quiet=True)


def untrained(folder: str) -> str:
    """Writes a checkpoint with random weights into a folder; returns the folder."""
    model = vca.create_model("vca_vit_pico_patch4_32", num_classes=10)
    vca.save(model, Path(folder) / "vca_untrained", label_names=[f"class {i}" for i in range(10)])
    return folder


def picture(number: int) -> bytes:
    """The image of one visitor, as PNG."""
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((320, 320), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


class Visitor:
    """One visitor with an image, over HTTP as gradio's client and the page talk to the server."""

    def __init__(self, url: str, number: int):
        self.http = httpx.Client(base_url=f"{url.rstrip('/')}/gradio_api/", timeout=PATIENCE)
        self.session = f"visitor{number}"
        config = httpx.get(f"{url.rstrip('/')}/config", timeout=PATIENCE).json()
        explorer = next(c for c in config["components"] if c["props"].get("elem_id") == "explorer")
        self.explorer = explorer["id"]
        self.explore_event = next(
            d["id"] for d in config["dependencies"] if d["outputs"] == [self.explorer] and d["backend_fn"]
        )
        choices = next(c["props"]["choices"] for c in config["components"] if c["props"].get("label") == "Model")
        self.model = choices[0][1]
        content = picture(number)
        [path] = self.http.post("upload", files=dict(files=(f"{number}.png", content))).raise_for_status().json()
        self.image = dict(path=path, orig_name=f"{number}.png", meta=dict(_type="gradio.FileData"))
        self.seconds: dict[str, list[float]] = {}

    def _timed(self, name: str, function, *args):
        start = time.perf_counter()
        answer = function(*args)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return answer

    def _streamed(self, path: str, **params) -> Iterator[str]:
        """The lines of a stream, whose heartbeats go on for ever where the answer does not come."""
        end = time.monotonic() + PATIENCE
        with self.http.stream("GET", path, params=params) as stream:
            for line in stream.raise_for_status().iter_lines():
                if time.monotonic() > end:
                    raise TimeoutError(f"{path}: no answer within {PATIENCE} s.")
                yield line

    def classify(self) -> dict:
        """Probabilities by label, from the public endpoint."""
        request = dict(data=[self.image, self.model, 5])
        event = self.http.post("call/classify", json=request).raise_for_status().json()["event_id"]
        answer = "\n".join(self._streamed(f"call/classify/{event}"))
        complete = re.search(r"event: complete\ndata: (.*)", answer)
        if not complete:
            raise RuntimeError(f"/classify failed: {answer}")
        return json.loads(complete[1])[0]

    def explore(self) -> dict:
        """What the server sends to the explorer: a token for the maps, and what the page shows."""
        request = dict(data=[self.image, self.model], fn_index=self.explore_event, session_hash=self.session)
        self.http.post("queue/join", json=request).raise_for_status()
        for line in self._streamed("queue/data", session_hash=self.session):
            message = json.loads(line.removeprefix("data:")) if line else {}
            if message.get("msg") == "process_completed":
                if not message["success"]:
                    raise RuntimeError(f"exploring failed: {message}")
                return json.loads(message["output"]["data"][0])
        raise RuntimeError("the server ended the stream before the answer.")

    def fetch(self, token: str, block: int) -> dict[str, bytes]:
        """The maps of one block."""
        request = dict(data=dict(token=token, block=block), fn_name="fetch_maps", component_id=self.explorer)
        answer = self.http.post("component_server", json=request | dict(session_hash=self.session))
        arrays = answer.raise_for_status().json()
        if "expired" in arrays:
            raise RuntimeError("the maps of a new token are not there.")
        return {name: base64.b64decode(array["data"]) for name, array in arrays.items()}

    def visit(self) -> tuple:
        """All that one round gives, times noted, without the token."""
        labels = self._timed("classify", self.classify)
        run = self._timed("explore", self.explore)
        token = run.pop("token")
        maps = [self._timed("fetch maps", self.fetch, token, block) for block in range(len(run["blocks"]))]
        return labels, run, maps, token

    def mix_ups(self, expected: tuple, rounds: int) -> tuple[int, list[str]]:
        """Visits `rounds` times; returns how many answers differ from `expected`, and the tokens."""
        answers = [self.visit() for _ in range(rounds)]
        return sum(answer[:3] != expected[:3] for answer in answers), [answer[3] for answer in answers]


def peak_megabytes(process: int) -> float:
    """The most resident memory that a process of this machine has had."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def measure(url: str, visitors: int, rounds: int, minutes: float = 0) -> int:
    """Prints response times; returns the number of answers for another visitor and of the server's faults."""
    with ThreadPoolExecutor(visitors) as pool:
        crowd = list(pool.map(Visitor, [url] * visitors, range(visitors)))
        alone = [visitor.visit() for visitor in crowd]
        if len({json.dumps(answer[0]) for answer in alone}) < visitors:
            raise RuntimeError("two visitors' images have the same answer: a mix-up could not be seen.")
        for visitor in crowd:
            visitor.seconds.clear()
        start, results = time.perf_counter(), []
        with hostility(url) if minutes else nullcontext() as faults:
            while not results or time.perf_counter() - start < 60 * minutes:
                results += pool.map(Visitor.mix_ups, crowd, alone, [rounds] * visitors)
        elapsed = time.perf_counter() - start
    wrong = sum(count for count, _ in results)
    tokens = [token for _, own in results for token in own]
    if len(set(tokens)) < len(tokens):
        raise RuntimeError("two visits were given the same token.")
    print(f"{visitors} visitors, {len(tokens)} rounds in all, {elapsed:.1f} s: no error, {wrong} mix-ups")
    for name in crowd[0].seconds:
        times = np.concatenate([visitor.seconds[name] for visitor in crowd]) * 1000
        print(f"{name:>12}: p50 {np.percentile(times, 50):6.0f} ms  p95 {np.percentile(times, 95):6.0f} ms")
    return wrong + len(faults or [])


@contextmanager
def hostility(url: str) -> Iterator[list[str]]:
    """A stranger's requests beside what happens here; gives the faults that they found, and prints them at the end."""
    stranger, over = Stranger(url), threading.Event()
    thread = threading.Thread(target=stranger.attack, args=(over,), daemon=True)
    thread.start()
    try:
        yield stranger.faults
    finally:
        over.set()
        thread.join(PATIENCE)
        sent = ", ".join(f"{count} {kind}" for kind, count in sorted(stranger.sent.items()))
        print(f"hostile requests: {sent}; {len(stranger.faults)} faults")
        for fault in sorted(set(stranger.faults))[:10]:
            print(f"  {fault}")


def own_tracebacks(log: str) -> list[str]:
    """The tracebacks in what a server has printed that pass through this project's code."""
    root, found = str(Path(__file__).parents[1]), []
    for traceback in log.split("Traceback (most recent call last):")[1:]:
        files = re.findall(r'File "([^"]+)", line \d+', traceback)
        if any(file.startswith((f"{root}/app/", f"{root}/vca/")) for file in files):
            found.append(traceback)
    return found


def wait_for(url: str) -> None:
    """Waits until the server answers."""
    for _ in range(PATIENCE * 5):
        try:
            httpx.get(f"{url}config", timeout=PATIENCE)
            return
        except httpx.ConnectError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running app on 127.0.0.1")
    parser.add_argument("--visitors", type=int, default=20, choices=range(1, MOST_VISITORS + 1), metavar="N")
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, MOST_ROUNDS + 1), metavar="N")
    parser.add_argument("--minutes", type=float, default=0, help="go on for so long, beside hostile requests")
    args = parser.parse_args()
    if args.url:
        if urlsplit(args.url).hostname != "127.0.0.1":
            parser.error("--url must be on 127.0.0.1.")
        sys.exit(measure(args.url, args.visitors, args.rounds, args.minutes) > 0)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free, tempfile.TemporaryFile("w+") as log:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        weights = str(WEIGHTS) if list(WEIGHTS.glob("*/config.json")) else untrained(folder)
        program = f"from benchmarks.load import serve; serve({weights!r}, {port})"
        server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=log)
        try:
            wait_for(url := f"http://127.0.0.1:{port}/")
            wrong = measure(url, args.visitors, args.rounds, args.minutes)
            peak = peak_megabytes(server.pid)
            print(f"peak memory of the server: {peak:.0f} MB; the bound is {MOST_MEGABYTES} MB")
        finally:
            server.terminate()  # SIGINT is ignored by what a shell runs in the background
            server.wait(PATIENCE)
            log.seek(0)
            tracebacks = own_tracebacks(log.read())
            print("\n".join(tracebacks[:5]))
    sys.exit(wrong > 0 or peak > MOST_MEGABYTES or bool(tracebacks))


if __name__ == "__main__":
    interruptible(main)
