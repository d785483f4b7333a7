"""Rows in the forms in which people keep them: every text of every row is in the set, or somebody says so."""
import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.tokenizer import load_tokenizer
from data import prepare

KINDS = dict(text=(prepare.TextConfig, prepare.Text, prepare.TextWriter),
             chat=(prepare.ChatConfig, prepare.Chats, prepare.ExampleWriter),
             pairs=(prepare.PairsConfig, prepare.Pairs, prepare.ExampleWriter),
             prompts=(prepare.PromptsConfig, prepare.Prompts, prepare.ExampleWriter))
QUESTIONS = ("prompt", "question", "query", "instruction", "problem")
HUMAN, GPT = {"from": "human", "value": "Is it lit?"}, {"from": "gpt", "value": "Since dusk."}
USER, ASSISTANT = dict(role="user", content="Depth?"), dict(role="assistant", content="Four metres.")
SYSTEM = dict(role="system", content="Speak like a pilot.")
CHATS = [
    {"messages": [USER, ASSISTANT]},
    {"system": "In French.", "messages": [USER, ASSISTANT]},
    {"messages": [SYSTEM, USER, dict(ASSISTANT, reasoning_content="The chart says four.", name=None)]},
    {"conversations": [{"from": "system", "value": "You keep a light."}, HUMAN, GPT,
                       {"from": "user", "value": "And now?"}, {"from": "assistant", "value": "Dark."}]},
    {"conversations": [HUMAN, GPT], "system": "Be brief."},
    {"conversations": [HUMAN, {"from": "gpt", "value": "<think>Look out.</think>Yes."}]},
    {"instruction": "Translate.", "input": "The sea.", "output": "La mer."},
    {"instruction": "Name a moon.", "input": "", "output": "Titan.", "system": "One word."},
    {"instruction": "Go on.", "output": "four", "history": [["one", "two"], ["and", "three"]]},
    *({question: f"Why {question}?", "response": "So."} for question in QUESTIONS)]
PAIRS = [
    {"prompt": "Where?", "chosen": "Here.", "rejected": "There."},
    {"system": "Short.", "question": "Where?", "chosen": "Here.", "rejected": "There."},
    {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "No idea."}},
    {"conversations": [{"from": "system", "value": "One word."}, HUMAN], "chosen": GPT,
     "rejected": {"from": "gpt", "value": "I cannot see it from here."}},
    {"instruction": "Translate.", "input": "The sea.", "chosen": "La mer.", "rejected": "Le mer."},
    {"messages": [SYSTEM, USER], "chosen": [ASSISTANT], "rejected": dict(ASSISTANT, content="Deep.")},
    {"chosen": [USER, ASSISTANT], "rejected": [USER, dict(ASSISTANT, content="Deep.")]}]
PROMPTS = [
    {"prompt": "2 + 2?", "answer": "4"}, {"question": "3 + 3?", "answer": "3 + 3 = 6\n#### 6"},
    {"system": "Numbers only.", "prompt": [USER], "answer": "4"},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"messages": [SYSTEM, USER, ASSISTANT]},
    {"conversations": [HUMAN, GPT]}, {"problem": "7 - 2?", "solution": "5"}]
ROWS = dict(chat=CHATS, pairs=PAIRS, prompts=PROMPTS)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if ".json" in name and ".jsonl" not in name:
        text = json.dumps(rows)
    data = text.encode()
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return name


def make(kind, name, out="set", **options):
    """-> meta.json"""
    config, *classes = KINDS[kind]
    prepare.prepare_set(config(input=(name,), out_dir=out, **options), *classes)
    return json.loads(Path(out, "meta.json").read_text())


def texts_of(value, key=""):
    """All that a row says, but for names of roles"""
    if isinstance(value, str):
        return [] if key in ("role", "from") else value.replace("<think>", "</think>").split("</think>")
    parts = value.items() if isinstance(value, dict) else [(key, part) for part in value or ()]
    return [text for name, part in parts for text in texts_of(part, name)]


def said_in(kind, out="set"):
    text = load_tokenizer(out).decode(np.load(f"{out}/train.npy").tolist())
    if kind == "prompts":
        text += json.dumps(text)[1:-1] + bytes(np.load(f"{out}/train_rows.npy")).decode()
    return text


