import datetime
import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosup.config import UserError
from cosup.data.documents import SUFFIXES, ingest, sentences
from cosup.data.records import Passage, read_passages, write_records


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def _found(path, **options):
    return [(passage.title, passage.text) for passage in ingest([path], **options)]


def _ids(path, **options):
    return {passage.text: passage.id for passage in ingest([path], **options)}


# Files and folders


def test_a_folder_is_read_recursively_in_order_of_names_without_hidden_files(write, tmp_path):
    for name in ("b.txt", "a/z.md", "a/c/d.html", ".hidden.txt", ".git/e.txt", "a/.f/g.txt"):
        write(f"docs/{name}", f"This is {name}.")
    sources = [passage.meta["source"] for passage in ingest([tmp_path / "docs"])]
    assert sources == [f"{tmp_path.as_posix()}/docs/{name}" for name in ("a/c/d.html", "a/z.md", "b.txt")]


def test_what_is_not_read_in_a_folder_is_told_to_the_caller(write, tmp_path):
    write("docs/a.txt", "Text.")
    others = [write("docs/b.docx", "PK"), write("docs/c/Makefile", "all:")]
    (tmp_path / "docs" / "d.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "docs" / "e").symlink_to(tmp_path / "docs")
    skipped = []
    assert len(list(ingest([tmp_path / "docs"], on_skip=skipped.append))) == 1
    assert skipped == [*others, tmp_path / "docs" / "d.txt", tmp_path / "docs" / "e"]


def test_a_file_that_is_met_twice_is_read_once(write, tmp_path):
    path = write("docs/a.txt", "Text.")
    assert len(list(ingest([tmp_path / "docs", path, tmp_path / "docs"]))) == 1


def test_suffixes_are_known_in_any_case(write):
    assert _found(write("A.TXT", "Text.")) == [("A", "Text.")]


def test_a_named_file_of_another_suffix_is_an_error_that_lists_what_is_read(write):
    path = write("a.docx", "PK")
    with pytest.raises(UserError) as error:
        list(ingest([path]))
    assert str(path) in str(error.value)
    assert all(suffix in str(error.value) for suffix in SUFFIXES)


def test_missing_paths_and_folders_without_documents_are_errors(write, tmp_path):
    write("docs/a.docx", "PK")
    with pytest.raises(UserError, match=r"there is no file or folder .*none"):
        list(ingest([tmp_path / "none"]))
    with pytest.raises(UserError, match="docs holds no documents: "):
        list(ingest([tmp_path / "docs"]))


def test_errors_of_names_come_before_the_first_passage(write, tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        next(ingest([write("a.txt", "Text."), tmp_path / "none"]))


def test_a_file_that_is_not_utf8_is_named_with_its_byte(write):
    path = write("a.txt", b"caf\xe9 noir")
    with pytest.raises(UserError, match="is not UTF-8: its byte 4 is 0xe9; convert it") as error:
        list(ingest([path]))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n\t", "\ufeff"])
def test_an_empty_file_yields_nothing(write, name, content):
    assert _found(write(name, content)) == []


def test_max_words_below_one_is_an_error(write):
    with pytest.raises(UserError, match="max_words is 0, and must be 1 or more"):
        next(ingest([write("a.txt", "Text.")], max_words=0))


# Packing


def test_whole_paragraphs_are_packed_while_they_fit(write):
    path = write("a.txt", "One two three.\n\nFour five.\n \nSix seven eight nine.")
    assert _found(path, max_words=5) == [("a", "One two three.\n\nFour five."), ("a", "Six seven eight nine.")]


def test_a_long_paragraph_is_split_between_sentences(write):
    path = write("a.txt", "One two three. Four five. Six seven. Eight.")
    assert [text for _, text in _found(path, max_words=5)] == ["One two three. Four five.", "Six seven. Eight."]


def test_a_long_sentence_is_cut_between_words(write):
    path = write("a.txt", "Start here. One two three four five six seven")
    assert [text for _, text in _found(path, max_words=3)] == ["Start here.", "One two three", "four five six", "seven"]


def test_chinese_and_japanese_characters_count_as_words(write):
    assert [len(text) for _, text in _found(write("a.txt", "東京は日本の首都" * 5), max_words=16)] == [16, 16, 8]


@given(text=st.text(alphabet=st.sampled_from('aB 1.?\n"é東')), max_words=st.integers(1, 6))
def test_packing_loses_no_word_and_keeps_to_the_limit(tmp_path_factory, text, max_words):
    path = tmp_path_factory.mktemp("packing") / "a.txt"
    path.write_text(text)
    texts = [passage.text for passage in ingest([path], max_words=max_words)]
    assert "".join("".join(texts).split()) == "".join(text.split())
    assert all(1 <= len(text.split()) <= max_words for text in texts)


# Ids and meta


def test_meta_holds_source_and_position_within_the_file(write, tmp_path):
    write("docs/a.txt", "One two.\n\nThree four.")
    write("docs/b.txt", "Five.")
    metas = [passage.meta for passage in ingest([tmp_path / "docs"], max_words=2)]
    a, b = f"{tmp_path.as_posix()}/docs/a.txt", f"{tmp_path.as_posix()}/docs/b.txt"
    assert metas == [{"source": a, "position": 1}, {"source": a, "position": 2}, {"source": b, "position": 1}]


def test_an_edit_changes_the_ids_of_the_passages_it_touches_and_of_no_other(write):
    before = _ids(write("a.md", "# A\nOne.\n## B\nTwo.\n## C\nThree."))
    after = _ids(write("a.md", "# A\nNew.\n\nOne.\n## B\nTwo.\n## C\nThree\nand more."))
    assert before.keys() & after.keys() == {"Two."}
    assert before["Two."] == after["Two."]
    assert not set(after.values()) & (set(before.values()) - {before["Two."]})


def test_wrapping_a_text_anew_changes_no_id(write):
    before = _ids(write("a.txt", "One two\nthree four.\n\nFive."))
    assert _ids(write("a.txt", "One two three\r\nfour.\r\n\r\n\r\nFive.\r\n")) == before


def test_ids_do_not_depend_on_where_the_folder_stands(write, tmp_path):
    write("one/docs/a.txt", "Text.")
    write("two/docs/a.txt", "Text.")
    assert _ids(tmp_path / "one/docs") == _ids(tmp_path / "two/docs")


def test_the_same_text_in_two_files_has_two_ids(write, tmp_path):
    write("docs/a.txt", "Text.")
    write("docs/b/a.txt", "Text.")
    assert len({passage.id for passage in ingest([tmp_path / "docs"])}) == 2


def test_identical_passages_get_a_numbered_suffix(write, tmp_path):
    write("one/a.md", "# T\nSame.\n# T\nSame.\n# T\nOther.\n# T\nSame.")
    write("two/a.md", "# T\nSame.")
    first, second, other, third, fourth = (p.id for p in ingest([tmp_path / "one", tmp_path / "two"]))
    assert [second, third, fourth] == [f"{first}-2", f"{first}-3", f"{first}-4"]
    assert other not in (first, second)


def test_what_is_ingested_can_be_written_and_read_as_passages(write, tmp_path):
    write("docs/a.md", "# A\nOne *two*.")
    write("docs/b.jsonl", '{"text": "Three.", "n": 1}')
    passages = list(ingest([tmp_path / "docs"]))
    write_records(tmp_path / "p.jsonl", passages)
    assert list(read_passages(tmp_path / "p.jsonl")) == passages


# Plain text and Markdown


def test_the_title_of_plain_text_is_the_file_name(write):
    assert _found(write("my notes.txt", "# Not a heading")) == [("my notes", "# Not a heading")]


def test_the_title_is_the_headings_that_govern(write):
    text = "Before.\n# Guide\nIntro.\n## Install\n### Linux\napt.\n## Use #\nRun.\n# Other\nEnd."
    assert _found(write("readme.md", text)) == [
        ("readme", "Before."),
        ("Guide", "Intro."),
        ("Guide > Install > Linux", "apt."),
        ("Guide > Use", "Run."),
        ("Other", "End."),
    ]


def test_without_a_first_level_heading_the_file_name_stands_in(write):
    assert _found(write("api.markdown", "## Options\nNone.")) == [("api > Options", "None.")]


def test_underlined_headings_are_headings(write):
    text = "Guide\n=====\nIntro.\n\nUse it\n------\n\nRun.\n\n- item\n\n---\n\nEnd."
    assert _found(write("a.md", text)) == [("Guide", "Intro."), ("Guide > Use it", "Run.\n\n- item\n\nEnd.")]


def test_front_matter_gives_the_title_and_is_no_text(write):
    text = '---\ntags: [x]\ntitle: "My page"\n---\nText.\n## Part\nMore.'
    assert _found(write("a.md", text)) == [("My page", "Text."), ("My page > Part", "More.")]


def test_a_heading_is_never_a_passage(write):
    assert _found(write("a.md", "# A\n## B\n# C")) == []
    assert _found(write("a.html", "<title>T</title><h1>A</h1><h2>B</h2>")) == []


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("See [the *docs*](https://x.y/a_(b) 'Title') now.", "See the docs now."),
        ("See [docs][ref].\n\n[ref]: https://x.y", "See docs."),
        ("[![build](b.svg)](https://ci) <https://x.y>", "build https://x.y"),
        ("**bold**, __too__, *it*, _it_, ***both***, ~~gone~~", "bold, too, it, it, both, gone"),
        ("**bold with *more* in it** and **`--flag`**", "bold with more in it and --flag"),
        ("`__init__`, ``a`b``, [`f_x`](f.md), `**p`", "__init__, a`b, f_x, **p"),
        ("snake_case_name, 2 * 3 * 4, a[0][1], List<int>", "snake_case_name, 2 * 3 * 4, a[0][1], List<int>"),
        (r"\*kept\* and 1 \< 2 &amp; 3", "*kept* and 1 < 2 & 3"),
        ("One<br>two <b>three</b><!-- hidden\n\ncomment --> four.", "One two three four."),
        ("> quoted\n> words", "quoted words"),
        ("wrapped\nline", "wrapped line"),
        ("Things:\n* one\n  more\n* two\n\n1. first\n2) last", "Things:\n* one more\n* two\n\n1. first\n2) last"),
        ("| a | b |\n|---|:-:|\n| 1 | **2** |", "| a | b |\n| 1 | 2 |"),
        ("One.\n\n***\n\nTwo.", "One.\n\nTwo."),
    ],
)
def test_markdown_markup_is_taken_out_and_its_text_kept(write, markdown, text):
    assert _found(write("a.md", markdown)) == [("a", text)]


