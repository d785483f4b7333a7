"""Tokenizers of Hugging Face folders against transformers', and runs that start from such a folder."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import run

import sample
from common import checkpoint
from common.chat import encode_chat, encode_user
from common.errors import UserError
from common.tokenizer import load_tokenizer
from data import prepare
from extras import hf

transformers = pytest.importorskip("transformers", reason="the authority on these folders; a dev extra")
pytest.importorskip("safetensors", reason="the extra hf")

SPLITS = {                     # of published tokenizer.json files
    "gpt2": None,
    "digits": "digits",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "words": r"\p{L}+|\p{N}"}  # leaves much unmatched, which is to stay
SAMPLES = ["", "Good morrow, cousin.", " one  two   three ", "\n\na\r\nb\n \n\n  c\n\t x",
           "don't I'LL we've 'S",
           "In 1984, 12345678 + 3.14 = 2", "今天天气很好",
           "我们去公园。",
           "Привет мир, שלום, مرحبا", "नमस्ते",
           "e\u0301 \u0301 n\u0303 \ud55c \u1112\u1161\u11ab \u212b",
           "ok \U0001F642\U0001F469\u200d\U0001F467!",
           "a\0b \ufb01\u2460 \u00fcber na\u00efve 1\u0663\u00bd  2 \u00a0x",
           "((a)) {b}[c]; // d\n\n    e = f(g)\n"]
CORPUS = [f"{text} Number {i}: the cat sat on the mat, then the other cats don't." for i in range(40)
          for text in SAMPLES]


def byte_level(folder, split, nfc=False, ignore_merges=False, eos="<|im_end|>", special=()):
    """Train a byte-level BPE in the form of a published one and save it as tokenizer.json"""
    import tokenizers as tk
    from tokenizers import pre_tokenizers as pre
    t = tk.Tokenizer(tk.models.BPE(ignore_merges=ignore_merges))
    t.pre_tokenizer = pre.ByteLevel(add_prefix_space=False) if SPLITS[split] is None else pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)] if split == "digits" else
        [pre.Split(tk.Regex(SPLITS[split]), "isolated"),
         pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    if nfc:
        t.normalizer = tk.normalizers.NFC()
    t.decoder = tk.decoders.ByteLevel()
    t.train_from_iterator(CORPUS, tk.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"] if split == "digits" else []))
    t.add_special_tokens(["<|endoftext|>", "<|im_end|>", *special])
    t.add_tokens(["<tool_call>"])
    folder.mkdir(exist_ok=True)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token=eos)
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_ids_are_those_of_transformers(tmp_path, split, ignore_merges, nfc):
    import random
    import unicodedata
    theirs, ours = byte_level(tmp_path, split, nfc, ignore_merges), load_tokenizer(str(tmp_path))
    letters, draw = "".join(CORPUS), random.Random(0)
    scrambled = ["".join(draw.choices(letters, k=30)) for _ in range(300)]
    for text in [*CORPUS[:12], *SAMPLES, *scrambled]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if nfc else text)


def test_special_tokens_of_the_folder_keep_their_ids_and_ours_follow(tmp_path):
    theirs = byte_level(tmp_path / "a", "qwen2")
    t = load_tokenizer(str(tmp_path / "a"))
    assert t.end == theirs.eos_token_id and t.vocab_size == len(theirs) + 9
    assert sorted(t.special.values()) == [t.end, *range(len(theirs), len(theirs) + 9)] and t.pad != t.end
    for text in ("<|im_end|>", "<|endoftext|>", "<end>", "<user>"):                       # is text
        assert not set(t.encode(text)) & {*t.special.values(), *theirs.all_special_ids}
        assert t.decode(t.encode(text)) == text
    ids = [theirs.convert_tokens_to_ids("<|endoftext|>"), theirs.convert_tokens_to_ids("<tool_call>")]
    assert t.decode(ids) == "<tool_call>" == theirs.decode(ids, skip_special_tokens=True)
    assert t.decode([t.special["user"], *t.encode("hi"), t.end], show_special=True) == "<user>hi<end>"


@pytest.mark.parametrize("name, ends, expected", [
    ("config.json", "<|im_end|>", "<|im_end|>"), ("config.json", "<|endoftext|>", "<|endoftext|>"),
    ("generation_config.json", ["<|endoftext|>", "<|im_end|>"], "<|im_end|>"),
    ("generation_config.json", ["<|endoftext|>", "a"], "<|endoftext|>"), ("config.json", None, "<|im_end|>")])
def test_the_end_is_the_model_s_and_among_several_the_tokenizer_s(tmp_path, name, ends, expected):
    id_of = byte_level(tmp_path, "gpt2", eos="<|im_end|>").convert_tokens_to_ids
    (tmp_path / name).write_text(json.dumps({"eos_token_id": ends and id_of(ends)}))
    assert load_tokenizer(str(tmp_path)).end == id_of(expected)


@pytest.mark.parametrize("name, content, message", [
    ("generation_config.json", {"eos_token_id": -1}, "eos_token_id=-1: not an id"),
    ("config.json", {"eos_token_id": 99999}, "eos_token_id=99999: not an id"),
    ("generation_config.json", {"eos_token_id": [5000]}, "eos_token_id=5000: not an id"),
    ("generation_config.json", [], "generation_config.json: expected an object"),
    ("tokenizer_config.json", [1], "tokenizer_config.json: expected an object"),
    ("tokenizer.json", [1], "tokenizer.json: expected an object")])
def test_an_end_or_a_file_that_cannot_be_is_named(tmp_path, name, content, message):
    byte_level(tmp_path, "gpt2")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path))


def test_the_files_beside_a_set_make_the_same_tokenizer(tmp_path):
    byte_level(tmp_path / "a", "qwen2", nfc=True)
    t = load_tokenizer(str(tmp_path / "a"))
    for name, content in t.files().items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == t.fingerprint and again.special == t.special and again.end == t.end
    assert [again.encode(text) for text in SAMPLES] == [t.encode(text) for text in SAMPLES]
    byte_level(tmp_path / "b", "qwen2", nfc=True, eos="<|endoftext|>")
    assert load_tokenizer(str(tmp_path / "b")).fingerprint != t.fingerprint


@pytest.mark.parametrize("changes, message", [
    (dict(normalizer={"type": "NFKC"}), 'a normalizer {"type": "NFKC"}'),
    (dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "a pre_tokenizer"),
    (dict(pre_tokenizer={"type": "Metaspace"}), "not byte-level BPE, and there is no SentencePiece"),
    (dict(model={"type": "WordPiece", "vocab": {}}), 'a model "WordPiece"'),
    (dict(model={"type": "BPE", "vocab": {}, "merges": []}), "not a vocabulary of that kind")])
def test_tokenizers_of_other_kinds_are_refused(tmp_path, changes, message):
    byte_level(tmp_path, "gpt2")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path))


def test_vocab_json_of_another_model_than_gpt2_is_refused(tmp_path):
    for name, content in (("vocab.json", "{}"), ("merges.txt", ""),
                          ("tokenizer_config.json", '{"tokenizer_class": "Qwen2Tokenizer"}')):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="its tokenizer.json is needed"):
        load_tokenizer(str(tmp_path))


def sentencepiece_folder(folder):
    """tokenizer.model and the tokenizer.json that Llama 2's folder has with it -> transformers' tokenizer"""
    import sentencepiece
    import tokenizers as tk
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=600, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(600)}
    by_score = sorted(vocab, key=lambda piece: -model.get_score(vocab[piece]))
    merges = [(piece[:at], piece[at:]) for piece in by_score
              for at in range(1, len(piece)) if piece[:at] in vocab and piece[at:] in vocab]
    t = tk.Tokenizer(tk.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("\u2581"),
                                            tk.normalizers.Replace(" ", "\u2581")])
    t.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def test_sentencepiece_ids_are_those_of_transformers(tmp_path):
    theirs = sentencepiece_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    ours = load_tokenizer(str(tmp_path))
    assert ours.end == 2 and ours.vocab_size == 601 + 9 and ours.pad == 601
    for text in [*SAMPLES[1:], *CORPUS[:5]]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == text


# -----------------------------------------------------------------------------
# roles

CHATML = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'}}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA3 = ("{% for m in messages %}{{'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
          " + m['content'] + '<|eot_id|>'}}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
CHAT = [dict(role="system", content="Be brief."), dict(role="user", content="How many cats?\n"),
        dict(role="assistant", content="12 cats."), dict(role="user", content="Sure?"),
        dict(role="assistant", content="Yes.")]


@pytest.mark.parametrize("template, special, eos", [
    (CHATML, ["<|im_start|>"], "<|im_end|>"),
    (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>")],
    ids=["qwen", "llama3"])
def test_roles_are_written_as_the_folder_s_models_have_learned_them(tmp_path, template, special, eos):
    theirs = byte_level(tmp_path, "llama3", eos=eos, special=special)
    theirs.chat_template = template
    ours = load_tokenizer(str(tmp_path))
    for n in range(1, len(CHAT) + 1):
        for reply in (False, True):
            (ids, counts), = encode_chat(ours, [CHAT[:n]], answer_tags=False, reply=reply)
            assert ids == theirs.apply_chat_template(CHAT[:n], add_generation_prompt=reply,
                                                     tokenize=True, return_dict=False)
    learned = [i for i, counted in zip(ids, counts) if counted]
    expected = [*theirs.encode("12 cats."), ours.end, *theirs.encode("Yes."), ours.end]
    assert learned == expected                                # the end of a turn, not the line break after it
    assert encode_user(ours, "Sure?") == theirs.apply_chat_template(
        [CHAT[3]], add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.mark.parametrize("how", ["post_processor", "add_bos_token"])
def test_texts_begin_as_the_folder_s_models_have_learned_them(tmp_path, how):
    import tokenizers as tk
    theirs = byte_level(tmp_path, "llama3", eos="<|eot_id|>", special=[
        "<|bos|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    bos = theirs.convert_tokens_to_ids("<|bos|>")
    if how == "post_processor":                               # Llama 3's
        t = tk.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        t.post_processor = tk.processors.Sequence([
            tk.processors.ByteLevel(trim_offsets=False),
            tk.processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])])
        t.save(str(tmp_path / "tokenizer.json"))
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=t)
        assert theirs.encode("hi") == [bos, *theirs.encode("hi", add_special_tokens=False)]
    else:
        path = tmp_path / "tokenizer_config.json"
        config = json.loads(path.read_text()) | dict(bos_token="<|bos|>", add_bos_token=True)
        path.write_text(json.dumps(config))
    ours = load_tokenizer(str(tmp_path))
    assert ours.begin == [bos] and ours.decode([bos, *ours.encode("hi")]) == "hi"
    (ids, counts), = encode_chat(ours, [CHAT])
    assert ids[0] == bos and ids.count(bos) == 1 and not counts[0]
    assert encode_user(ours, "x") == [bos, *encode_user(ours, "x", begin=False)]
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    run("data/prepare.py", "text", f"--input={tmp_path}/t.jsonl", f"--tokenizer={tmp_path}",
        f"--out_dir={tmp_path}/set")
    import numpy as np
    assert np.load(tmp_path / "set/train.npy").tolist() == [
        bos, *ours.encode("one"), ours.end, bos, *ours.encode("two"), ours.end]
    assert load_tokenizer(str(tmp_path / "set")).begin == [bos]


def test_thoughts_are_between_the_folder_s_own_tokens(tmp_path):
    theirs = byte_level(tmp_path, "qwen2")
    theirs.add_tokens(["<think>", "</think>"])
    theirs.save_pretrained(tmp_path)
    ours, ids_of = load_tokenizer(str(tmp_path)), theirs.convert_tokens_to_ids
    assert [ours.special[name] for name in ("think", "/think")] == ids_of(["<think>", "</think>"])
    assert ours.vocab_size == len(theirs) + 7                 # end and these are there
    ids, _ = encode_chat(ours, [[dict(role="assistant", think="Hm.", content="Yes.")]], answer_tags=False)[0]
    assert ours.decode(ids[1:], hide_think=True) == "Yes."
    assert ours.decode(ids[1:], show_special=True) == "<think>Hm.</think>Yes.<end>"
    assert ours.encode("a <think>b</think>") == theirs.encode("a <think>b</think>")  # not special there


def test_roles_of_other_folders_are_ours(tmp_path):
    byte_level(tmp_path, "gpt2", eos="<|endoftext|>", special=["<|im_start|>"])
    t = load_tokenizer(str(tmp_path))
    assert t.markers == {name: [i] for name, i in t.special.items()}


# -----------------------------------------------------------------------------
# runs from a folder

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of transformers whose embedding has a row for each of its tokens, and none for ours"""
    folder = tmp_path_factory.mktemp("hf") / "model"
    tokenizer = byte_level(folder, "qwen2", special=["<|im_start|>"])
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=131072, initializer_range=0.2,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)).to(
            torch.bfloat16).save_pretrained(folder)
    rows = [[dict(role="user", content=f"{i} cats?"), dict(role="assistant", content="12 cats.")]
            for i in range(20)]
    (folder.parent / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("data/prepare.py", "chat", f"--input={folder.parent}/chat.jsonl", "--val_frac=0.2",
        f"--tokenizer={folder}", f"--out_dir={folder.parent}/set")
    return folder


def sampled(source, *options):
    return run("sample.py", f"--init_from={source}", "--max_new_tokens=8", "--seed=3", *options).stdout


def test_a_stage_and_sampling_start_from_a_folder_of_transformers(folder, tmp_path):
    options = [f"--data_dir={folder.parent}/set", f"--init_from={folder}", "--seq_len=64", "--batch_size=2",
               "--eval_seqs=2", "--lr=0.0", "--warmup_steps=0", "--eval_prompts=cats?"]
    result = run("train_sft.py", *options, f"--out_dir={tmp_path}/run", "--num_steps=2")
    assert f"weights of {folder}" in result.stdout
    model, tokenizer = sample.load(str(tmp_path / "run"), "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    n = theirs.config.vocab_size
    assert model.config.vocab_size == tokenizer.vocab_size == n + 9 and model.config.seq_len == 131072
    assert load_tokenizer(str(folder)).fingerprint == tokenizer.fingerprint
    x = torch.randint(n, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(x) @ model.head.T
        torch.testing.assert_close(logits[..., :n], theirs(x).logits, atol=1e-4, rtol=0)
    for weight in (model.embed.weight, model.head):           # further rows: the mean, and something besides
        mean, new = weight[:n].mean(dim=0), weight[n:]
        assert (new - mean).abs().max() < 0.1 and len(new.unique(dim=0)) == 9
    text = sampled(folder, "--chat=true", "--prompt=12 cats?")
    assert text == sampled(folder, "--chat=true", "--prompt=12 cats?") != sampled(folder, "--prompt=12 cats?")


def test_a_folder_that_is_imported_is_a_run(folder, tmp_path):
    def command(*options):
        return run("-m", "extras.hf", *options, check=False)
    result = command("import", f"--hf_dir={folder}", f"--out_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    ours, theirs = checkpoint.find(str(tmp_path / "run")), hf.read_weights(str(folder))
    model, tokenizer = sample.load(ours, "cpu")
    for name, weight in model.state_dict().items():
        assert weight[:len(theirs[name])].equal(theirs[name].float()), name
    greedy = ["--prompt=12 cats?", "--temperature=0"]
    assert sampled(folder, *greedy) == sampled(tmp_path / "run", *greedy)
    result = run("train_sft.py", f"--data_dir={folder.parent}/set", f"--init_from={tmp_path}/run",
                 f"--out_dir={tmp_path}/sft", "--num_steps=2", "--seq_len=64", "--batch_size=2",
                 "--eval_seqs=0", "--lr=1e-3")
    assert f"weights of {ours}" in result.stdout
    result = command("import", f"--hf_dir={folder}", f"--out_dir={tmp_path}/run")
    assert result.returncode == 2 and "not empty" in result.stderr and result.stderr.count("\n") == 1


def test_dpo_from_a_folder_has_the_same_reference_after_a_resume(folder, tmp_path):
    rows = [dict(prompt=f"{i} cats?", chosen="12 cats.", rejected="None.") for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("data/prepare.py", "pairs", f"--input={tmp_path}/pairs.jsonl", "--val_frac=0.2",
        f"--tokenizer={folder}", f"--out_dir={tmp_path}/set")
    options = [f"--data_dir={tmp_path}/set", f"--init_from={folder}", "--seq_len=64", "--batch_size=4",
               "--eval_seqs=2", "--ref_online=true", "--schedule=constant", "--lr=1e-3"]
    run("train_dpo.py", *options, f"--out_dir={tmp_path}/straight", "--num_steps=4")
    run("train_dpo.py", *options, f"--out_dir={tmp_path}/halves", "--num_steps=2")
    run("train_dpo.py", *options, f"--out_dir={tmp_path}/halves", "--num_steps=4", "--resume=true")
    straight, halves = ([json.loads(line)["loss"] for line in open(tmp_path / name / "metrics.jsonl")
                         if '"loss"' in line] for name in ("straight", "halves"))
    assert straight == halves and straight[0] == pytest.approx(0.6931, abs=1e-3)


def test_what_does_not_go_together_is_said_in_a_line(folder, tmp_path, token_set):
    for script, options, message in (
            ("train_pretrain.py", [f"--data_dir={token_set}", f"--init_from={folder}"], "another tokenizer"),
            ("train_kd.py", [f"--data_dir={token_set}", f"--teacher={folder}"], "another tokenizer"),
            ("train_sft.py", [f"--data_dir={folder.parent}/set", f"--init_from={folder}",
                              "--model.n_layer=3"], "--model.n_layer=3: the checkpoint has 2")):
        result = run(script, *options, f"--out_dir={tmp_path}/none", "--num_steps=1", "--seq_len=64",
                     "--batch_size=2", check=False)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    byte_level(tmp_path / "plain", "gpt2", eos="<|endoftext|>")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "plain" / name).write_bytes((folder / name).read_bytes())
    result = run("sample.py", f"--init_from={tmp_path}/plain", "--chat=true", "--prompt=x", check=False)
    assert result.returncode == 2 and "knows no tokens for roles" in result.stderr


def test_spare_rows_of_an_embedding_hold_our_tokens_which_its_model_has_not_learned(folder, tmp_path):
    """Qwen's are padded so: --chat=true asks whether the model knows roles, not whether rows are there"""
    tokenizer = byte_level(tmp_path / "model", "gpt2", eos="<|endoftext|>")
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=len(tokenizer) + 30, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None)).save_pretrained(tmp_path / "model")
    run("-m", "extras.hf", "import", f"--hf_dir={tmp_path}/model", f"--out_dir={tmp_path}/imported")
    for source in ("model", "imported"):
        options = [f"--init_from={tmp_path / source}", "--prompt=x", "--max_new_tokens=3"]
        assert run("sample.py", *options).stdout
        result = run("sample.py", *options, "--chat=true", check=False)
        assert result.returncode == 2 and "knows no tokens for roles" in result.stderr
    run("data/prepare.py", "chat", f"--input={folder.parent}/chat.jsonl", "--val_frac=0.2",
        f"--tokenizer={tmp_path}/model", f"--out_dir={tmp_path}/set")
    result = run("train_sft.py", f"--data_dir={tmp_path}/set", f"--init_from={tmp_path}/model",
                 f"--out_dir={tmp_path}/sft", "--num_steps=2", "--seq_len=64", "--batch_size=2",
                 "--eval_seqs=0")
    assert "rows are added" not in result.stdout
    model, _ = sample.load(str(tmp_path / "sft"), "cpu")
    assert model.config.vocab_size == len(tokenizer) + 30
    assert run("sample.py", f"--init_from={tmp_path}/sft", "--chat=true", "--prompt=x",
               "--max_new_tokens=3").stderr == ""


def test_a_chat_with_a_model_that_knows_text_only_is_noted(folder, tmp_path, teacher_run):
    chat = ["--chat=true", "--prompt=x", "--max_new_tokens=3"]
    assert "last trained on text" in run("sample.py", f"--init_from={teacher_run}", *chat).stderr
    assert run("sample.py", f"--init_from={folder}", *chat).stderr == ""              # ChatML is known there


def test_a_student_learns_from_a_folder_of_its_own_tokenizer(folder, tmp_path):
    options = [f"--data_dir={folder.parent}/set", f"--teacher={folder}", "--seq_len=64", "--batch_size=4",
               "--warmup_steps=2", "--eval_seqs=2", "--model.n_layer=1", "--model.n_head=2",
               "--model.n_embd=32"]
    result = run("train_kd.py", *options, f"--out_dir={tmp_path}/kd", "--num_steps=30", "--lr=1e-2",
                 "--kd_frac=1", "--eval_every=0")
    assert f"{folder}: 9 rows are added" in result.stdout
    rows = [json.loads(line) for line in open(tmp_path / "kd/metrics.jsonl")]
    kd = [row["kd"] for row in rows if "kd" in row]
    assert kd[-1] < 0.5 * kd[0]


def test_a_prompt_is_needed_where_no_token_begins_a_text(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        config = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({k: v for k, v in config.items() if "eos" not in k}))
    assert run("sample.py", f"--init_from={tmp_path}", "--prompt=x", "--max_new_tokens=3").stdout
    result = run("sample.py", f"--init_from={tmp_path}", check=False)
    assert result.returncode == 2 and "give some text" in result.stderr


def test_a_folder_without_a_tokenizer_is_named(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    result = run("sample.py", f"--init_from={tmp_path}", "--prompt=x", check=False)
    assert result.returncode == 2 and f"error: {tmp_path}: no tokenizer there" in result.stderr


# -----------------------------------------------------------------------------
# what a published tokenizer.json may hold

def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reference(folder):
    """What tokenizers makes of the file, whatever class transformers would take"""
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def test_bytes_that_the_vocabulary_lacks_follow_it(tmp_path):
    """As SmolLM2's lacks 21: no text is lost, and the ids of all others stay."""
    byte_level(tmp_path, "digits", eos="<|endoftext|>")
    whole = load_tokenizer(str(tmp_path))
    lacking = ["ā", "Ă", "ă"]                                 # for the bytes 1, 2, 3, in GPT-2's files
    def drop(file):
        vocab = file["model"]["vocab"]
        assert not any(c in "".join(pair) for pair in file["model"]["merges"] for c in lacking)
        for c in lacking:
            del vocab[c]
    edit_json(tmp_path / "tokenizer.json", drop)
    ours, theirs = load_tokenizer(str(tmp_path)), reference(tmp_path)
    assert ours.vocab_size == whole.vocab_size + 3
    for text in [*SAMPLES, *CORPUS[:9]]:
        assert ours.encode(text) == whole.encode(text) == theirs.encode(text, add_special_tokens=False)
    first = whole.vocab_size - 9                              # before our special tokens
    assert ours.encode("a\1b\2\3") == [*ours.encode("a"), first, *ours.encode("b"), first + 1, first + 2]
    assert ours.decode(ours.encode("a\1b\2\3é")) == "a\1b\2\3é"
    files = {name: content for name, content in ours.files().items()}
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / name).write_bytes(content)
    assert load_tokenizer(str(tmp_path / "set")).fingerprint == ours.fingerprint


ISOLATED = dict(type="Split", behavior="Isolated", invert=False)
LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)


@pytest.mark.parametrize("steps", [
    [dict(ISOLATED, pattern=dict(Regex=r"\p{N}{1,3}")), dict(ISOLATED, pattern=dict(Regex="[一-龥]+")),
     dict(ISOLATED, pattern=dict(Regex=SPLITS["qwen2"])), LEVEL],
    [dict(ISOLATED, pattern=dict(String="at")), dict(ISOLATED, pattern=dict(Regex=SPLITS["llama3"])), LEVEL],
    [dict(type="Digits", individual_digits=True), dict(ISOLATED, pattern=dict(Regex=SPLITS["words"])), LEVEL],
    [dict(ISOLATED, behavior="Removed", invert=True, pattern=dict(Regex=SPLITS["llama3"])), LEVEL],
    [dict(ISOLATED, pattern=dict(Regex="(c)(a)t")), dict(LEVEL, use_regex=True)]],
    ids=["three", "text", "digits", "removed", "groups"])
def test_splits_in_a_row_are_those_of_tokenizers(tmp_path, steps):
    byte_level(tmp_path, "qwen2")
    edit_json(tmp_path / "tokenizer.json",
              lambda file: file.update(pre_tokenizer=dict(type="Sequence", pretokenizers=steps)))
    ours, theirs = load_tokenizer(str(tmp_path)), reference(tmp_path)
    for text in [*SAMPLES, *CORPUS[:14]]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("step", [dict(ISOLATED, behavior="Removed", pattern=dict(Regex="a")),
                                  dict(ISOLATED, invert=True, pattern=dict(Regex="a")),
                                  dict(type="Whitespace")], ids=str)
def test_splits_that_would_lose_text_are_refused(tmp_path, step):
    byte_level(tmp_path, "qwen2")
    edit_json(tmp_path / "tokenizer.json",
              lambda file: file.update(pre_tokenizer=dict(type="Sequence", pretokenizers=[step, LEVEL])))
    with pytest.raises(UserError, match="a pre_tokenizer"):
        load_tokenizer(str(tmp_path))


def test_added_tokens_are_one_id_wherever_they_are_written(tmp_path):
    theirs = byte_level(tmp_path, "qwen2", nfc=True)
    theirs.add_tokens(["<think>", "</think>", "<tool", "<tool_calls>"])
    theirs.save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(str(tmp_path)), reference(tmp_path)
    for text in ("<tool_call>", "a<tool_call>b", "<tool_calls><tool_call><tool", " <think>\ne\u0301</think> ",
                 "<think", "<<think>>", "x</think></think>"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode("<tool_call>")) == "<tool_call>"
    assert len(ours.encode("<tool_calls>")) == 1
    for name in ("<|im_end|>", "<|endoftext|>"):              # special ones are text
        assert not set(ours.encode(name)) & set(theirs.all_special_ids)


def test_an_added_token_that_eats_white_space_is_named(tmp_path):
    byte_level(tmp_path, "qwen2")
    edit_json(tmp_path / "tokenizer.json", lambda file: file["added_tokens"][-1].update(rstrip=True))
    with pytest.raises(UserError, match="'<tool_call>' has lstrip, rstrip or single_word"):
        load_tokenizer(str(tmp_path))


def test_every_end_of_the_folder_ends_a_text(tmp_path):
    theirs = byte_level(tmp_path, "qwen2", special=["<|eot|>"])
    id_of = theirs.convert_tokens_to_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": id_of(
        ["<|endoftext|>", "<|im_end|>"])}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": id_of("<|eot|>")}))
    t = load_tokenizer(str(tmp_path))
    assert t.end == id_of("<|im_end|>")
    assert set(t.ends) == set(id_of(["<|im_end|>", "<|endoftext|>", "<|eot|>"]))
    assert all(t.decode([i]) == "" for i in t.ends)
    for name, content in t.files().items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(str(tmp_path)).ends == t.ends


