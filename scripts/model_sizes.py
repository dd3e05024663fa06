"""Parameters and multiply-adds of the paper's classifiers, ours beside the paper's print.

    python -m scripts.model_sizes

The weights are not allocated. GMACs are those of the fast path at 224 px; the paper counts one more product per
contrast stage, 7nNC for a layer, where the fast path subtracts the two maps first and does 6nNC.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

import vca

PRINTED = {  # parameters in millions and GMACs, as the paper prints them; None where its print is not known
    "deit_tiny_patch16_224": (5.7, 1.2),
    "vca_deit_tiny_patch16_224": (6.0, 1.2),
    "deit_small_patch16_224": (22.1, 4.6),
    "vca_deit_small_patch16_224": (22.6, 4.6),
    "vca_deit_base_patch16_224": None,
    "pvt_tiny": (13.2, 1.9),
    "vca_pvt_tiny": (11.6, 2.0),
    "pvt_small": None,
    "vca_pvt_small": None,
    "pvt_medium": None,
    "vca_pvt_medium": None,
    "swin_tiny_patch4_window7_224": (28.9, 4.5),
    "vca_swin_tiny": (28.5, 4.6),
    "swin_small_patch4_window7_224": None,
    "vca_swin_small": None,
    "swin_base_patch4_window7_224": None,
    "vca_swin_base": None,
    "cswin_tiny": (20.5, 4.3),
    "vca_cswin_tiny": (20.4, 4.3),
    "cswin_small": None,
    "vca_cswin_small": None,
}
NOTES = {
    "swin_tiny_patch4_window7_224": "the print is that of Agent-Swin-T (28,902,964)",
    "cswin_tiny": "the print is that of Agent-CSwin-T (20,458,672)",
}


def size(name: str, image: int = 224) -> tuple[int, float]:
    """Parameters, and GMACs for one image."""
    with torch.device("meta"):
        model = vca.create_model(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image, image, device="meta"))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9


def main() -> None:
    print("| model | parameters | GMACs | paper: parameters | paper: GMACs | |")
    print("|---|---|---|---|---|---|")
    for name, printed in PRINTED.items():
        parameters, gmacs = size(name)
        paper = f"{printed[0]} M | {printed[1]}" if printed else "- | -"
        print(f"| `{name}` | {parameters:,} | {gmacs:.4f} | {paper} | {NOTES.get(name, '')} |")


if __name__ == "__main__":
    main()
