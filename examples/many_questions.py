"""Many questions at once, in shared rows, with citations: python examples/many_questions.py MODEL INDEX FILE"""

import sys
from pathlib import Path

from cosup import CoSupModel, Engine, FaissIndex, Options
from cosup.data import read_questions


def main(model_folder: str, index_folder: str, file: str) -> None:
    model, index = CoSupModel.load(model_folder), FaissIndex(Path(index_folder))
    questions = list(read_questions(Path(file)))
    prompts = [model.template.prompt(question.question, task=question.task) for question in questions]
    for question, response in zip(questions, Engine(model, index, Options(rows=8)).generate(prompts), strict=True):
        print(f"{question.question}\n  {response.text}")
        for claim in response.claims:
            print(f"  cites {claim.passage}: {claim.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