def lacking(kind, rows, out="set"):
    """-> the texts of rows that are nowhere in the set"""
    said = said_in(kind, out)
    texts = [text for row in rows for text in texts_of(row)]
    return [text for text in texts if text not in said and json.dumps(text)[1:-1] not in said]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
@pytest.mark.parametrize("kind", ROWS)
def test_every_text_of_every_row_is_in_the_set(kind, name):
    meta = make(kind, write(name, ROWS[kind]))
    assert meta["splits"]["train"][meta["kind"] if kind != "chat" else "conversations"] == len(ROWS[kind])
    assert lacking(kind, ROWS[kind]) == [] and meta["left_out"] == {}


@pytest.mark.parametrize("kind, row", [(kind, row) for kind in ROWS for row in ROWS[kind]], ids=str)
def test_every_form_alone(kind, row):
    make(kind, write("a.jsonl", [row]))
    assert lacking(kind, [row]) == []


def test_a_csv_is_read_with_its_line_breaks_and_quotes(capsys):
    rows = [["query", "response", "id"], ["Who, then?", 'The "keeper",\nand his son.', "1"],
            ["So?", "Ja é.", "2"]]
    with open("a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    make("chat", "a.csv")
    assert all(text in said_in("chat") for row in rows[1:] for text in row[:2])
    out = capsys.readouterr().out
    assert "read as query, response: 2 rows" in out and "not read: id (2 rows)" in out


def test_a_parquet_file_is_read():
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [USER, ASSISTANT], "source": "log"}] * 1500
    parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    assert make("chat", "a.parquet")["splits"]["train"]["conversations"] == 1500
    assert lacking("chat", [{"messages": [USER, ASSISTANT]}]) == []


def test_text_may_have_another_name_and_comes_from_any_file():
    rows = [{"content": "one"}, {"content": "two"}]
    for name in ("a.jsonl", "a.json"):
        make("text", write(name, rows), out=name + ".set", fields=("content",))
        assert lacking("text", rows, name + ".set") == []


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b'{"messages": []}', "a.json: expected a list of rows; a row a line is a .jsonl"),
    ("a.json", b"[1, 2", "a.json: not JSON"), ("a.json", b'[{"a": "\xe9"}]', "a.json: not UTF-8"),
    ("a.csv", b"query,response\na\n", "a.csv:2: a row of another length than the first, which names 2"),
    ("a.csv", b"query,response\na,b,c\n", "a.csv:2: a row of another length"),
    ("a.csv", b"query,response,response\na,b,c\n", "a.csv: its first line names a column twice"),
    ("a.csv", b"query,response\na,\xe9\n", "a.csv: not a .csv in UTF-8"),
    ("a.csv", b'query,response\n"a,b\n', "a.csv: not a .csv in UTF-8"),
    ("a.parquet", b"PAR1 but no more", "a.parquet: damaged, or no parquet file"),
    ("a.json.gz", b"no gzip", "a.json.gz: damaged or truncated")])
