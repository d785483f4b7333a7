"""A new SentencePiece vocabulary, for `python data/prepare.py tokenizer`."""

import io
import os
import re

import sentencepiece

from common.errors import UserError
from common.tokenizer import SPECIAL_TOKENS

# characters of a sentence, at most 4 bytes each: SentencePiece leaves out those above its
# max_sentence_length in bytes, and those with one of RESERVED
LONGEST = 16_000
RESERVED = re.compile("[\u2581\u2585]")
# of these it learns from a sample
MOST = 2_000_000


def sentences(lines):
    """
    Yield lines in the pieces that SentencePiece takes: cut at a space before LONGEST characters,
    or there where a word is longer, and at RESERVED characters.
    """
    for line in lines:
        for text in RESERVED.split(line):
            while len(text) > LONGEST:
                at = text.rfind(" ", 1, LONGEST)
                at = at if at > 0 else LONGEST
                yield text[:at]
                text = text[at:]
            if text:
                yield text


def train_sentencepiece(lines, vocab_size):
    """
    Train a BPE vocabulary on an iterable of lines. vocab_size counts our special tokens too, so
    that it is the model's. -> content of a .model file. Lossless (but for a literal U+2581): no
    normalisation, no added spaces, bytes for what is not in the vocabulary. Prints how many lines a
    sample leaves out.
    """
    model, total = io.BytesIO(), 0

    def counted():
        nonlocal total
        for text in sentences(lines):
            total += 1
            yield text

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=counted(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 16,
            input_sentence_size=MOST,
            shuffle_input_sentence=True,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if few := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            least = int(few[1]) + len(SPECIAL_TOKENS)
            raise UserError(
                f"--vocab_size={vocab_size}: bytes and this text's characters alone take {least} "
                f"tokens; give more, such as {-(-2 * least // 1024) * 1024}"
            ) from None
        raise UserError(
            f"--vocab_size={vocab_size}: "
            + (
                f"this text has words for {int(most[1]) + len(SPECIAL_TOKENS)} tokens at most; "
                "lower it or give more text"
                if most
                else f"SentencePiece refuses ({str(error).splitlines()[-1]})"
            )
        ) from None
    if total > MOST:
        print(f"learned from {MOST:,} of {total:,} lines, drawn at random")
    return model.getvalue()
