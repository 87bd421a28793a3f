"""Writes the reference pages of the command line and of recipes from the code, or checks that they are up to date.

python docs/generate.py [--check]
"""

import argparse
import ast
import inspect
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from cosup import config

HERE = Path(__file__).parent / "reference"
SECTIONS = {
    "": config.Recipe,
    "model": config.ModelSection,
    "model.lora": config.LoraSection,
    "data": config.DataSection,
    "train": config.TrainSection,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    check = parser.parse_args().check
    stale = []
    for name, text in {"cli.md": command_line(), "recipe.md": recipes()}.items():
        page = HERE / name
        if not page.is_file() or page.read_text("utf-8") != text:
            stale.append(page)
            if not check:
                page.write_text(text, "utf-8")
    if check and stale:
        sys.exit(f"{', '.join(map(str, stale))}: stale; run `make docs`")


def command_line() -> str:
    """Every command with its arguments, as Typer documents itself."""
    command = [sys.executable, "-m", "typer", "cosup.cli", "utils", "docs", "--name", "cosup"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("&#x27;", "'")


def recipes() -> str:
    """Every key of a recipe with its type, default and meaning."""
    lines = ["# Recipes", "", "A recipe is a YAML file; `--set a.b=value` overrides a key. Unknown keys are errors."]
    for name, section in SECTIONS.items():
        lines += ["", f"## `{name}`" if name else "## The recipe itself", "", first_line(section), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        meanings = docstrings(section)
        for key, field in section.model_fields.items():
            shown = field.alias or key
            cells = (f"`{shown}`", f"`{type_of(section, key)}`", default_of(field), meanings.get(key, ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def first_line(section: type) -> str:
    return inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0]


def type_of(section: type, key: str) -> str:
    """The type as the source writes it, aliases spelt out, without what only validates."""
    node = next(n for n in fields_of(section) if n.target.id == key)  # type: ignore[union-attr]
    return ast.unparse(bare(node.annotation))


def bare(node: ast.expr) -> ast.expr:
    class Strip(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            self.generic_visit(node)
            if isinstance(node.value, ast.Name) and node.value.id == "Annotated" and isinstance(node.slice, ast.Tuple):
                return node.slice.elts[0]
            return node

        def visit_Name(self, node: ast.Name) -> ast.AST:
            choices = get_args(getattr(config, node.id, None))  # of an alias such as Objective
            return ast.parse(f"Literal[{', '.join(map(repr, choices))}]", mode="eval").body if choices else node

    return Strip().visit(node)


def default_of(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    default = field.default
    if isinstance(default, config.Section):
        return "see below"
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def docstrings(section: type) -> dict[str, str]:
    """The string below each field."""
    body = class_body(section)
    pairs = itertools.pairwise(body)
    return {
        node.target.id: inspect.cleandoc(below.value.value)
        for node, below in pairs
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def fields_of(section: type) -> list[ast.AnnAssign]:
    return [node for node in class_body(section) if isinstance(node, ast.AnnAssign)]


def class_body(section: type) -> list[ast.stmt]:
    [definition] = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    return definition.body


if __name__ == "__main__":
    main()
