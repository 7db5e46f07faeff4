"""Lists of pictures and texts as people save them are read rightly, or refused in one sentence."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive_jax.errors import UserError
from data import listings


def test_lines_end_where_editors_end_them(tmp_path):
  """Captions hold what Python calls line boundaries; Windows and spreadsheets leave marks of their own."""
  (tmp_path / "captions.txt").write_bytes("\ufeffone\r\ntwo\u2028halves\n".encode())
  assert listings.texts(tmp_path / "captions.txt") == (["1", "2"], ["one", "two\u2028halves"])
  (tmp_path / "captions.jsonl").write_text('{"text": "two\u2028halves", "id": 7}\n', encoding="utf-8")
  assert listings.texts(tmp_path / "captions.jsonl") == (["7"], ["two\u2028halves"])
  (tmp_path / "captions.csv").write_bytes("\ufefftext\none\n".encode())
  assert listings.texts(tmp_path / "captions.csv") == (["1"], ["one"])


def test_a_folder_of_texts_is_refused_as_one(tmp_path):
  with pytest.raises(UserError, match="is a folder: name a table or a file"):
    listings.texts(tmp_path)


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.parquet", "bad.txt"])
def test_a_damaged_list_is_one_sentence(tmp_path, name):
  (tmp_path / name).write_bytes(b"{\xff")
  with pytest.raises(UserError, match="cannot be read"):
    listings.texts(tmp_path / name)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("t.CSV", "id,text\n7,one\n"),
    ("t.tsv", "id\ttext\n7\tone\n"),
    ("t.TSV", '\ufeffid\ttext\r\n7\t"one"\r\n'),
    ("t.json", '[{"id": 7, "text": "one"}]'),
    ("t.JSONL", '{"id": "7", "text": "one"}\n\n'),
    ("t.csv", "text;id\none;7\n"),
    ("t.csv", "text\tid\none\t7\n"),
    ("t.tsv", "text,id\none,7\n"),
    ("t.csv", '"text","id"\r\n"one","7"\r\n\r\n'),
    ("t.json", '{"id": 7, "text": "one"}\n'),
    ("t.jsonl", '\n [{"id": 7, "text": "one"}]\n'),
  ],
)
def test_tables_of_every_kind_in_any_case(tmp_path, name, content):
  (tmp_path / name).write_bytes(content.encode())
  assert listings.texts(tmp_path / name) == (["7"], ["one"])


def test_a_parquet_file_is_known_by_its_content(tmp_path):
  pq.write_table(pa.table({"id": [7], "text": ["one"]}), tmp_path / "t.pq")
  assert listings.texts(tmp_path / "t.pq") == (["7"], ["one"])


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("t.csv", "id,text\n7\n", "row 1 of .* has no 'text' but nothing"),
    ("t.csv", "id,text\n7,one,two\n", "row 1 of .* more fields"),
    ("t.csv", "id,text\n,one\n", "row 1 of .* has no 'id'"),
    ("t.csv", "id,text\n7,one\n7,two\n", "rows 1 and 2 of .* both have the id '7'"),
    ("t.csv", 'id,text\n"a\nb",one\n', "without line breaks"),
    ("t.csv", 'id,text\n7,"one\n', "cannot be read"),
    ("t.jsonl", '{"id": null, "text": "one"}', "row 1 of .* has no 'id'"),
    ("t.jsonl", '{"id": NaN, "text": "one"}', "row 1 of .* has no 'id'"),
    ("t.jsonl", '{"id": 1.5, "text": "one"}', "write ids as text"),
    ("t.jsonl", '{"id": 1, "text": 3}', "has no 'text' but a int"),
    ("t.jsonl", '{"id": 1, "text": null}', "has no 'text' but nothing"),
    ("t.jsonl", '{"id": 1, "text": "a", "text": "b"}', "the column 'text' more than once"),
    ("t.jsonl", '{"id": true, "text": "a"}', "write ids as text"),
    ("t.jsonl", '{"text": "\\ud800"}', "lone surrogate"),
    ("t.jsonl", '{"id": "\\ud800", "text": "a"}', "write ids as text"),
    ("t.jsonl", "[" * 100_000, "cannot be read"),
    ("t.csv", "id,text,text\n7,one,two\n", "the column 'text' more than once"),
    ("t.csv", "id,Text\n7,one\n", r"has no column 'text' \(did you mean 'Text'\?\): it has 'id', 'Text'"),
    ("t.csv", "", "has no column 'text'"),
    ("t.csv", "7,one\n", "has no column 'text'"),
    ("t.txt", "one\0", "holds a NUL"),
    ("t.xlsx.csv", "PK\3\4\0\0", "has no column 'text'"),
    ("t.jsonl", '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', "rows 1 and 2"),
    ("t.jsonl", '{"id": 1, "text": "a"}\n{"text": "b"}', "row 2 of .* has no 'id'"),
    ("t.json", '[{"text": "a"}, {"id": "7", "text": "b"}]', "row 1 of .* has no 'id'"),
    ("t.json", '{\n"text": {"0": "one"}}', "holds a dict"),
    ("t.json", '["one"]', "row 1 of .* is a str"),
    ("t.json", "[", "cannot be read"),
    ("t.jsonl", '{"text": "a"}\n\n{"text": "b', "line 3 of .* is no JSON"),
    ("t.csv", "text\na\0b\n", "row 1 of .* has a NUL in its 'text'"),
    ("t.txt", "one".encode("utf-16-le"), "holds a NUL"),
    ("t.csv", "text\none\n".encode("utf-16-be"), "has no column"),
    ("t.txt", b"caf\xe9", "cannot be read"),
  ],
)
def test_a_row_that_cannot_be_used_is_one_sentence(tmp_path, name, content, said):
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=said):
    listings.texts(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("t.txt", "pünktchen\r\n猫\n"),
    ("t.csv", 'id,text\r\n1,pünktchen\r\n2,"猫"\r\n'),
    ("t.tsv", "text\npünktchen\n猫\n"),
    ("t.json", '[{"text": "pünktchen"}, {"text": "猫"}]'),
    ("t.jsonl", '{"text": "pünktchen"}\n{"text": "猫"}'),
  ],
)
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding, name, content):
  (tmp_path / name).write_bytes(content.encode(encoding))
  assert listings.texts(tmp_path / name) == (["1", "2"], ["pünktchen", "猫"])


def test_what_quotes_hold_stays_together(tmp_path):
  (tmp_path / "t.csv").write_text('text,id\n"a, b; c\td",1\n"two\nlines",2\n"a ""word""",3\n')
  assert listings.texts(tmp_path / "t.csv") == (["1", "2", "3"], ["a, b; c\td", "two\nlines", 'a "word"'])


