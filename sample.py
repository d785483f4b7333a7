"""
Text from a trained model, streamed as it is sampled.

    python sample.py --init_from=out/pretrain --prompt="ROMEO:"
    python sample.py --init_from=out/pretrain --interactive=true    # type prompts, get their
                                                                    continuations
    python sample.py --init_from=out/sft --chat=true                # talk; /reset forgets, an empty
                                                                    line ends
    python sample.py --init_from=out/vlm --chat=true --image=a.png,b.png --prompt="What do you see?"
    echo "To be, or" | python sample.py --init_from=out/pretrain --prompt=-

From your own code:

    from sample import load, stream
    model, tokenizer = load("out/pretrain", "cpu")
    for text in stream(model, tokenizer, "ROMEO:"): ...
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from common import checkpoint, dist
from common.chat import encode_chat, encode_user, with_thoughts
from common.config import parse_config
from common.errors import UserError
from common.logger import printable
from common.model import GPT, ModelConfig
from common.sampling import SamplingConfig, complete, for_vocabulary, stream_tokens
from common.sampling import stream as stream  # to be imported from here
from common.tokenizer import load_tokenizer


# fmt: off
@dataclass(frozen=True)
class Config(SamplingConfig):
    # what
    init_from: str = "out/pretrain"  # run (its latest checkpoint), checkpoint, Hugging Face folder
    prompt: str = ""               # text to continue; - reads it from stdin; "" starts a document
    image: tuple[str, ...] = ()  # pictures to show before the prompt, or in a chat's first turn
    interactive: bool = False      # ask for prompts in a loop; an empty line ends it
    chat: bool = False  # the prompt is a message to an assistant; without one: a conversation
    system: str = ""               # chat: a system message before everything
    tower: str = ""  # path/to/file.py:function, where the model sees with a tower of yours
    show_tags: bool = False        # chat: print thoughts and tags too; false: the answer alone
    num_samples: int = 1           # continuations of each prompt
    stream: bool = True  # print text as it is sampled; false: sample all at once, in one batch
    seed: int = 1337               # the same seed gives the same text
    # system
    device: str = "auto"           # auto, cpu, cuda, mps
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and arithmetic
# fmt: on


def load(path, device, dtype=torch.float32, tower=""):
    """
    path: run, checkpoint or Hugging Face folder; tower: path/to/file.py:function, where the model
    has one of yours -> model in eval mode on device, its tokenizer
    """
    return load_source(checkpoint.source(path), device, dtype, tower)


def load_source(source, device, dtype=torch.float32, tower=""):
    """`load`, of a checkpoint.Source"""
    config, vision = ModelConfig(**source.manifest["model"]), source.manifest.get("vision")
    if vision:
        from extras.images import saved_model

        model = saved_model(config, vision, tower)
    else:
        model = GPT(config)
    source.fill(model)
    return model.to(device, dtype).eval(), load_tokenizer(source.folder)


def check_roles(source, model, tokenizer):
    """
    UserError where the model has never seen the tokens for roles; a note where it may not have
    """
    learned = source.manifest.get("identity", {}).get("kind")  # by a stage of ours
    known = tokenizer.template or tokenizer.extra and tokenizer.extra["markers"]
    # of a folder that is no export of ours
    ignorant = tokenizer.extra and not known and not learned
    if ignorant or max(encode_user(tokenizer, "")) >= model.config.vocab_size:
        raise UserError(
            f"--chat=true: {source.folder} knows no tokens for roles; train_sft.py teaches them"
        )
    if learned == "text" and not known:
        print(
            f"note: {source.folder} was last trained on text, not on conversations; "
            "train_sft.py teaches answers",
            file=sys.stderr,
        )


def answer(model, tokenizer, ids, cfg, seed, inputs=None):
    """
    Print cfg.num_samples continuations of ids -> the tokens of the last one. inputs: in place of
    the embeddings of ids, see `sampling.generate`
    """
    how = dict(continues=bool(ids))
    if cfg.chat:
        how = dict(show_special=cfg.show_tags, hide_think=not cfg.show_tags)
    completions = None
    if not cfg.stream:
        completions, *_ = complete(
            model,
            [ids or [tokenizer.end]],
            for_vocabulary(cfg, model, tokenizer),
            tokenizer.ends,
            cfg.num_samples,
            seed,
            inputs=inputs,
        )
    for i in range(cfg.num_samples):
        if cfg.num_samples > 1:
            print(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {cfg.num_samples}")
        print("" if cfg.chat else printable(tokenizer.decode(ids)), end="", flush=True)
        decoder, tokens = tokenizer.stream(**how), []
        for token in (
            completions[i]
            if completions
            else stream_tokens(model, tokenizer, ids, cfg, seed + i, inputs)
        ):
            if token in tokenizer.ends:
                break
            tokens.append(token)
            print(printable(decoder.put(token)), end="", flush=True)
        print(decoder.end(), flush=True)
    return tokens


def continue_text(model, tokenizer, text, cfg, shown=None):
    """shown: what stands before the text, an extras.images.Shown"""
    ids = tokenizer.begin + (shown.ids if shown else []) + tokenizer.encode(text)
    if not ids and tokenizer.end >= model.config.vocab_size:
        raise UserError(
            f"--prompt: {cfg.init_from} knows no token that a text begins with; give some text"
        )
    if len(ids) + bool(shown) > model.config.seq_len:  # the window would move on, past it
        raise UserError(
            f"--prompt: {len(ids)} tokens, but the model's context is "
            f"{model.config.seq_len}; shorten it"
        )
    answer(model, tokenizer, ids, cfg, cfg.seed, shown and shown.inputs(ids))


def reply(model, tokenizer, turns, text, cfg, shown=None):
    """
    Answer the user's text. turns: the messages so far; these two are added. The oldest are
    forgotten when max_new_tokens, or half the context, would not be left. shown: what the first
    message shows, an extras.images.Shown
    """
    if text == "/reset":
        turns.clear()
        print("(forgotten)")
        return
    content = tuple(shown.ids + tokenizer.encode(text)) if shown and not turns else text
    user = dict(role="user", content=content)
    system = [dict(role="system", content=cfg.system)] if cfg.system else []

    def encoded(messages):
        # answers so far have the tags that they were given
        return encode_chat(tokenizer, [system + messages], answer_tags=False, reply=True)[0][0]

    context = model.config.seq_len
    room = context - min(cfg.max_new_tokens, context // 2)
    if (alone := len(encoded([user]))) > room:
        given = (("--prompt", True), ("--system", cfg.system), ("--image", shown))
        options = " and ".join(name for name, value in given if value)
        raise UserError(
            f"{options}: {alone} tokens, which leave "
            f"too little of the model's context of {context}; shorten it"
        )
    turns.append(user)
    while len(ids := encoded(turns)) > room:
        del turns[:2]
    tokens = answer(model, tokenizer, ids, cfg, cfg.seed + len(turns), shown and shown.inputs(ids))
    said = tuple(tokens)
    # a folder's template decides what is left of earlier thoughts
    if tokenizer.template and tokenizer.special["answer"] not in tokens:
        said = tokenizer.decode(tokens, show_special=True)
    turns.append(with_thoughts(dict(role="assistant", content=said)))


def typed(ask):
    """Yield lines from the terminal, until an empty one."""
    while text := input(ask):
        yield text


def check_text(text):
    """UserError when what came from a terminal, a pipe or a command line is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            "--prompt: not UTF-8 text; set the terminal to UTF-8, or convert it"
        ) from None


