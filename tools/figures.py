"""Print code metrics of the repository: lines, comments, syntax nodes per line, longest functions, import cycles.

    python -m tools.figures

Code lines are not blank, not comments and not part of docstrings; comment lines have nothing but a comment. Syntax nodes are
those of ast.walk. tests/words/test_house.py checks the limits.
"""

import ast
import graphlib
import signal
from pathlib import Path
from typing import NamedTuple

from configurator import configure

ROOT = Path(__file__).resolve().parent.parent
STEP = 'dpo.py training.py losses.py data.py model.py fsdp.py configurator.py'.split()  # files of a DPO step
SCRIPTS = 'sft.py dpo.py reward.py ppo.py sample.py label.py'.split()
FOLDERS = ('text', 'hf', 'runtime', 'feedback', 'rl', 'tools')  # the product, besides the top level
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Figures(NamedTuple):
    """Metrics of one or more files. lines counts all lines; longest: (lines, name) of the longest function, or (0, '')."""

    lines: int
    code: int
    comments: int
    nodes: int
    longest: tuple


def measure(path):
    """Return the Figures of a Python file."""
    source = path.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    docstring_lines = set()
    for node in nodes:
        may_have_docstring = isinstance(node, ast.Module | ast.ClassDef | Function)
        if may_have_docstring and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            docstring_lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    # all other lines are blank, comments or code
    lines = source.splitlines()
    others = [line.strip() for number, line in enumerate(lines, start=1) if number not in docstring_lines]
    comments = sum(line.startswith('#') for line in others)
    code = len(others) - others.count('') - comments
    # tuples compare by size first
    sizes = [(node.end_lineno - node.lineno + 1, node.name) for node in nodes if isinstance(node, Function)]
    return Figures(len(lines), code, comments, len(nodes), longest=max(sizes, default=(0, '')))


def total(paths):
    """Return the combined Figures of one or more files: sums, and the longest function of all."""
    lines, code, comments, nodes, longest = zip(*map(measure, paths), strict=True)
    return Figures(sum(lines), sum(code), sum(comments), sum(nodes), max(longest))


def module_of(path):
    """Return the dotted module name of a file: hf.load for hf/load.py, hf for hf/__init__.py."""
    relative = path.relative_to(ROOT).with_suffix('')
    return '.'.join(relative.parts).removesuffix('.__init__')


def imported(path, modules, late=False):
    """Return which of `modules` (a set of dotted names) the Python file at `path` imports.

    late: include imports inside functions, which run only when the function is called."""
    nodes = set(ast.walk(ast.parse(path.read_text())))
    if not late:
        functions = [node for node in nodes if isinstance(node, Function)]
        for function in functions:
            nodes -= set(ast.walk(function))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            # in `from a import b`, b may be a submodule a.b or just a name in a
            names.add(node.module)
            names.update(f'{node.module}.{alias.name}' for alias in node.names)
    return names & modules


def product():
    """Return the paths of the product's Python files, without experiments, configs and tests."""
    folders = [ROOT, *(ROOT / name for name in FOLDERS)]
    return [path for folder in folders for path in sorted(folder.glob('*.py'))]


def cycle(paths):
    """Return the names of the modules of an import cycle among these files, in order; [] if there is none."""
    files = {module_of(path): path for path in paths}
    imports = {name: imported(path, set(files)) - {name} for name, path in files.items()}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        _, names = error.args
        return names
    return []


def main():
    """Print a line of metrics for each group of files and each file of the product, then the import cycle."""
    product_files = product()
    top_level = sorted(ROOT.glob('*.py'))
    groups = {'product': product_files, 'top level': top_level, 'a DPO step': [ROOT / name for name in STEP]}
    for name in ('experiments', 'tests'):
        groups[name] = sorted((ROOT / name).rglob('*.py'))
    for path in product_files:
        groups[module_of(path)] = [path]
    print(f'{"":26s} files  lines  comments  nodes a code line  longest function')
    for name, paths in groups.items():
        figures = total(paths)
        code = figures.code or 1  # empty files: avoid dividing by 0
        share = figures.comments / code
        density = figures.nodes / code
        size, function = figures.longest
        print(f'{name:26s} {len(paths):5d} {figures.lines:6d} {share:9.1%} {density:18.1f}  {function} {size}')
    print(f'python files at the top: {len(top_level)}; import cycle: {", ".join(cycle(product_files)) or "none"}')


if __name__ == '__main__':
    # exit silently on a closed pipe, as in `figures | head`
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    configure(globals())  # there are no options but --help
    main()
