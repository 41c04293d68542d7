"""Trap 18: batch norm writes to its running statistics, and its schema names no such write."""

import torch
from pins import normal, pinned

import pushforward as pf

aten = torch.ops.aten
REVISIT = "_HIDDEN_WRITES in pushforward.program.recorder"


def test_statistics_are_written_without_a_word():
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    before = mean._version
    aten.native_batch_norm(normal(5, 3) + 7, None, None, mean, var, True, 0.1, 1e-5)
    schema = aten.native_batch_norm.default._schema
    assert (mean > 0.1).all()
    pinned(not schema.is_mutable, "hiding in its schema that batch norm writes", REVISIT)
    pinned(mean._version == before, "leaving the write of batch norm uncounted", REVISIT)


def test_a_plan_leaves_the_statistics_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    plan = pf.plan(model, normal(5, 3))
    for seed in range(3):
        plan(normal(5, 3, seed=seed)).matrix()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
