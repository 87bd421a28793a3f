"""Asking: one question, a file of them, the demo."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosup.cli.options import DEFAULT_MODEL, IndexOption, ModelOption, TaskOption, with_writing_options
from cosup.config import UserError

if TYPE_CHECKING:
    from cosup.data import Question
    from cosup.engine import Options
    from cosup.index import FaissIndex
    from cosup.model import CoSupModel


@with_writing_options
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    index: IndexOption,
    *,
    model: ModelOption = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    task: TaskOption = "",
    options: "Options",
) -> None:
    """Answer a question with cited passages, as it is written."""
    from cosup import terminal
    from cosup.engine import Engine
    from cosup.index import open_index
    from cosup.model import CoSupModel

    if not question.strip():
        raise UserError("the question is empty; ask something")
    opened, loaded = open_index(index), CoSupModel.load(model)
    engine = Engine(loaded, opened, replace(options, rows=1))
    prompt = loaded.template.prompt(question, task=task)
    if as_json:
        (response,) = engine.generate([prompt])
        cited = list(dict.fromkeys(claim.passage for claim in response.claims))
        print(terminal.answer_json(question, response, opened.get(cited)))
    else:
        response = terminal.show_answer(engine.stream(prompt), opened.get)
    if response.reason == "error":  # it was shown with the answer
        raise typer.Exit(2)


@with_writing_options
def generate(
    questions: Annotated[Path, typer.Option("--input", help="JSONL of questions.")],
    output: Annotated[Path, typer.Option("--output", help="JSONL of answers to write.")],
    index: IndexOption,
    *,
    model: ModelOption = DEFAULT_MODEL,
    rows: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
    options: "Options",
) -> None:
    """Answer a file of questions; a sampled answer depends on the seed and its question alone."""
    from cosup import terminal
    from cosup.data import read_questions
    from cosup.engine import Engine
    from cosup.files import atomic_file, refuse_overwriting
    from cosup.index import open_index
    from cosup.model import CoSupModel

    refuse_overwriting(output, [questions])
    asked = list(read_questions(questions))
    if not asked:
        raise UserError(f"{questions} holds no questions to answer")
    opened, loaded = open_index(index), CoSupModel.load(model)
    engine = Engine(loaded, opened, replace(options, rows=rows))
    prompts = [loaded.template.prompt(question.question, task=question.task) for question in asked]
    with atomic_file(output) as file:  # opened first: a place that can't be written to is told before the work
        with terminal.counting("answering", len(asked), unit="questions") as on_progress:
            responses = engine.generate(prompts, on_progress=on_progress)
        for question, response in zip(asked, responses, strict=True):
            cited = list(dict.fromkeys(claim.passage for claim in response.claims))
            line = terminal.answer_json(question.question, response, opened.get(cited), id=question.id)
            file.write(line.encode() + b"\n")
    terminal.out.print(f"saved: {output}")


def demo(
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Training budget in minutes.")] = 6.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of reusing what is finished.")] = False,
    model: ModelOption = DEFAULT_MODEL,
) -> None:
    """Watch the whole method work on a real small model: five cited answers, training on such facts, five again."""
    from cosup import terminal
    from cosup.demo import Demo

    steps = Demo(
        out,
        minutes=minutes,
        counter=lambda what, total, unit: terminal.counting(what, total, unit=unit),
        model=model,
    )
    if fresh:
        steps.start_over()
    terminal.step("Building worldfacts")
    steps.build_data()
    terminal.step(f"Five questions to {model}")
    _show_answers(steps.at_first(), steps.shown())
    terminal.step("Asking it all test questions")
    before = steps.before()
    terminal.step(f"Co-supervising it on worldfacts for {minutes:g} minutes")
    with terminal.training_bar() as bar:
        steps.train(callbacks=[bar], on_start=terminal.show_settings)
    terminal.step("Asking it again")
    after = steps.after()
    terminal.step("Before and after")
    terminal.show_figures({"before": before, "after": after})
    terminal.step("The same five questions, about entities that were never trained on")
    _show_answers(steps.trained(), steps.shown())
    terminal.show_next_steps(out)


def _show_answers(opened: "tuple[CoSupModel, FaissIndex]", questions: "Sequence[Question]") -> None:
    from cosup import terminal
    from cosup.demo import OPTIONS
    from cosup.engine import Engine

    model, index = opened
    engine = Engine(model, index, OPTIONS)
    for question in questions:
        terminal.show_question(question.question)
        terminal.show_answer(engine.stream(model.template.prompt(question.question, task=question.task)), index.get)
