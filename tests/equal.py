"""
Does the working tree compute what an earlier revision computed, bit for bit? A program, not a test:

    python tests/equal.py REVISION [NAME ...]      # d4435a4; NAME: variants with this in the name

Every variant runs as a user runs it, on the CPU, in both trees at once, with the sets, runs and
exports of the earlier tree. Of a run, metrics.jsonl without timings, samples.jsonl, and the weights
and optimizer state of the last checkpoint are compared; of anything else, its files: JSON by value, others by
byte.
In a "cross" variant the working tree finishes a run of the earlier tree. Prints a table; the exit
code is 1 if anything differs, and the folder with both results stays.
"""
import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  (imported once here, not in every process forked below)
from launch import _child, _free_port
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = {"ms", "tok_per_s", "mfu", "eta", "rollout_s", "reward_s", "update_s"}
# words of a command that differ in the working tree, such as {"common/hf.py": "extras/hf.py"}
MOVED = {"common/hf.py": "extras/hf.py"}

# @out: what a variant makes; @in: write_inputs(); @NAME: what the earlier tree made of variant NAME
LOOP = ("--out_dir=@out --num_steps=5 --batch_size=8 --micro_batch_size=4 --lr=1e-2 --device=cpu "
        "--warmup_steps=2 --eval_every=5 --save_every=3 --eval_seqs=20 --eval_prompts=word1 ")
MODEL = "--model.n_layer=2 --model.n_head=2 --model.n_kv_head=1 --model.n_embd=16 --seq_len=32 "
TINY = LOOP + MODEL
MOE = ("--model.n_expert=4 --model.n_expert_active=2 --model.n_shared_expert=1 "
       "--model.n_dense_layer=1 --model.balance_coef=0.1 ")
LLAMA3 = "--model.rope_scaling=llama3 --model.rope_factor=4 --model.seq_len=128 "
PREPARE = "data/prepare.py {0} --input=@in/{0}.jsonl --val_frac=0.2 --out_dir=@out "
PRETRAIN = f"train_pretrain.py {TINY} --data_dir=@set-text "
YARN = f"train_pretrain.py {LOOP} --data_dir=@set-text --seq_len=300 --model.rope_scaling=yarn "
ZERO1 = f"2x {PRETRAIN} --micro_batch_size=2 --zero1=true "              # 2x: on two ranks
SFT = f"train_sft.py {TINY} --data_dir=@set-chat --seq_len=128 "
SFT_FROM = f"train_sft.py {LOOP} --data_dir=@set-chat --seq_len=150 --init_from="
SEES = (f"train_sft.py {TINY} --data_dir=@set-images --seq_len=150 --vision.n_layer=1 "
        "--vision.n_head=2 --vision.n_embd=16 ")
DPO = f"train_dpo.py {TINY} --data_dir=@set-pairs --beta=0.5 "
GRPO = (f"train_grpo.py {TINY} --data_dir=@set-prompts --num_samples=4 --max_new_tokens=8 "
        "--reward=common/rewards.py:exact_match,tests/some_rewards.py:letters ")
TWICE = "--updates_per_rollout=2 --num_steps=6 --save_every=4 --eval_every=2 --aggregate=dapo"
KD = f"train_kd.py {TINY} --teacher=@teacher --max_new_tokens=8 "
KD_TEXT, KD_CHAT = KD + "--data_dir=@set-text ", KD + "--data_dir=@set-chat --seq_len=150 "
SAMPLE = "sample.py --device=cpu --prompt=word1 --max_new_tokens=40 --init_from="
TOKENIZER = "data/prepare.py tokenizer --input=@in/text.jsonl --vocab_size=330 "

