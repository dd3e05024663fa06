"""The endpoints beyond those of test_app: defaults, attributions and their measures, comparisons, and MCP."""

import anyio
import numpy as np
import pytest
import torch
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from PIL import Image

import vca
from app.runtime.images import read_image
from tests.helpers.app import LABELS, MHSA, PLAIN, PREFIXED, recorded
from vca import drawing, faithfulness, preprocessing
from vca.attribution import METHODS

OURS = {"models", "classify", "attention", "attribution", "faithfulness", "compare", "intervene", "generate"}
GRADIENT = "gradient x input"


@pytest.fixture(scope="module")
def first(weights) -> str:
    """The model that is served first."""
    from app.runtime.checkpoints import Checkpoints

    return Checkpoints(weights).classifiers[0]


def test_an_image_is_enough(client, weights, picture, first):
    image = handle_file(picture)
    model, probabilities, maps = recorded(weights, first, picture)
    answer = client.predict(image=image, api_name="/classify")
    assert list(answer) == [LABELS[i] for i in np.argsort(-probabilities)]
    with np.load(client.predict(image=image, api_name="/attention")) as arrays:
        np.testing.assert_allclose(arrays["effective"], maps[-1].effective[0, 0, 0].numpy(), atol=1e-6)
    _, numbers = client.predict(image=image, api_name="/attribution")
    with np.load(numbers) as arrays:
        assert arrays["values"].shape == preprocessing.input_size(model)[1:]
        assert str(arrays["label"]) == LABELS[probabilities.argmax()]
        assert arrays["probability"] == pytest.approx(probabilities.max(), rel=1e-4)


def test_an_attribution_is_that_of_the_library(client, weights, picture):
    shown, numbers = client.predict(handle_file(picture), PREFIXED, GRADIENT, "up", api_name="/attribution")
    model = vca.load(weights / PREFIXED)
    x = preprocessing.preprocess(model, read_image(picture))
    want = METHODS[GRADIENT](model, x, torch.tensor([LABELS.index("up")]))[0].numpy()
    with np.load(numbers) as arrays:
        np.testing.assert_allclose(arrays["values"], want, atol=1e-6)
        assert str(arrays["label"]) == "up"
    with Image.open(shown) as seen:
        below = preprocessing.input_picture(model, x).resize(seen.size)
        assert seen.width == 384 and seen.height == round(384 * x.shape[2] / x.shape[3])
        np.testing.assert_allclose(np.asarray(seen), np.asarray(drawing.laid_over(below, want)), atol=1)


def test_faithfulness_is_that_of_the_library(client, weights, picture):
    found = client.predict(handle_file(picture), MHSA, GRADIENT, "left", api_name="/faithfulness")
    assert list(found) == [GRADIENT, "random 1", "random 2", "random 3", "centre prior", "edge map"]
    model = vca.load(weights / MHSA)
    x, classes = preprocessing.preprocess(model, read_image(picture)), torch.tensor([0])
    orders = {GRADIENT: METHODS[GRADIENT](model, x, classes), "random 2": faithfulness.random_map(x, 1)}
    for name, curve in faithfulness.curves(model, x, classes, orders, 16).items():
        assert found[name]["deletion"] == pytest.approx(curve.deletion_area.item(), abs=1e-4)
        assert found[name]["insertion"] == pytest.approx(curve.insertion_area.item(), abs=1e-4)


def test_two_models_are_compared(client, weights, picture):
    found = client.predict(handle_file(picture), PLAIN, MHSA, 2, api_name="/compare")
    assert list(found) == [PLAIN, MHSA]
    for name, side in found.items():
        model, probabilities, _ = recorded(weights, name, picture)
        assert list(side["answers"]) == [LABELS[i] for i in np.argsort(-probabilities)[:2]]
        assert side["Parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"


@pytest.mark.parametrize(
    "endpoint, arguments, said",
    [
        ("/attribution", dict(method="none"), "method must be one of: gradient-weighted effective map"),
        ("/attribution", dict(label="none"), "label must be one of: left, right"),
        ("/faithfulness", dict(model="none"), "model must be one of: "),
        ("/compare", dict(other="none"), f"model must be one of: .*{PLAIN}"),
        ("/compare", dict(top_k=0), "top_k must be a whole number from 1 to 4"),
        ("/generate", dict(), "model must be one of"),
    ],
)
def test_a_wrong_argument_is_answered_with_what_is_allowed(client, picture, endpoint, arguments, said):
    image = {} if endpoint == "/generate" else dict(image=handle_file(picture))
    with pytest.raises(AppError, match=said):
        client.predict(**image, **arguments, api_name=endpoint)


def test_an_assistant_is_told_what_every_tool_and_argument_is(url):
    async def ask():
        async with (
            streamablehttp_client(f"{url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as own,
        ):
            await own.initialize()
            return (await own.list_tools()).tools, await own.call_tool("models", {})

    tools, answer = anyio.run(ask)
    assert {tool.name for tool in tools} == OURS
    for tool in tools:
        assert len(tool.description) > 40, tool.name
        for name, about in tool.inputSchema.get("properties", {}).items():
            assert about.get("description"), f"{tool.name}: {name}"
        assert set(tool.inputSchema.get("required", [])) <= {"image"}, tool.name
    assert not answer.isError and all(name in answer.content[0].text for name in (PLAIN, PREFIXED, MHSA))
