"""Trap 7: every pass of one evaluation must draw the same random numbers.

On this build separate ``jvp`` calls draw a mask each, so that columns belong to different maps, and
``jacfwd`` refuses random ops unless it is told which of two answers is wanted.
"""

import pytest
import torch
from pins import forward_mode, pinned, pinned_raise
from torch import Tensor, nn
from torch.func import jacfwd, jvp

import pushforward as pf

pytestmark = forward_mode
REVISIT = "RandomState in pushforward.purity"


def test_separate_passes_draw_separate_masks():
    net, x = nn.Dropout(0.5).train(), torch.ones(32)
    torch.manual_seed(0)
    columns = [jvp(net, (x,), (row,))[1] for row in torch.eye(32)]
    separate = torch.stack(columns, 1).diagonal()
    torch.manual_seed(0)
    pinned(not torch.equal(separate, net(x)), "separate masks in separate passes", REVISIT)
    with pinned_raise("random operation", "jacfwd refusing random ops", REVISIT):
        jacfwd(net)(x)


@pytest.mark.parametrize("plan", ["auto", "reverse", "forward", "loop"])
def test_one_mask_for_all_passes_and_the_value(plan: str):
    net, x = nn.Dropout(0.5).train(), torch.ones(32)
    J = pf.jacobian(net, x, plan=plan)
    torch.testing.assert_close(J.matrix(), torch.diag(J.value))
    torch.testing.assert_close(J @ torch.ones(32, 2), J.value[:, None].expand(32, 2))
    torch.testing.assert_close(J.T @ torch.ones(32, 2), J.value[:, None].expand(32, 2))
    torch.testing.assert_close(J.diagonal(), J.value)


def test_one_mask_whatever_the_chunk():
    net, x = nn.Dropout(0.5).train(), torch.ones(32)
    torch.manual_seed(3)
    whole = pf.jacobian(net, x).matrix()
    torch.manual_seed(3)
    chunked = pf.jacobian(net, x, memory=16 * 1024).matrix()
    torch.testing.assert_close(whole, chunked)


def test_the_mask_is_the_one_that_comes_next():
    """What a training step would draw, and drawing it again changes nothing."""
    net, x = nn.Dropout(0.5).train(), torch.ones(32)
    torch.manual_seed(5)
    J = pf.jacobian(net, x)
    assert torch.equal(J.value, net(x))


def test_laplacian_and_hessian_use_one_mask():
    net, x = nn.Dropout(0.5).train(), torch.linspace(0.5, 1.5, 8).double()

    def cubed(x: Tensor) -> Tensor:
        return (net(x) ** 3).sum()

    torch.manual_seed(2)
    mask = net(torch.ones(8).double())
    torch.manual_seed(2)
    H = pf.hessian(cubed, x).matrix()
    torch.testing.assert_close(H, torch.diag(6 * mask**3 * x))
    torch.manual_seed(2)
    torch.testing.assert_close(pf.laplacian(cubed, x), H.trace())
