"""The same model and batches under DistributedDataParallel and under Hugging Face's Trainer."""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainingArguments

from b2t.data.batches import Batch
from throughput.bare import Bare

_CAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def keep_quantizer_exact(peer: Bare) -> None:
    """Let autocast leave the quantizer alone, which computes in float32 in any loop."""
    quantizer = peer.model.quantizer
    if quantizer is not None and peer.ds_file.precision in _CAST:
        exact = torch.autocast(peer.ranks.device.type, enabled=False)
        quantizer.forward = exact(quantizer.forward)


class PlainDDP(Bare):
    """Forward, backward, clip, AdamW around `DistributedDataParallel`; any number of ranks.

    In 16 bit by autocast, with a gradient scaler for fp16, as PyTorch recommends.
    """

    def _prepare(self) -> None:
        keep_quantizer_exact(self)
        self.wrapped = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scheduler = LambdaLR(self.optimizer, self.courses)
        half, kind = _CAST.get(self.ds_file.precision), self.ranks.device.type
        self.cast = nullcontext() if half is None else torch.autocast(kind, half)
        self.scaler = torch.amp.GradScaler(kind, enabled=self.ds_file.precision == "fp16")

    def _step(self, micro_batches: list[Batch]) -> torch.Tensor:
        self.optimizer.zero_grad()
        stats = None
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with nullcontext() if last else self.wrapped.no_sync():
                with self.cast:
                    output = self.wrapped(batch.to(self.ranks.device), weights=self.weights)
                self.scaler.scale(output.loss / len(micro_batches)).backward()
            stats = output.stats if stats is None else stats + output.stats
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.ds_file.clipping)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self._move_codebooks(stats)
        return output.loss.detach()


class HuggingFace(Bare):
    """`transformers.Trainer`, which owns its loop: it runs in a thread, and stops between steps.

    Its data loader hands out the micro-batches of a segment, and holds it until the next one.
    """

    def _prepare(self) -> None:
        keep_quantizer_exact(self)
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left = 0
        self._failure: BaseException | None = None
        self._loss = torch.zeros(())
        self._folder = tempfile.TemporaryDirectory()
        self._trainer = self._build_trainer()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def segment(self, steps: int) -> float:
        """Let it take steps; return the last loss."""
        self._left = steps
        self._go.release()
        self._wait()
        self.done += steps
        return float(self._loss)

    def _step(self, micro_batches: list[Batch]) -> torch.Tensor:
        raise NotImplementedError("Hugging Face's Trainer takes the steps itself")

    def _wait(self) -> None:
        self._done.acquire()
        if self._failure is not None:
            raise RuntimeError("Hugging Face's Trainer failed") from self._failure

    def _run(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.set_device(self.ranks.device)
        try:
            self._trainer.train()
        except BaseException as error:
            self._failure = error
            self._done.release()

    def _micro_batches(self) -> Iterator[dict[str, Any]]:
        while True:
            self._done.release()
            self._go.acquire()
            for _ in range(self._left):
                _, _, micro_batches = next(self.batches)
                self.model.quantizer.set_progress(self.done / self.phase.steps)
                for batch in micro_batches:
                    yield {"batch": batch.to(self.ranks.device), "weights": self.weights}

    def _build_trainer(self) -> HuggingFaceTrainer:
        peer, precision = self, self.ds_file.precision

        class Stream(IterableDataset[Any]):
            def __iter__(self) -> Iterator[dict[str, Any]]:
                return peer._micro_batches()

        class Loop(HuggingFaceTrainer):
            stats: Any = None

            def get_train_dataloader(self) -> Any:
                return Stream()

            def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
                output = model(**inputs)
                self.stats = output.stats if self.stats is None else self.stats + output.stats
                peer._loss = output.loss.detach()
                return output.loss

        class Codebooks(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                peer._move_codebooks(loop.stats)
                loop.stats = None

        settings = TrainingArguments(
            output_dir=self._folder.name, max_steps=10**9, report_to=[], save_strategy="no",
            gradient_accumulation_steps=self.ds_file.accumulation, disable_tqdm=True,
            per_device_train_batch_size=self.ds_file.micro_batch, logging_strategy="no",
            max_grad_norm=self.ds_file.clipping, use_cpu=self.ranks.device.type == "cpu",
            ddp_find_unused_parameters=False, ddp_broadcast_buffers=False,
            fp16=precision == "fp16", bf16=precision == "bf16",
        )  # fmt: skip
        optimizers = (self.optimizer, LambdaLR(self.optimizer, self.courses))
        loop = Loop(
            model=self.model, args=settings, train_dataset=Stream(), optimizers=optimizers,
            callbacks=[Codebooks()],
        )  # fmt: skip
        return loop
