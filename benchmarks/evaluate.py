"""Scores predictions, without a model: every question of a made-up data set is judged and the figures drawn together.

Run with OMP_NUM_THREADS=1 to see one core. The last line is one JSON object.
"""

import argparse
import random
import time

from report import report

from cosup.data import Passage, QAPair, Question
from cosup.evaluate import PassageTexts, Prediction, judge, summarize

WORDS = [f"word{number}" for number in range(3000)]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + "."


def made_up(count: int, rng: random.Random) -> tuple[dict[str, Passage], list[Question], list[Prediction]]:
    """Short and long answers in turn, 20 passages in each of three rankings, as an evaluation run has them."""
    passages = {f"p{n}": Passage(f"p{n}", text(rng, 100), text(rng, 2)) for n in range(count)}
    ids = list(passages)
    questions, predictions = [], []
    for number in range(count):
        answers = [text(rng, 2) for _ in range(3)]
        long = number % 4 == 0
        questions.append(
            Question(
                f"q{number}",
                "asqa" if long else "nq",
                text(rng, 10),
                answers=answers,
                gold=[] if number % 3 == 0 else rng.sample(ids, 2),
                long_answers=[text(rng, 120) for _ in range(2)] if long else [],
                qa_pairs=[QAPair("?", [answer]) for answer in answers] if long else [],
            )
        )
        claims = [text(rng, 40 if long else 8) for _ in range(2)]
        ranked = [rng.sample(ids, 20) for _ in range(3)]
        written = " ".join(claims)
        spans = [[0, len(claims[0])], [len(claims[0]) + 1, len(written)]]
        cited = ranked[0][:2]
        predictions.append(
            Prediction(f"q{number}", written, claims, spans, cited, [ranked[0]], ranked[1], ranked[2], "stop", "", True)
        )
    return passages, questions, predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 predictions instead of 10,000")
    count = 2000 if parser.parse_args().quick else 10_000
    passages, questions, predictions = made_up(count, random.Random(0))
    started, cpu = time.perf_counter(), time.process_time()
    texts = PassageTexts(lambda ids: [passages[id] for id in ids])
    items = [judge(q, p, texts=texts) for q, p in zip(questions, predictions, strict=True)]
    judged = time.process_time() - cpu
    figures = summarize(items)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"{count:,} predictions, {len(figures)} figures: {seconds:.1f} s, {cpu:.1f} s of CPU")
    report(
        "evaluate",
        {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "judging_cpu_seconds": judged,
            "cpu_seconds_per_10000": cpu * 10_000 / count,
        },
        {"predictions": count},
    )


if __name__ == "__main__":
    main()
