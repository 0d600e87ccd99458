"""Operations against their peer, at a quarter of the heads of the models' shapes."""

from functools import partial

import pytest
import torch

from gate4d import gated_attention, received_attention
from gate4d.benchmarks import peers
from gate4d.benchmarks.check import Expected, expected_backward, expected_forward
from gate4d.benchmarks.inputs import make_inputs
from gate4d.benchmarks.registry import OPERATIONS, SHAPES
from gate4d.benchmarks.rows.target import QUICK, Conditions

ATTENTION = [o for o in OPERATIONS.values() if o.gate is not None]


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [*((o, torch.float32) for o in ATTENTION), (OPERATIONS["gated"], torch.bfloat16)],
    ids=lambda x: x.name if hasattr(x, "name") else str(x).removeprefix("torch."),
)
def test_attention(operation, dtype, versus):
    """Against SDPA with the dense bias, which is what users have for a gate; plain attention against plain SDPA."""
    shape = Conditions(QUICK).shape(operation.shape)
    x = make_inputs(
        shape, operation.frames, dtype=dtype, gate=operation.gate, visible=operation.visible, window=operation.window,
        requires_grad=operation.backward,
    )  # fmt: skip
    ours, peer = peers.gate4d_forward, peers.sdpa if operation.name == "plain" else peers.sdpa_masked
    if operation.backward:
        grad = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(2))
        expected = expected_backward(x, grad)
        ours, peer = (partial(peers.with_backward, b, grad_out=grad) for b in (ours, peer))
    else:
        expected = expected_forward(x)
    steps = [ours(x=x), peer(x=x)]
    with torch.set_grad_enabled(operation.backward):
        expected.verify("gate4d", steps[0]())
        expected.verify("peer", steps[1](), peer=True)
        versus(*steps)


@torch.no_grad()
def test_received(versus):
    """Attention received per key, given lse, against the forward pass that gave it."""
    x = make_inputs(Conditions(QUICK).shape("vggt.global"), 4)
    _, aux = gated_attention(x.q, x.k, x.v, return_aux=True)
    found = received_attention(x.q, x.k, aux.lse)
    truth = received_attention(x.q.double(), x.k.double(), aux.lse.double(), backend="chunked")
    plain = received_attention(x.q, x.k, aux.lse, backend="chunked")
    names = ("mean", "variance")
    both = [(m.mean, m.variance()) for m in (truth, plain, found)]
    Expected(names, both[0], both[1], x.q.shape[2]).verify("received", both[2], peer=True)
    versus(lambda: received_attention(x.q, x.k, aux.lse), peers.gate4d_forward(x))


def test_every_shape_has_a_source():
    assert all("/" in s.source or ":" in s.source for s in SHAPES.values())
