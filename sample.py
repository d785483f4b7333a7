"""
Text from a trained model, streamed as it is sampled.

    python sample.py --init_from=out/pretrain --prompt="ROMEO:"
    python sample.py --init_from=out/pretrain --interactive=true    # type prompts, get their continuations
    echo "To be, or" | python sample.py --init_from=out/pretrain --prompt=-

From your own code:

    from sample import load, stream
    model, tokenizer = load("out/pretrain", "cpu")
    for text in stream(model, tokenizer, "ROMEO:"): ...
"""
import sys
from dataclasses import dataclass, replace

from common import checkpoint, dist
from common.config import parse_config
from common.dist import UserError
from common.model import GPT, ModelConfig
from common.sampling import SamplingConfig, complete, stream
from common.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Config(SamplingConfig):
    # what
    init_from: str = "out/pretrain"    # run directory (its latest checkpoint) or one checkpoint folder
    prompt: str = ""                   # text to continue; - reads it from stdin; "" starts a document
    interactive: bool = False          # ask for prompts in a loop; an empty line ends it
    num_samples: int = 1               # continuations of each prompt
    stream: bool = True                # print text as it is sampled; false: sample all at once, in one batch
    seed: int = 1337                   # the same seed gives the same text
    # system
    device: str = "auto"               # auto, cpu, cuda, mps


def load(path, device):
    """path: run directory or checkpoint folder -> model in eval mode on device, its tokenizer"""
    folder = checkpoint.find(path)
    model = GPT(ModelConfig(**checkpoint.read_manifest(folder)["model"])).to(device).eval()
    checkpoint.load_weights(folder, model)
    return model, load_tokenizer(folder)


def answer(model, tokenizer, prompt, cfg):
    """Print cfg.num_samples continuations of prompt."""
    ids = tokenizer.encode(prompt) or [tokenizer.end]
    if len(ids) > model.config.seq_len:
        raise UserError(f"--prompt: {len(ids)} tokens, but the model's context is "
                        f"{model.config.seq_len}; shorten it")
    # a head padded beyond the vocabulary has rows that stand for nothing
    sampling = replace(cfg, suppress=cfg.suppress + tuple(range(tokenizer.vocab_size, len(model.head))))
    completions = None
    if not cfg.stream:
        completions, _ = complete(model, [ids], sampling, tokenizer.end, cfg.num_samples, cfg.seed)
    for i in range(cfg.num_samples):
        if cfg.num_samples > 1:
            print(f"{'' if i == 0 else chr(10)}--- sample {i + 1} of {cfg.num_samples}")
        print(prompt, end="", flush=True)
        if completions:
            print(tokenizer.decode(completions[i], continues=bool(prompt)), end="")
        else:
            for text in stream(model, tokenizer, prompt, sampling, seed=cfg.seed + i):
                print(text, end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    cfg = parse_config(Config)
    _, _, device = dist.init(cfg.device)
    if cfg.num_samples < 1:
        raise UserError(f"--num_samples={cfg.num_samples}: expected at least 1")
    model, tokenizer = load(cfg.init_from, device)
    if any(not 0 <= i < model.config.vocab_size for i in cfg.suppress):
        raise UserError(f"--suppress={cfg.suppress}: ids must be below the vocabulary's "
                        f"{model.config.vocab_size}")
    try:
        if cfg.interactive:
            while prompt := input("\nprompt> "):
                answer(model, tokenizer, prompt, cfg)
        else:
            answer(model, tokenizer, sys.stdin.read().rstrip("\n") if cfg.prompt == "-" else cfg.prompt, cfg)
    except (KeyboardInterrupt, EOFError):
        print()
