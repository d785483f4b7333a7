"""
A run directory and what is written into it while training.

    out_dir/
        config.json        the options as a config file: `python train_x.py out_dir/config.json`
                           runs it again
        code/              the script and common/ as they ran
        metrics.jsonl      one JSON object per line: training steps, and evaluations ("val_..."
                           keys)
        samples.jsonl      text generated from the eval prompts
        step_NNNNNN/       checkpoints (checkpoint.py)

Only rank 0 writes. Values are those of the whole step over all ranks, never one rank's or one
micro-batch's.
"""

import json
import math
import os
import re
import shutil
import time
from pathlib import Path

from common import dist
from common.errors import UserError

ROOT = Path(__file__).parent.parent


def check_run_directory(out_dir, resume):
    """
    UserError when a run that is not resumed would write into a folder that holds something: other
    than what a run of ours leaves that has failed before its first step
    """
    names = set(os.listdir(out_dir)) if os.path.isdir(out_dir) else set()
    ours = os.path.isfile(os.path.join(out_dir, "code/common/logger.py"))
    failed = ours and names == {"config.json", "code"}
    if names and not resume and not failed:
        raise UserError(
            f"--out_dir={out_dir}: not empty; "
            "choose another, or continue that run with --resume=true"
        )


class Logger:
    """
    config: plain dict of options. start_step: where a resumed run starts; later records are taken
    out. wandb: name of a project, "" = none; tensorboard: whether to write for it
    """

    def __init__(
        self,
        out_dir,
        config,
        script,
        resume=False,
        start_step=0,
        num_steps=0,
        log_every=10,
        wandb="",
        tensorboard=False,
    ):
        self.out_dir, self.num_steps, self.log_every = out_dir, num_steps, log_every
        self.start_step, self.resume = start_step, resume
        self.is_main = dist.world()[0] == 0
        self.interval_tokens = self.interval_seconds = 0.0
        self.mirrors = []
        if wandb or tensorboard:
            from extras import mirrors

            mirrors.check(wandb, tensorboard)  # before anything is written
        dist.from_rank_zero(lambda: self._open(config, script, resume, start_step))
        if self.is_main and (wandb or tensorboard):
            self.mirrors = mirrors.open_mirrors(out_dir, config, wandb, tensorboard, start_step)

    def _open(self, config, script, resume, start_step):
        check_run_directory(self.out_dir, resume)
        try:
            os.makedirs(self.out_dir, exist_ok=True)
            name = f"config_from_step_{start_step}.json" if start_step else "config.json"
            with open(os.path.join(self.out_dir, name), "w", encoding="utf-8") as file:
                json.dump(config, file, indent=1)
            for name in ("metrics.jsonl", "samples.jsonl"):
                self._rewind(os.path.join(self.out_dir, name), start_step)
            code = os.path.join(
                self.out_dir, f"code_from_step_{start_step}" if start_step else "code"
            )
            shutil.rmtree(code, ignore_errors=True)
            for folder in ("common", "extras"):
                shutil.copytree(
                    ROOT / folder,
                    os.path.join(code, folder),
                    ignore=shutil.ignore_patterns("__pycache__"),
                )
            shutil.copy(script, code)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"--out_dir={self.out_dir}: cannot write there ({why})") from None

    @staticmethod
    def _rewind(path, start_step):
        """
        Drop the records from start_step on (this run writes them again) and a line cut short by a
        kill.
        """
        if not os.path.exists(path):
            return
        kept = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n") and json.loads(line)["step"] < start_step:
                    kept.append(line)
        with open(path + ".partial", "w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".partial", path)

    def print(self, *text):
        if self.is_main:
            print(*text, flush=True)

    def introduce(self, size, state_bytes, data, source, resumed):
        """
        First line of a run: how large model, optimizer and data are, and where the weights come
        from. source: folder of the weights, or None; resumed: it is a checkpoint of this run
        """
        if self.resume and not resumed:
            self.print(
                f"note: {self.out_dir} has no checkpoint to go on from; this run starts anew"
            )
        elif resumed and self.start_step >= self.num_steps:
            self.print(
                f"note: {self.out_dir} has made its {self.num_steps} steps; --num_steps makes more"
            )
        start = f", weights of {source}" if source else ", random weights"
        if resumed:
            start = f" from step {self.start_step} of {source}"
        ranks = dist.world()[1]
        each = f"each of {ranks} ranks" if ranks > 1 else "each of 1 rank"
        self.print(
            f"{size}, {state_bytes:,} bytes of optimizer state on {each}, "
            f"{data.num_tokens:,} tokens in {data.num_rows:,} samples, "
            f"{self.num_steps} steps{start}"
        )

    def print_changes(self, config, before):
        """Tell which options a resumed run has changed."""
        for name, value in config.items() if before else ():
            if value != before.get(name) and name != "resume":
                self.print(
                    f"changed since the checkpoint: --{name}={value} (was {before.get(name)})"
                )

    def metrics(self, step, **values):
        """Append one record to metrics.jsonl; nan and inf, which JSON lacks, become null."""
        self._append("metrics.jsonl", dict(step=step, **values))
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for mirror in self.mirrors:
            mirror(step, numbers)

    def sample(self, step, prompt, text, between=""):
        """Record and print text that a prompt has given. between: what to print between the two"""
        self._append("samples.jsonl", dict(step=step, prompt=prompt, text=text))
        self.print(printable(f"sample at step {step}: {prompt}{between}{text}"))

    def _append(self, name, record):
        if self.is_main:
            record = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in record.items()
            }
            # opened each time: nothing is buffered when a kill comes, and the file may be moved
            # while we run
            with open(os.path.join(self.out_dir, name), "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def train_step(self, step, tokens, seconds, token_flops, peak_flops, also=None, **values):
        """
        Record a training step, and print a line every log_every steps. tokens: of this step over
        all ranks; token_flops: FLOPs a token costs; peak_flops: of all ranks together; also: dict
        of what is recorded but not printed; values: loss, lr, grad_norm, ...
        """
        self.metrics(
            step,
            **values,
            **(also or {}),
            tokens=tokens,
            ms=1000 * seconds,
            tok_per_s=tokens / seconds,
            mfu=token_flops * tokens / seconds / peak_flops,
        )
        self.interval_tokens += tokens
        self.interval_seconds += seconds
        if (step + 1) % self.log_every and step + 1 != self.num_steps:
            return
        speed = self.interval_tokens / self.interval_seconds
        mfu = token_flops * speed / peak_flops
        line = f"step {step + 1:>{len(str(self.num_steps))}}/{self.num_steps}"
        for name, value in values.items():
            line += f" | {name.removeprefix('grad_')} " + (
                f"{value:.1e}"
                if name == "lr"
                else f"{value:.4f}"
                if name == "loss"
                else f"{value:.4g}"
            )
        line += f" | {speed / 1000:.1f}k tok/s" + (
            f" | mfu {mfu:.0%}" if math.isfinite(mfu) else ""
        )
        self.print(line + f" | eta {dist.short_time((self.num_steps - step - 1) * tokens / speed)}")
        self.interval_tokens = self.interval_seconds = 0.0

    def count_skipped(self, step, finite, skipped, most):
        """
        finite: whether the loss and the gradient of this step were; skipped: steps in a row before
        it that were left out -> how many now. UserError when there are `most`.
        """
        if finite:
            return 0
        self.print(f"step {step}: loss or gradient is not finite, skipped ({skipped + 1} in a row)")
        if skipped + 1 == most:
            raise UserError(
                f"loss or gradient was not finite in {most} steps in a row; lower --lr, or look "
                f"at the data around step {step}; checkpoints in {self.out_dir} are from before"
            )
        return skipped + 1


def printable(text):
    """
    Text for a terminal, which control characters that a young model writes would move or colour
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


class Timer:
    """Seconds since the last call of lap()."""

    def __init__(self):
        self.start = time.perf_counter()

    def lap(self):
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds
