"""`b2t decode --follow`: what is being said, while it is being said."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from b2t.counted import counted
from b2t.data.phonemes import to_names
from b2t.errors import UserError
from b2t.evaluate.bin_source import read_bins, sentences
from b2t.evaluate.raw_bins import RawBins
from b2t.evaluate.word_stream import WordStream
from b2t.model.streaming import Frames, Stream
from b2t.model.tokenizer import decode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from b2t.evaluate.words import WordDecoder
    from b2t.model.brain_to_text import BrainToText

BLANK = 0


class Sentence:
    """What is read of one sentence: text so far, and the text at its end.

    With a language model its words; without one the phonemes, and at the end the text of a text
    decoder where the model has one.

    Args:
        model: a causal `BrainToText` in evaluation mode.
        session: of the bins.
        words: lexicon and language model, or None.
        tokenizer: of the text decoder, or None.
        generation: options of the text decoder.

    Attributes:
        stream: what encodes the bins.
        text: the last one.
    """

    def __init__(
        self,
        model: "BrainToText",
        session: str | None,
        words: "WordDecoder | None",
        tokenizer: "PreTrainedTokenizerBase | None",
        generation: dict,
    ) -> None:
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.stream = Stream(model, session)
        self.text = ""
        self._words = None if words is None else WordStream(words)
        self._heard: list[Frames] = []
        self._classes: list[int] = []
        self._before = BLANK

    def push(self, bins: torch.Tensor) -> str:
        """Read bins [n, C]; return the text so far."""
        return self._read(self.stream.push(bins))

    def finish(self) -> str:
        """End the sentence; return its text."""
        text = self._read(self.stream.finish())
        if self._words is not None:
            text = self._words.finish()
        elif self.tokenizer is not None:
            text = self._spoken()
        self.text = text
        return text

    def _read(self, frames: Frames) -> str:
        if self._words is None and self.tokenizer is not None:
            self._heard.append(frames)
        if not len(frames.quantized):
            return self.text
        if self._words is not None:
            self.text = self._words.push(frames.phoneme_logits)  # type: ignore[arg-type]
        elif frames.phoneme_logits is not None:
            for best in frames.phoneme_logits.argmax(-1).tolist():
                if best not in (self._before, BLANK):
                    self._classes.append(best)
                self._before = best
            self.text = " ".join(to_names(self._classes))
        return self.text

    def _spoken(self) -> str:
        from b2t.model.outputs import Encoded

        heard = torch.cat([frames.quantized for frames in self._heard])[None]
        mask = torch.ones(heard.shape[:2], dtype=torch.bool, device=heard.device)
        encoded = Encoded(heard, heard, None, mask, {}, None)
        with torch.no_grad():
            memory = self.model.text_memory(encoded)
            tokens = self.model.text_decoder.generate(*memory, **self.generation)
        return decode_texts(self.tokenizer, tokens)[0].strip()


def follow(
    source: Iterator[np.ndarray], start: Callable[[], Sentence], at_once: int, rate: float
) -> Iterator[tuple[str, float, str, float]]:
    """Yield (`partial` or `final`, seconds of its signal, text, seconds of computing).

    A partial result comes with every change of the text, a final one with every end of a sentence.

    Args:
        source: bins [n, C] as they come.
        start: begins a sentence.
        at_once: bins read at once at most.
        rate: bins per second.
    """
    sentence = None
    for bins in sentences(source, at_once):
        began = time.perf_counter()
        if bins is None:
            assert sentence is not None
            text = sentence.finish()
            yield "final", sentence.stream.bins / rate, text, time.perf_counter() - began
            sentence = None
            continue
        sentence = sentence or start()
        before = sentence.text
        text = sentence.push(torch.from_numpy(bins.copy()))
        kind = "partial" if text != before else ""
        yield kind, sentence.stream.bins / rate, text, time.perf_counter() - began


def run(args: argparse.Namespace) -> int:
    """Decode bins as they come; print texts, and how long each bin took."""
    from b2t.evaluate import run_folder
    from b2t.evaluate.evaluate_command import generation_options, open_words
    from b2t.model.streaming import require_causal

    if args.out is not None:
        raise UserError("--out is for a dataset: send what --follow prints to a file with > FILE")
    opened = run_folder.open_run(args.run, args.checkpoint)
    model, tokenizer = run_folder.load_model(opened, args.device)
    require_causal(model)
    # Joint scores judge whole sentences: as bins come, the first pass alone reads.
    reader = open_words(model, args.lm, rescoring=False)
    words = None if reader is None else reader.decoder
    if words is None and tokenizer is None and model.phoneme_head is None:
        raise UserError(f"{opened.checkpoint}: it has neither phonemes nor text to decode")
    generation = generation_options(opened, model, args.beams, args.max_new_tokens)
    if words is not None or tokenizer is None:
        generation = {}

    def start() -> Sentence:
        return Sentence(model, args.session, words, tokenizer, generation)

    start()  # an unknown session is refused before the first bin
    rate = model.config.sampling_rate
    bins = read_bins(args.follow, model.config.channels, args.idle)
    if args.raw:
        bins = RawBins(model.config, args.forget, args.start_from, args.session)(bins)
    bin_s: list[float] = []
    end_s: list[float] = []
    with contextlib.suppress(KeyboardInterrupt):  # the usual end of a pipe that does not end
        for kind, at, text, took in follow(bins, start, args.at_once, rate):
            (end_s if kind == "final" else bin_s).append(took)
            if kind:
                print(f"{at:.2f}\t{kind}\t{text}", flush=True)
    print(_latency(bin_s, end_s, args.at_once, rate, start().stream.bins_ahead), file=sys.stderr)
    return 0


def _latency(bin_s: list[float], end_s: list[float], at_once: int, rate: float, ahead: int) -> str:
    if not bin_s:
        return "no bins came"
    took = np.array(bin_s) * 1e3
    length = 1e3 * at_once / rate
    middle, high, most = np.percentile(took, [50, 95, 100])
    unit = "bin" if at_once == 1 else f"{at_once} bins"
    lines = [
        f"{len(bin_s):,} × {unit} of {length:g} ms: computing takes {middle:.2f} ms (median), "
        f"{high:.2f} ms (95 %), {most:.2f} ms (longest); "
        f"{100 * np.mean(took > length):.2f} % took longer than they last",
        f"a frame waits for the {ahead} bins ({1e3 * ahead / rate:g} ms) after its first one: the "
        "rest of its patch, and what smoothing looks ahead at",
    ]
    if end_s:
        lines.append(
            f"{counted(len(end_s), 'sentence')}: the text follows the last bin by "
            f"{1e3 * float(np.median(end_s)):.1f} ms (median), {1e3 * max(end_s):.1f} ms (longest)"
        )
    return "\n".join(lines)
