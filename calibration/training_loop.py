"""The loop of stage 2: steps, checkpoints, validations, and what is said of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from sla_video.calibration import training_checkpoint
from sla_video.calibration.clip_source import Sampler
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.calibration.nonfinite import find_nonfinite
from sla_video.calibration.pace import SYNC_EVERY, Pace
from sla_video.calibration.student import Student
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.progress import Progress

# Records that are kept, for checkpoints are read and written whole.
_HISTORY = 20000


class NonFiniteLoss(InputError):
    """The loss is NaN or infinite. The message says which layer was the first."""


class TrainingLoop:
    """Trains a student to the end of its pace.

    Args:
        accelerator, config: of the run.
        student: the network itself; `wrapped`: what `accelerator.prepare` made of it.
        optimizer: prepared; its groups have a "rate", their peak learning rate.
        sampler: the clips.
        pace: how far the run is.
        ema: of the trainable parameters, if wanted.
        validate: measures the student; called with the step, returns metrics.
        history: records of an interrupted run, to be continued.
        tokens, block_q: of a clip, for the draws of SSA.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: FinetuneConfig,
        *,
        student: Student,
        wrapped: nn.Module,
        optimizer: Any,
        sampler: Sampler,
        pace: Pace,
        ema: EMAModel | None,
        validate: Callable[[int], dict[str, Any]],
        progress: Progress,
        tokens: int,
        history: list[dict[str, Any]],
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.student = student
        self.wrapped = wrapped
        self.optimizer = optimizer
        self.sampler = sampler
        self.pace = pace
        self.ema = ema
        self.validate = validate
        self.progress = progress
        self.tokens = tokens
        self.history = history
        self.trainable = student.trainable()
        device = accelerator.device
        # Kept on the device, so that no step waits for it: sums since the last log, and the first
        # step whose loss was not finite.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._counted = 0
        # The first step, which compiles, is not timed.
        self._logged_at = (pace.steps + 1, pace.elapsed)
        self._bad_step = torch.full((), -1, dtype=torch.long, device=device)
        self._skips = getattr(optimizer, "optimizer", optimizer).defaults.get("fused", False)

    def run(self) -> bool:
        """Train; whether the end is reached, rather than `stop_after`."""
        config, pace = self.config, self.pace
        self.progress.stage("train", config.max_steps or None)
        while not pace.finished:
            self._step(pace.steps)
            pace.advance()
            self.progress.advance()
            step = pace.steps
            ended = pace.finished or step == config.stop_after
            log = step % config.log_every == 0 or ended
            save = step % config.save_every == 0 or ended
            if log or save:
                pace.agree()
                if pace.finished:
                    # The time is up: what is due at the end is due now.
                    ended = log = save = True
            if log or save or step % SYNC_EVERY == 0:
                self._check()
            if log:
                self._log()
            if config.validate_every and step % config.validate_every == 0 and not ended:
                self.validate_and_note(step)
                self.progress.stage("train", config.max_steps or None)
            if save:
                self._save()
            if ended:
                break
        return pace.finished

    def _step(self, step: int) -> None:
        """One optimizer step. Nothing in it waits for the device."""
        config, student, accelerator = self.config, self.student, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.pace.factor
        student.set_sparsity(draw_sparsity(config, step))
        if student.draw is not None:
            student.draw.step(config.seed, step, self.tokens, student.handle.config.block_q)
        total = torch.zeros(2, device=accelerator.device)
        for part in range(config.accumulate):
            last = part == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                losses = self.wrapped(*self.sampler.batch(step, part).tensors())
                accelerator.backward(losses["velocity"] / config.accumulate)
            found = [losses[k].detach().float() for k in ("velocity", "alignment") if k in losses]
            total[: len(found)] += torch.stack(found) / config.accumulate
        norm = accelerator.clip_grad_norm_(list(self.trainable.values()), config.clip_norm)
        norm = training_checkpoint.whole(norm.detach()).float()
        finite = torch.isfinite(total).all() & torch.isfinite(norm)
        self._bad_step = torch.where(
            (self._bad_step < 0) & ~finite, torch.full_like(self._bad_step, step), self._bad_step
        )
        if self._skips:
            # Fused optimizers leave out a step on the device's own word (as a gradient scaler's).
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            inner.grad_scale, inner.found_inf = None, (~finite).float()
        elif not bool(finite):
            self._check()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.trainable.values())
        self._sums += torch.cat([total, norm.view(1)])
        self._counted += 1

    def _check(self) -> None:
        """Stop if a loss was not finite; what is saved is from before."""
        bad = self._bad_step
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.gather(bad.view(1)).amax()
        step = int(bad)
        if step < 0:
            return
        self.student.set_sparsity(draw_sparsity(self.config, step))
        if self.student.draw is not None:
            block_q = self.student.handle.config.block_q
            self.student.draw.step(self.config.seed, step, self.tokens, block_q)
        where = None
        for part in range(self.config.accumulate):
            batch = self.sampler.batch(step, part).tensors()
            where = where or find_nonfinite(self.student, batch)
        where = where or "run once more, the same step is finite in every layer"
        saved = training_checkpoint.find_all(self.config.out)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved before"
        raise NonFiniteLoss(
            f"the loss of step {step} is not finite: {where}; {kept}. Try a lower --learning-rate "
            "or --router-rate, or look at the data"
        )

    def _log(self) -> None:
        """Write a line of the log: the means since the last one."""
        sums, count = self._sums, self._counted
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "mean")
        velocity, alignment, norm = (sums / max(count, 1)).tolist()
        self._sums = torch.zeros_like(self._sums)
        self._counted = 0
        steps, elapsed = self._logged_at
        self._logged_at = (self.pace.steps, self.pace.elapsed)
        clips = (self.pace.steps - steps) * self.clips_a_step
        record: dict[str, Any] = {
            "step": self.pace.steps,
            "loss": velocity + self.config.alignment_weight * alignment,
            "velocity": velocity,
            "grad_norm": norm,
            "rate": self.pace.factor,
            "samples_per_second": clips / max(self.pace.elapsed - elapsed, 1e-9),
        }
        if self.student.alignments:
            record["alignment"] = alignment
        self.history.append(record)
        del self.history[:-_HISTORY]
        values = {k: v for k, v in record.items() if k != "step"}
        self.accelerator.log(values, step=self.pace.steps)
        left = self.pace.seconds_left
        text = f"step {self.pace.steps} ({self.pace.fraction:.0%}) loss {record['loss']:.5f}"
        text += f" {record['samples_per_second']:.1f} samples/s"
        self.accelerator.print(text + ("" if left is None else f" {left:.0f} s left"), flush=True)

    @property
    def clips_a_step(self) -> int:
        """Of all processes."""
        return self.config.batch_size * self.config.accumulate * int(self.accelerator.num_processes)

    def validate_and_note(self, step: int) -> None:
        """Validate, and keep the metrics in the history."""
        metrics = self.validate(step)
        self.history.append({"step": step, "validation": metrics})
        numbers = {f"validation/{k}": v for k, v in metrics.items() if isinstance(v, float)}
        self.accelerator.log(numbers, step=step)
        text = " ".join(f"{k} {v:.5f}" for k, v in metrics.items() if isinstance(v, float))
        self.accelerator.print(f"step {step} validation: {text}", flush=True)

    def _save(self) -> None:
        state: training_checkpoint.TrainingState = {
            "step": self.pace.steps,
            "elapsed": self.pace.elapsed,
            "config": self.config.to_dict(),
            "processes": self.accelerator.num_processes,
            # Which clips come next follows from the step and the size of the global batch.
            "clips": self.pace.steps * self.clips_a_step,
            "ema_steps": 0 if self.ema is None else self.ema.optimization_step,
            "pending": {"sums": self._sums.tolist(), "counted": self._counted},
            "history": self.history,
        }
        training_checkpoint.save(
            self.accelerator,
            self.config.out,
            trainable=self.trainable,
            ema=None if self.ema is None else self.ema.shadow_params,
            optimizer=self.optimizer,
            state=state,
            keep=self.config.keep,
        )

    def restore(self, state: training_checkpoint.TrainingState) -> None:
        """Go on with the part of the log that had not been written when `state` was saved."""
        pending = state["pending"]
        self._sums = torch.tensor(pending["sums"], dtype=torch.float64, device=self._sums.device)
        self._counted = int(pending["counted"])


def draw_sparsity(config: FinetuneConfig, step: int) -> float:
    """The sparsity of an optimizer step, the same in all processes."""
    if len(config.sparsity) == 1:
        return config.sparsity[0]
    return random.Random(f"sparsity/{config.seed}/{step}").choice(config.sparsity)
