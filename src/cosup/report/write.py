"""Writing a report: Markdown, and one HTML page that needs nothing but itself."""

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cosup.config import UserError
from cosup.files import atomic_file
from cosup.report.load import Condition, Run, conditions_of, read_run
from cosup.report.pictures import Picture, pictures
from cosup.report.tables import Table, comparison, headline, overview, task_table

_SHOWN = 3  # passages of a retrieval whose text is in the page


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes `report.md` and `report.html` about evaluation runs.

    Args:
        folders: of the runs; the first one's condition is what the others are compared with.
        out: a folder; files of the same names are replaced.

    Raises:
        UserError: a folder holds no evaluation run, or one is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each once")
    runs = [read_run(folder) for folder in folders]
    conditions = conditions_of(runs)
    tasks = list(dict.fromkeys(task for condition in conditions for task in condition.tasks))
    tables = overview(conditions, tasks)
    if compared := comparison(tasks, conditions):
        tables.append(compared)
    details = [task_table(task, conditions) for task in tasks]
    drawn = pictures(conditions, tasks)
    with atomic_file(out / "report.md") as file:
        file.write(_markdown(runs, [*tables, *details], drawn).encode())
    with atomic_file(out / "report.html") as file:
        file.write(_html(runs, conditions, tables, details, drawn).encode())
    for number, picture in enumerate(drawn, start=1):
        if picture.svg:
            with atomic_file(out / f"picture-{number}.svg") as file:
                file.write(picture.svg.encode())


def _markdown(runs: Sequence[Run], tables: Sequence[Table], drawn: Sequence[Picture]) -> str:
    parts = ["# Evaluation report\n", _runs(runs).markdown(), *(table.markdown() for table in tables)]
    for number, picture in enumerate(drawn, start=1):
        image = f"![{picture.title}](picture-{number}.svg)\n\n" if picture.svg else ""
        parts.append(f"## {picture.title}\n\n{image}{picture.caption}\n")
    return "\n".join(parts)


def _html(
    runs: Sequence[Run],
    conditions: Sequence[Condition],
    tables: Sequence[Table],
    details: Sequence[Table],
    drawn: Sequence[Picture],
) -> str:
    template = files("cosup.report").joinpath("page.html").read_text("utf-8")
    figures = "".join(
        f"<figure><h3>{html.escape(p.title)}</h3>{p.svg}<figcaption>{html.escape(p.caption)}</figcaption></figure>"
        for p in drawn
    )
    data = json.dumps(_browser(runs, conditions), ensure_ascii=False, separators=(",", ":"))
    parts = {
        "{{runs}}": _runs(runs).html(),
        "{{tables}}": "".join(table.html() for table in tables),
        "{{pictures}}": figures,
        "{{details}}": "".join(table.html() for table in details),
        # nothing in the data can end the element that holds it
        "{{data}}": data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
    }
    before, *rest = template.split("{{")
    pieces = [before]
    for piece in rest:
        name, _, after = piece.partition("}}")
        pieces += [parts["{{" + name + "}}"], after]
    return "".join(pieces)


def _runs(runs: Sequence[Run]) -> Table:
    rows = [
        [
            run.name,
            str(run.training.get("seed", "-")),
            run.settings["mode"],
            str(run.training.get("objective") or "-"),
            str(run.training.get("lambda", "-")),
            run.settings["model"] or "-",
            f"{run.settings['index']['passages']:,}",
            run.settings["created"],
        ]
        for run in runs
    ]
    columns = ["run", "seed", "mode", "objective", "lambda", "model", "passages", "begun"]
    return Table("Runs", "What was evaluated.", columns, rows)


def _browser(runs: Sequence[Run], conditions: Sequence[Condition]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(task for run in runs for task in run.evaluations))
    names = [run.name for run in runs]
    return {
        "runs": [
            run.name if names.count(run.name) == 1 else f"{run.name} (seed {run.training.get('seed', number)})"
            for number, run in enumerate(runs)
        ],
        "tasks": {
            task: {
                "score": headline(task, conditions).correctness,
                "passages": {p.id: [p.title, p.text] for run in runs for p in run.passages.get(task, ())},
                "items": [
                    [_shown(item) for item in run.evaluations[task].items] if task in run.evaluations else None
                    for run in runs
                ],
            }
            for task in tasks
        },
    }


def _shown(item: dict[str, Any]) -> dict[str, Any]:
    kept = {key: item[key] for key in ("id", "question", "answers", "gold", "text", "spans", "cited", "reason")}
    kept["forced"] = item["forced"][:_SHOWN]
    kept["retrieved"] = [ranked[:_SHOWN] for ranked in item["retrieved"]]
    kept["error"] = item["error"]
    kept["scores"] = {name: round(value, 4) for name, value in item["scores"].items()}
    return kept
