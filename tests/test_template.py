import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from cosup.config import UserError
from cosup.data import Evidence, Example, Passage, Text
from cosup.model import CoSupModel
from cosup.template import IGNORED, Template, TemplateSettings, separator, with_control_tokens

LONG = Passage("long", "Oslo is the capital. Paris is the capital. Iron is a metal. Gold has 79.", "Title")
PASSAGES = {
    "p": Passage("p", "Oslo is the capital.", "Norway"),
    "q": Passage("q", "Iron has [Cs] the symbol [Ce] Fe. <eos> [Ret]"),
    "long": replace(LONG, text=LONG.text * 10),
}
TYPED = ["[Ret]", "[Cs]", "[Ce]", "<eos>", "Oslo", " the capital of", "{question}", "\n", "é", "🏔"]

WORDS = st.text(max_size=6) | st.lists(st.sampled_from(TYPED), max_size=3).map("".join)
EVIDENCE = st.builds(Evidence, st.sampled_from(sorted(PASSAGES)), WORDS)
RESPONSES = st.lists(st.builds(Text, WORDS) | EVIDENCE, max_size=6).map(tuple)
SPACED = WORDS.map(lambda text: f" {text} ")


def _tokenizer(folder, settings=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with_control_tokens(tokenizer, settings or TemplateSettings())
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_lm):
    return _tokenizer(tiny_lm)


@pytest.fixture(scope="module")
def template(tokenizer):
    return Template(tokenizer, settings=TemplateSettings(max_passage_tokens=48))


@pytest.fixture(scope="module")
def control(template):
    return {template.ret, template.cs, template.ce, template.eos}


@pytest.fixture
def fresh(tokenizer):
    """A template that has shortened nothing yet."""
    return Template(tokenizer)


def _example(*response, question="Which city?"):
    return Example("e", "squad", question, response)


def _parse(template, rendered):
    start = rendered.prompt_length
    return template.parse(rendered.ids[start:], rendered.inserted[start:])


def _pieces(response):
    """Texts and claims in order; texts that follow each other are one."""
    pieces = []
    for part in response:
        if isinstance(part, Text) and pieces and not pieces[-1][0]:
            pieces[-1] = (False, pieces[-1][1] + part.text)
        else:
            pieces.append((isinstance(part, Evidence), part.text if isinstance(part, Text) else part.claim))
    return pieces


# Parse and render


@given(response=RESPONSES, question=WORDS)
def test_parsing_is_the_inverse_of_rendering(template, response, question):
    parsed = _parse(template, template.render(_example(*response, question=question), PASSAGES))
    text, claims = "", []
    for is_claim, piece in _pieces(response):
        text += separator(text, piece)
        claims += [(piece, len(text), len(text) + len(piece))] if is_claim else []
        text += piece
    assert parsed.text == text
    assert [(claim.text, claim.start, claim.end) for claim in parsed.claims] == claims
    assert parsed.well_formed


@given(opening=SPACED, cited=st.lists(st.tuples(EVIDENCE, SPACED), max_size=4))
def test_rendering_what_was_parsed_gives_the_same_ids(template, opening, cited):
    response = [Text(opening), *(part for evidence, text in cited for part in (evidence, Text(text)))]
    rendered = template.render(_example(*response), PASSAGES)
    parsed = _parse(template, rendered)
    again, position = [], 0
    for claim, passage in zip(parsed.claims, rendered.gold, strict=True):
        again += [Text(parsed.text[position : claim.start]), Evidence(passage, parsed.text[claim.start : claim.end])]
        position = claim.end
    again.append(Text(parsed.text[position:]))
    assert template.render(_example(*again), PASSAGES) == rendered


def _is_well_formed(template, ids, inserted):
    """By a regular expression, apart from the parser's own states: a letter a token, small where it was inserted.

    Outside a passage it makes no difference who wrote a control token: the engine forces some in the place of Gen.
    """
    letters = {template.ret: "R", template.cs: "S", template.ce: "C", template.eos: "E"}
    signs = [
        letters.get(id, "T").lower() if flag else letters.get(id, "T") for id, flag in zip(ids, inserted, strict=True)
    ]
    return re.fullmatch("(?:T|[Rr][trce]*sT*[Cc])*[Ee]", "".join(signs)) is not None