def test_fenced_code_is_kept_as_it_is(write):
    text = "Run:\n```python\n# no heading\nif x:\n\n    y = '**z**'\n```\n~~~\n```\n~~~\n# H\nEnd.\n````\nunclosed"
    assert _found(write("a.md", text)) == [
        ("a", "Run:\n\n# no heading\nif x:\n\n    y = '**z**'\n\n```"),
        ("H", "End.\n\nunclosed"),
    ]


def test_a_long_list_is_split_between_items(write):
    path = write("a.md", "- one two\n- three four. Five\n- six")
    assert [text for _, text in _found(path, max_words=4)] == ["- one two", "- three four. Five", "- six"]


# HTML


def test_html_headings_and_title_are_titles(write):
    page = "<title>Page &mdash; Site</title><p>Top.<h2>Part <i>one</i></h2>Text.<h1>Real</h1><p>More.<h3>Deep</h3>End."
    assert _found(write("a.htm", page)) == [
        ("Page — Site", "Top."),
        ("Page — Site > Part one", "Text."),
        ("Real", "More."),
        ("Real > Deep", "End."),
    ]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>One <b>t</b>wo<div>three", "One two\n\nthree"),
        ("a &lt;b&gt; &amp;&nbsp;c &eacute;&#8212;", "a <b> & c é—"),
        ("<nav><ul><li>menu</ul></nav>a<script>x='<p>'</script><style>p{}</style><template><p>t</template>b", "ab"),
        ("<svg><title>icon</title></svg><p>text</p><!-- <p>no -->", "text"),
        ("one<br>two<br/>three\n  four", "one\ntwo\nthree four"),
        ("<ul><li>one<li><b>two</b></ul>", "one\ntwo"),
        ("<table><tr><th>a</th><th>b</th></tr>\n<tr>\n<td>1</td>\n<td>2</td>\n</tr></table>", "a | b\n1 | 2"),
        ("<p>Run:</p><pre>\nif x:\n    y &lt; 1\n</pre>then", "Run:\n\nif x:\n    y < 1\n\nthen"),
        ("<![if IE]><p>text</p><![endif]><![<", "text"),
        ("</nav><p>text", "text"),
    ],
)
def test_html_markup_is_taken_out_and_its_text_kept(write, page, text):
    assert _found(write("a.html", page)) == [("a", text)]


