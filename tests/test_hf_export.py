"""Tokenizers as transformers' files: ids, texts and chats are ours when transformers reads them."""
import io
import json
import random

import pytest
import sentencepiece
import torch
from test_hf_tokenizers import CORPUS as PROSE
from test_hf_tokenizers import SAMPLES, byte_level, sentencepiece_folder
from test_tokenizer import BYTES, CORPUS, MARKUP, MERGES, TEXTS, rank_lines

from common.chat import encode_chat
from common.errors import UserError
from common.model import GPT, ModelConfig
from common.sampling import SamplingConfig, stream_tokens
from common.tokenizer import PATTERNS, SPECIAL_TOKENS, Tokenizer, load_tokenizer
from data.train_tokenizer import train_sentencepiece
from extras import hf, hf_tokenizer
from extras.hf_export import tokenizer_files

transformers = pytest.importorskip("transformers", reason="the authority; a dev extra")

CODE = open(hf_tokenizer.__file__, encoding="utf-8").read()
LINES = [*CORPUS, *PROSE, *CODE.split("\n"), *TEXTS.values()]
LANGUAGES = [
    "Zwölf Boxkämpfer jagen", "Où est le garçon ?", "El niño comió ñoquis", "Žluťoučký kůň",
    "Съешь ещё этих булок", "Ξεσκεπάζω την ψυχοφθόρα", "איך בלש תפס גמל", "صِف خَلقَ خَودٍ",
    "ऋषियों को सताने वाले", "আমি ভাত খাই", "நீங்கள் எப்படி", "เป็นมนุษย์สุดประเสริฐ",
    "今天天气很好，我们去公园。",
    "いろはにほへと ちりぬるを", "키스의 고유조건은", "Tiếng Việt có dấu", "ﬁ ① ½ ＡＢＣ Å"]
MARKS = [f"{a}{text}{b}" for text in MARKUP for a, b in (("", ""), (" a", "b "), ("\n", text))]
CHATS = [
    [dict(role="system", content=" Be brief.\n"),
     dict(role="user", content="\n\n 你好 <end><|endoftext|>  "),
     dict(role="assistant", think="Hm \n", content="  ho\n\n"), dict(role="user", content=""),
     dict(role="assistant", content="'s it\r\n")],
    [dict(role="user", content="q")],
    [dict(role="user", content="<think>"), dict(role="assistant", think="", content="好")]]


def scrambled(letters, n, length):
    draw = random.Random(0)
    return ["".join(draw.choices(letters, k=length)) for _ in range(n)]


def any_characters(n, length):
    draw = random.Random(1)
    return ["".join(chr(draw.choice([draw.randrange(0x80), draw.randrange(0xD800),
                                     draw.randrange(0xE000, 0x110000)])) for _ in range(length))
            for _ in range(n)]


FIXED = [*TEXTS.values(), *SAMPLES, *LANGUAGES, *MARKS, CODE, "x" * 5000, "-" * 79, "haha" * 20]
FIXED += [text + end for text in LANGUAGES for end in (" ", "  \t", "\r\n", "\n\n \n")]
DRAWN = [*scrambled("".join(LINES + MARKUP), 400, 30), *any_characters(100, 20),
         *scrambled(" \n\t\r\u3000\xa0\u2581='a1<", 400, 14)]


def train(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, minloglevel=2, num_threads=1, **options)
    return Tokenizer("sentencepiece", model.getvalue())


