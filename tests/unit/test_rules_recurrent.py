"""Recurrence and control flow: the detected pattern against the Jacobian of autograd."""

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn as packing

from detected import detect, draw, exact

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
TIME = torch.ones(4, 4, dtype=torch.bool).tril().numpy()


def _made(kind, *args, **options):
    torch.manual_seed(0)
    return CELLS[kind](*args, **options, dtype=torch.float64)


def _by_time(pattern, features, entries):
    return pattern.todense().reshape(4, features, 4, entries).any((1, 3))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_see_the_past_alone(kind, layers):
    cell = _made(kind, 2, 3, layers)
    structure = exact(lambda x: cell(x)[0], draw(4, 1, 2))
    assert (_by_time(structure.pattern, 3, 2) == TIME).all()


@pytest.mark.parametrize("kind", CELLS)
def test_both_directions_see_everything(kind):
    cell = _made(kind, 2, 2, bidirectional=True)
    structure = exact(lambda x: cell(x)[0], draw(3, 1, 2))
    found = structure.pattern.todense().reshape(3, 2, 2, 3, 2).any((2, 4))
    causal = torch.ones(3, 3).tril().bool().numpy()
    assert (found[:, 0] == causal).all()
    assert (found[:, 1] == causal.T).all()


@pytest.mark.parametrize("kind", CELLS)
def test_samples_stay_apart(kind):
    cell = _made(kind, 2, 2, batch_first=True)
    found = exact(lambda x: cell(x)[0], draw(2, 2, 2)).pattern.todense()
    assert not found.reshape(2, 4, 2, 4)[0, :, 1].any()


@pytest.mark.parametrize("kind", CELLS)
def test_last_states_and_first_states(kind):
    cell = _made(kind, 2, 2)
    exact(lambda x: cell(x)[1], draw(3, 1, 2))
    state = draw(1, 1, 2, seed=1)
    start = (lambda h: (h, h)) if kind == "lstm" else (lambda h: h)
    exact(lambda h: cell(draw(2, 1, 2), start(h))[0], state)


@pytest.mark.parametrize("kind", CELLS)
def test_unbatched(kind):
    cell = _made(kind, 2, 2)
    assert (_by_time(exact(lambda x: cell(x)[0], draw(4, 2)).pattern, 2, 2) == TIME).all()


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells(cell):
    torch.manual_seed(0)
    made = cell(2, 3, dtype=torch.float64)

    def last(x):
        out = made(x)
        return out[0] if isinstance(out, tuple) else out

    exact(last, draw(2, 2))


def test_projections():
    cell = _made("lstm", 2, 4, proj_size=2)
    assert (_by_time(exact(lambda x: cell(x)[0], draw(4, 1, 2)).pattern, 2, 2) == TIME).all()


@pytest.mark.parametrize("kind", CELLS)
def test_packed_sequences_end_early(kind):
    cell = _made(kind, 1, 2)

    def packed(x):
        sequence = packing.pack_padded_sequence(x, torch.tensor([3, 1]))
        return packing.pad_packed_sequence(cell(sequence)[0])[0]

    structure = exact(packed, draw(3, 2, 1))
    assert not structure.pattern.todense().reshape(3, 2, 2, 3, 2)[..., 1:, 1].any()


def test_a_recurrence_written_out():
    mixing = nn.Parameter(draw(2, 2))

    def unrolled(x):
        h, states = torch.zeros(2, dtype=torch.float64), []
        for row in x:
            h = torch.tanh(mixing @ h + row)
            states.append(h)
        return torch.stack(states)

    assert (_by_time(exact(unrolled, draw(4, 2)).pattern, 2, 2) == TIME).all()


def test_a_linear_recurrence_of_scalars():
    def smoothed(x):
        out = x.clone()
        for t in range(1, len(x)):
            out[t] = out[t] + 0.5 * out[t - 1]
        return out

    exact(smoothed, draw(5))


def test_branches_on_values_hold_at_this_point():
    def branching(x):
        return x[:1] if x.sum() > 0 else x[1:2]

    exact(branching, draw(3), at_point=True)


def test_loops_that_end_by_a_value_hold_at_this_point():
    def damped(x):
        while float(x.detach().norm()) > 0.5:
            x = x / 2 - x.roll(1) / 8
        return x

    exact(damped, draw(4), at_point=True)


def test_branches_on_constants_are_guarded():
    switch = torch.tensor(True)

    def branching(x):
        return x.flip(0) if switch else x

    structure = exact(branching, draw(3))
    assert [t is switch for t in structure.guards.constants.values()] == [True]


def test_drawn_numbers_are_no_structure():
    def noisy(x):
        return x * torch.randn(3, dtype=torch.float64).relu()

    assert detect(noisy, draw(3)).pattern.nnz == 3