def test_a_run_of_white_space_that_the_library_cannot_take_is_an_error_with_file_and_line(
        tmp_path, monkeypatch):
    monkeypatch.setattr("common.tokenizer.LONGEST_SPACE", 50)
    byte_level(tmp_path / "model", "qwen2")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert tokenizer.encode("a" + " " * 49 + "b") and tokenizer.encode("ab" * 100)
    with pytest.raises(ValueError, match="over 50 characters of white space in a row"):
        tokenizer.encode_batch(["a", "b" + "\n \t" * 17])
    rows = [dict(text="one"), dict(text="two" + " " * 60), dict(text="three")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = prepare.TextConfig(input=(str(tmp_path / "t.jsonl"),), tokenizer=str(tmp_path / "model"),
                                out_dir=str(tmp_path / "set"))
    with pytest.raises(UserError, match="t.jsonl:2: over 50 .* leave such rows out with --bad_rows=skip"):
        prepare.prepare_set(config, prepare.Text, prepare.TextWriter)
    prepare.prepare_set(replace(config, bad_rows="skip"), prepare.Text, prepare.TextWriter)
    meta = json.loads((tmp_path / "set/meta.json").read_text())
    assert meta["splits"]["train"]["documents"] == 2 and meta["left_out"] == {"malformed": 1}
