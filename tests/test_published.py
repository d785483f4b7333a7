"""
Ids, conversations and exports of published tokenizers, against tokenizers and transformers; and SmolLM2, from
its folder through SFT and GRPO to an export that transformers loads.
"""
import json
import random

import pytest
import smollm2
import torch
from conftest import run
from published import NAMES, fetch
from test_hf_export import LANGUAGES
from test_hf_tokenizers import CORPUS, SAMPLES

import sample
from common.chat import encode_chat, encode_user
from common.tokenizer import load_tokenizer
from extras.hf_export import tokenizer_files

transformers = pytest.importorskip("transformers", reason="the authority; a dev extra")
pytestmark = pytest.mark.slow

DRAW = random.Random(0)
TEXTS = [*SAMPLES, *LANGUAGES, *CORPUS[:14], "x <think>\na</think> <tool_call>f()</tool_call><|fim_prefix|>",
         *("".join(DRAW.choices("".join(CORPUS), k=40)) for _ in range(300))]
SYSTEM = dict(role="system", content="Be brief. ")
USER = dict(role="user", content=" How many cats?\n")
ANSWER = dict(role="assistant", content="12 cats. ")
THOUGHT = dict(role="assistant", think="\nHm\n", content="Yes.")
CHATS = [[USER], [SYSTEM, USER], [USER, ANSWER], [SYSTEM, USER, ANSWER], [USER, ANSWER, USER],
         [SYSTEM, USER, ANSWER, USER, ANSWER], [USER, THOUGHT], [USER, THOUGHT, USER, ANSWER]]


@pytest.fixture(scope="module", params=[*NAMES, "smollm2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    if request.param == "smollm2":
        pytest.importorskip("gguf", reason="reads the file with its weights; a dev extra")
        smollm2.build(folder)
    else:
        folder.mkdir()
        fetch(request.param, folder)
    return folder


def text_of(token):
    return token["content"] if isinstance(token, dict) else token


def theirs_of(folder):
    """Its own tokenizer.json, whatever class transformers would make of it"""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.eos_token, theirs.bos_token = text_of(config["eos_token"]), text_of(config.get("bos_token"))
    theirs.chat_template = config.get("chat_template")
    return theirs


def chat_ids(tokenizer, chat, **how):
    """What transformers writes; it calls thoughts reasoning_content"""
    chat = [{"reasoning_content" if name == "think" else name: text for name, text in message.items()}
            for message in chat]
    return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **how)


def assert_same(ours, theirs, folder):
    differing = [text for text in TEXTS if ours.encode(text) != theirs.encode(text, add_special_tokens=False)]
    assert not differing
    if not ours.template:
        return
    knows_thoughts = "reasoning_content" in ours.template
    for chat in CHATS:
        # ours go before the answer where the template knows none
        if any("think" in message for message in chat) and not knows_thoughts:
            continue
        # Mistral's writes the system's text into the last message if that is the user's, else not at all
        if "mistral" in ours.template.lower() or "[INST]" in ours.template and chat[-1] is ANSWER:
            continue
        reply = chat[-1] is USER
        (ids, learned), = encode_chat(ours, [chat], answer_tags=False, reply=reply)
        assert ids == chat_ids(theirs, chat, add_generation_prompt=reply), chat
        said = ours.decode([i for i, learn in zip(ids, learned) if learn])
        assert all(message["content"].strip() in said for message in chat if message["role"] == "assistant")


def test_ids_and_conversations_are_those_of_the_authors(folder):
    ours = load_tokenizer(str(folder))
    assert_same(ours, theirs_of(folder), folder)
    assert encode_user(ours, "hi", begin=False)[-1] == encode_user(ours, "hi")[-1]


def test_what_is_exported_gives_the_same_ids(folder, tmp_path):
    ours = load_tokenizer(str(folder))
    for name, content in tokenizer_files(ours).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert max(theirs.get_vocab().values()) + 1 == ours.vocab_size   # gpt-4o leaves ids out
    assert_same(ours, theirs, folder)
    for name, i in ours.special.items():
        assert theirs.convert_ids_to_tokens(i), name


# -----------------------------------------------------------------------------
# SmolLM2: weights too

@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    pytest.importorskip("gguf", reason="reads the file with its weights; a dev extra")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.build(folder)
    return folder


def test_it_answers_and_has_the_logits_of_transformers(model_folder):
    question = "What is the capital of France?"
    said = run("sample.py", f"--init_from={model_folder}", "--chat=true", f"--prompt={question}",
               "--temperature=0", "--max_new_tokens=30", timeout=900).stdout
    assert said == "The capital of France is Paris.\n"
    model, tokenizer = sample.load(str(model_folder), "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    x = torch.tensor([encode_user(tokenizer, question)])
    with torch.no_grad():
        ours, expected = model(x) @ model.head.T, theirs(x).logits
    n = expected.shape[-1]
    assert ours.shape[-1] == n and expected.std() > 1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_it_is_tuned_rewarded_and_exported(model_folder, tmp_path):
    pairs = [(f"What is {i} plus {j}?", f"{i} plus {j} is {i + j}.") for i in range(12) for j in range(12)]
    chats = [[dict(role="user", content=q), dict(role="assistant", content=a)] for q, a in pairs]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps(dict(prompt=q, answer=a)) + "\n" for q, a in pairs))
    for kind in ("chat", "prompts"):
        run("data/prepare.py", kind, f"--input={tmp_path}/{kind}.jsonl", "--val_frac=0.1",
            f"--tokenizer={model_folder}", "--answer_tags=false", f"--out_dir={tmp_path}/{kind}")
    options = ["--seq_len=128", "--eval_every=0", "--eval_seqs=2", "--warmup_steps=1"]
    result = run("train_sft.py", f"--data_dir={tmp_path}/chat", f"--init_from={model_folder}",
                 f"--out_dir={tmp_path}/sft", "--batch_size=2", "--micro_batch_size=1", "--num_steps=20",
                 "--lr=2e-5", *options, timeout=3600)
    assert "30 rows are added" in result.stdout               # 9 of ours, 21 bytes that it lacks
    run("train_grpo.py", f"--data_dir={tmp_path}/prompts", f"--init_from={tmp_path}/sft",
        f"--out_dir={tmp_path}/grpo", "--batch_size=1", "--num_samples=4", "--max_new_tokens=16",
        "--num_steps=5", "--lr=1e-6", *options, timeout=3600)
    rows = [json.loads(line) for line in open(tmp_path / "sft/metrics.jsonl")]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.3 * losses[0]
    export = tmp_path / "export"
    run("-m", "extras.hf", "export", f"--init_from={tmp_path}/grpo", f"--hf_dir={export}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export)
    prompt = tokenizer.apply_chat_template([chats[17][0]], add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    ids = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    greedy = ["--chat=true", f"--prompt={pairs[17][0]}", "--temperature=0", "--max_new_tokens=20"]
    for source in (export, tmp_path / "grpo"):                # by us too, from either
        said = run("sample.py", f"--init_from={source}", *greedy, timeout=900).stdout
        assert said.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip() == pairs[17][1]
