"""A stranger who sends an app what no page sends: images, checkpoints and requests made to exhaust or to break it.

`benchmarks.load --minutes` lets one loose beside the visitors.
"""

import io
import json
import random
import struct
import threading
import uuid
import zipfile
import zlib
from collections import Counter

import httpx
from PIL import Image

PATIENCE = 300
WRONG = [None, True, -1, 10**12, 1e300, "", "x", "<form>", "../../etc/passwd", "a/b/c", [], {}, [[]], {"path": 3}, "\0"]
DEEP = "[" * 100_000


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header_only(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def images() -> dict[str, bytes]:
    """Files that are small, or no images, and large once they are decoded."""
    return {
        "claims.png": header_only(20_000, 20_000),
        "claims less.png": header_only(9_000, 9_000),
        "tall.png": encoded(Image.new("L", (1, 20_000_000)), "PNG"),
        "float.tiff": encoded(Image.new("F", (6000, 6000)), "TIFF", compression="tiff_adobe_deflate"),
        "large.png": encoded(Image.new("RGBA", (7000, 7000)), "PNG"),
        "cut.jpg": encoded(Image.effect_noise((400, 300), 90), "JPEG")[:3000],
        "text.png": b"no image",
        "empty.png": b"",
    }


def zipped(config: bytes | str, weights: bytes = b"", card: str = "") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.safetensors", weights)
        archive.writestr("README.md", card)
    return stream.getvalue()


def checkpoints() -> dict[str, bytes]:
    """Uploads that are small and would take much memory or time, or are damaged."""

    def config(architecture: str = "vit_tiny_patch16_224", preprocessing: dict | None = None, **arguments) -> str:
        sized = dict(input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.5] * 3) | (preprocessing or {})
        return json.dumps(
            dict(architecture=architecture, num_classes=4, model_args=arguments, pretrained_cfg=sized), allow_nan=True
        )

    header = json.dumps(dict(x=dict(dtype="F32", shape=[10**6], data_offsets=[0, 4 * 10**6]))).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(4 * 10**6)
    swin = dict(img_size=128, patch_size=1, embed_dim=8, depths=[8], num_heads=[1], window_size=128)
    return {
        "much json.zip": zipped('{"a": [' + "{}," * 10_000_000 + "{}]}"),
        "much weights.zip": zipped(config(), bytes(300 * 2**20)),
        "deep.zip": zipped(config(depth=400), weights),
        "deeper.zip": zipped(config(depth=10**6), weights),
        "wide.zip": zipped(config(embed_dim=4096, depth=200), weights),
        "tables.zip": zipped(config("swin_tiny_patch4_window7_224", **swin), weights),
        "crop.zip": zipped(config(preprocessing=dict(crop_pct=0.0005)), weights),
        "nan.zip": zipped(config(preprocessing=dict(mean=[float("nan")] * 3)), weights),
        "header.zip": zipped(config(), struct.pack("<Q", 10**8) + b" " * 10**8),
        "nested.zip": zipped(DEEP),
        "no.zip": b"PK\x03\x04" + bytes(1000),
    }


class Stranger:
    """A session of its own, over HTTP.

    Attributes:
        sent: how many requests of each kind.
        faults: answers with the status 500 and above.
    """

    def __init__(self, url: str, seed: int = 0):
        self.http = httpx.Client(base_url=f"{url.rstrip('/')}/gradio_api/", timeout=PATIENCE)
        self.config = httpx.get(f"{url.rstrip('/')}/config", timeout=PATIENCE).json()
        self.draw = random.Random(seed)
        self.files = list(images().items())
        self.uploads = list(checkpoints().items())
        self.sent: Counter[str] = Counter()
        self.faults: list[str] = []
        events = [event for event in self.config["dependencies"] if event["backend_fn"]]
        kinds = {component["id"]: component["props"].get("label") for component in self.config["components"]}
        self.events = [event for event in events if event["api_name"] not in ("models", "generate")]
        self.loaders = [e for e in events if any(kinds.get(i) == "Or your own" for i in e["inputs"])]
        self.pages = [
            c["id"]
            for c in self.config["components"]
            if c["props"].get("elem_id") in ("explorer", "compare", "generated")
        ]

    def post(self, kind: str, path: str, **options) -> httpx.Response:
        answer = self.http.post(path, **options)
        self.sent[kind] += 1
        if answer.status_code >= 500:
            self.faults.append(f"{kind}: {answer.status_code} {answer.text[:300]}")
        return answer

    def uploaded(self, name: str, content: bytes) -> dict:
        answer = self.post("upload", "upload", files=dict(files=(name, content)))
        return dict(path=answer.json()[0], orig_name=name, meta=dict(_type="gradio.FileData"))

    def ask(self, kind: str, event: dict, data: list) -> None:
        """Queues an event and waits for its end, as the page does."""
        session = uuid.uuid4().hex
        request = dict(data=data, fn_index=event["id"], session_hash=session)
        if self.post(kind, "queue/join", json=request).status_code == 200:
            with self.http.stream("GET", "queue/data", params=dict(session_hash=session)) as stream:
                next(
                    (line for line in stream.iter_lines() if "process_completed" in line or "close_stream" in line),
                    None,
                )

    def image(self) -> None:
        name, content = self.draw.choice(self.files)
        data = [self.uploaded(name, content), self.config_model(), 5]
        event = self.post("image", "call/classify", json=dict(data=data)).json().get("event_id")
        self.http.get(f"call/classify/{event}")

    def config_model(self) -> str:
        choices = (c["props"]["choices"] for c in self.config["components"] if c["props"].get("label") == "Model")
        return next(choices)[0][1]

    def checkpoint(self) -> None:
        self.ask("checkpoint", self.loaders[0], [[self.uploaded(*self.draw.choice(self.uploads))], []])

    def event(self) -> None:
        event = self.draw.choice(self.events)
        self.ask("event", event, [self.draw.choice([*WRONG, DEEP]) for _ in event["inputs"]])

    def page_function(self) -> None:
        name = self.draw.choice(["fetch_maps", "export_numbers", "export_page", "measure", "look", "nothing"])
        whole = dict.fromkeys(
            ("token", "block", "mode", "head", "query", "lambda", "view", "run", "step", "picture"), "x"
        )
        data = self.draw.choice([*WRONG, DEEP, whole, whole | dict(run=DEEP)])
        request = dict(data=data, fn_name=name, component_id=self.draw.choice(self.pages), session_hash="stranger")
        if name != "nothing":
            self.post("page function", "component_server", json=request)

    def attack(self, over: threading.Event) -> None:
        """Goes on until `over` is set."""
        kinds = [self.image, self.checkpoint, self.event, self.event, self.page_function, self.page_function]
        while not over.is_set():
            self.draw.choice(kinds)()