VARIANTS = {
    "tokenizer": TOKENIZER + "--out=@out/own.model",
    "set-text": PREPARE.format("text"),
    "set-text-files": PREPARE.format("text") + "--input=@in/*.txt --tokenizer=@tokenizer/own.model",
    "set-chat": PREPARE.format("chat"),
    "set-chat-cut": PREPARE.format("chat") + "--max_len=30 --long_rows=cut --answer_tags=false",
    "set-pairs": PREPARE.format("pairs"),
    "set-pairs-skip": PREPARE.format("pairs") + "--max_len=14 --long_rows=skip",
    "set-prompts": PREPARE.format("prompts"),
    "set-prompts-tiktoken": PREPARE.format("prompts") + "--tokenizer=@in/own.tiktoken:gpt2",
    "set-images": PREPARE.format("images") + "--image_size=16 --tokens_per_image=4",
    "set-images-pad": PREPARE.format("images") + "--tokens_per_image=16 --resize=pad",
    "teacher": PRETRAIN + "--model.n_embd=32 --seq_len=150 --num_steps=30 --save_every=0",
    "pretrain": PRETRAIN,
    "pretrain-dropout": PRETRAIN + "--model.attn_dropout=0.2",
    "pretrain-doc-mask": PRETRAIN + "--doc_mask=true --seq_len=150",
    "pretrain-muon": PRETRAIN + "--optimizer=muon",
    "pretrain-lion": PRETRAIN + "--optimizer=lion --schedule=wsd",
    "pretrain-moe": PRETRAIN + MOE,
    "pretrain-zero1": ZERO1,
    "pretrain-bf16-params": PRETRAIN + "--param_dtype=bfloat16 --dtype=bfloat16",
    "pretrain-fp16": PRETRAIN + "--dtype=float16",
    "pretrain-yarn": YARN + "--init_from=@teacher",
    "pretrain-qwen": PRETRAIN + "--model.qk_norm=true --model.attn_bias=true",
    "pretrain-llama3": PRETRAIN + LLAMA3 + "--model.tie_embeddings=false",
    "pretrain-recompute": PRETRAIN + "--activation_checkpointing=true --model.attn_dropout=0.1",
    "pretrain-critical": PRETRAIN + "--critical_ids=97,49 --critical_alpha=3",
    "pretrain-epochs": PRETRAIN + "--num_epochs=0.06 --schedule=restarts --restart_steps=2",
    "hf-export": "common/hf.py export --init_from=@teacher --hf_dir=@out",
    "hf-import": "common/hf.py import --hf_dir=@hf-export --out_dir=@out",
    "sft": SFT,
    "sft-long": SFT + "--seq_len=150 --mask_prompt=false",
    "sft-init": SFT_FROM + "@teacher --num_steps=20",
    "sft-hf": SFT_FROM + "@hf-export",
    "sft-images": SEES,
    "sft-frozen-llm": SEES + "--freeze_llm=true",
    "sft-frozen-tower": SEES + "--freeze_tower=true --activation_checkpointing=true",
    "dpo": DPO,
    "dpo-ipo": DPO + "--loss=ipo",
    "dpo-simpo": DPO + "--loss=simpo --beta=2",
    "dpo-orpo": DPO + "--loss=orpo --nll_coef=1 --critical_ids=97,49 --critical_alpha=3",
    "dpo-online": DPO + "--ref_online=true --label_smoothing=0.1",
    "dpo-moe-dropout": DPO + MOE + "--model.attn_dropout=0.1 --activation_checkpointing=true",
    "grpo": GRPO,
    "grpo-reference": GRPO + "--beta=0.01 --ref_mix=0.5 --ref_every=2",
    "grpo-two-updates": GRPO + TWICE,
    "grpo-cispo-moe": GRPO + MOE + "--loss=cispo --aggregate=dr_grpo --scale_rewards=none",
    "grpo-top-k-p": GRPO + "--top_k=200 --top_p=0.95",
    "grpo-turns": GRPO + "--env=tests/some_rewards.py:twice --reward=tests/some_rewards.py:letters",
    "grpo-packed": GRPO + "--packed=true --level=sequence --scale_rewards=batch",
    "kd-text": KD_TEXT,
    "kd-chat": KD_CHAT,
    "kd-reverse": KD_CHAT + "--divergence=reverse --mask_prompt=false",
    "kd-jsd": KD_TEXT + "--divergence=jsd --temperature=2 --doc_mask=true",
    "kd-on-policy": KD_CHAT + "--on_policy_frac=0.5 --num_steps=6",
    "kd-cached": KD_CHAT + "--cache_top_k=20",
    "kd-hf-teacher": KD_TEXT + "--teacher=@hf-export --cache_top_k=20 --temperature=0.7",
    "sample-greedy": SAMPLE + "@teacher --temperature=0",
    "sample": SAMPLE + "@teacher --top_k=50 --top_p=0.9 --repetition_penalty=1.2",
    "sample-several": SAMPLE + "@teacher --num_samples=3",
    "sample-batch": SAMPLE + "@hf-export --num_samples=3 --stream=false",
    "sample-chat": SAMPLE + "@sft-init --chat=true --show_tags=true --system=count",
    "sample-image": SAMPLE + "@sft-images --chat=true --image=@in/3.png",
    "resume-pretrain": PRETRAIN + "--model.attn_dropout=0.1",
    "cross-pretrain": PRETRAIN + "--model.attn_dropout=0.1",
    "cross-pretrain-muon": PRETRAIN + "--optimizer=muon",
    "cross-pretrain-zero1": ZERO1,
    "cross-sft": SFT,
    "cross-sft-images": SEES,
    "cross-dpo": DPO,
    "cross-grpo": GRPO + "--beta=0.01 --ref_mix=0.5 --ref_every=2",
    "cross-kd": KD_CHAT + "--cache_top_k=20",
}