if __name__ == "__main__":
    cfg = parse_config(Config)
    _, _, device = dist.init(cfg.device)
    if cfg.num_samples < 1:
        raise UserError(f"--num_samples={cfg.num_samples}: expected at least 1")
    if not cfg.chat and (cfg.system or cfg.show_tags):
        raise UserError("--system and --show_tags: only with --chat=true")
    if cfg.interactive and cfg.prompt:
        raise UserError("--interactive=true: asks for prompts itself; leave --prompt out")
    source = checkpoint.source(cfg.init_from)
    model, tokenizer = load_source(source, device, getattr(torch, cfg.dtype), cfg.tower)
    if cfg.chat:
        check_roles(source, model, tokenizer)
    if any(not 0 <= i < model.config.vocab_size for i in cfg.suppress):
        raise UserError(
            f"--suppress={cfg.suppress}: ids must be below the vocabulary's "
            f"{model.config.vocab_size}"
        )
    shown = None
    if cfg.image:
        from extras.images import Shown

        shown = Shown(cfg.image, model)
    interactive, turns = cfg.interactive or (cfg.chat and not cfg.prompt), []
    texts = (
        typed("\nyou> " if cfg.chat else "\nprompt> ")
        if interactive
        else [sys.stdin.read().rstrip("\n") if cfg.prompt == "-" else cfg.prompt]
    )
    try:
        for text in texts:
            try:
                check_text(cfg.system + text)
                if cfg.chat:
                    reply(model, tokenizer, turns, text, cfg, shown)
                else:
                    continue_text(model, tokenizer, text, cfg, shown)
            except UserError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)
    except (KeyboardInterrupt, EOFError):
        print()