def train_ranks(pattern):
    import tokenizers as tk
    pre = tk.pre_tokenizers
    t = tk.Tokenizer(tk.models.BPE())
    t.pre_tokenizer = pre.Sequence([pre.Split(tk.Regex(r"\s?\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]+"),
                                              "isolated"),
                                    pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.train_from_iterator(LINES, tk.trainers.BpeTrainer(
        vocab_size=1200, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet()))
    byte_of = {char: byte for byte, char in hf_tokenizer._printable().items()}
    by_id = sorted(t.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[char] for char in token) for token, _ in by_id]
    return Tokenizer("tiktoken", rank_lines(tokens), pattern)


PLAIN = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
MAKE = {
    "bytes": lambda: Tokenizer("bytes"),
    "tiny": lambda: Tokenizer("tiktoken", rank_lines(BYTES + MERGES), "gpt2"),  # unreachable tokens
    **{name: lambda name=name: train_ranks(name) for name in PATTERNS},
    "ours": lambda: Tokenizer("sentencepiece", train_sentencepiece(LINES, 900)),
    "dummy": lambda: train(model_type="bpe", vocab_size=900, **PLAIN),
    "nmt": lambda: train(model_type="bpe", vocab_size=900),
    "frozen": lambda: train(model_type="bpe", vocab_size=900, **PLAIN,
                            user_defined_symbols=["\n", "\n\n", "<tab>", "'='"]),
    "unigram": lambda: train(model_type="unigram", vocab_size=450),
    "unigram bytes": lambda: train(model_type="unigram", vocab_size=700, **PLAIN,
                                   user_defined_symbols=["\n"])}
GRAPHEMES = "\u1112\u1161\u11ab"         # tokenizers' Precompiled looks up a grapheme, not a prefix


@pytest.fixture(scope="module", params=MAKE)
def pair(request, tmp_path_factory):
    ours = MAKE[request.param]()
    return request.param, ours, loaded(ours, tmp_path_factory.mktemp("files"))


def loaded(tokenizer, folder, model_type="llama"):
    for name, content in (tokenizer.files() | tokenizer_files(tokenizer)).items():
        (folder / name).write_bytes(content)
    # of the exported model; for some types AutoTokenizer would take a class of its own
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def differing(ours, theirs, texts):
    """-> the texts of which ids, or what is decoded of them, differ"""
    ids = [ours.encode(text) for text in texts]
    return [text for text, ours_of in zip(texts, ids)
            if ours_of != theirs.encode(text, add_special_tokens=False)
            or ours.decode(ours_of) != theirs.decode(ours_of)]


def test_ids_and_texts_are_ours(pair):
    name, ours, theirs = pair
    wrong = differing(ours, theirs, FIXED + DRAWN)
    if name in ("nmt", "unigram"):
        wrong = [text for text in wrong if GRAPHEMES not in text]
    if name.startswith("unigram"):       # in a long run several splits are as likely
        wrong = [text for text in wrong if "-" * 20 not in text and "x" * 20 not in text]
    assert not wrong


def test_special_tokens_have_their_ids_and_are_not_shown(pair):
    _, ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.end, ours.pad)
    for name in SPECIAL_TOKENS:
        token = f"<|llm:{name}|>"
        assert theirs.encode(token, add_special_tokens=False) == [ours.special[name]]
        assert theirs.decode([ours.special[name]]) == token
        assert theirs.decode([ours.special[name]], skip_special_tokens=True) == ""


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("reply", [True, False])
def test_the_template_writes_our_ids(pair, reply, tags):
    _, ours, theirs = pair
    for chat in CHATS:
        (ids, _), = encode_chat(ours, [chat], reply=reply, answer_tags=tags)
        renamed = [{k.replace("think", "reasoning_content"): v for k, v in message.items()}
                   for message in chat]
        for messages in (chat, renamed):
            assert ids == theirs.apply_chat_template(
                messages, add_generation_prompt=reply, return_dict=False, answer_tags=tags)


def test_an_unknown_role_is_refused_and_no_reasoning_is_none(pair):
    _, ours, theirs = pair
    with pytest.raises(Exception, match="unknown role tool"):
        theirs.apply_chat_template([dict(role="tool", content="x")])
    chat = [dict(role="assistant", content="x")]
    assert encode_chat(ours, [chat])[0][0] == theirs.apply_chat_template(
        [dict(chat[0], reasoning_content=None)], return_dict=False)


def test_ids_with_holes_and_gpt2_s_own(tmp_path):
    lines = rank_lines(BYTES + MERGES).splitlines()
    moved = b"\n".join(lines[:260] + [b"%s %d" % (line.split()[0], 270 + i)
                                      for i, line in enumerate(lines[260:])])
    ours = Tokenizer("tiktoken", moved, "cl100k")
    theirs = loaded(ours, tmp_path)
    assert not differing(ours, theirs, FIXED) and theirs.eos_token_id == ours.end
    assert len(theirs) == ours.vocab_size and theirs.decode([265], skip_special_tokens=True) == ""


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_a_model_s_type_does_not_change_its_tokenizer(tmp_path, model_type):
    ours = Tokenizer("tiktoken", rank_lines(BYTES + MERGES), "o200k")
    assert not differing(ours, loaded(ours, tmp_path, model_type), FIXED)


