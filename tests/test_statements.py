import pytest

from cosup.data.statements import MOST_WORDS, statement

TEXT = (
    "Oslo lies at the head of a fjord. Founded in 1040, it has been the capital of Norway since 1814! "
    "The university of Oslo, which is the oldest in Norway, was opened by King Frederick in 1811, and it teaches "
    "27,000 students (as of 2019) in eight faculties, of which medicine is the largest."
)


def _of(question, answer, text=TEXT, **options):
    return statement(question, answer, text, **options)


def test_the_sentence_that_holds_the_answer_is_the_statement():
    assert _of("When was it founded?", "1040") == "Founded in 1040, it has been the capital of Norway since 1814!"


def test_of_several_sentences_with_the_answer_the_one_nearest_the_question_is_taken_and_of_equals_the_first():
    assert "1814" in _of("Which country has this capital?", "Norway")
    assert "oldest" in _of("Where is its oldest university?", "Norway")
    assert "1814" in _of("Why?", "Norway")


def test_a_long_sentence_gives_whole_clauses_around_the_answer_those_before_it_first():
    told = _of("By whom was the university opened?", "King Frederick", most=18)
    assert told == "The university of Oslo, which is the oldest in Norway, was opened by King Frederick in 1811"
    assert _of("How many students?", "27,000 students", most=9) == "and it teaches 27,000 students (as of 2019)"
    assert _of("As of when?", "2019", most=4) == "(as of 2019)"


def test_an_answer_over_several_clauses_is_not_cut():
    answer = "in 1811, and it teaches 27,000 students"
    assert _of("What else?", answer, most=7) == answer


def test_a_clause_too_long_by_itself_is_cut_between_words_and_keeps_the_answer():
    text = " ".join(f"w{n}" for n in range(40))
    assert _of("?", "w3", text, most=5) == "w0 w1 w2 w3 w4"
    assert _of("?", "w30", text, most=5) == "w26 w27 w28 w29 w30"
    assert _of("?", "w39", text, most=5) == "w35 w36 w37 w38 w39"


@pytest.mark.parametrize("answer", ["SUPPORTS", "Nor", "", "1040 it"])
def test_an_answer_that_the_text_does_not_hold_as_whole_words_stays_as_it_is(answer):
    assert _of("Which?", answer) == answer


def test_letter_case_does_not_matter_and_special_characters_mean_themselves():
    assert _of("What?", "NORWAY", "It is in norway.") == "It is in norway."
    assert _of("What?", "a+b (c)", "They write a+b (c) here.") == "They write a+b (c) here."


def test_blanks_around_an_answer_do_not_matter():
    assert _of("What?", " Oslo ", "This is Oslo \n") == "This is Oslo"


def test_an_answer_longer_than_a_statement_stays_as_it_is():
    answer = "Founded in 1040, it has been the capital"
    assert _of("What?", answer, most=7) == answer
    assert _of("What?", answer, most=8) == answer


@pytest.mark.parametrize("answer", ["Oslo", "1814", "2019", "eight faculties", "medicine", "the largest", "students"])
@pytest.mark.parametrize("most", [2, 5, 9, MOST_WORDS])
def test_a_statement_stands_in_the_text_holds_the_answer_and_has_no_more_words_than_asked(answer, most):
    told = _of("Of what?", answer, most=most)
    assert told in TEXT
    assert answer in told
    assert len(told.split()) <= most