def test_a_file_that_is_not_what_its_name_says_is_one_line(name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="the extra parquet")
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as error:
        make("chat", name)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not Path("set").exists()


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    Path("a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match='its extra "parquet"|extra "parquet"'):
        make("chat", "a.parquet")


# -----------------------------------------------------------------------------
# columns that are not read

def test_columns_that_are_not_read_are_counted_and_named(capsys):
    rows = [dict(CHATS[0], source="log 7", score=i, tags=[]) for i in range(3)] + [CHATS[0]]
    make("chat", write("a.jsonl", rows))
    assert "not read: source (3 rows), score (3 rows)\n" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["tools", "input", "history", "functions", "videos"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_column_that_changes_what_a_row_means_must_be_ignored_by_name(kind, column, capsys):
    row = dict(ROWS[kind][0], **{column: "[{}]"})
    write("a.jsonl", [ROWS[kind][0], row])
    with pytest.raises(UserError, match=f"a.jsonl:2: the column {column} is not read; --ignore={column}"):
        make(kind, "a.jsonl")
    assert make(kind, "a.jsonl", bad_rows="skip", out="skipped")["left_out"] == {"malformed": 1}
    make(kind, "a.jsonl", ignore=(column,))
    assert f"not read: {column} (1 rows)" in capsys.readouterr().out


def test_a_system_that_is_ignored_is_left_out_and_counted(capsys):
    make("chat", write("a.jsonl", [dict(CHATS[0], system="SECRET")]), ignore=("system",))
    assert "SECRET" not in said_in("chat") and "not read: system (1 rows)" in capsys.readouterr().out


@pytest.mark.parametrize("kind, fields, message", [
    ("chat", ("q",), "--fields=q: give two names, of the user's text and the assistant's"),
    ("text", ("a", "b"), "--fields=a,b: give one name, of the text"),
    ("pairs", ("a", "b"), "--fields=a,b: give three names, of the prompt, the better answer and the worse"),
    ("prompts", ("a",), "--fields=a: give two names, of the prompt and the answer")])
def test_each_kind_wants_its_number_of_fields(kind, fields, message):
    with pytest.raises(UserError, match=message):
        make(kind, write("a.jsonl", [{"a": "x"}]), fields=fields)


def test_fields_name_the_columns_of_pairs():
    row = {"ask": "Where?", "good": "Here.", "bad": "There.", "system": "Short."}
    make("pairs", write("a.jsonl", [row]), fields=("ask", "good", "bad"))
    assert lacking("pairs", [row]) == []


# -----------------------------------------------------------------------------
# the order of roles

@pytest.mark.parametrize("kind, row, reason", [
    ("chat", [ASSISTANT, USER, ASSISTANT], "that an assistant begins"),
    ("chat", [USER, USER, ASSISTANT], "with two messages of one role in a row"),
    ("chat", [USER, ASSISTANT, ASSISTANT], "with two messages of one role in a row"),
    ("chat", [dict(USER, content=" \n"), ASSISTANT], "with an empty message"),
    ("chat", {"question": "q", "answer": ""}, "with an empty message"),
    ("chat", {"question": "q", "answer": "<think>only thoughts</think>"}, "with an empty message"),
    ("chat", {"instruction": "q", "output": "a", "history": 3}, "malformed"),
    ("prompts", {"prompt": [USER, ASSISTANT], "answer": "4"}, "that end with the assistant"),
    ("prompts", {"prompt": "", "answer": "4"}, "with an empty message"),
    ("prompts", {"prompt": [SYSTEM], "answer": "4"}, "that end with the assistant"),
    ("pairs", {"prompt": "q", "chosen": "", "rejected": "b"}, "with an empty message"),
    ("pairs", {"prompt": [USER, USER], "chosen": "a", "rejected": "b"},
     "with two messages of one role in a row")], ids=str)
def test_what_is_no_conversation_is_refused_or_left_out_and_counted(kind, row, reason, capsys):
    write("a.jsonl", [ROWS[kind][0], row])
    with pytest.raises(UserError, match="a.jsonl:2: .*--bad_rows=skip"):
        make(kind, "a.jsonl")
    assert make(kind, "a.jsonl", bad_rows="skip")["left_out"] == {reason: 1}
    assert f"left out 1 {reason}: a.jsonl:2" in capsys.readouterr().out


def test_a_prompt_needs_no_answer_to_say_anything():
    """Some rewards look at the completion alone."""
    make("prompts", write("a.jsonl", [{"prompt": "Sing.", "answer": ""}]))


def test_a_tokenizer_learns_from_every_form():
    rows = [*CHATS, *PAIRS, *PROMPTS]
    lines = "\n".join(prepare.read_lines([write("a.jsonl", rows), write("b.json", CHATS)], ("text",)))
    said = [line for row in rows for text in texts_of(row) for line in text.splitlines()]
    assert [line for line in said if line not in lines] == []


def test_the_answer_of_a_prompt_is_what_follows_the_thoughts():
    thought = dict(role="assistant", content="<think>2 and 2</think>4")
    make("prompts", write("a.jsonl", [{"messages": [USER, thought]}]))
    assert json.loads(bytes(np.load("set/train_rows.npy")))["answer"] == "4"


def test_rows_of_several_forms_in_one_table_have_nulls_in_the_others(capsys):
    rows = [dict(CHATS[0], question=None, answer=None), dict(question="Why?", answer="So.", messages=None)]
    make("chat", write("a.jsonl", rows))
    assert lacking("chat", [CHATS[0], {"question": "Why?", "answer": "So."}]) == []
