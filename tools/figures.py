"""Print the figures of the house: lines, comments, density, longest function, import cycles.

    python -m tools.figures

A code line is not blank, not a comment and not of a docstring; a comment line has nothing but a comment. Syntax nodes are those of ast.walk.
"""

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STEP = 'dpo.py training.py losses.py data.py model.py fsdp.py configurator.py'.split()
SCRIPTS = 'sft.py dpo.py reward.py ppo.py sample.py label.py'.split()
LIBRARIES = ('text', 'hf', 'runtime', 'feedback', 'rl')
Definition = ast.FunctionDef | ast.AsyncFunctionDef


class Figures(NamedTuple):
    """Of one file or of several. longest: (lines, name) of the longest function."""

    lines: int
    code: int
    comments: int
    nodes: int
    longest: tuple


def measure(path):
    """The Figures of a python file."""
    source = path.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | Definition) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))

    # neither blank nor of a docstring
    lines = source.splitlines()
    rest = [line.strip() for number, line in enumerate(lines, 1) if number not in docstrings and line.strip()]
    comments = sum(line.startswith('#') for line in rest)
    sizes = [(node.end_lineno - node.lineno + 1, node.name) for node in nodes if isinstance(node, Definition)]
    return Figures(len(lines), len(rest) - comments, comments, len(nodes), max(sizes, default=(0, '')))


def total(paths):
    """The Figures of several files together."""
    *columns, longest = zip(*map(measure, paths), strict=True)
    return Figures(*map(sum, columns), max(longest))


def module_of(path):
    """The dotted name of a file's module."""
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    return name.removesuffix('.__init__')


def imported(path, modules, late=False):
    """Those of our modules that a file imports while it is itself imported; late: also inside of functions."""
    nodes, found = list(ast.walk(ast.parse(path.read_text()))), set()
    if not late:
        inside = {id(n) for f in nodes if isinstance(f, Definition) for n in ast.walk(f)}
        nodes = [node for node in nodes if id(node) not in inside]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found & modules


def product():
    """The files of the project itself: without experiments, configs and tests."""
    folders = [ROOT, *(ROOT / name for name in (*LIBRARIES, 'tools'))]
    return [path for folder in folders for path in sorted(folder.glob('*.py'))]


def cycle(paths, late=False):
    """The modules that are left where no more leaf can be taken away: empty without a cycle."""
    names = {module_of(path): path for path in paths}
    arrows = {name: imported(path, set(names), late) - {name} for name, path in names.items()}
    while leaves := [name for name, to in arrows.items() if not to]:
        arrows = {name: to - set(leaves) for name, to in arrows.items() if name not in leaves}
    return sorted(arrows)


def main():
    ours, top = product(), sorted(ROOT.glob('*.py'))
    groups = {'product': ours, 'top level': top, 'a DPO step': [ROOT / name for name in STEP]}
    groups |= {name: sorted((ROOT / name).rglob('*.py')) for name in ('experiments', 'tests')}
    print(f'{"":26s} files  lines  comments  nodes a code line  longest function')
    for name, paths in (groups | {module_of(path): [path] for path in ours}).items():
        found = total(paths)
        code = found.code or 1
        lines = f'{len(paths):5d} {found.lines:6d} {found.comments / code:9.1%} {found.nodes / code:18.1f}'
        print(f'{name:26s} {lines}  {found.longest[1]} {found.longest[0]}')
    print(f'python files at the top: {len(top)}; import cycle: {", ".join(cycle(ours)) or "none"}')


if __name__ == '__main__':
    main()
