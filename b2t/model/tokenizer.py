"""Tokenizers of the text decoder: bytes, BPE trained on the spot, or a checkpoint's own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from b2t.errors import UserError


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """UTF-8 bytes: 259 tokens, needs no files and knows every text."""
    return ByT5Tokenizer(extra_ids=0)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int = 2000) -> PreTrainedTokenizerBase:
    """Byte-level BPE (Sennrich et al. 2016) learnt from the training texts.

    It falls back to bytes, so it knows every text. The same texts give the same tokenizer.

    Args:
        texts: training texts only.
        vocab_size: tokens at most, at least 260 (256 bytes and 4 special tokens).

    Raises:
        UserError: no text, or too small a vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise UserError(
            f"text_decoder.bpe_vocab_size={vocab_size}: expected at least "
            f"{len(alphabet) + len(special)} (256 bytes and {len(special)} special tokens)"
        )
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(
            "text_decoder.tokenizer=bpe: the training split holds no text to learn from; "
            "use text_decoder.tokenizer=byte or text_decoder.enabled=false"
        )
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def load_tokenizer(checkpoint: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; options as in transformers.

    Raises:
        UserError: no tokenizer there, or one without an end token.
    """
    path = Path(checkpoint).expanduser()
    try:
        place = str(path) if path.is_dir() else str(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # tokenizers raises bare exceptions where a file is damaged
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{checkpoint}: no tokenizer could be loaded ({reason}); expected a folder with "
            "tokenizer.json or a Hub id that can be reached"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{checkpoint}: its tokenizer has no end token, so decoding cannot stop")
    return tokenizer


def build_tokenizer(
    kind: str = "byte",
    texts: Iterable[str] = (),
    vocab_size: int = 2000,
    checkpoint: str | None = None,
    causal: bool = False,
) -> PreTrainedTokenizerBase:
    """Make the tokenizer that a text decoder section asks for.

    Args:
        kind: `byte` or `bpe`; a checkpoint brings its own.
        texts: training texts, for `bpe`.
        vocab_size: tokens at most, for `bpe`.
        checkpoint: folder or Hub id of a model.
        causal: it is a causal language model, whose texts come without their start token: the text
            decoder puts it between latents and text.

    Raises:
        UserError: unknown kind, no texts, or an unreadable checkpoint.
    """
    if checkpoint is not None:
        tokenizer = load_tokenizer(checkpoint)
        return without_start(tokenizer) if causal else tokenizer
    if kind == "byte":
        return byte_tokenizer()
    if kind == "bpe":
        return bpe_tokenizer(texts, vocab_size)
    raise UserError(f"text_decoder.tokenizer={kind}: expected byte or bpe")


def without_start(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Keep a tokenizer from putting its start token before texts; saving keeps this."""
    from tokenizers import processors

    core, start = getattr(tokenizer, "backend_tokenizer", None), tokenizer.bos_token_id
    if start is not None and core is not None and tokenizer("a")["input_ids"][:1] == [start]:
        if hasattr(tokenizer, "add_bos_token"):
            tokenizer.add_bos_token = False
        core.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A $B", special_tokens=[]
        )
    return tokenizer


def decode_texts(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> list[str]:
    """Texts of generated tokens or labels [B, L], cut at the first end token.

    A text that begins with the end token as its start token is read from behind it.
    """
    texts = []
    for row in tokens.tolist():
        row = [token for token in row if token >= 0]
        if len(row) > 1 and row[0] in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            row = row[1:]
        if tokenizer.eos_token_id in row:
            row = row[: row.index(tokenizer.eos_token_id)]
        texts.append(tokenizer.decode(row, skip_special_tokens=True))
    return texts
