"""Everything that touches DeepSpeed: one engine per phase, exact float32 masters between them.

Under ZeRO-2 `requires_grad_(False)` after `deepspeed.initialize` does not freeze (missing
gradients are filled with zeros, so momentum and weight decay still move weights), and a parameter
frozen before it never trains later. So each phase gets its own engine over the parameters that
it trains. Adam's moments start fresh with each phase, behind its warm-up. What carries over are
the float32 masters: a 16-bit engine keeps only rounded weights in the module.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from b2t.config import OptimConfig, PhaseConfig
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.gather import Gatherer, Part
from b2t.train.gradient_norms import GradientNorms
from b2t.train.masters import load_weights, weights_are_masters, weights_of
from b2t.train.schedule import lr_factor

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def parameter_groups(model: nn.Module, phase: PhaseConfig, optim: OptimConfig) -> list[dict]:
    """Named groups per trained component, with and without weight decay.

    Vectors (norms, biases), per-session weights and codebooks do not decay.
    """
    groups = []
    for component in phase.trainable:
        module = getattr(model, component, None)
        if module is None:
            continue
        lr = phase.lr * phase.lr_scale.get(component, 1.0)
        decays = component not in ("adapter", "quantizer")
        split: dict[str, list[nn.Parameter]] = {"": [], "/no_decay": []}
        for parameter in module.parameters():
            if parameter.requires_grad:
                split["" if decays and parameter.ndim > 1 else "/no_decay"].append(parameter)
        for suffix, parameters in split.items():
            if parameters:
                groups.append(
                    {
                        "name": component + suffix,
                        "params": parameters,
                        "lr": lr,
                        "weight_decay": 0.0 if suffix else optim.weight_decay,
                    }
                )
    return groups


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""What a precision of the DeepSpeed file makes of weights and activations."""


