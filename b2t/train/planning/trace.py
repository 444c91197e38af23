"""A training step without data: fake tensors run the real code, and every byte is counted.

`FakeTensorMode` carries shapes and no memory, so that the step of any model is traced in seconds on
any machine. What depends on data is taken at its largest: all frames real and finite, a phoneme
heard in each.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from b2t.config import PhaseConfig
from b2t.data.batches import Batch
from b2t.errors import UserError
from b2t.model.brain_to_text import BrainToText
from b2t.model.outputs import BrainToTextOutput
from b2t.quantize.norms import StepNorms
from b2t.quantize.statistics import QuantizerStats
from b2t.train.phase import components
from b2t.train.planning.workload import Workload, fake_copy
from b2t.train.step import COUNTED

aten = torch.ops.aten


@dataclass
class Kernels:
    """Operators as they were launched: floating-point operations and bytes moved, of each."""

    flops: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)

    def seconds(self, flops_per_s: float, bytes_per_s: float, launch_s: float) -> np.ndarray:
        """Seconds of each operator [3, operators] by arithmetic, memory and launch."""
        return np.stack([
            np.asarray(self.flops) / flops_per_s,
            np.asarray(self.moved) / bytes_per_s,
            np.full(len(self.flops), launch_s),
        ])  # fmt: skip


@dataclass
class MicroStep:
    """One micro-batch forward and backward, and the codebook update that follows on a step.

    Attributes:
        kept: bytes of activations at the end of forward.
        peak: most bytes of activations and temporaries in forward.
        gradients: weights that received a gradient in the order of their coming, each with the most
            bytes since the one before; it leaves as soon as it is there, as under ZeRO.
        ending: most bytes after the last.
        after: bytes that the outputs of the step still hold.
        update: most bytes of the codebook update, on top of `after`.
        forward: operators of forward.
        backward: operators of backward.
        loss_names: losses that were computed.
        usage: operators of the pass that finds the soft usage of a step with accumulation.
        moving: operators of the codebook update.
        stats: codebook statistics, of fake tensors; None where codebooks rest.
    """

    kept: int = 0
    peak: int = 0
    gradients: list[tuple[str, int]] = field(default_factory=list)
    ending: int = 0
    after: int = 0
    update: int = 0
    forward: Kernels = field(default_factory=Kernels)
    backward: Kernels = field(default_factory=Kernels)
    loss_names: list[str] = field(default_factory=list)
    usage: Kernels = field(default_factory=Kernels)
    moving: Kernels = field(default_factory=Kernels)
    stats: QuantizerStats | None = None

    @property
    def most(self) -> int:
        """Most bytes of activations and temporaries at any time."""
        return max(self.peak, self.ending, *(peak for _, peak in self.gradients), 0)


class Tracer(TorchDispatchMode):
    """Counts the bytes that live, and what each operator does.

    Args:
        known: tensors whose memory is somebody else's: weights, buffers, the batch.
    """

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.kernels = Kernels()
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operator and take note of it."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return _number(args[0])
        if func.namespace == "prim":  # asks for a device, often
            return func(*args, **kwargs)
        out = _of_largest_shape(func, args, kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in results:
            self._see(tensor)
        if results and not func.is_view and func._overloadpacket not in _NO_KERNEL:
            self.kernels.flops.append(_flops(func, args, kwargs, out))
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.kernels.moved.append(float(sum(map(_size, inputs + results))))
        return out

    def restart(self) -> Kernels:
        """Return the operators so far; begin a new list, and a new peak."""
        done, self.kernels, self.peak = self.kernels, Kernels(), self.live
        return done

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def trace_step(
    phase: PhaseConfig, model: BrainToText, workload: Workload,
    micro_batch: int, dtype: torch.dtype, bins: int | None = None, usage: bool = True,
) -> MicroStep:  # fmt: skip
    """Trace one micro-batch of a phase and the codebook update.

    Args:
        phase: what is trained, on which losses.
        model: built on the meta device; it is made fake, and may be traced again.
        workload: what trials look like.
        micro_batch: trials.
        dtype: of weights and activations.
        bins: of each trial; None is the longest.
        usage: trace `MicroStep.usage` too.
    """
    model.freeze([name for name in components(model) if name not in phase.trainable])
    found = MicroStep()
    with FakeTensorMode(allow_non_fake_inputs=True), _started(model, dtype):
        batch = workload.batch(micro_batch, dtype, bins)
        held = [t for t in vars(batch).values() if isinstance(t, Tensor)]
        tracer = Tracer(iter([*model.parameters(), *model.buffers(), *held]))
        hooks = _take_gradients(model, found, tracer)
        if model.text_decoder is not None and model.text_decoder.phonemes is not None:
            model.text_decoder.phonemes.room = model.frame_mask(batch.signal_mask).shape[1]
        model.train()
        with tracer:
            output = _forward(model, batch, phase)
            found.kept, found.peak = tracer.live, tracer.peak
            found.forward = tracer.restart()
            if output.loss is not None and output.loss.requires_grad:
                output.loss.backward()
            found.ending, found.after = tracer.peak, tracer.live
            found.backward = tracer.restart()
            found.loss_names = sorted(output.losses or {})
            _update(model, phase, output, tracer, found)
            if usage:
                _share_usage(model, batch, tracer, found)
        for hook in hooks:
            hook.remove()
    return found


def _update(
    model: BrainToText,
    phase: PhaseConfig,
    output: BrainToTextOutput,
    tracer: Tracer,
    found: MicroStep,
) -> None:
    quantizer = model.quantizer
    if quantizer is not None and output.stats is not None and "quantizer" in phase.trainable:
        quantizer.revival_enabled = False  # whom it revives depends on data
        quantizer.update(output.stats)
        found.stats = output.stats
    found.update = tracer.peak - found.after
    found.moving = tracer.restart()


def _share_usage(model: BrainToText, batch: Batch, tracer: Tracer, found: MicroStep) -> None:
    if model.quantizer is not None and {"diversity", "perplexity"} & {*found.loss_names}:
        with torch.no_grad():
            latents, mask = model.latents(batch.signal, batch.signal_mask, batch.session)
            model.quantizer.soft_usage(latents, mask)
        found.usage = tracer.restart()


def _forward(model: BrainToText, batch: Batch, phase: PhaseConfig) -> BrainToTextOutput:
    counts = dict.fromkeys(COUNTED, 1.0)
    labels = phase.text_from != "signals"
    norms = StepNorms(counts=counts)
    return model(batch, norms, phase.losses.model_dump(), text_from_labels=labels)


def _take_gradients(model: BrainToText, found: MicroStep, tracer: Tracer) -> list[Any]:
    """Note each weight's gradient and let go of it."""

    def taker(name: str) -> Any:
        def take(parameter: Tensor) -> None:
            found.gradients.append((name, tracer.peak))
            parameter.grad = None
            tracer.peak = tracer.live

        return take

    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p.register_post_accumulate_grad_hook(taker(name)) for name, p in trained]


