# SPDX-License-Identifier: Apache-2.0
"""
A whole step of training as a function of fixed buffers, which a GPU replays as one CUDA graph.

A step of a small model is more than a thousand launches, over which Python and the driver take longer than the GPU.
Recorded are forward pass, loss, backward pass, the check for divergence, clipping, the optimiser, its rates and the
average of the weights: a step then costs the host two copies and one launch. What a host would decide in between is
decided on the device: rates come from a table, fp16's skipped steps are flags.

Without CUDA the same function runs uncaptured, which is how it is tested against the Trainer's own way.
"""

import contextlib
import functools
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer

from ..data.dataset import source_of
from ..models.families import OWN
from ..models.softmax_attention import UNMASKED
from .divergence import SKIPPED_STEPS
from .ema import WeightAverage


T = TypeVar("T")
# Before recording, on the stream that is recorded: kernels are compiled and libraries take their workspaces.
WARM_UPS = 2
# Small kernels side by side in one launch: the casts of a block's weights to half precision, and sums of its gradients.
COMPILED = {"combo_kernels": True}


class RecordedStep:
    """
    One optimiser step, over one batch or several accumulated ones.

    Batches of the first one's shape are replayed; others (the last, smaller one of an epoch) go through the same
    function, launch by launch. (Filled up, they could be replayed, but matrix products of more rows round otherwise.)

    Args:
        model: called as `model(pixel_values=...)`; its output has `logits`.
        parts: of the model, that are compiled, each by itself: equal ones share the work.
        parameters: the trainable ones by name.
        loss: of (outputs, labels, number of elements of all labels of the step).
        optimizer: torch's fused Adam, AdamW or SGD (see `obstacle`).
        rates: of each group of the optimiser at each step, fp64 (steps, groups) on the CPU.
        position: the step at which `rates` goes on.
        step: optimiser steps done before.
        max_norm: the gradients' norm is clipped at; 0 for never.
        running_loss: scalar to which each batch's loss is added.
        scaler: of fp16, or `None`.
        average: of the weights, or `None`.
        accumulated: batches of a step.
        world: processes, whose gradients are added up.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: list[nn.Module],
        parameters: dict[str, nn.Parameter],
        loss: Callable,
        optimizer: Any,
        rates: torch.Tensor,
        position: int,
        step: int,
        *,
        max_norm: float,
        running_loss: torch.Tensor,
        scaler: Any = None,
        average: WeightAverage | None = None,
        accumulated: int = 1,
        world: int = 1,
    ):
        self.model, self.parts, self.loss_of, self.optimizer = model, parts, loss, optimizer
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.max_norm, self.scaler, self.average = max_norm, scaler, average
        self.accumulated, self.world = accumulated, world
        self.running_loss, device = running_loss, running_loss.device
        zeros = functools.partial(torch.zeros, (), device=device)
        self.schedule, self.table = rates, rates.to(device, torch.float32)
        self.rates = self.table[position].clone()
        self.position = torch.tensor([position], device=device)
        # Of the step: elements of its labels, its loss, whether it is skipped (fp16), the norm of its gradients.
        self.items, self.loss, self.found_inf, self.norm = zeros(dtype=torch.int64), zeros(), zeros(), zeros()
        self._items = 0
        # Steps done, and skipped in a row; the first step that diverged (0: none), with its loss and norms.
        self.steps, self.skipped, self.diverged = (zeros(dtype=torch.int64) for _ in range(3))
        self.steps.fill_(step)
        self.values: Any = None
        if scaler is not None and scaler._scale is None:
            scaler._lazy_init_scale_growth_tracker(device)
        self.graphs: dict[bool, torch.cuda.CUDAGraph] | None = None
        # What the graphs read and write, from when they are made.
        self.pool: Any = None
        self.images: Any = None
        self.labels: Any = None
        # Of an evaluation.
        self.forward: torch.cuda.CUDAGraph | None = None
        self.seen: Any = None
        self.answer: Any = None

    def run(self, batches: list[dict[str, torch.Tensor]], items: int) -> None:
        """
        Take one step.

        Args:
            batches: `pixel_values` and `labels` on the device.
            items: elements of all their labels (over all processes).
        """
        if items != self._items:
            self.items.fill_(items)
            self._items = items
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            images, labels = batch["pixel_values"], batch["labels"]
            if self.graphs is not None and (images.shape, labels.shape) == (self.images.shape, self.labels.shape):
                self.images.copy_(images)
                self.labels.copy_(labels)
                self.graphs[last].replay()
            else:
                self.model.train()  # Maybe after an evaluation.
                self._compute(images, labels, last)

    def record(self, images: torch.Tensor, labels: torch.Tensor, listen=contextlib.nullcontext) -> None:
        """
        Make the graphs, for batches like this one. Nothing that a checkpoint holds changes.

        Args:
            images, labels: any batch.
            listen: context of a backward pass, for whoever wants to hear of it.
        """
        self.images, self.labels = images.clone(), labels.clone()
        generator = torch.cuda.get_rng_state(images.device)
        self.model.train()
        self._make_momentum()
        for part in self.parts:
            part.compile(options=COMPILED)
        try:
            for index in range(WARM_UPS):
                with listen() if index == 0 else contextlib.nullcontext():
                    self._differentiate(self.images, self.labels)
                if index < WARM_UPS - 1:
                    self._drop_gradients()
            # A step that is skipped makes the optimiser's state, and changes nothing.
            self._step_optimizer(self.found_inf.new_ones(()))
            self._drop_gradients()
            if self.accumulated > 1:
                self._make_gradients()
            self.graphs = {}
            for last in (True, False) if self.accumulated > 1 else (True,):
                self.graphs[last], _ = self._capture(functools.partial(self._compute, self.images, self.labels, last))
        finally:
            for part in self.parts:
                part._compiled_call_impl = None  # Evaluation, and batches of other sizes, would compile anew.
        if self.accumulated == 1:
            self._drop_gradients()
        torch.cuda.set_rng_state(generator, images.device)

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """What the model, in evaluation, says of images: recorded for batches of the first one's size."""
        if not images.is_cuda:
            return self.model(pixel_values=images).logits
        if self.forward is None:
            self.seen = images.clone()
            for _ in range(WARM_UPS):
                self.model(pixel_values=self.seen)
            self.forward, self.answer = self._capture(lambda: self.model(pixel_values=self.seen).logits)
        if images.shape != self.seen.shape:
            return self.model(pixel_values=images).logits
        self.seen.copy_(images)
        self.forward.replay()
        return self.answer.clone()

    def _capture(self, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """`work` as a graph of the current stream, and what it returns. One graph runs at a time: they share memory."""
        device = self.running_loss.device
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the data loader's, go on.
        with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream(device), capture_error_mode="thread_local"):
            result = work()
        return graph, result

    def position_now(self) -> int:
        """Steps that the schedule has taken: all but those that fp16 skipped. Waits for the device."""
        return int(self.position)

    def divergence(self) -> tuple[int, list[float]] | None:
        """The first step that diverged, with its loss and the norm of each gradient. Waits for the device."""
        step = int(self.diverged)
        return (step, self.values.tolist()) if step else None

    def _compute(self, images: torch.Tensor, labels: torch.Tensor, last: bool) -> None:
        """All that is recorded: a batch, and after the `last` one the step."""
        loss = self._differentiate(images, labels)
        self.loss += loss
        self.running_loss += loss * self.world
        if not last:
            return
        with torch.no_grad():
            self._finish()
        if self.accumulated > 1:
            torch._foreach_zero_(self._gradients())
        else:
            self._drop_gradients()

    def _differentiate(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self.loss_of(self.model(pixel_values=images), labels, self.items)
        (loss if self.scaler is None else loss * self.scaler._scale).backward()
        if self.values is None:
            # As the optimiser does, leave out what gets no gradient: it would decay by one of 0.
            used = {name: weight for name, weight in zip(self.names, self.parameters) if weight.grad is not None}
            self.names, self.parameters = list(used), list(used.values())
            self.values = torch.zeros(1 + len(used), device=loss.device)
        return loss.detach()

    def _finish(self) -> None:
        gradients = self._gradients()
        if self.world > 1:
            whole = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(whole)
            parts = whole.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(like) for part, like in zip(parts, gradients, strict=True)])
        if self.scaler is not None:
            self.found_inf.zero_()
            inverse = self.scaler._scale.double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found_inf, inverse)
        norms = torch.stack(torch._foreach_norm(gradients))
        self._watch(norms)
        self.norm.copy_(torch.linalg.vector_norm(norms))
        if self.max_norm > 0:
            torch._foreach_mul_(gradients, (self.max_norm / (self.norm + 1e-6)).clamp(max=1.0))
        torch.index_select(self.table, 0, self.position, out=self.rates[None])
        self._step_optimizer(None if self.scaler is None else self.found_inf)
        if self.scaler is None:
            self.position += 1
        else:
            scaler = self.scaler
            torch._amp_update_scale_(
                scaler._scale,
                scaler._growth_tracker,
                self.found_inf,
                scaler.get_growth_factor(),
                scaler.get_backoff_factor(),
                scaler.get_growth_interval(),
            )
            self.position += 1 - self.found_inf.long()
        if self.average is not None:
            self.average.update(None if self.scaler is None else self.found_inf)
        self.loss.zero_()

    def _watch(self, norms: torch.Tensor) -> None:
        """As `DivergenceGuard` does on the host: keep the first loss and norms that are not finite."""
        values = torch.cat([self.loss[None], norms])
        finite = torch.isfinite(values)
        self.steps += 1
        bad = ~finite.all()
        if self.scaler is not None:
            self.skipped.copy_(torch.where(finite[1:].all(), 0, self.skipped + 1))
            bad = ~finite[0] | (self.skipped >= SKIPPED_STEPS)
        first = bad & (self.diverged == 0)
        self.values.copy_(torch.where(first, values, self.values))
        self.diverged.copy_(torch.where(first, self.steps, self.diverged))

    def _step_optimizer(self, found_inf: torch.Tensor | None) -> None:
        """With `found_inf` 1, the step is skipped."""
        with self._rates_on_device():
            if found_inf is not None:
                self.optimizer.grad_scale, self.optimizer.found_inf = None, found_inf
            try:
                self.optimizer.step()
            finally:
                if found_inf is not None:
                    del self.optimizer.grad_scale, self.optimizer.found_inf

    def _make_momentum(self) -> None:
        """SGD would take its first gradients for it, by a decision of the host."""
        if isinstance(self.optimizer, torch.optim.SGD):
            for group in self.optimizer.param_groups:
                for parameter in group["params"] if group["momentum"] else ():
                    self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Only here has the optimiser tensors for rates: its state stays what it is without recording."""
        before = [(group["lr"], group.get("capturable")) for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, self.rates.unbind(), strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = rate.is_cuda
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(self.optimizer.param_groups, before, strict=True):
                group["lr"] = rate
                if "capturable" in group:
                    group["capturable"] = capturable

    def _make_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def parts_to_compile(model: PreTrainedModel) -> list[nn.Module]:
    """Blocks and embeddings of a ViT. None where a teacher hands each block its maps."""
    if getattr(model.config, "teacher_attention", None):
        return []
    parts = [module for module in model.modules() if isinstance(module, ViTLayer)]
    for module in model.modules():
        if isinstance(getattr(module, "embeddings", None), ViTEmbeddings):
            parts.append(module.embeddings)
    return parts


def table_of_rates(scheduler: LambdaLR, steps: int) -> torch.Tensor:
    """The rate of each group at each of `steps` steps, fp64 (steps + 1, groups): the last is never used."""
    return torch.tensor(
        [
            [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for step in range(steps + 1)
        ],
        dtype=torch.float64,
    )


def obstacle(trainer) -> str | None:
    """Why this Trainer's step cannot be recorded, in words; `None` if it can. Asked when its optimiser is there."""
    args, optimizer = trainer.args, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if args.device.type != "cuda":
        return f"the device is {args.device.type}, and CUDA alone has graphs"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "FSDP and DeepSpeed decide on the host what is where"
    if args.n_gpu > 1:
        return "one process has several GPUs: start one for each, with `accelerate launch`"
    if (kind := trainer.bare_model.config.model_type) not in OWN:
        return f"no step of a model of type {kind} has been recorded so far, only of KArAt-ViT and ViT"
    if kind == "vit" and trainer.bare_model.config._attn_implementation == "sdpa":
        return f"`attn_implementation` sdpa makes a mask while it is recorded ({UNMASKED} does not)"
    if any(getattr(module, "gradient_checkpointing", False) for module in trainer.bare_model.modules()):
        return "`gradient_checkpointing` restores random numbers on the host"
    if args.torch_compile:
        return "`torch_compile` compiles the whole model in its own way"
    if args.torch_empty_cache_steps is not None:
        return "`torch_empty_cache_steps` gives memory back that the graph uses"
    if args.debug:
        return f"`debug` {args.debug[0].value} looks at every module's output on the host"
    if others := [callback for callback in trainer.callback_handler.callbacks if _acts_within(callback)]:
        return f"the callback {type(others[0]).__name__} acts within a step"
    if any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in trainer.bare_model.parameters()):
        return "hooks of a parameter, as WANDB_WATCH sets them, want to see its gradient"
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)):
        return f"the optimiser {args.optimizer_name} cannot be recorded (adamw_torch_fused, adamw_torch and sgd can)"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"the optimiser {args.optimizer_name} is not the fused one (adamw_torch_fused is)"
    if not isinstance(trainer.lr_scheduler, LambdaLR):
        return f"the schedule {type(trainer.lr_scheduler).__name__} decides on the host"
    if args.world_size > 1 and source_of(trainer.train_dataset).is_divided:
        return "the processes of a streamed data set tell each other at each step how many images they have"
    if trainer.average is not None and not trainer.average.is_beside_the_weights():
        return "`model_ema_device` keeps the average of the weights elsewhere"
    if not has_compiler():
        return "there is no C compiler (gcc, clang, or $CC)"
    return None


def _acts_within(callback: TrainerCallback) -> bool:
    """Whether it wants to hear of events of which there is none while a graph is replayed."""
    events = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")
    heard = any(getattr(type(callback), event) is not getattr(TrainerCallback, event) for event in events)
    return heard and not getattr(callback, "is_recorded", False)


def has_compiler() -> bool:
    """Whether Triton can compile its launchers."""
    named = os.environ.get("CC")
    return any(shutil.which(name) for name in ([named] if named else ["gcc", "clang", "cc"]))
