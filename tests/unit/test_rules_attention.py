"""Attention, as a tape runs it: the detected pattern against the Jacobian of autograd."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detected import detect, draw, exact, sound

# Queries (1 sample, 2 heads, 3 positions, 2 entries), and others to go with them.
Q, K, V = draw(1, 2, 3, 2, seed=1), draw(1, 2, 4, 2, seed=2), draw(1, 2, 4, 3, seed=3)
CAUSAL = torch.ones(3, 3, dtype=torch.bool).tril()
LETS = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
SLIDING = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
attend = F.scaled_dot_product_attention


def _floating(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)


ALIBI = _floating(CAUSAL) + torch.arange(3)[None] - torch.arange(3)[:, None]

BY_QUERIES = {
    "plain": lambda q: attend(q, K, V),
    "boolean mask": lambda q: attend(q, K, V, LETS),
    "floating mask": lambda q: attend(q, K, V, _floating(LETS)),
    "scaled": lambda q: attend(q, K, V, scale=0.5),
    "a mask for each head": lambda q: attend(q, K, V, torch.stack([LETS, LETS.flip(0)])),
    "itself": lambda q: attend(q, q, q),
    "itself, causal": lambda q: attend(q, q, q, is_causal=True),
    "itself, by a mask": lambda q: attend(q, q, q, CAUSAL),
    "itself, with a slope": lambda q: attend(q, q, q, ALIBI),
    "written out": lambda q: (q @ q.mT / 2**0.5).masked_fill(~CAUSAL, -math.inf).softmax(-1) @ q,
    "written out, added": lambda q: (q @ q.mT + ALIBI).softmax(-1) @ q,
    "written out, chosen": lambda q: (
        torch.where(CAUSAL, q @ q.mT, torch.tensor(-math.inf).double()).softmax(-1) @ q
    ),
    "linear": lambda q: (q @ q.mT).tril() @ q,
}
# One value follows from a single query whatever the weights are.
ALONE = {"boolean mask", "floating mask", "a mask for each head"}


@pytest.mark.parametrize("name", BY_QUERIES)
def test_by_queries(name):
    f = BY_QUERIES[name]
    if name in ALONE:
        alone = LETS.sum(-1) == 1
        found = detect(f, Q).pattern.todense().reshape(2, 3, 3, 2, 3, 2)
        assert found[0, :, :, 1].sum() == 0
        assert found[0, 0, :, 0, 1].sum() == 0
        assert alone.tolist() == [False, False, True]
    else:
        exact(f, Q)


@pytest.mark.parametrize("name", ["plain", "boolean", "floating"])
def test_by_keys_and_values(name):
    mask = {"plain": None, "boolean": LETS[:2], "floating": _floating(LETS[:2])}[name]
    exact(lambda k: attend(Q[:, :, :2], k, V, mask), K)
    exact(lambda v: attend(Q[:, :, :2], K, v, mask), V)


def test_a_sliding_window():
    x = draw(1, 1, 5, 2)
    pattern = exact(lambda x: attend(x, x, x, SLIDING), x).pattern.todense()
    positions = pattern.reshape(5, 2, 5, 2).any((1, 3))
    assert (positions == SLIDING.numpy()).all()


def test_two_layers_of_windows_reach_twice_as_far():
    x = draw(1, 1, 5, 1)

    def layers(x):
        return attend(*[attend(x, x, x, SLIDING)] * 3, SLIDING)

    positions = exact(layers, x).pattern.todense()
    assert (positions == torch.ones(5, 5).tril().triu(-2).bool().numpy()).all()


def test_grouped_queries():
    q, k, v = draw(1, 4, 3, 2), draw(1, 2, 3, 2, seed=1), draw(1, 2, 3, 2, seed=2)

    def grouped(q, k, v):
        return attend(q, k, v, is_causal=True, enable_gqa=True)

    for argument in range(3):
        exact(grouped, q, k, v, argnums=argument)


def _layer(make, *args, **options):
    torch.manual_seed(0)
    return make(*args, **options, dtype=torch.float64)


def test_multihead_attention_in_training():
    layer = _layer(nn.MultiheadAttention, 4, 2, batch_first=True)
    x = draw(2, 3, 4)
    exact(lambda x: layer(x, x, x, attn_mask=~CAUSAL, need_weights=False)[0], x)
    exact(lambda x: layer(x, x, x, attn_mask=~CAUSAL)[0], x)
    exact(lambda x: layer(x, x, x, attn_mask=~CAUSAL, is_causal=True, need_weights=False)[0], x)


def test_multihead_attention_in_evaluation():
    """No fast path is taken where a gradient is wanted."""
    layer = _layer(nn.MultiheadAttention, 4, 2, batch_first=True).eval()
    exact(lambda x: layer(x, x, x, need_weights=False)[0], draw(2, 3, 4))
    exact(lambda x: layer(x, x, x, attn_mask=~CAUSAL)[0], draw(1, 3, 4))


def test_padded_keys():
    layer = _layer(nn.MultiheadAttention, 4, 2, batch_first=True)
    padding = torch.tensor([[False, False, True], [False, True, True]])

    def padded(x):
        return layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    found = exact(padded, draw(2, 3, 4)).pattern.todense().reshape(2, 3, 4, 2, 3, 4)
    assert not found[0, :2, :, 0, 2].any()
    assert not found[1, 0, :, 1, 1:].any()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_layer(first, training):
    layer = _layer(
        nn.TransformerEncoderLayer, 4, 2, 5, dropout=0.0, batch_first=True, norm_first=first
    ).train(training)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    x = draw(2, 3, 4)
    pattern = exact(lambda x: layer(x, src_mask=mask), x).pattern.todense()
    positions = pattern.reshape(2, 3, 4, 2, 3, 4).any((2, 5))
    expected = torch.block_diag(CAUSAL, CAUSAL).reshape(2, 3, 2, 3).bool().numpy()
    assert (positions == expected).all()


def test_an_encoder():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = _layer(nn.TransformerEncoderLayer, 2, 1, 3, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2)
    exact(lambda x: encoder(x), draw(2, 2, 2))


def test_a_decoder_layer_sees_all_of_the_memory():
    layer = _layer(nn.TransformerDecoderLayer, 2, 1, 3, dropout=0.0, batch_first=True)
    x, memory = draw(1, 3, 2), draw(1, 2, 2, seed=1)
    exact(lambda x: layer(x, memory, tgt_mask=~CAUSAL), x)
    exact(lambda m: layer(x, m, tgt_mask=~CAUSAL), memory)


def test_infinity_in_a_mask_stops_no_derivative_by_itself():
    """A sum with minus infinity has a derivative of one; only a softmax makes it zero."""
    mask = torch.tensor([0.0, -math.inf, 0.0]).double()
    exact(lambda x: x + mask, draw(3))
    exact(lambda x: (x + mask).softmax(0), draw(3))
    exact(lambda x: (x + mask).log_softmax(0), draw(3))
    exact(lambda x: torch.cat([x + mask, x + mask]).softmax(0), draw(3))
    exact(lambda x: x.clone().add_(mask).float().softmax(0), draw(3))
    exact(lambda x: (x + mask.clamp(min=-1.0)).softmax(0), draw(3))


def test_a_mask_that_was_written_over_masks_no_more():
    mask = torch.tensor([0.0, -math.inf, 0.0]).double()

    def f(x):
        scores = x + mask
        scores[1] = x[0]
        return scores.softmax(0)

    exact(f, draw(3))


def test_the_lowest_number_masks_as_well():
    lowest = torch.tensor([0.0, torch.finfo(torch.float64).min, 0.0]).double()
    exact(lambda x: (x + lowest).softmax(0), draw(3))
    exact(lambda x: x.masked_fill(lowest < 0, lowest[1]).softmax(0), draw(3))


def test_a_row_that_is_masked_as_a_whole():
    lowest = torch.full((2,), torch.finfo(torch.float64).min, dtype=torch.float64)
    sound(lambda x: (x + lowest).softmax(0), draw(2))
    sound(lambda x: attend(x, x, x, torch.zeros(3, 3, dtype=torch.bool)), Q)


def test_softmax_over_one():
    assert exact(lambda x: x.softmax(1), draw(3, 1)).pattern.nnz == 0
    assert exact(lambda x: x.log_softmax(0), draw()).pattern.nnz == 0


def test_rotary_positions_keep_pairs():
    angles = torch.arange(3.0).double()[:, None] * torch.tensor([1.0, 0.1]).double()

    def rotated(x):
        pairs = torch.view_as_complex(x.reshape(3, 2, 2))
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
        return turned.reshape(3, 4)

    structure = detect(rotated, draw(3, 4))
    assert structure.pattern.nnz == 3 * 4 * 2


def test_dropout_keeps_the_structure():
    q = draw(1, 1, 3, 2)
    structure = detect(lambda q: attend(q, q, q, CAUSAL, dropout_p=0.5), q)
    positions = structure.pattern.todense().reshape(3, 2, 3, 2).any((1, 3))
    assert (positions == CAUSAL.numpy()).all()