def plan(name, side):
    """-> [(tree, command), ...], one after the other, that make the result of a side"""
    if not name.startswith(("cross", "resume")):
        return [(side, VARIANTS[name])]
    whole = f"{VARIANTS[name]} --schedule=constant --num_steps=6 "
    first, second = whole + "--num_steps=3 ", whole + "--resume=true "
    if name.startswith("resume"):
        return [(side, first), (side, second)]
    return [("old", whole)] if side == "old" else [("old", first), ("new", second)]


def write_inputs(folder):
    """What data/prepare.py reads: rows of many lengths, pictures, a text file, a vocabulary"""
    folder.mkdir()
    texts, chats, pairs, prompts, images = [], [], [], [], []
    for i in range(120):
        asked, said = f"{i % 10}" + "?" * (i % 4), f"{i % 10}" * (1 + i * i % 7)
        words = " ".join(f"word{(i * 7 + j * j) % 50}" for j in range(20 + i % 13))
        shown = [f"{(i // 3 * 5 + n) % 12}.png" for n in range(i % 3)]
        user, assistant = dict(role="user", content=asked), dict(role="assistant", content=said)
        looks = dict(role="user", content="<image>" * len(shown) + asked)
        texts.append(dict(text=f"Document {i}: {words}. Ende, fin, 結尾.\n"))
        start = [] if i % 5 else [dict(role="system", content="count")]
        chats.append(start + [user, assistant] * (1 + i % 3))
        pairs.append(dict(prompt=asked, chosen=said, rejected="abc"[i % 3] * (1 + i % 5)))
        prompts.append(dict(prompt=said, answer="a"))
        images.append(dict(messages=[looks, assistant], images=shown))
    kinds = dict(text=texts, chat=chats, pairs=pairs, prompts=prompts, images=images)
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "long.txt").write_text("Whan that Aprille\r\nwith his shoures soote\n" * 40)
    with open(folder / "own.tiktoken", "wb") as file:
        for rank, piece in enumerate([*(bytes([i]) for i in range(256)), b"wo", b"rd", b"word"]):
            file.write(base64.b64encode(piece) + f" {rank}\n".encode())
    for n in range(12):
        image = Image.new("RGB", (16, 12), (20 * n, 100, 255 - 20 * n))
        image.putpixel((n, n), (0, 0, 0))
        image.save(folder / f"{n}.png")


def make(work, name, side):
    """A fork of this process runs the commands of a side -> its id; it exits with 1 if one fails"""
    def path(match):
        folder = {"in": work / "in", "out": work / side / name / "out"}
        return str(folder.get(match[1], work / "old" / match[1] / "out"))
    (work / side / name).mkdir(parents=True)
    if process := os.fork():
        return process
    for tree, command in plan(name, side):
        args = [MOVED.get(arg, arg) if tree == "new" else arg for arg in command.split()]
        args = [re.sub(r"@([\w-]+)", path, arg) for arg in args]
        root, environments = ROOT if tree == "new" else work / "tree", [{}]
        if args[0] == "2x":
            both = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
            both["MASTER_PORT"] = str(_free_port())
            environments = [both | dict(RANK=rank, LOCAL_RANK=rank) for rank in "01"]
            del args[0]
        children = []
        for environment in environments:
            children.append(os.fork())
            if not children[-1]:
                # torch is imported, but nothing of a tree; `python -m` would look in the root too
                sys.path.insert(1, str(root))
                _child(args, environment | {"OMP_NUM_THREADS": "1"}, root, work / side / name)
        if any([os.waitpid(child, 0)[1] for child in children]):
            os._exit(1)
    os._exit(0)


