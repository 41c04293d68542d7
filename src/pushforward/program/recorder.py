"""Recording what a computation does to tensors as a flat list of ops, as they ran."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pushforward.errors import PushforwardError

aten = torch.ops.aten

READS_A_VALUE = (
    *(aten._local_scalar_dense.default, aten.is_nonzero.default),
    *(aten.equal.default, aten.allclose.default),
)
# They write to running statistics without saying so in their schemas.
_HIDDEN_WRITES = (aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm)
# They ask a tensor for its shape alone.
_FILLS = (
    *(aten.zeros_like, aten.ones_like, aten.full_like),
    *(aten.new_zeros, aten.new_ones, aten.new_full),
)
_REFUSED = (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape)


class CannotRecord(PushforwardError):
    """A computation that cannot be run again as a flat list of ops, and why."""


class Slot(NamedTuple):
    """A place that holds a tensor while a program runs."""

    number: int


class Like(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Instruction:
    """One op: what it is called with, slots standing for tensors, and where its results go.

    ``expected`` is the plain value that a guard must find again.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Slot | None, ...]
    writes: frozenset[int]
    expected: Any = None

    @property
    def reads(self) -> list[Slot]:
        """The slots among the arguments."""
        return [leaf for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, Slot)]


@dataclass
class Storage:
    """A storage that was met: its group, and the slots that look at it."""

    group: int
    slots: dict[Any, Slot] = field(default_factory=dict)
    alive: Any = None