@given(data=st.data())
def test_any_sequence_parses_and_only_sound_ones_are_well_formed(template, control, data):
    some = st.sampled_from([*sorted(control), template.encode("a")[0], template.encode("é")[0]])
    tokens = data.draw(
        st.lists(st.tuples(some | st.integers(0, len(template.tokenizer) - 1), st.booleans()), max_size=20)
    )
    ids, inserted = [id for id, _ in tokens], [flag for _, flag in tokens]
    parsed = template.parse(ids, inserted)
    position = 0
    for claim in parsed.claims:
        assert position <= claim.start <= claim.end <= len(parsed.text)
        assert parsed.text[claim.start : claim.end] == claim.text
        position = claim.end
    assert parsed.well_formed == _is_well_formed(template, ids, inserted)


@given(data=st.data(), response=RESPONSES)
def test_one_changed_token_is_noticed_wherever_it_breaks_the_form(template, control, data, response):
    rendered = template.render(_example(*response), PASSAGES)
    start = rendered.prompt_length
    ids, inserted = rendered.ids[start:], rendered.inserted[start:]
    place = data.draw(st.integers(0, len(ids) - 1))
    ids[place] = data.draw(st.sampled_from(sorted(control)))
    assert template.parse(ids, inserted).well_formed == _is_well_formed(template, ids, inserted)


def test_a_claim_that_is_never_closed_is_kept_and_the_response_not_well_formed(template):
    rendered = template.render(_example(Text("So"), Evidence("p", "Oslo")), PASSAGES)
    start = rendered.prompt_length
    parsed = template.parse(rendered.ids[start:-2], rendered.inserted[start:-2])
    assert (parsed.text, [claim.text for claim in parsed.claims], parsed.well_formed) == ("So Oslo", ["Oslo"], False)


def test_nothing_is_read_after_the_end(template):
    parsed = template.parse([*template.encode("a"), template.eos, *template.encode("b")], [False] * 3)
    assert (parsed.text, parsed.well_formed) == ("a", False)


@pytest.mark.parametrize(
    ("before", "piece", "blank"),
    [
        ("a", "b", " "),
        ("a ", "b", ""),
        ("a", " b", ""),
        ("a", "\nb", ""),
        ("a", ", b", ""),
        ("", "b", ""),
        ("a", "", ""),
    ],
)
def test_parts_are_shown_with_a_blank_where_neither_brings_one(before, piece, blank):
    assert separator(before, piece) == blank


# What is rendered


def test_a_response_is_rendered_token_by_token(template):
    evidence = Evidence("p", "Oslo", also=("q",), negatives=("long",))
    rendered = template.render(_example(Text("Well,"), evidence, Text(".")), PASSAGES)
    prompt = template.prompt("Which city?", task="squad")
    passage = template.encode("Norway :: Oslo is the capital.")
    own = [*template.encode("Well,"), template.ret], [*template.encode("Oslo"), template.ce, *template.encode(".")]
    assert rendered.ids == [*prompt, *own[0], *passage, template.cs, *own[1], template.eos]
    assert rendered.prompt_length == len(prompt)
    assert rendered.ret == [rendered.ids.index(template.ret)]
    assert (rendered.gold, rendered.ignored, rendered.negatives) == (["p"], [{"q"}], [("long",)])


@given(response=RESPONSES)
@pytest.mark.parametrize("train_on_passages", [False, True])
def test_labels_are_the_ids_except_in_the_prompt_and_in_what_the_system_inserts(template, response, train_on_passages):
    rendered = template.render(_example(*response), PASSAGES, train_on_passages=train_on_passages)
    silent = [
        position < rendered.prompt_length or (inserted and not train_on_passages)
        for position, inserted in enumerate(rendered.inserted)
    ]
    assert [label == IGNORED for label in rendered.labels] == silent
    assert all(label in (IGNORED, id) for label, id in zip(rendered.labels, rendered.ids, strict=True))


@given(response=RESPONSES)
def test_inserted_are_exactly_the_passages_and_their_cs(template, response):
    rendered = template.render(_example(*response), PASSAGES)
    expected = [False] * len(rendered.ids)
    for ret, gold in zip(rendered.ret, rendered.gold, strict=True):
        assert rendered.ids[ret] == template.ret
        passage = template.inserted(PASSAGES[gold], max_tokens=template.settings.max_passage_tokens)
        assert rendered.ids[ret + 1 : ret + 1 + len(passage)] == passage
        expected[ret + 1 : ret + 1 + len(passage)] = [True] * len(passage)
    assert rendered.inserted == expected