def leaves(value, *place):
    """Yield (place, value) of what nested dicts and lists hold."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value, 1):
            yield from leaves(part, *place, key)
    else:
        yield place, value


def contents(folder):
    """What a variant has made -> {(file, line or name, ...): number, text, bytes or tensor}"""
    out, found = folder / "out", {}
    files = [file for file in out.rglob("*") if file.is_file()] or [folder / "stdout"]
    if runs := sorted(out.glob("step_??????")):
        files = [*out.glob("*.jsonl"), *runs[-1].glob("*.pt")]
    for file in files:
        if file.suffix == ".jsonl":
            for number, line in enumerate(file.read_text().split("\n")[:-1], 1):
                row = {key: value for key, value in json.loads(line).items() if key not in TIMINGS}
                found |= leaves(row, file.name, number)
        elif file.suffix == ".pt":
            found |= leaves(torch.load(file, weights_only=True), file.name)
        elif file.name == "meta.json":
            found |= leaves(json.loads(file.read_text()) | {"made_with": ""}, file.name)
        else:
            content = file.read_bytes()
            # keys of JSON have no order
            if file.suffix == ".json":
                content = json.dumps(json.loads(content), sort_keys=True)
            found[str(file.relative_to(folder)),] = content
    return found


def difference(a, b):
    """-> 0 where two leaves are equal, else by how much numbers differ, inf for anything else"""
    if type(a) is not type(b) or torch.is_tensor(a) and (a.dtype, a.shape) != (b.dtype, b.shape):
        return math.inf
    if torch.equal(a, b) if torch.is_tensor(a) else a == b:
        return 0
    if not isinstance(a, (int, float, torch.Tensor)):
        return math.inf
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    gap = (a - b).abs().max().item()
    return gap if gap > 0 else math.inf                       # nan


def compare(old, new):
    """Of two `contents` -> cells of the table"""
    gaps = {place: difference(old.get(place), new.get(place)) for place in old | new}
    place = max(gaps, key=gaps.get)
    lines = {place[:2] for place in old if place[0].endswith(".jsonl")}
    steps = sum(place[0] == "metrics.jsonl" and place[2:] == ("loss",) for place in old)
    where = f" in {':'.join(map(str, place))}" if gaps[place] else ""
    others = {place[:2] for place in old} - lines
    return steps, len(lines), len(others), f"{gaps[place]:.2g}{where}"


def main(revision, parts):
    torch.set_num_threads(1)
    names = {name for name in VARIANTS if not parts or any(part in name for part in parts)}
    for name in reversed(VARIANTS):                           # and those whose results these take
        if name in names:
            names.update(re.findall(r"@([\w-]+)", VARIANTS[name]))
    work, different = Path(tempfile.mkdtemp(prefix="equal-")), 0
    (work / "tree").mkdir()
    archive = subprocess.check_output(["git", "archive", revision], cwd=ROOT)
    subprocess.run(["tar", "-x", "-C", work / "tree"], check=True, input=archive)
    write_inputs(work / "in")
    print("| variant | steps | lines | tensors, files | largest difference |")
    print("|---|---|---|---|---|", flush=True)
    for name in filter(names.__contains__, VARIANTS):
        processes = [make(work, name, side) for side in ("old", "new")]
        failed = [os.waitpid(process, 0)[1] for process in processes]
        if any(failed):
            side = "old" if failed[0] else "new"
            cells = ("", "", "", f"failed: {work}/{side}/{name}/stderr")
        else:
            cells = compare(contents(work / "old" / name), contents(work / "new" / name))
        different += cells[-1] != "0"
        print("|", " | ".join(map(str, (name, *cells))), "|", flush=True)
    if different:
        sys.exit(f"{different} variants differ; both results are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip())
    main(sys.argv[1], sys.argv[2:])
