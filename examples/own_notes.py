"""From a folder of notes to a cited answer: python examples/own_notes.py MODEL FOLDER QUESTION"""

import sys
import tempfile
from pathlib import Path

from cosup import CoSupModel, Engine, FaissIndex, Options, build_index
from cosup.data.documents import ingest
from cosup.engine import ClaimOpened, Token


def main(model_folder: str, notes: str, question: str) -> None:
    model = CoSupModel.load(model_folder)
    with tempfile.TemporaryDirectory() as folder:
        build_index(list(ingest([Path(notes)])), model, Path(folder) / "index")
        index = FaissIndex(Path(folder) / "index")
        engine = Engine(model, index, Options(retrieve_first=True))
        for event in engine.stream(model.template.prompt(question, task="")):
            if isinstance(event, ClaimOpened):
                [passage] = index.get([event.passage_id])
                print(f"[{passage.title}, {passage.meta['source']}] ", end="", flush=True)
            elif isinstance(event, Token) and not event.inserted:
                print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
