"""Words from phoneme logits as they come, by the search that reads whole trials."""

import torch
from torch import Tensor

from b2t.evaluate.words import WordDecoder, emissions


class WordStream:
    """One sentence read by a `WordDecoder`, which can read one at a time.

    Its last text is the decoder's of all frames at once.

    Args:
        decoder: lexicon, language model and weights.
    """

    def __init__(self, decoder: WordDecoder) -> None:
        self._decoder = decoder
        self._search = decoder.search
        self._search.decode_begin()

    def push(self, logits: Tensor) -> str:
        """Read the logits [n, 41] of new frames; return the best text so far, which may change."""
        if len(logits):
            mask = torch.ones(1, len(logits), dtype=torch.bool)
            penalty = self._decoder.options.blank_penalty
            (frames,) = emissions(logits[None], mask, penalty)
            self._search.decode_step(frames.data_ptr(), *frames.shape)
        return self._decoder.text(self._search.get_best_hypothesis(0))

    def finish(self) -> str:
        """Return the text of the sentence."""
        self._search.decode_end()
        found = self._search.get_all_final_hypothesis()
        return self._decoder.text(self._decoder.ordered(found)[0]) if found else ""