@contextmanager
def _started(model: BrainToText, dtype: torch.dtype) -> Iterator[None]:
    """Lend a meta model fake tensors and codebooks that have started."""
    before = [
        (m._parameters, dict(m._parameters), m._buffers, dict(m._buffers)) for m in model.modules()
    ]
    try:
        fake_copy(model, dtype)
        if model.quantizer is not None:
            books = model.quantizer.codebooks
            with unset_fake_temporarily():
                for name, value in _clocks(model.quantizer.num_quantizers).items():
                    books._buffers[name] = value
        yield
    finally:
        for parameters, had, buffers, held in before:
            parameters.update(had)
            buffers.update(held)


def _clocks(layers: int) -> dict[str, Tensor]:
    return {
        "seed": torch.tensor(0),
        "updates": torch.tensor(1),
        "initialized": torch.tensor(layers),
        "temperature": torch.tensor(1.0),
        "progress": torch.tensor(0.0),
    }


def _number(tensor: Tensor) -> Any:
    """What the host reads of a tensor: of a fake flag, that all is well.

    Raises:
        UserError: a number that depends on data.
    """
    if not isinstance(tensor, FakeTensor):
        with unset_fake_temporarily():
            return tensor.detach().numpy().item()
    if tensor.dtype == torch.bool:
        return True
    raise UserError(
        f"this configuration reads a {tensor.dtype} of the data while it computes, which no plan "
        "can know before there are data; plan the phases without the part that does so, or measure "
        "a run (scripts/bench_train.py)"
    )


def _of_largest_shape(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator; where the shape of its result depends on data, the largest there can be."""
    first: Any = args[0] if args else None
    if func is aten.nonzero.default:
        return first.new_empty(first.numel(), first.dim(), dtype=torch.int64)
    if func in (aten._unique2.default, aten.unique_dim.default):
        length = first.numel() if func is aten._unique2.default else first.shape[0]
        ids = (first.new_empty(length, dtype=torch.int64) for _ in range(2))
        return (torch.empty_like(first), *ids)
    if func is aten._ctc_loss.Tensor:
        steps, rows, _ = first.shape
        return first.new_empty(rows), first.new_empty(rows, steps, 2 * args[1].shape[-1] + 1)
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return func(first, [*_as_numbers(args[1])], *args[2:], **kwargs)
    return func(*args, **kwargs)


def _as_numbers(indices: Any) -> Iterator[Tensor | None]:
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            for _ in range(index.dim()):
                yield index.new_empty(index.numel(), dtype=torch.int64)
        else:
            yield index


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> float:
    """Floating-point operations, those of matrix products and of the quantizer's search alone."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return float(sdpa_flop_count(*(t.shape for t in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        # Five products in place of two: scores again, and the gradients of all four factors.
        return 2.5 * sdpa_flop_count(*(t.shape for t in args[1:4]))
    if packet in _SEARCHES:
        x, codebook = (t for t in args if isinstance(t, Tensor) and t.dim() == 2)
        return _SEARCHES[packet] * 2.0 * x.shape[0] * codebook.numel()
    return 0.0


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_NO_KERNEL = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten._unsafe_view, aten.detach,
}  # fmt: skip
"""Operators that launch nothing on a GPU."""

_SEARCHES = {
    torch.ops.b2t_kernels.nearest_code: 1.0,
    torch.ops.b2t_kernels.usage_forward: 1.0,
    torch.ops.b2t_kernels.usage_backward: 2.0,
}
"""Passes over all N × K scores, each 2·N·K·D; backward recomputes them."""