def test_a_heading_that_is_not_closed_ends_with_its_block(write):
    assert _found(write("a.html", "<h1>A<p>Text.<p>More.")) == [("A", "Text.\n\nMore.")]


MARKUP = ["<", ">", "</", "<![", "<!--", "-->", "<pre>", "<h1>", "</h1>", "<nav>", "<title>", "&#", "<?", "```", "\0"]


@pytest.mark.parametrize("suffix", [".md", ".html"])
@given(parts=st.lists(st.sampled_from([*MARKUP, *"!-[]()*_~`\\|:#= ab1\n"]), max_size=40))
def test_malformed_markup_is_read_without_an_error(tmp_path_factory, suffix, parts):
    path = tmp_path_factory.mktemp("malformed") / f"a{suffix}"
    path.write_text("".join(parts))
    assert all(passage.text.strip() for passage in ingest([path], max_words=3))


# JSON Lines


def test_a_passages_file_keeps_its_ids_and_texts(write, tmp_path):
    passages = [Passage("x-1", "One.\n Two. ", "T", {"tags": ["a"]}), Passage("x-2", "Three.")]
    for name in ("p.jsonl", "p.jsonl.gz"):
        write_records(tmp_path / name, passages)
        first, second = ingest([tmp_path / name])
        source = (tmp_path / name).as_posix()
        assert first == Passage("x-1", "One.\n Two. ", "T", {"source": source, "position": 1, "tags": ["a"]})
        assert second == Passage("x-2", "Three.", "", {"source": source, "position": 2})


