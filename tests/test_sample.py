"""sample.py as a person uses it: streaming, several samples, standard input, a prompt loop, mistakes."""
import json

import pytest
from conftest import ROOT, run

OPTIONS = ["--device=cpu", "--max_new_tokens=12", "--temperature=1"]


@pytest.fixture(scope="module")
def model_run(token_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run("train_pretrain.py", f"--data_dir={token_set}", f"--out_dir={folder}", "--num_steps=30",
        "--seq_len=32", "--batch_size=8", "--eval_every=0", "--eval_seqs=8", "--lr=1e-2", "--warmup_steps=5",
        "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.vocab_size=300",
        "--device=cpu")
    return folder


def sample(model_run, *options, **kwargs):
    return run("sample.py", f"--init_from={model_run}", *OPTIONS, *options, **kwargs)


def test_streaming_and_batched_sampling_print_the_same_text(model_run):
    streamed = sample(model_run, "--prompt=Document", "--seed=3").stdout
    assert streamed == sample(model_run, "--prompt=Document", "--seed=3", "--stream=false").stdout
    assert streamed.startswith("Document") and len(streamed) > len("Document") + 5
    assert streamed != sample(model_run, "--prompt=Document", "--seed=4").stdout


def test_a_checkpoint_folder_is_as_good_as_its_run(model_run):
    assert sample(model_run, "--prompt=D").stdout == sample(model_run / "step_000030", "--prompt=D").stdout


def test_several_samples_differ_and_are_numbered(model_run):
    for stream in ("true", "false"):
        text = sample(model_run, "--prompt=word", "--num_samples=3", f"--stream={stream}").stdout
        parts = text.split("--- sample ")[1:]
        assert [part[:6] for part in parts] == ["1 of 3", "2 of 3", "3 of 3"]
        assert len({part[6:] for part in parts}) == 3


def test_the_prompt_may_come_from_standard_input_or_be_empty(model_run):
    piped = sample(model_run, "--prompt=-", input="Document 7\n").stdout
    assert piped == sample(model_run, "--prompt=Document 7").stdout
    assert sample(model_run).stdout.strip()


def test_the_prompt_loop_answers_until_an_empty_line(model_run):
    text = sample(model_run, "--interactive=true", input="Document\nword\n\nnever read\n").stdout
    assert text.count("prompt> ") == 3 and "never read" not in text
    assert sample(model_run, "--prompt=word").stdout.strip() in text


def test_suppressed_tokens_and_the_padded_tail_of_the_vocabulary_never_appear(model_run):
    letters = ",".join(str(i) for i in range(97, 123))
    text = sample(model_run, "--prompt=Q", f"--suppress={letters}", "--max_new_tokens=60",
                  "--temperature=3").stdout[1:]
    assert len(text) > 5 and not any("a" <= c <= "z" for c in text)


@pytest.mark.parametrize("options, message", [
    (["--init_from=nowhere"], "nowhere: no such run or checkpoint"),
    (["--prompt=" + "x" * 40], "--prompt: 40 tokens, but the model's context is 32; shorten it"),
    (["--top_p=0"], "--top_p=0"), (["--temperature=-1"], "--temperature=-1"),
    (["--suppress=300"], "--suppress=(300,): ids must be below the vocabulary's 300"),
    (["--promt=x"], "unknown option --promt; did you mean --prompt?")])
def test_mistakes_are_answered_by_one_line(model_run, options, message):
    result = sample(model_run, *options, check=False)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


# -----------------------------------------------------------------------------
# chat

@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A model that knows a few conversations by heart: what it says depends on what was said before."""
    def user(text):
        return {"role": "user", "content": text}

    def assistant(text, **think):
        return {"role": "assistant", "content": text, **think}
    folder = tmp_path_factory.mktemp("chat")
    chats = [[user("Ann"), assistant("hello"), user("who?"), assistant("Ann")],
             [user("Bob"), assistant("hello"), user("who?"), assistant("Bob")],
             [user("who?"), assistant("nobody", think="hm")],
             [{"role": "system", "content": "loud"}, user("who?"), assistant("NOBODY")]]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    run("data/prepare.py", "chat", f"--input={folder}/chats.jsonl", f"--out_dir={folder}/set")
    run("train_sft.py", f"--data_dir={folder}/set", f"--out_dir={folder}/run", "--num_steps=150",
        "--seq_len=64", "--batch_size=2", "--eval_seqs=0", "--lr=1e-2", "--warmup_steps=5", "--device=cpu",
        "--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32")
    return folder / "run"


def chat(chat_run, *options, **kwargs):
    return run("sample.py", f"--init_from={chat_run}", "--chat=true", "--device=cpu", "--temperature=0",
               "--max_new_tokens=30", *options, **kwargs)


def test_a_conversation_is_remembered_until_reset(chat_run):
    said = chat(chat_run, input="Ann\nwho?\n/reset\nwho?\n/reset\nBob\nwho?\n\nnever read\n").stdout
    replies = [reply.strip() for reply in said.split("you> ")[1:]]
    assert replies == ["hello", "Ann", "(forgotten)", "nobody", "(forgotten)", "hello", "Bob", ""]


def test_a_prompt_is_answered_once_and_a_system_message_counts(chat_run):
    assert chat(chat_run, "--prompt=who?").stdout == "nobody\n"
    assert chat(chat_run, "--prompt=who?", "--system=loud").stdout == "NOBODY\n"
    assert chat(chat_run, "--prompt=who?", "--stream=false").stdout == "nobody\n"
    assert chat(chat_run, "--prompt=-", input="who?\n").stdout == "nobody\n"


def test_thoughts_and_tags_are_shown_on_request(chat_run):
    shown = chat(chat_run, "--prompt=who?", "--show_tags=true").stdout
    assert shown == "<think>hm</think><answer>nobody</answer>\n"


def test_a_long_conversation_forgets_its_oldest_turns(chat_run, monkeypatch):
    import sample as script
    asked = []
    monkeypatch.setattr(script, "answer", lambda model, tokenizer, ids, *rest: asked.append(ids) or [1, 2])
    model, tokenizer = script.load(str(chat_run), "cpu")
    cfg, turns = script.Config(chat=True, system="loud", max_new_tokens=30), []
    for number in range(9):
        script.reply(model, tokenizer, turns, f"who{number}?", cfg)
    shown = [tokenizer.decode(ids, show_special=True) for ids in asked]
    assert shown[0] == "<system>loud<end><user>who0?<end><assistant>"
    assert shown[1] == shown[0] + "\x01\x02<end><user>who1?<end><assistant>"
    assert all(len(ids) <= 64 - 30 for ids in asked) and len(asked[-1]) > 20
    for number, text in enumerate(shown):
        assert text.startswith("<system>loud<end><user>who")
        assert text.endswith(f"<user>who{number}?<end><assistant>")
    assert "who0?" not in shown[-1]


def test_a_message_that_does_not_fit_is_an_error_and_the_conversation_goes_on(chat_run):
    result = chat(chat_run, "--prompt=" + "x" * 60, check=False)
    assert result.returncode == 2 and "leave too little of the model's context of 64" in result.stderr
    result = chat(chat_run, "--max_new_tokens=12", input="Ann\n" + "x" * 60 + "\nwho?\n")
    assert "leave too little" in result.stderr
    assert [reply.strip() for reply in result.stdout.split("you> ")[1:]] == ["hello", "", "Ann", ""]


@pytest.mark.parametrize("options, text", [
    (["--prompt=-"], b"K\xe4se\n"), pytest.param(["--chat=true"], b"\xff\n", marks=pytest.mark.slow)])
def test_what_is_not_utf_8_is_refused_in_one_line(chat_run, options, text):
    import os
    import subprocess
    import sys
    result = subprocess.run([sys.executable, ROOT / "sample.py", f"--init_from={chat_run}", *options],
                            input=text, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert b"--prompt: not UTF-8 text" in result.stderr and b"Traceback" not in result.stderr


@pytest.mark.parametrize("options", [["--system=x", "--prompt=a"], ["--show_tags=true"],
                                     ["--interactive=true", "--prompt=a"]])
def test_options_without_effect_are_refused(chat_run, options):
    assert run("sample.py", f"--init_from={chat_run}", *options, check=False).returncode == 2