def test_qwen2_s_type_needs_the_general_class(tmp_path):
    """transformers 5 has qwen2 in a list of types whose tokenizer_class it overrules"""
    ours = Tokenizer("tiktoken", rank_lines(BYTES + MERGES), "o200k")
    loaded(ours, tmp_path, "qwen2")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert not differing(ours, theirs, FIXED)


def test_the_end_is_eos_token():
    files = tokenizer_files(Tokenizer("bytes"))
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|llm:end|>"


def test_a_vocabulary_of_words_is_refused():
    with pytest.raises(UserError, match="neither BPE nor unigram"):
        tokenizer_files(train(model_type="char", vocab_size=200))


# -----------------------------------------------------------------------------
# vocabularies from a folder

def from_folder(folder, originals=True):
    ours = load_tokenizer(str(folder))
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    paths = [folder / name for name in names if originals and (folder / name).exists()]
    ours.originals = {path.name: path.read_bytes() for path in paths}
    return ours


@pytest.mark.parametrize("split, nfc", [("gpt2", False), ("qwen2", True), ("llama3", False)])
def test_a_folder_s_files_are_its_own_and_have_our_tokens(tmp_path, split, nfc):
    before = byte_level(tmp_path, split, nfc=nfc, special=["<|im_start|>"])
    ours = from_folder(tmp_path)
    (tmp_path / "new").mkdir()
    after = loaded(ours, tmp_path / "new")
    was, new = (json.loads(f["tokenizer.json"]) for f in (ours.originals, tokenizer_files(ours)))
    added = new.pop("added_tokens")
    assert added[:len(was["added_tokens"])] == was.pop("added_tokens") and new == was
    assert {token["id"] for token in added[-9:]} == set(ours.special.values()) - {ours.end}
    assert len(after) == ours.vocab_size and after.eos_token == "<|im_end|>"
    texts = FIXED[:60]
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
    (ids, _), = encode_chat(ours, [CHATS[0][:2]], answer_tags=False)
    assert after.decode(ids).startswith("<|im_start|>system\n")


def test_a_folder_s_chat_template_and_config_are_kept(tmp_path):
    theirs = byte_level(tmp_path, "qwen2")
    theirs.chat_template = "{{ messages[0].content }}"
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    was = json.loads(path.read_text()) | dict(model_max_length=77, added_tokens_decoder={})
    path.write_text(json.dumps(was))
    ours = from_folder(tmp_path)
    files = tokenizer_files(ours)
    assert files["chat_template.jinja"] == b"{{ messages[0].content }}"
    config = json.loads(files["tokenizer_config.json"])
    assert config.pop("added_tokens_decoder").keys() == {str(i) for i in ours.special.values()
                                                         if i != ours.end}
    assert config == {k: v for k, v in was.items() if k != "added_tokens_decoder"}
    (tmp_path / "new").mkdir()
    assert len(loaded(ours, tmp_path / "new")) == ours.vocab_size


def test_bytes_that_a_folder_lacks_are_entered(tmp_path):
    byte_level(tmp_path, "gpt2")
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    full = from_folder(tmp_path)
    gone = [0xC0, 0xFF]
    lines = [line for line in full.vocabulary.splitlines()
             if rank_lines([bytes([gone[0]])]).split()[0] != line.split()[0]
             and rank_lines([bytes([gone[1]])]).split()[0] != line.split()[0]]
    n = max(int(token["id"]) for token in file["added_tokens"]) + 1
    lines += [rank_lines([bytes([b])]).split()[0] + b" %d" % (n + i) for i, b in enumerate(gone)]
    ours = Tokenizer("tiktoken", b"\n".join(lines), "gpt2", full.extra)
    for byte in gone:
        del file["model"]["vocab"][hf_tokenizer._printable()[byte]]
    ours.originals = {"tokenizer.json": json.dumps(file).encode()}
    theirs = loaded(ours, tmp_path)
    vocab = theirs.get_vocab()
    assert [vocab[hf_tokenizer._printable()[byte]] for byte in gone] == [n, n + 1]
    assert all(vocab[token["content"]] == token["id"] for token in file["added_tokens"])
    assert [vocab[f"<|llm:{name}|>"] for name in ("pad", "image")] == [n + 2, n + 10]
    assert theirs.eos_token_id == ours.end and not differing(ours, theirs, FIXED[:20])


