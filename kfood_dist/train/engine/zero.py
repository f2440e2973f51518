"""The engine on DeepSpeed ZeRO, stages 1 to 3."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kfood_dist.data.batch.collate import Batch
from kfood_dist.model.objective.base import Outcome
from kfood_dist.train.engine import state
from kfood_dist.train.engine.base import Update, scaled

# The gradients of an adapter take a few hundred MiB. Those of a model that trains in full must be divided at once.
_MOST_LOCAL_GRADIENTS = 2**28  # 1 GiB in float32


class ZeroEngine:
    """An engine with DeepSpeed ZeRO. DeepSpeed clips the gradients, as configured from the recipe."""

    def __init__(self, accelerator: Accelerator, module: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.trainable: dict[str, Any] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        fp16 = accelerator.mixed_precision == "fp16"
        frozen = [p for p in module.parameters() if not p.requires_grad]
        tower = {p: p.data for p in frozen if fp16 and p.dtype == torch.float32}
        self.engine, _ = accelerator.prepare(module, optimizer)
        self.optimizer = optimizer
        self.rank = accelerator.process_index
        self.stage = self.engine.zero_optimization_stage()
        self._window = ExitStack()  # open while gradients are added on this rank only
        self._in_window = False
        self._adds_locally = self._is_small_enough_to_add_locally()
        if self._adds_locally:
            inner = self.engine.optimizer
            # Otherwise, stage 2 would add them in 16 bits. Stage 1 has this switch from the start.
            inner.use_grad_accum_attribute = inner.use_separate_grad_accum
        if fp16:
            # DeepSpeed has cast every weight to fp16, but the vision tower must stay in float32.
            for parameter, data in tower.items():
                parameter.data = data
            # Otherwise it ends the run with a bare Exception at the smallest scale. The loop's own limit comes first.
            self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    def forward(self, batch: Batch) -> Outcome:
        return Outcome(*self.engine(batch))

    def micro_step(self, batch: Batch, scale: float, last: bool) -> Outcome:
        if self._adds_locally and not self._in_window:
            self._window.enter_context(self.engine.coalesce_grad_reduction())
            self._in_window = True
        self.engine.set_gradient_accumulation_boundary(last)
        outcome = self.forward(batch)
        self.engine.backward(scaled(outcome.loss, scale), scale_wrt_gas=False)
        if last and self._in_window:
            self._window.close()  # reduces the sum of all micro-batches
            self._in_window = False
            self.engine.set_gradient_accumulation_boundary(True)
        return outcome._replace(loss=outcome.loss.detach())

    def _is_small_enough_to_add_locally(self) -> bool:
        """Return whether the gradients are added over micro-batches on each rank, and reduced once per step.

        Otherwise, ZeRO stage 2 reduces them at every micro-step, which keeps only a part of them on each rank. Stage 1
        reduces once anyway.
        """
        inner = self.engine.optimizer
        count = sum(parameter.numel() for parameter in self.trainable.values())
        return self.stage == 2 and not inner.cpu_offload and count <= _MOST_LOCAL_GRADIENTS

    def step(self, learning_rates: Sequence[float]) -> Update:
        for group, learning_rate in zip(self.engine.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate
        loss_scale = self.scale_state.get("scale")
        self.engine.step()
        return Update(float(self.engine.get_global_grad_norm()), self.engine.was_step_applied(), loss_scale)

    @property
    def scale_state(self) -> dict[str, float]:
        if not self.engine.fp16_enabled():
            return {}
        scaler = self.engine.optimizer.loss_scaler
        return {
            "scale": scaler.cur_scale,
            "good_steps": (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window,
        }

    @scale_state.setter
    def scale_state(self, state: dict[str, float]) -> None:
        scaler = self.engine.optimizer.loss_scaler
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = state["scale"], int(state["good_steps"]), -1

    def save(self, folder: Path) -> None:
        state.save(folder / state.file_name(self.rank), self.fragments(), self.optimizer, self.scale_state)

    def load(self, folder: Path) -> None:
        with state.Saved(folder) as saved:
            saved.require_parameters(
                {n: p.ds_numel if self.stage == 3 else p.numel() for n, p in self.trainable.items()}
            )
            state.load(saved, self.fragments(), self.optimizer)
            if saved.extra:
                self.scale_state = saved.extra
        self._refresh_weights()

    def fragments(self) -> list[state.Fragment]:
        """Return the flat float32 tensors of this rank, each with the parameters that are in it."""
        inner = self.engine.optimizer
        if self.stage == 3:
            return [
                state.Fragment(flat, tuple(self._slices_of_stage_3(group)))
                for flat, group in zip(inner.fp32_partitioned_groups_flat, inner.fp16_groups, strict=True)
            ]
        # For ZeRO stage 1 with float32 accumulation, DeepSpeed uses its BF16_Optimizer, which names them differently.
        bf16 = hasattr(inner, "fp32_groups_flat_partition")
        flats = inner.fp32_groups_flat_partition if bf16 else inner.single_partition_of_fp32_groups
        slices: list[list[state.Slice]] = [[] for _ in flats]
        for name, parameter in self.trainable.items():
            if (mapping := parameter._hp_mapping) is not None:  # None: no part of it is on this rank
                part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                slices[mapping.param_group_index].append(state.Slice(name, part.start, part.numel, place.start))
        return [state.Fragment(flat, tuple(found)) for flat, found in zip(flats, slices, strict=True)]

    def _slices_of_stage_3(self, group: list[Any]) -> Iterator[state.Slice]:
        """Yield the slices of this rank in one group.

        ZeRO stage 3 cuts each parameter separately, into equal parts. The last parts can be short or empty.
        """
        names = {id(parameter): name for name, parameter in self.trainable.items()}
        inner = self.engine.optimizer
        for parameter in group:
            _, at, size = inner.grad_position[inner.get_param_id(parameter)]
            start = self.rank * size
            if (length := min(size, parameter.ds_numel - start)) > 0:
                yield state.Slice(names[id(parameter)], start, length, at)

    def _refresh_weights(self) -> None:
        """Copy the master weights to the weights that the model computes with, as the end of a step does."""
        inner = self.engine.optimizer
        if self.stage < 3:
            inner.update_lp_params()
            return
        inner.checkpoint_event_prologue()
        for i in range(len(inner.fp16_groups)):
            inner._reassign_or_swap_out_partitioned_parameters(i)
        inner.checkpoint_event_epilogue()
