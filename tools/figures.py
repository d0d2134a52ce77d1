"""Print the figures of the house: lines, comments, density, longest function, import cycles.

    python -m tools.figures

A code line is not blank, not a comment and not part of a docstring; a comment line has nothing but a comment. Syntax nodes
are those of ast.walk.
"""

import ast
import signal
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STEP = 'dpo.py training.py losses.py data.py model.py fsdp.py configurator.py'.split()
SCRIPTS = 'sft.py dpo.py reward.py ppo.py sample.py label.py'.split()
FOLDERS = ('text', 'hf', 'runtime', 'feedback', 'rl', 'tools')  # the product's, beside the top level
Definition = ast.FunctionDef | ast.AsyncFunctionDef


class Figures(NamedTuple):
    """Figures of one file or of several. longest: (lines, name) of the longest function."""

    lines: int
    code: int
    comments: int
    nodes: int
    longest: tuple


def measure(path):
    """The Figures of a python file."""
    source = path.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    # the numbers of the lines that belong to docstrings
    docstrings = set()
    for node in nodes:
        may_have_one = isinstance(node, ast.Module | ast.ClassDef | Definition)
        if may_have_one and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            docstrings.update(range(docstring.lineno, docstring.end_lineno + 1))

    # what is left is comment or code
    lines = source.splitlines()
    rest = [line.strip() for number, line in enumerate(lines, 1) if number not in docstrings and line.strip()]
    comments = sum(line.startswith('#') for line in rest)
    functions = [node for node in nodes if isinstance(node, Definition)]
    sizes = [(node.end_lineno - node.lineno + 1, node.name) for node in functions]
    return Figures(len(lines), len(rest) - comments, comments, len(nodes), max(sizes, default=(0, '')))


def total(paths):
    """The Figures of several files together."""
    found = [measure(path) for path in paths]
    lines, code, comments, nodes, longest = zip(*found, strict=True)
    return Figures(sum(lines), sum(code), sum(comments), sum(nodes), max(longest))


def module_of(path):
    """The dotted name of a file's module."""
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    return name.removesuffix('.__init__')


def imported(path, modules, late=False):
    """Those of our modules that a file imports while it is itself imported; late: also inside of functions."""
    tree = ast.parse(path.read_text())
    nodes = set(ast.walk(tree))
    if not late:
        for function in nodes.copy():
            if isinstance(function, Definition):
                nodes -= set(ast.walk(function))

    # `from a import b`: a module a, and perhaps a module a.b
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return found & modules


def product():
    """The files of the project itself: without experiments, configs and tests."""
    folders = [ROOT, *(ROOT / name for name in FOLDERS)]
    return [path for folder in folders for path in sorted(folder.glob('*.py'))]


def cycle(paths):
    """The names of the modules that import one another in a circle, and of those that import these: empty without one."""
    files = {module_of(path): path for path in paths}
    imports = {name: imported(path, set(files)) - {name} for name, path in files.items()}
    # again and again, take away the modules that import no other
    while leaves := {name for name, others in imports.items() if not others}:
        imports = {name: others - leaves for name, others in imports.items() if name not in leaves}
    return sorted(imports)


def main():
    """Print a line for each group of files and for each file of the product."""
    ours = product()
    top = sorted(ROOT.glob('*.py'))
    groups = {'product': ours, 'top level': top, 'a DPO step': [ROOT / name for name in STEP]}
    for name in ('experiments', 'tests'):
        groups[name] = sorted((ROOT / name).rglob('*.py'))
    for path in ours:
        groups[module_of(path)] = [path]
    print(f'{"":26s} files  lines  comments  nodes a code line  longest function')
    for name, paths in groups.items():
        found = total(paths)
        code = found.code or 1  # an empty file
        size, function = found.longest
        numbers = f'{len(paths):5d} {found.lines:6d} {found.comments / code:9.1%} {found.nodes / code:18.1f}'
        print(f'{name:26s} {numbers}  {function} {size}')
    print(f'python files at the top: {len(top)}; import cycle: {", ".join(cycle(ours)) or "none"}')


if __name__ == '__main__':
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # figures | head: end without a word where nobody reads on
    main()