def test_a_folder_without_its_files_is_built_anew(tmp_path):
    byte_level(tmp_path, "qwen2", nfc=True, special=["<|im_start|>"])
    ours = from_folder(tmp_path, originals=False)
    theirs = loaded(ours, tmp_path)
    texts = [text for text in FIXED + DRAWN if "<tool_call>" not in text]
    assert not differing(ours, theirs, texts) and theirs.eos_token_id == ours.end
    assert theirs.decode(theirs.encode("<tool_call>"), skip_special_tokens=True) == "<tool_call>"
    (ids, _), = encode_chat(ours, [CHATS[1]], reply=True)     # ChatML, as its models know it
    assert ids == theirs.apply_chat_template(
        CHATS[1], add_generation_prompt=True, return_dict=False)


def test_a_text_begins_with_its_token(tmp_path):
    byte_level(tmp_path, "llama3", special=["<|bos|>"])
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(
        bos_token="<|bos|>", add_bos_token=True)))
    ours = from_folder(tmp_path, originals=False)
    assert ours.begin
    theirs = loaded(ours, tmp_path)
    assert theirs.encode("hi") == [*ours.begin, *ours.encode("hi")] and theirs.bos_token_id
    (ids, _), = encode_chat(ours, [CHATS[1]])
    assert ids == theirs.apply_chat_template(CHATS[1], return_dict=False)


def test_a_sentencepiece_folder_is_built_anew(tmp_path):
    ours = train(model_type="bpe", vocab_size=900, **PLAIN)
    ours = Tokenizer("sentencepiece", ours.vocabulary, "", dict(
        special={"end": 2}, added={"2": ""}, nfc=False, begin=[], markers={}))
    config = b'{"eos_token": "</s>", "added_tokens_decoder": {}}'
    ours.originals = {"tokenizer.model": ours.vocabulary, "tokenizer_config.json": config}
    files = tokenizer_files(ours)
    assert "tokenizer.model" not in files             # of which transformers makes other ids
    theirs = loaded(ours, tmp_path)
    assert [theirs.encode(text) for text in LANGUAGES] == [ours.encode(text) for text in LANGUAGES]


def test_a_sentencepiece_folder_with_tokenizer_json(tmp_path):
    before = sentencepiece_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    ours = from_folder(tmp_path)
    assert "tokenizer.json" in ours.originals and ours.kind == "sentencepiece"
    (tmp_path / "new").mkdir()
    after = loaded(ours, tmp_path / "new")
    texts = SAMPLES[1:] + LANGUAGES
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
    for chat in CHATS[1:]:
        (ids, _), = encode_chat(ours, [chat])
        assert ids == after.apply_chat_template(chat, return_dict=False)


def test_greedy_text_is_that_of_transformers(pair, tmp_path):
    """What sample.py streams, by the export's model and tokenizer"""
    _, ours, theirs = pair
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=ours.vocab_size, n_layer=2, n_head=2, n_embd=32, seq_len=64)).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    hf.write(str(tmp_path / "out"), model.config, model.state_dict(), ours.ends, {})
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    greedy = SamplingConfig(max_new_tokens=24, temperature=0.0)
    for prompt in ("Good morrow, cousin", "今天天气 and  so\n"):
        ids = theirs(prompt)["input_ids"]
        assert ids == ours.begin + ours.encode(prompt)
        written = peer.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
        own = [*ids, *stream_tokens(model, ours, ids, greedy)]
        assert own == [i for i in written if i not in ours.ends] and len(own) > len(ids)
        text = ours.decode(own)
        # half characters, and a text after a special token, which begins anew here
        if "\ufffd" not in text and not set(own) & ours.special_names.keys():
            assert theirs.decode(written, skip_special_tokens=True) == text