def test_other_golds_and_accepted_passages_are_ignored_but_not_the_gold_itself(template):
    response = Evidence("p", "a", also=("x", "p")), Evidence("q", "b"), Evidence("p", "c")
    assert template.render(_example(*response), PASSAGES).ignored == [{"q", "x"}, {"p"}, {"q"}]


def test_a_citation_of_an_absent_passage_is_refused_with_both_ids(template):
    with pytest.raises(UserError, match="example 'e' cites passage 'gone'"):
        template.render(_example(Evidence("gone", "a")), PASSAGES)


# Control tokens


@given(text=st.lists(st.sampled_from(TYPED), min_size=1, max_size=6).map("".join) | st.text())
def test_text_never_becomes_a_control_token_and_decodes_to_itself(template, control, text):
    assert control.isdisjoint(template.encode(text))
    assert template.decode(template.encode(text)) == text


def test_control_tokens_that_users_and_documents_type_stay_text(template, control):
    typed = "[Ret] [Cs] [Ce] <eos>"
    passage = Passage("p", typed, typed)
    rendered = template.render(_example(Text(typed), Evidence("p", typed), question=typed), {"p": passage})
    assert [id for id in rendered.ids if id in control] == [template.ret, template.cs, template.ce, template.eos]
    assert [id for id in template.embedded(passage, max_tokens=200) if id in control] == [template.eos]
    assert [claim.text for claim in _parse(template, rendered).claims] == [typed]


def test_stray_bytes_of_a_command_line_are_refused(template):
    with pytest.raises(UserError, match=r"'.*caf\\udce9.*' holds bytes that are no text"):
        template.prompt("caf\udce9", task="")


def test_control_tokens_are_added_once(tiny_lm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    assert with_control_tokens(tokenizer, TemplateSettings()) == 3
    assert with_control_tokens(tokenizer, TemplateSettings()) == 0


def test_a_tokenizer_without_the_control_tokens_is_refused(tiny_lm):
    with pytest.raises(UserError, match=r"no special token '\[Ret\]'"):
        Template(AutoTokenizer.from_pretrained(tiny_lm))


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tiny_lm):
    tokenizer = _tokenizer(tiny_lm)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Template(tokenizer)


# Prompts


def test_a_prompt_is_the_instruction_of_its_task_and_the_question(template):
    assert template.decode(template.prompt("Q?", task="squad")) == "Answer the question.## Input:\n\nQ?## Output:\n\n"
    assert template.decode(template.prompt("Q?", task="fever")).startswith("Is the statement true?")


def test_an_unknown_task_takes_the_default_instruction(tokenizer):
    template = Template(tokenizer, settings=TemplateSettings(default_instruction="Do it."))
    assert template.decode(template.prompt("Q?", task="new")).startswith("Do it.##")


@given(text=st.text("{}!:question ", max_size=12))
def test_braces_mean_nothing_in_questions_and_passages(template, text):
    assert template.decode(template.prompt(text, task="squad")).endswith(f"Input:\n\n{text}## Output:\n\n")
    assert template.passage_text(Passage("p", f"{text}.", "{text}")) == f"{{text}} :: {text}."


def test_a_beginning_of_sequence_token_stands_once_before_the_prompt(tiny_lm):
    tokenizer = _tokenizer(tiny_lm)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    template = Template(tokenizer)
    rendered = template.render(_example(Text("a"), Evidence("p", "b")), PASSAGES)
    assert [position for position, id in enumerate(rendered.ids) if id == bos] == [0]
    assert template.embedded(PASSAGES["p"], max_tokens=99)[0] == bos


# Passages


def test_a_passage_is_read_with_its_title_where_it_has_one(template):
    assert template.passage_text(PASSAGES["p"]) == "Norway :: Oslo is the capital."
    assert template.passage_text(PASSAGES["q"]) == PASSAGES["q"].text


