"""Whole backbones with gate and statistics, at eight frames, against the fastest way that users have today."""

import pytest
import torch

from gate4d.benchmarks.check import Expected
from gate4d.benchmarks.sequences import backbones

FRAMES = 8


@pytest.mark.parametrize(
    ("backbone", "peer"),
    [("alternating", "SDPA + mask"), ("pairwise", "SDPA + mask"), ("recurrent", "maps"), ("streaming", "SDPA + mask")],
)
@torch.inference_mode()
def test_backbone(backbone, peer, versus):
    def outputs(method, dtype="float32"):
        run = backbones.setup(backbone, dtype, method=method, frames=FRAMES)
        return lambda: (torch.cat(list(run(FRAMES))),)

    ours, theirs = outputs("gate4d"), outputs(peer)
    truth, plain = outputs("maps", "float64")()[0], outputs("maps")()[0]
    expected = Expected(("tokens",), (truth,), (plain,), truth.shape[0] * truth.shape[1])
    expected.verify("gate4d", ours(), peer=True)
    expected.verify(peer, theirs(), peer=True)
    versus(ours, theirs)
