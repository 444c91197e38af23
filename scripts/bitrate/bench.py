"""Trains and scores one point, in this process."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b2t.data.augment import Augment
from b2t.data.batches import Batch, TrialRows, collate
from b2t.data.dataset import load_trials
from b2t.evaluate import metrics, run_folder, usage
from b2t.evaluate.decode import collapse_ctc
from b2t.model import losses as sums
from b2t.model.brain_to_text import BrainToText
from b2t.quantize import ResidualVQ

FRAMES_PER_CODE = 32
CLIP = 1.0
"""Greatest gradient norm."""


class Bench:
    """A model without a quantizer, what to train it on, and what to score it on."""

    def __init__(self, run: Path, data: str | None = None) -> None:
        opened = run_folder.open_run(run)
        assert opened.config is not None
        path = opened.data_path(data)
        self.model, _ = run_folder.load_model(opened, "cpu")
        if self.model.quantizer is not None:
            raise SystemExit(f"{run}: has a quantizer; train it with model.quantizer.enabled=false")
        self.scored = {
            split: list(run_folder.load_batches(opened, self.model, path, split, None, 16))
            for split in ("val", "test")
        }
        augment = Augment(**opened.config.data.augment.model_dump())
        trials, sessions = load_trials(path, "train"), self.model.config.sessions
        self.rows = TrialRows(trials, None, sessions, augment, seed=opened.config.run.seed, phase=1)

    @property
    def frames_per_second(self) -> float:
        """Latent frames per second of the signal."""
        return self.model.config.sampling_rate / self.model.config.encoder["patch_stride"]

    def measured(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Build, train and score one point."""
        torch.manual_seed(plan["seed"])
        model = copy.deepcopy(self.model)
        if plan["quantizer"] is not None:
            width = model.config.encoder["dim"]
            model.quantizer = ResidualVQ(width, seed=plan["seed"], **plan["quantizer"])
            if plan["head"]:
                look_as_the_head(model)
            self._start(model, plan["seed"])
        self._train(model, plan)
        return self._score(model.eval())

    def _batch(self, seed: int, step: int, size: int) -> Batch:
        """Training trials of a step, augmented."""
        epoch, place = divmod(step * size, len(self.rows) // size * size)
        order = np.random.default_rng([seed, epoch]).permutation(len(self.rows))
        return collate([self.rows.example(epoch, int(i)) for i in order[place : place + size]]).to(
            "cpu"
        )

    def _start(self, model: BrainToText, seed: int) -> None:
        """Start the codebooks on latents of training trials."""
        assert model.quantizer is not None
        wanted = FRAMES_PER_CODE * model.quantizer.codebook_size
        parts: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            while sum(int(mask.sum()) for _, mask in parts) < wanted:
                batch = self._batch(seed, len(parts), 16)
                parts.append(model.latents(batch.signal, batch.signal_mask, batch.session))
        model.quantizer.initialize(parts, progress=False, frames_per_code=2 * FRAMES_PER_CODE)

    def _train(self, model: BrainToText, plan: dict[str, Any]) -> None:
        """AdamW with a cosine from the full learning rate to zero."""
        steps = plan["steps"]
        optimizer = torch.optim.AdamW(
            model.parameters(), plan["lr"], (0.9, 0.98), weight_decay=0.01
        )
        weights = {"phoneme": 1.0, **plan["weights"]}
        model.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = (
                plan["lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
            batch = self._batch(plan["seed"], step, plan["batch"])
            output = model(batch, weights=weights)
            loss = output.loss
            if plan["first"]:
                loss = loss + plan["first"] * first_layer_loss(model, batch, output)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            if model.quantizer is not None:
                model.quantizer.set_progress(step / steps)
                model.quantizer.update(output.stats)

    @torch.no_grad()
    def _score(self, model: BrainToText) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for split, batches in self.scored.items():
            targets: list[list[int]] = []
            found: list[list[int]] = []
            codes: list[Tensor] = []
            for batch in batches:
                output = model(batch, weights={"phoneme": 1.0})
                found += collapse_ctc(output.phoneme_logits, output.frame_mask)
                lengths = batch.phoneme_lengths.tolist()
                targets += [p[:n].tolist() for p, n in zip(batch.phonemes, lengths, strict=True)]
                if output.codes is not None:
                    codes.append(output.codes.flatten(0, 1))
            edits = metrics.count_phoneme_edits(targets, found)
            result[f"per_{split}"] = edits.rate()
        result["per_interval"] = edits.interval()
        counts = None
        if codes:
            counts = usage.count_codes(torch.cat(codes), model.quantizer.codebook_size)
        return result | rates(counts, self.frames_per_second)


def rates(counts: Tensor | None, frames: float) -> dict[str, Any]:
    """Bits per second and use of codes counted as [Q, K]; None for latents that are not coded."""
    if counts is None:
        return {"bits": None, "bits_entropy": None, "utilization": None}
    layers, codes = counts.shape
    return {
        "bits": frames * layers * math.log2(codes),
        "bits_entropy": frames * float(usage.perplexity(counts).log2().sum()),
        "utilization": float(usage.utilization(counts).min()),
    }


@torch.no_grad()
def look_as_the_head(model: BrainToText) -> None:
    """Let the projections keep what the phoneme head tells its classes apart by, and nothing else.

    Latents are projected on the greatest singular directions of the head's weights and back; what
    is orthogonal to them is zero.
    """
    head, quantizer = model.phoneme_head, model.quantizer
    weight = head.classify.weight * head.norm.weight
    _, _, directions = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    basis = directions[: quantizer.codebook_dim]
    quantizer.project_in.weight.copy_(basis)
    quantizer.project_out.weight.copy_(basis.T)
    quantizer.project_in.bias.zero_()
    quantizer.project_out.bias.zero_()


def first_layer_loss(model: BrainToText, batch: Batch, output: Any) -> Tensor:
    """CTC loss per phoneme of the phonemes heard in the first layer's code alone.

    The gradient passes straight through that code to the latents, as in SpeechTokenizer (Zhang et
    al. 2023), whose first layer learns from labels of speech.
    """
    code = model.quantizer.decode(output.codes[..., :1])
    latents = torch.where(output.frame_mask[..., None], output.latents, 0.0)
    heard = model.phoneme_head(latents + (code - latents).detach())
    found = sums.ctc_sums(heard, output.frame_mask, batch.phonemes, batch.phoneme_lengths)
    return sums.normalise(found.negative_log_likelihood, model.counts(batch)["phonemes"])
