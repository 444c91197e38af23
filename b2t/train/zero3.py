"""ZeRO stage 3: a phase's engine that splits the weights themselves over ranks.

DeepSpeed partitions every parameter of the module, frozen ones too, and gathers those of each
submodule around its forward and backward. Codebooks are buffers and stay whole. What runs the
model outside of the engine needs `Zero3Engine.whole`; when a phase ends the module gets ordinary
parameters back.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from b2t.train.engine import PhaseEngine
from b2t.train.gather import Part

_MODULE_STATE = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "all_parameters",
                 "_external_params", "_original_parameters")  # fmt: skip
"""What DeepSpeed leaves on a module, besides names that begin with `ds_`."""


class Zero3Engine(PhaseEngine):
    """A `PhaseEngine` whose weights, gradients and optimizer state each rank holds a part of."""

    def __init__(self, model: nn.Module, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        quantizer = getattr(model, "quantizer", None)
        if quantizer is not None and quantizer.codebooks.weight is not None:
            from deepspeed.runtime.zero import register_external_parameter

            # The quantizer reads it past its owner, and not before the codebooks have started.
            register_external_parameter(quantizer, quantizer.codebooks.weight)

    def step(self) -> bool:
        """Step after a micro-batch; True where weights changed (boundary and no overflow)."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        applied = super().step()
        if boundary:
            # DeepSpeed overwrites gradients but never clears them: a parameter that has none in
            # the next step would move along its last one again.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        return applied

    def flat_masters(self) -> list[Tensor]:
        """Return this rank's parts of the float32 masters, flat, one a sub-group."""
        return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    @contextmanager
    def whole(self, *modules: nn.Module) -> Iterator[None]:
        """Gather the weights of `modules` (of the model) for what runs them outside. Collective.

        Inside, ranks may run them as often as they like, each for itself: DeepSpeed's hooks, which
        gather and release, are off.
        """
        from deepspeed.runtime.zero import GatheredParameters

        parameters = [p for module in modules or (self.model,) for p in module.parameters()]
        with GatheredParameters(parameters), self._without_hooks():
            yield

    def _release(self) -> None:
        """Release the engine; the model gets whole, ordinary parameters. Collective."""
        from deepspeed.runtime.zero import GatheredParameters

        partitioned = list(self.model.parameters())
        with GatheredParameters(partitioned):
            weights = {parameter: parameter.data for parameter in partitioned}
        super()._release()
        _make_ordinary(self.model, weights)

    def write(self, parameter: Any, value: Tensor, moment: str | None = None) -> None:
        """Replace a whole master, or one of its moments, on the ranks that hold its parts."""
        # DeepSpeed's writers of whole tensors fail where ranks do not divide them.
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        part = parameter.partition_numel()
        rank = parameter.ds_zero_partition_rank
        mine = value.flatten()[part * rank : part * (rank + 1)]
        mine = nn.functional.pad(mine, (0, part - mine.numel()))
        if moment is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, moment)

    def _link_moments(self) -> None:
        """Do nothing: DeepSpeed looks moments up by the masters that they belong to."""

    def _parts(self) -> Iterator[Part]:
        """What of each trained parameter lies where in this rank's `flat_masters`."""
        zero = self._engine.optimizer
        parameter: Any
        for name, parameter in self._trained():
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = parameter.partition_numel() * parameter.ds_zero_partition_rank
            numel = min(length, parameter.ds_numel - start)
            if numel > 0:
                yield Part(name, group, offset, start, numel)

    def _flat_groups(self) -> list[int]:
        zero = self._engine.optimizer
        return [zero.sub_group_to_group_id[i] for i in range(len(zero.fp16_groups))]

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        offload = self._engine.optimizer.parameter_offload
        handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
        hooks = [(handle.hooks_dict_ref(), handle.id) for handle in handles]
        taken = [(place, number, place.pop(number)) for place, number in hooks]
        try:
            yield
        finally:
            for place, number, hook in taken:
                place[number] = hook


def _make_ordinary(model: nn.Module, weights: Mapping[nn.Parameter, Tensor]) -> None:
    """Replace partitioned parameters by ordinary ones of these values; undo DeepSpeed's traces."""
    from deepspeed.runtime.zero import partition_parameters

    fresh = {p: nn.Parameter(value, p.requires_grad) for p, value in weights.items()}
    for module in model.modules():
        own = module._parameters
        module._parameters = {n: None if p is None else fresh[p] for n, p in own.items()}
        for name in [n for n in module.__dict__ if n.startswith("ds_") or n in _MODULE_STATE]:
            del module.__dict__[name]
    for parameter in weights:
        # They refer to the engine, and its caches to them.
        parameter.__dict__.clear()
    patched = partition_parameters.InsertPostInitMethodToModuleSubClasses
    torch.nn.functional.linear = getattr(patched, "linear_bk", torch.nn.functional.linear)