def test_other_keys_of_a_line_go_into_meta_and_win(write):
    line = {"text": "One.", "id": 7, "title": None, "url": "https://x.y", "source": "wiki", "meta": {"lang": "en"}}
    [passage] = ingest([write("a.jsonl", json.dumps(line) + "\n\n")])
    meta = {"source": "wiki", "position": 1, "lang": "en", "url": "https://x.y"}
    assert passage == Passage("7", "One.", "", meta)


def test_a_long_line_becomes_passages_that_name_their_parent(write):
    lines = [{"id": "x", "title": "T", "text": "One two. Three four."}, {"text": " "}, {"text": "Five."}]
    path = write("a.jsonl", "\n".join(map(json.dumps, lines)))
    found = [(p.title, p.text, p.meta.get("parent"), p.meta["position"]) for p in ingest([path], max_words=2)]
    assert found == [("T", "One two.", "x", 1), ("T", "Three four.", "x", 2), ("", "Five.", None, 3)]
    assert "x" not in {passage.id for passage in ingest([path], max_words=2)}


def test_an_id_that_repeats_in_json_lines_is_an_error(write):
    path = write("a.jsonl", '{"id": "x", "text": "One."}\n{"id": "x", "text": "Two."}')
    with pytest.raises(UserError, match="the id 'x' occurs twice"):
        list(ingest([path]))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "invalid JSON"),
        (b"[1]", "input should be an object"),
        (b'{"title": "T"}', "text: field required"),
        (b'{"text": 5}', "text: input should be a valid string, not 5; each line"),
        (b'{"text": "x", "id": true}', "id: input should be a valid string, not True"),
        (b'{"text": "caf\xe9"}', "is not UTF-8: its byte 14 is 0xe9"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_its_number(write, line, reason):
    path = write("a.jsonl", b'{"text": "One."}\n\n' + line)
    with pytest.raises(UserError) as error:
        list(ingest([path]))
    assert str(error.value).startswith(f"{path}:3")
    assert reason in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"{}" + data, lambda data: data[:20] + data])
def test_a_damaged_gzip_file_is_a_user_error(write, damage):
    rng = random.Random(0)
    data = gzip.compress("\n".join(json.dumps({"text": str(rng.random())}) for _ in range(99)).encode())
    with pytest.raises(UserError, match=r"a\.jsonl\.gz can't be read: .*; mend it"):
        list(ingest([write("a.jsonl.gz", damage(data))]))


def test_the_source_is_the_path_as_it_was_given(write, monkeypatch, tmp_path):
    write("docs/a.txt", "Text.")
    monkeypatch.chdir(tmp_path)
    assert [passage.meta["source"] for passage in ingest([Path("docs")])] == ["docs/a.txt"]


# Sentences


@given(st.text())
def test_sentences_joined_give_back_the_text(text):
    assert "".join(sentences(text)) == text
    assert all(sentences(text))


@given(st.lists(st.sampled_from(["Dr.", "e.g.", "J.", "End.", "word", "(Yes!)", '"No?"', "1.", " ", "\n", "\n\n"])))
def test_sentences_of_texts_full_of_stops_joined_give_back_the_text(words):
    text = " ".join(words)
    assert "".join(sentences(text)) == text


@given(st.text())
def test_a_sentence_begins_at_a_word(text):
    assert not any(sentence[0].isspace() for sentence in sentences(text)[1:])