class PhaseEngine:
    """A DeepSpeed engine over the components that one phase trains.

    Args:
        model: `BrainToText`, already frozen to the phase's components.
        phase: the phase.
        optim: optimizer settings.
        ds_file: the checked DeepSpeed file.
        masters: exact float32 weights by name; read at construction, written by
            `collect_masters`. Where `weights_are_masters`, they become the module's own weights.
        time_done: share of the phase's minutes that is over, for the learning rate.

    Attributes:
        overflowed: components whose gradients, of this rank's share, were not finite in the last
            step that was skipped.
    """

    _adamw: type[torch.optim.AdamW] = torch.optim.AdamW

    def __init__(
        self,
        model: nn.Module,
        phase: PhaseConfig,
        optim: OptimConfig,
        ds_file: DeepSpeedFile,
        masters: dict[str, Tensor],
        time_done: Callable[[], float] = lambda: 0.0,
    ) -> None:
        import deepspeed

        self.model = model
        self.masters = masters
        self.ds_file = ds_file
        self._shared = weights_are_masters(ds_file, next(model.parameters()).device)
        load_weights(model, masters, self._shared)
        groups = parameter_groups(model, phase, optim)
        optimizer = self._optimizer(groups, optim)
        self._engine, _, _, self._scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for g in groups for p in g["params"]],
            lr_scheduler=lambda inner: LambdaLR(
                inner, _courses(inner.param_groups, phase, time_done)
            ),
            config=_with_quiet_defaults(ds_file.engine_config()),
            dist_init_required=False,
        )
        names = [groups[number]["name"] for number in self._flat_groups()]
        self._norms = GradientNorms(self._engine.optimizer, names)
        self.overflowed: list[str] = []
        self._norm_before: float | None = None
        self._watch_overflows([name.split("/")[0] for name in names])
        self._gatherer: Gatherer | None = None
        self.write_masters(masters)
        if self._shared:
            masters.update(weights_of(model))

    def _optimizer(self, groups: list[dict], optim: OptimConfig) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps}
        if self.ds_file.offload:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return self._adamw(groups, fused=True, **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward inside the engine."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro-batch, scaled by the loss scale and 1/accumulation."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """Step after a micro-batch; True where weights changed (boundary and no overflow)."""
        self._engine.step()
        return self._engine.was_step_applied()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return DTYPES[self.ds_file.precision]

    @property
    def loss_scale(self) -> float:
        """Current loss scale, 1 without fp16."""
        return float(getattr(self._engine.optimizer, "cur_scale", 1.0))

    def grad_norm(self) -> float:
        """Global gradient norm before clipping, unscaled; synchronises the device."""
        norm = self._engine.get_global_grad_norm()
        if norm is None:
            norm = self._norm_before
        return float("nan") if norm is None else float(norm)

    def grad_norms(self) -> dict[str, Tensor]:
        """Norm of each component before clipping, unscaled, of the last applied step."""
        return self._norms.norms()

    def learning_rates(self) -> dict[str, float]:
        """Current learning rate of each component."""
        groups = self._engine.optimizer.param_groups
        return {group["name"].split("/")[0]: float(group["lr"]) for group in groups}

    def collect_masters(self) -> dict[str, Tensor]:
        """Bring the trained weights up to date in `masters` (float32, CPU) and return it.

        Collective: all ranks must call it.
        """
        if not self._shared:
            self.masters.update(self.read_masters())
        return self.masters

    def read_masters(self) -> dict[str, Tensor]:
        """Return the trained weights by name, whole, float32, on the CPU. Collective."""
        found = {}
        for name, parameter in self._trained():
            full = self.read(parameter)
            assert full is not None, f"{name} has no float32 master"
            found[name] = full.detach().to("cpu", torch.float32, copy=True)
        return found

    def gather_masters(self) -> dict[str, Tensor]:
        """Return what `read_masters` does on rank 0 alone, nothing elsewhere. Collective.

        In memory that the next call uses again.
        """
        return self.gather(self.flat_masters(), "masters")

    def gather(self, flats: Sequence[Tensor], kind: str) -> dict[str, Tensor]:
        """Bring tensors that are laid out as `flat_masters` to rank 0, whole, by name. Collective.

        Args:
            flats: of this rank.
            kind: names the memory that receives them, which the next call uses again.
        """
        if self._gatherer is None:
            shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self._trained()}
            self._gatherer = Gatherer(list(self._parts()), shapes, self._engine.device)
        return self._gatherer.gather(flats, kind)

    def _parts(self) -> Iterator[Part]:
        """What of each trained parameter lies where in this rank's `flat_masters`."""
        for name, parameter in self._trained():
            found: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if found is not None:
                here, there = found.hp_fragment_address, found.lp_fragment_address
                group = found.param_group_index
                yield Part(name, group, here.start, there.start, here.numel)

    def trained_names(self) -> list[str]:
        """Names of the parameters that this engine trains."""
        return [name for name, _ in self._trained()]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, numbers) that continue this engine exactly, at any number of ranks.

        Collective. Tensors are Adam's moments by `name/moment`, whole, float32, on the CPU, on
        rank 0 alone, in memory that the next call uses again; numbers are counters, the loss
        scaler and the scheduler.
        """
        tensors: dict[str, Tensor] = {}
        stepped = self._adam_step()
        if stepped > 0:
            states = self._adam.state
            for moment in _MOMENTS:
                flats = [states[each][moment].view(-1) for each in self._stepped()]
                whole = self.gather(flats, moment)
                tensors |= {f"{name}/{moment}": value for name, value in whole.items()}
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        norm = self.grad_norm()
        numbers = {
            "adam_step": stepped,
            "scheduler_step": self._scheduler.last_epoch,
            "global_steps": self._engine.global_steps,
            "skipped_steps": self._engine.skipped_steps,
            "micro_steps": self._engine.micro_steps,
            "grad_norm": None if math.isnan(norm) else norm,
            "scaler": {f: getattr(scaler, f) for f in _SCALER_FIELDS if hasattr(scaler, f)},
        }
        return tensors, numbers

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from what `state` returned; the weights come through `masters`."""
        if numbers["adam_step"] > 0:
            self._create_moments(numbers["adam_step"])
            for name, parameter in self._trained():
                for moment in _MOMENTS:
                    value = tensors[f"{name}/{moment}"].to(self._engine.device)
                    self.write(parameter, value, moment)
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for field, value in numbers["scaler"].items() if scaler is not None else ():
            setattr(scaler, field, value)
        for counter in ("global_steps", "skipped_steps"):
            setattr(self._engine, counter, numbers[counter])
        self._norm_before = numbers.get("grad_norm")
        # Accumulation may have changed with the number of ranks; this is always a boundary.
        self._engine.micro_steps = numbers["global_steps"] * self.ds_file.accumulation
        self._set_schedule(numbers["scheduler_step"])

    def close(self) -> None:
        """Release the engine, its hooks and buffers; the model keeps its (rounded) weights."""
        self._release()
        gc.collect()  # DeepSpeed's objects go round in circles

    def _release(self) -> None:
        # DeepSpeed leaves these hooks on the model, and with them all that the engine holds. Its
        # destructor destroys once more, at any time, by then also what the next engine needs.
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        self._engine.destroy()
        self._engine.optimizer = None
        for parameter in self.model.parameters():
            parameter.grad = None
        del self._engine, self._norms, self._scheduler

    def whole(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Lend the weights of `modules` (of the model) to what runs them outside of the engine.

        They are whole as it is, but for ZeRO stage 3.
        """
        return nullcontext()

    def _watch_overflows(self, components: list[str]) -> None:
        """Note whose gradients overflow, and never give up for it: how long is the trainer's say.

        DeepSpeed raises where the loss scale cannot fall further, and drops the gradients.
        """
        zero = self._engine.optimizer
        if hasattr(getattr(zero, "loss_scaler", None), "raise_error_at_min_scale"):
            zero.loss_scaler.raise_error_at_min_scale = False
        if not hasattr(zero, "_update_scale"):
            return
        update = zero._update_scale

        def noted(has_overflow: bool = False) -> None:
            if has_overflow:
                found = {
                    component
                    for number, component in enumerate(components)
                    for gradient in self._gradients(number)
                    if not bool(torch.isfinite(gradient).all())
                }
                self.overflowed = sorted(found)
            update(has_overflow)

        zero._update_scale = noted

    def _gradients(self, group: int) -> list[Tensor]:
        """Return the gradients of a parameter group that this rank holds, reduced over ranks."""
        zero = self._engine.optimizer
        if self.ds_file.offload:
            gradient = zero.single_partition_of_fp32_groups[group].grad
            return [] if gradient is None else [gradient]
        return [g for g in zero.averaged_gradients.get(group) or [] if g is not None]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def write_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Replace the engine's masters, made from 16-bit weights, by these exact ones."""
        for name, parameter in self._trained():
            self.write(parameter, masters[name].to(self._engine.device))

    def read(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a copy of the whole float32 master of a parameter. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)

    def write(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Replace a whole master, or one of its moments, on the ranks that hold its parts."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _set_schedule(self, step: int) -> None:
        scheduler = self._scheduler
        scheduler.last_epoch = step
        rates = [b * f(step) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def flat_masters(self) -> list[Tensor]:
        """Return this rank's parts of the float32 masters, flat, one a parameter group."""
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _flat_groups(self) -> list[int]:
        """Numbers of the parameter groups that the flat masters belong to."""
        return list(range(len(self._engine.optimizer.param_groups)))

    @property
    def _adam(self) -> Any:
        """The optimizer that holds the moments."""
        return self._engine.optimizer.optimizer

    def _stepped(self) -> list[Tensor]:
        """What this optimizer steps: the flat masters."""
        return self.flat_masters()

    def _adam_step(self) -> int:
        states = self._adam.state
        steps = [int(states[p]["step"]) for p in self._stepped() if "step" in states[p]]
        return max(steps, default=0)

    def _create_moments(self, step: int) -> None:
        """Make the optimizer state that DeepSpeed would make at its first step."""
        adam = self._adam
        for each in self._stepped():
            count: Any = step
            if not self.ds_file.offload:
                on_device = bool(adam.defaults.get("fused"))
                count = torch.tensor(
                    float(step), dtype=torch.float32, device=each.device if on_device else "cpu"
                )
            adam.state[each] = {
                "step": count,
                "exp_avg": torch.zeros_like(each),
                "exp_avg_sq": torch.zeros_like(each),
            }
        if self.ds_file.offload:
            _count_up(adam, step)
        self._link_moments()

    def _link_moments(self) -> None:
        """Point each parameter at its part of Adam's moments.

        DeepSpeed does so after stepping the first parameter group, when the moments of the
        others do not exist yet, and never again.
        """
        zero = self._engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _count_up(adam: Any, steps: int) -> None:
    """Bring `DeepSpeedCPUAdam`'s bias correction to where ``steps`` steps leave it, bit for bit.

    Its C++ side keeps β^t as a running product, which a jump to step t replaces by a power.
    """
    group = adam.param_groups[0]
    nothing = [torch.zeros(8) for _ in range(4)]
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(
            adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, *nothing
        )


def _courses(
    groups: list[dict], phase: PhaseConfig, time_done: Callable[[], float]
) -> list[Callable[[int], float]]:
    """Learning-rate factor of each parameter group, by its component."""

    def factor(step: int, component: str) -> float:
        return lr_factor(step, phase, component, time_done())

    return [partial(factor, component=group["name"].split("/")[0]) for group in groups]


def _with_quiet_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"log_level": "error", "steps_per_print": 10**9, **raw}