def test_blank_texts_are_told_apart():
  ids, texts = ["1", "2", "3", "4"], ["one", "", " \t", "four"]
  assert listings.without_blank(ids, texts) == (["1", "4"], ["one", "four"], ["2", "3"])


@pytest.mark.parametrize(
  ("columns", "said"),
  [
    ([("text", ["one", None])], "row 2 of .* has no 'text' but nothing"),
    ([("text", [b"one", b"two"])], "row 1 of .* has no 'text' but a bytes"),
    ([("text", [1, 2])], "row 1 of .* has no 'text' but a int"),
    ([("id", [1, None]), ("text", ["one", "two"])], "row 2 of .* has no 'id'"),
    ([("id", [1.0, 2.0]), ("text", ["one", "two"])], "write ids as text"),
    ([("id", [b"1", b"2"]), ("text", ["one", "two"])], "write ids as text"),
    ([("caption", ["one", "two"])], "has no column 'text': it has 'caption'"),
    ([("text", ["one", "two"]), ("text", ["three", "four"])], "the column 'text' more than once"),
  ],
)
def test_a_parquet_file_that_cannot_be_used_is_one_sentence(tmp_path, columns, said):
  names, values = zip(*columns, strict=True)
  pq.write_table(pa.table([pa.array(each) for each in values], names=names), tmp_path / "t.parquet")
  with pytest.raises(UserError, match=said):
    listings.texts(tmp_path / "t.parquet")


@pytest.mark.parametrize(
  ("path", "said"),
  [("", "empty 'path'"), ("gs://bucket/a.png", "row 1 of .*only folders of this machine"), ("x" * 300, "too long")],
)
def test_a_picture_that_no_path_names_is_refused_before_any_work(tmp_path, path, said):
  (tmp_path / "t.csv").write_text(f'path,id\n"{path}",1\n')
  with pytest.raises(UserError, match=said):
    listings.images(tmp_path / "t.csv")


def test_a_path_of_a_table_is_that_below_the_table_or_from_the_root(tmp_path):
  (tmp_path / "t.csv").write_text(f"path\na/b [1].png\nfile://{tmp_path}/c%20d.png\n{tmp_path}/e.png\n")
  _, found = listings.images(tmp_path / "t.csv")
  assert found == [tmp_path / "a/b [1].png", tmp_path / "c d.png", tmp_path / "e.png"]