@pytest.mark.parametrize(
    "expected",
    [
        ["One is here. ", "Two is there! ", "Is three? ", "Four… ", "Five"],
        ["Dr. Smith met Mrs. Jones at St. Paul. ", "They spoke."],
        ["J. R. R. Tolkien and George W. Bush met. ", "No."],
        ["He moved to the U.S. Army. ", "It was fun."],
        ["Some, e.g. Paris, i.e. France (cf. Rome vs. Milan), agree. ", "Others don't."],
        ["See No. 5 and Fig. 2 of vol. 3. ", "It was built on Jan. 4 there."],
        ["He said no. ", "Then he left."],
        ["It cost $3.50 in v1.2. ", "In 1990. ", "Then it rose."],
        ['"Stop!" he said. ', '"Why?" ', "She left. ", "(It rained.) ", "“Yes.” ", "\u2018So.\u2019 ", "End"],
        ["Was that it?! ", "Yes... it was... ", "Over."],
        ["a heading\n\n", "a text without stops\nover lines\n \n", "end"],
        ["1. First item. ", "2. Second item."],
        ["Smith et al. (2020) found it. ", "Good."],
        ["  Leading space. ", "Trailing space.  \n"],
        ["No stop"],
        [],
    ],
)
def test_sentences_end_where_a_reader_would_end_them(expected):
    assert sentences("".join(expected)) == expected


# PDF


@pytest.fixture
def pdf(tmp_path):
    fpdf = pytest.importorskip("fpdf")

    def write_pdf(name, pages, title="", head="", numbers=False):
        document = fpdf.FPDF()
        document.set_title(title) if title else None
        document.set_font("helvetica", size=11)
        document.set_creation_date(datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))
        for number, text in enumerate(pages, start=1):
            document.add_page()
            lines = [head, text, str(number) if numbers else ""]
            document.multi_cell(0, 6, "\n".join(line for line in lines if line), align="L")
        path = tmp_path / name
        document.output(path)
        return path

    return write_pdf


def test_a_pdf_is_read_with_its_pages_and_title(pdf):
    path = pdf("a.pdf", ["The krone is the money of Norway.", "Oslo is its capital."], title="A Handbook")
    first, second = ingest([path])
    assert (first.title, first.text, first.meta["page"]) == ("A Handbook", "The krone is the money of Norway.", 1)
    assert (second.text, second.meta["page"], second.meta["position"]) == ("Oslo is its capital.", 2, 2)


def test_lines_of_a_pdf_are_joined_and_divided_words_too(pdf):
    text = "The money of Norway is called the krone, which is a word for a cro-\nwn. Its sign is kr."
    assert _found(pdf("a.pdf", [text])) == [("a", text.replace("-\n", ""))]


def test_running_heads_and_page_numbers_of_a_pdf_are_left_out(pdf):
    pages = [f"Sentence {word} stands on its own page here." for word in ("one", "two", "three", "four", "five")]
    path = pdf("a.pdf", pages, head="A Handbook, page 7", numbers=True)
    assert [text for _, text in _found(path)] == pages


def test_a_sentence_that_goes_on_over_a_page_stands_whole_on_the_second(pdf):
    path = pdf("a.pdf", ["It is cold. The krone is the money", "of Norway. It is good."])
    assert [text for _, text in _found(path)] == ["It is cold.", "The krone is the money of Norway. It is good."]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "can't be read as PDF"), (b"%PDF-1.4 nothing", "can't be read as PDF")]
)
def test_a_damaged_pdf_is_named(write, content, message):
    path = write("a.pdf", content)
    with pytest.raises(UserError, match=message) as caught:
        list(ingest([path]))
    assert str(path) in str(caught.value)


def test_a_pdf_without_text_or_with_a_password_is_refused(pdf, tmp_path):
    with pytest.raises(UserError, match="holds no text, perhaps because it is a scan"):
        list(ingest([pdf("scan.pdf", [""])]))
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=pdf("a.pdf", ["Secret."]))
    writer.encrypt("password", algorithm="RC4-128")
    writer.write(tmp_path / "secret.pdf")
    with pytest.raises(UserError, match="is encrypted"):
        list(ingest([tmp_path / "secret.pdf"]))


def test_the_file_that_passages_go_to_is_not_read_again(write, tmp_path):
    write("a.txt", "one two")
    out = tmp_path / "passages.jsonl"
    write_records(out, ingest([tmp_path], leave_out=out))
    first = list(read_passages(out))
    assert list(ingest([tmp_path], leave_out=out)) == first


def test_a_file_whose_name_is_not_utf8_is_told(tmp_path):
    try:
        (tmp_path / "caf\udce9.txt").write_text("one two")
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(UserError, match=r"the name '.*caf\\udce9.txt' is not UTF-8"):
        list(ingest([tmp_path]))