@dataclass
class Recording:
    """What was recorded.

    Attributes:
        instructions: the ops in order.
        inputs: the slots of the inputs.
        externals: tensors from outside that the computation read.
        constants: the values of slots that depend on nothing from outside.
        groups: for each slot the number of its storage; slots with the same one are views of it.
        like: shape, strides and dtype of each slot, for what looks for shortcuts.
    """

    inputs: tuple[Slot, ...]
    instructions: list[Instruction] = field(default_factory=list)
    externals: dict[Slot, Tensor] = field(default_factory=dict)
    constants: dict[Slot, Tensor] = field(default_factory=dict)
    groups: dict[Slot, int] = field(default_factory=dict)
    like: dict[Slot, Like] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Records every op that runs inside, below autograd.

    Args:
        inputs: tensors that will be others when the program runs.
        constants: tensors that never change, such as seeds.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self._storages: dict[int, Storage] = {}
        self._varying: set[int] = set()
        self._read_constants: set[int] = set()
        self.recording = Recording(())
        self.recording.inputs = tuple(self._enter(tensor) for tensor in inputs)
        self._varying.update(self.recording.groups[slot] for slot in self.recording.inputs)
        for tensor in constants:
            self.recording.constants[self._enter(tensor)] = tensor

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first op imports the compiler, which takes seconds."""
        return False

    def expect(self, tensor: Tensor) -> None:
        """Guard a tensor that was met: a run finds the same values in it, or is stale."""
        slot = self.slot(tensor)
        if self.recording.groups[slot] in self._varying:
            values = tensor.detach().clone()
            self._add(Instruction(aten.equal.default, (slot, values), {}, (), frozenset(), True))

    def slot(self, tensor: Tensor) -> Slot:
        """The slot of a tensor; for one from outside, a new one."""
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise CannotRecord(f"a {type(tensor).__name__} is no plain tensor")
        _refuse_sparse(tensor)
        storage = self._storages.get(_key(tensor))
        if storage is None:
            return self._external(tensor)
        found = storage.slots.get(_geometry(tensor))
        return found if found is not None else self._view(tensor, storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in _REFUSED) and not _by_whole_numbers(func, args):
            raise CannotRecord(
                f"{func.overloadpacket.__name__} draws random numbers, or makes shapes from values"
            )
        leaves, spec = pytree.tree_flatten((args, kwargs))
        slots = [self.slot(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        result = func(*args, **kwargs)
        filled, named = pytree.tree_unflatten(slots, spec)
        self._record(func, filled, named, result)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in outputs:
            _refuse_sparse(tensor)
        reads = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Slot)]
        groups = self.recording.groups
        varies = any(groups[slot] in self._varying for slot in reads)
        varies = varies and not _is_fill(func, args)
        if func in READS_A_VALUE:
            if varies:
                self._add(Instruction(func, args, kwargs, (), frozenset(), result))
            return
        writes = frozenset(groups[slot] for slot in _written(func, args, kwargs))
        known = [self._known(tensor) for tensor in outputs]
        if not writes and all(slot is not None for slot in known):
            return  # the same tensor again: a view of all of it, or detached
        outs = tuple(None if t is None else self._output(t) for t in _flat_results(result))
        self._mark(varies, reads, writes, [slot for slot in outs if slot is not None], outputs)
        self._add(Instruction(func, args, kwargs, outs, writes))

    def _mark(
        self,
        varies: bool,
        reads: list[Slot],
        writes: frozenset[int],
        outs: list[Slot],
        outputs: list[Tensor],
    ) -> None:
        """Note what varies, and keep the values of what does not."""
        groups = self.recording.groups
        if writes & self._read_constants:
            raise CannotRecord("a constant is overwritten after it was used")
        if varies:
            self._varying |= writes | {groups[slot] for slot in outs}
            self._read_constants |= {groups[s] for s in reads} - self._varying
            return
        for slot, tensor in zip(outs, outputs, strict=True):
            if groups[slot] not in self._varying:
                self.recording.constants[slot] = tensor

    def _add(self, instruction: Instruction) -> None:
        self.recording.instructions.append(instruction)

    def _known(self, tensor: Tensor) -> Slot | None:
        storage = self._storages.get(_key(tensor))
        return None if storage is None else storage.slots.get(_geometry(tensor))

    def _output(self, tensor: Tensor) -> Slot:
        known = self._known(tensor)
        return known if known is not None else self._enter(tensor)

    def _enter(self, tensor: Tensor) -> Slot:
        """A new slot for a tensor, beside others of its storage."""
        key = _key(tensor)
        storage = self._storages.get(key)
        if storage is None:
            storage = Storage(len(self.recording.groups))
            self._storages[key] = storage
            # Held by what it forgets, and holding nothing: a recorder must not outlive its run.
            gone = partial(_forget, weakref.ref(self), key)
            storage.alive = weakref.ref(tensor.untyped_storage(), gone)
        slot = Slot(len(self.recording.groups))
        self.recording.groups[slot] = storage.group
        self.recording.like[slot] = Like(tuple(tensor.shape), tensor.stride(), tensor.dtype)
        storage.slots[_geometry(tensor)] = slot
        return slot

    def forget(self, key: int, alive: Any) -> None:
        """A storage is gone, and another one may get its place."""
        storage = self._storages.get(key)
        if storage is not None and storage.alive is alive:
            del self._storages[key]

    def _external(self, tensor: Tensor) -> Slot:
        slot = self._enter(tensor)
        self.recording.externals[slot] = tensor
        self._varying.add(self.recording.groups[slot])
        return slot

    def _view(self, tensor: Tensor, storage: Storage) -> Slot:
        """A view that no op was seen to make: autograd keeps tensors in forms of its own."""
        other = next(iter(storage.slots.values()))
        if tensor.is_conj() or tensor.is_neg() or self.recording.like[other].dtype != tensor.dtype:
            raise CannotRecord("autograd keeps a view that is conjugate, or of another dtype")
        slot = self._enter(tensor)
        where = (list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
        self._add(Instruction(aten.as_strided.default, (other, *where), {}, (slot,), frozenset()))
        if storage.group not in self._varying:
            self.recording.constants[slot] = tensor
        return slot


def _is_fill(func: Any, args: Any) -> bool:
    """Whether a call makes the same of whatever values it is given."""
    power_of_zero = func is aten.pow.Tensor_Scalar and args[1] == 0
    return power_of_zero or func.overloadpacket in _FILLS


def _refuse_sparse(tensor: Tensor) -> None:
    """Only what lies in a storage by its strides can be told from other views of it."""
    if tensor.layout != torch.strided:
        raise CannotRecord("a sparse tensor takes part")


def _forget(recorder: Callable[[], Recorder | None], key: int, alive: Any) -> None:
    found = recorder()
    if found is not None:
        found.forget(key, alive)


def _by_whole_numbers(func: Any, args: Any) -> bool:
    """Whether an indexing op takes its shape from its indices, and not from a mask."""
    if func.overloadpacket not in (aten.index, aten._unsafe_index):
        return False
    return not any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])


def _leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=lambda node: isinstance(node, Slot))


def _written(func: Any, args: Any, kwargs: Any) -> list[Slot]:
    """The slots that a call writes to, by its schema."""
    if func.overloadpacket in _HIDDEN_WRITES and args[5]:
        return [slot for slot in args[3:5] if isinstance(slot, Slot)]
    if not func._schema.is_mutable:
        return []
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in _leaves(value) if isinstance(leaf, Slot)]
    return written


def _flat_results(result: Any) -> list[Tensor | None]:
    if isinstance(result, (tuple, list)):
        return [part if isinstance(part, Tensor) else None for part in result]
    return [result if isinstance(result, Tensor) else None]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _geometry(tensor: Tensor) -> Any:
    return (
        tuple(tensor.shape),
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )
