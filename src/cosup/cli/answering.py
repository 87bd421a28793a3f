"""Asking: one question, a file of them, the demo."""

from pathlib import Path
from typing import Annotated

import typer

from cosup.cli.options import (
    FirstOption,
    ForgetOption,
    IndexOption,
    ModelOption,
    ModeOption,
    NewTokensOption,
    RetrievalsOption,
    ScoreOption,
    SeedOption,
    StopOption,
    TaskOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: ModelOption,
    index: IndexOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    task: TaskOption = "",
    max_new_tokens: NewTokensOption = 128,
    mode: ModeOption = "cosup",
    retrieve_first: FirstOption = False,
    max_retrievals: RetrievalsOption = 4,
    min_score: ScoreOption = None,
    forget_passages: ForgetOption = False,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    stop: StopOption = None,
) -> None:
    """Answer a question with cited passages, as it is written."""
    from cosup import terminal
    from cosup.engine import Engine, Options
    from cosup.index import open_index
    from cosup.model import CoSupModel

    options = Options(
        max_new_tokens=max_new_tokens,
        mode=mode,
        retrieve_first=retrieve_first,
        max_retrievals=max_retrievals,
        min_score=min_score,
        forget_passages=forget_passages,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        rows=1,
    )
    opened, loaded = open_index(index), CoSupModel.load(model)
    engine = Engine(loaded, opened, options)
    prompt = loaded.template.prompt(question, task=task)
    if not as_json:
        terminal.show_answer(engine.stream(prompt), opened.get)
        return
    (response,) = engine.generate([prompt])
    cited = list(dict.fromkeys(claim.passage for claim in response.claims))
    print(terminal.answer_json(question, response, opened.get(cited)))


def generate(
    questions: Annotated[Path, typer.Option("--input", help="JSONL of questions.")],
    output: Annotated[Path, typer.Option("--output", help="JSONL of answers to write.")],
    model: ModelOption,
    index: IndexOption,
    max_new_tokens: NewTokensOption = 128,
    mode: ModeOption = "cosup",
    retrieve_first: FirstOption = False,
    max_retrievals: RetrievalsOption = 4,
    min_score: ScoreOption = None,
    forget_passages: ForgetOption = False,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
) -> None:
    """Answer a file of questions; a sampled answer depends on the seed and its question alone."""
    from cosup import terminal
    from cosup.data import read_questions
    from cosup.engine import Engine, Options
    from cosup.files import atomic_file
    from cosup.index import open_index
    from cosup.model import CoSupModel

    options = Options(
        max_new_tokens=max_new_tokens,
        mode=mode,
        retrieve_first=retrieve_first,
        max_retrievals=max_retrievals,
        min_score=min_score,
        forget_passages=forget_passages,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        rows=rows,
    )
    asked = list(read_questions(questions))
    opened, loaded = open_index(index), CoSupModel.load(model)
    engine = Engine(loaded, opened, options)
    prompts = [loaded.template.prompt(question.question, task=question.task) for question in asked]
    with terminal.counting("answering", len(asked), unit="questions") as on_progress:
        responses = engine.generate(prompts, on_progress=on_progress)
    with atomic_file(output) as file:
        for question, response in zip(asked, responses, strict=True):
            cited = list(dict.fromkeys(claim.passage for claim in response.claims))
            line = terminal.answer_json(question.question, response, opened.get(cited), id=question.id)
            file.write(line.encode() + b"\n")
    terminal.out.print(f"saved: {output}")


def demo(
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Training budget in minutes.")] = 7.2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of reusing what is finished.")] = False,
) -> None:
    """Watch the whole method work on a real small model: before, training, after, five cited answers."""
    from cosup import terminal
    from cosup.demo import OPTIONS, Demo
    from cosup.engine import Engine
    from cosup.index import FaissIndex
    from cosup.model import CoSupModel

    steps = Demo(out, minutes=minutes, counter=lambda what, total, unit: terminal.counting(what, total, unit=unit))
    if fresh:
        steps.start_over()
    terminal.step("Building worldfacts")
    steps.build_data()
    terminal.step("Evaluating the untrained model")
    before = steps.before()
    terminal.step(f"Co-supervising Gen and Emb_seq for {minutes:g} minutes")
    steps.train(callbacks=[terminal.training_callback()], on_start=terminal.show_settings)
    terminal.step("Indexing and evaluating the trained model")
    after = steps.after()
    terminal.step("Before and after")
    terminal.show_figures({"before": before, "after": after})
    terminal.step("Five test questions, about entities that were never trained on")
    model, index = CoSupModel.load(steps.run), FaissIndex(out / "index")
    engine = Engine(model, index, OPTIONS)
    for question in steps.shown():
        terminal.show_question(question.question)
        terminal.show_answer(engine.stream(model.template.prompt(question.question, task=question.task)), index.get)
    terminal.show_next_steps(out)
