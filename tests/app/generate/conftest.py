"""Small generators."""

import pytest

from tests.helpers.app import save_checkpoints
from tests.helpers.generate_tab import DIT, LATENT, SIT, save_generator


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Small generators of pixels, one of latents whose autoencoder is nowhere, and classifiers."""
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoints(folder)
    save_generator(folder / SIT, "vca_sit_xs_4", input_size=(16, 24))
    save_generator(folder / DIT, "vca_dit_xs_4", input_size=16)
    save_generator(folder / LATENT, "dit_s_8", input_size=8, vae=str(folder / "no autoencoder"))
    return folder
