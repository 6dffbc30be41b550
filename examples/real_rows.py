"""Real rows for the examples, from Python's own library and the package evals: pip install --no-deps evals==3.0.1.post1

What they hold and under which licence is in their own files; nothing of it is copied here.
"""

import ast
import importlib.metadata
import json
import random
import re
import sysconfig
from pathlib import Path
from typing import Any


def evals_rows(name: str) -> list[tuple[str, str]]:
    """Return (question, ideal answer) of a set in ``evals``, shuffled with a fixed seed."""
    wanted = f"data/{name}/samples.jsonl"
    file = next(file for file in importlib.metadata.files("evals") or () if str(file).endswith(wanted))
    lines = Path(str(file.locate())).read_text(encoding="utf-8").splitlines()
    rows = [(row["input"][-1]["content"], row["ideal"]) for row in map(json.loads, lines)]
    random.Random(0).shuffle(rows)
    return rows


def tagged_sentences() -> list[dict[str, Any]]:
    """Return sentences of loan agreements in which something is named, as words with BIO tags (set ner_finance)."""
    found = []
    for text, ideal in evals_rows("ner_finance"):
        words = text.split()
        tags, at = ["O"] * len(words), 0
        for name, kind in re.findall(r"([^,\[\]][^\[\]]*?) - (PERSON|ORGANIZATION|LOCATION)", ideal):
            parts = name.strip(" ,").split()
            # Names come in the order in which they stand in the sentence.
            start = next((i for i in range(at, len(words)) if words[i : i + len(parts)] == parts), None)
            if start is not None:
                at = start + len(parts)
                tags[start:at] = [f"B-{kind[:3]}"] + [f"I-{kind[:3]}"] * (len(parts) - 1)
        if set(tags) != {"O"}:
            found.append({"tokens": words, "tags": tags})
    return found


def tagged_names(first: int, last: int) -> list[dict[str, Any]]:
    """Return the names in functions of Python's library with what each stands for, of files ``first`` to ``last``.

    Brackets, dots, keywords and ``self`` are left out: with them a few rules would do.
    """
    root, rows, tests = Path(sysconfig.get_path("stdlib")), [], {"site-packages", "test", "tests"}
    files = [file for file in sorted(root.rglob("*.py")) if not tests & {*file.relative_to(root).parts}]
    random.Random(0).shuffle(files)
    for file in files[first:last]:
        nodes = ast.walk(ast.parse(file.read_bytes()))
        for names in [names for names in map(_names, nodes) if 10 <= len(names) <= 60][:5]:
            rows.append({"tokens": [name for _, name, _ in names], "tags": [kind for *_, kind in names]})
    return rows


def _names(function: ast.AST) -> list[tuple[tuple[int, int], str, str]]:
    """Return place, name and kind in the order of reading; nothing where ``function`` is none."""
    nodes = list(ast.walk(function)) if isinstance(function, ast.FunctionDef) else []
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    called = {node.func for node in nodes if isinstance(node, ast.Call)}
    found = []
    for node in nodes:
        at = (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))
        match node:
            case ast.Name(id=name):
                kind = "parameter" if name in parameters else "function" if node in called else "variable"
            case ast.Attribute(attr=name):
                at = (node.end_lineno or 0, (node.end_col_offset or 0) - len(name))  # behind what it belongs to
                kind = "method" if node in called else "attribute"
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.keyword(arg=str(name)):
                kind = {ast.arg: "parameter", ast.FunctionDef: "definition", ast.keyword: "keyword"}[type(node)]
            case _:
                continue
        if name not in ("self", "cls"):
            found.append((at, name, kind))
    return sorted(found)
