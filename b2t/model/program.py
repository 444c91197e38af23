"""Signals to codes as one `torch.export` program, which runs without b2t."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from b2t.errors import UserError

if TYPE_CHECKING:
    from b2t.model.brain_to_text import BrainToText

PROGRAM_FILE = "tokenizer.pt2"


class Tokenizer(nn.Module):
    """Session adapter, encoder and quantizer of a `BrainToText`, for one trial at a time.

    Args:
        model: in evaluation mode, on the CPU; its weights are shared.

    Raises:
        UserError: it has no quantizer, one that never started, or one that searches by a beam.
    """

    def __init__(self, model: "BrainToText") -> None:
        super().__init__()
        quantizer = model.quantizer
        if quantizer is None or not quantizer.initialized:
            raise UserError("the model has no codebooks that have started: it makes no codes")
        options = quantizer.options
        if max(options.eval_beam_size or options.beam_size, 1) > 1:
            raise UserError(
                "the quantizer searches by a beam (model.quantizer.eval_beam_size), which a "
                "program does not hold: set it to 1, and measure what that costs"
            )
        self.model = model
        layers = quantizer._layers(quantizer.codebooks.value())
        books = [layers.books[layers.index(q)].detach() for q in range(layers.quantizers)]
        self.cosine = layers.cosine
        self.register_buffer("books", torch.stack(books), persistent=False)
        added = torch.stack([layers.vectors(q) for q in range(layers.quantizers)])
        self.register_buffer("added", added, persistent=False)

    books: Tensor
    added: Tensor

    def forward(self, signal: Tensor, session: Tensor) -> tuple[Tensor, Tensor]:
        """Encode and quantize.

        Args:
            signal: [1, T, C] float32, prepared and smoothed as for training; at least three
                times as long as a patch.
            session: [1] int64, index into the config's sessions; −1 takes their mean.

        Returns:
            Codes [P, Q] int64 and their sums, the quantized latents [P, D].
        """
        residual = self.model.latents(signal, None, session)[0][0].float()
        quantized, codes = torch.zeros_like(residual), []
        for book, added in zip(self.books, self.added, strict=True):
            seen = F.normalize(residual, dim=-1) if self.cosine else residual
            # The nearest code is that of the largest x·c − ½|c|².
            code = (seen @ book.T - 0.5 * book.square().sum(1)).argmax(1)
            codes.append(code)
            quantized = quantized + added[code]
            residual = residual - added[code]
        return torch.stack(codes, 1), quantized


@torch.no_grad()
def save_program(model: "BrainToText", folder: Path) -> int:
    """Write `tokenizer.pt2` and compare it with the model on signals of several lengths.

    Args:
        model: a `BrainToText` in evaluation mode on the CPU.
        folder: to write into.

    Returns:
        Frames that were compared; every code of each was the model's.

    Raises:
        UserError: the encoder cannot be exported, or the program says other codes than the model.
    """
    program, channels = Tokenizer(model).eval(), model.config.channels
    # One or two patches take another course through the code than many; a program holds one.
    shortest = 3 * model.patch_size
    example = (torch.randn(1, 2 * shortest + 1, channels), torch.zeros(1, dtype=torch.int64))
    try:
        exported = torch.export.export(
            program, example, dynamic_shapes=({1: torch.export.Dim.AUTO}, None)
        )
    except Exception as error:  # torch.export raises its own kinds, and those of what it traces
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"torch.export cannot hold this encoder ({reason})") from None
    path = folder / PROGRAM_FILE
    torch.export.save(exported, path)
    return require_parity(model, torch.export.load(path).module(), shortest)


@torch.no_grad()
def require_parity(model: "BrainToText", program: Any, shortest: int) -> int:
    """Compare codes and quantized latents on random signals; return the frames compared.

    Raises:
        UserError: they differ.
    """
    generator, frames = torch.Generator().manual_seed(0), 0
    for bins in (shortest, 3 * shortest + 2, 20 * shortest + 1):
        signal = torch.randn(1, bins, model.config.channels, generator=generator)
        session = torch.tensor([-1 if bins == shortest else 0])
        codes, quantized = program(signal, session)
        wanted = model.encode_batch(signal, None, session)
        assert wanted.codes is not None
        frames += len(codes)
        if not torch.equal(codes, wanted.codes[0]):
            share = float((codes != wanted.codes[0]).float().mean())
            raise UserError(f"the program differs from the model in {100 * share:.2f} % of codes")
        if not torch.allclose(quantized, wanted.quantized[0].float(), rtol=1e-4, atol=1e-5):
            raise UserError("the program's quantized latents are not the model's")
    return frames