def test_a_passage_that_fits_is_whole_and_not_counted(fresh):
    ids = fresh.inserted(LONG, max_tokens=1000)
    assert fresh.decode(ids[:-1]) == fresh.passage_text(LONG)
    assert fresh.inserted(LONG, max_tokens=len(ids)) == ids
    assert fresh.shortened == set()


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_passage_is_shortened_at_a_sentence_and_counted(fresh, kept):
    sentences = "Title :: " + " ".join(re.findall(r"[^.]+\.", LONG.text)[:kept]).replace("  ", " ")
    exact = len(fresh.encode(sentences))
    for room in (exact, exact + 1):
        assert fresh.decode(fresh.inserted(LONG, max_tokens=room + 1)) == sentences + "[Cs]"
        assert fresh.decode(fresh.embedded(LONG, max_tokens=room + 1)) == sentences + "<eos>"
    assert fresh.shortened == {"long"}


def test_a_passage_whose_first_sentence_does_not_fit_is_cut_between_tokens(fresh):
    ids = fresh.encode(fresh.passage_text(LONG))
    assert fresh.inserted(LONG, max_tokens=6) == [*ids[:5], fresh.cs]
    assert fresh.shortened == {"long"}


@given(text=st.text(min_size=1, max_size=60), title=st.text(max_size=8), max_tokens=st.integers(2, 30))
def test_what_is_embedded_and_inserted_respects_the_limit_and_ends_with_its_token(template, text, title, max_tokens):
    passage = Passage("p", text, title)
    for ids, end in (
        (template.embedded(passage, max_tokens=max_tokens), template.eos),
        (template.inserted(passage, max_tokens=max_tokens), template.cs),
    ):
        assert len(ids) <= max_tokens
        assert ids[-1] == end
        assert end not in ids[:-1]


@pytest.mark.parametrize(("end_token", "last"), [(None, ["<eos>"]), ("[Ce]", ["[Ce]"]), ("", [])])
def test_the_end_token_of_what_is_embedded_can_be_chosen(tokenizer, end_token, last):
    template = Template(tokenizer, settings=TemplateSettings(end_token=end_token))
    ids = template.embedded(PASSAGES["p"], max_tokens=99)
    body = template.encode("Norway :: Oslo is the capital.")
    assert ids == body + tokenizer.convert_tokens_to_ids(last)


def test_an_end_token_that_the_tokenizer_does_not_know_is_refused(tokenizer):
    with pytest.raises(UserError, match="no special token '<none>'"):
        Template(tokenizer, settings=TemplateSettings(end_token="<none>"))


def test_what_is_embedded_is_read_by_the_tokenizer_of_emb_seq(tokenizer, tiny_lm):
    other = AutoTokenizer.from_pretrained(tiny_lm)
    other.add_tokens(["Norway"])
    ids = Template(tokenizer, other).embedded(PASSAGES["p"], max_tokens=99)
    assert ids[0] == other.convert_tokens_to_ids("Norway")


def test_a_chat_of_one_question_is_that_questions_prompt(tiny: CoSupModel) -> None:
    t = tiny.template
    chat = t.chat([{"role": "user", "content": "Which city?"}])
    assert chat == t.prompt("Which city?", task="")
    assert t.chat([{"role": "user", "content": "Which?"}], task="squad") == t.prompt("Which?", task="squad")


def test_a_chat_is_system_history_and_last_question(tiny: CoSupModel) -> None:
    t = tiny.template
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Which {city}? [Ret]"},
    ]
    text = "Be brief.## Input:\n\nuser: Hello?\n\nassistant: Yes.\n\nWhich {city}? [Ret]## Output:\n\n"
    assert t.chat(messages) == t.encode(text)
    assert t.ret not in t.chat(messages)


def test_a_model_folder_can_lay_out_earlier_messages_otherwise(tiny: CoSupModel) -> None:
    settings = TemplateSettings(turn="<{role}> {content} / ")
    t = Template(tiny.template.tokenizer, settings=settings)
    messages = [{"role": "user", "content": "Hello?"}, {"role": "user", "content": "Which?"}]
    assert t.chat(messages) == t.prompt("<user> Hello? / Which?", task="")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a chat ends with a question"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "a chat ends with a question"),
        ([{"role": "robot", "content": "a"}], "needs a role, one of system, user, assistant"),
        ([{"role": "user"}], "and a content of text, not {'role': 'user'}"),
    ],
)
def test_a_chat_of_another_form_is_refused(tiny: CoSupModel, messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.template.chat(messages)
