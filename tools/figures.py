"""Print the figures of the house: lines, comments, density, longest function, import cycles.

    python -m tools.figures

A code line is not blank, not a comment and not part of a docstring; a comment line has nothing but a comment. Syntax nodes
are those of ast.walk. tests/words/test_house.py holds the project to its limits with the functions below.
"""

import ast
import signal
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
STEP = 'dpo.py training.py losses.py data.py model.py fsdp.py configurator.py'.split()
SCRIPTS = 'sft.py dpo.py reward.py ppo.py sample.py label.py'.split()
# the product's folders; the files of the top level belong to it, too
FOLDERS = ('text', 'hf', 'runtime', 'feedback', 'rl', 'tools')
# methods are functions, too; classes are not
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Figures(NamedTuple):
    """Figures of one file, or of several together.

    lines: all of them; code, comments: lines of each kind; nodes: syntax nodes. longest: (number of lines, name) of the
    longest function, or (0, '') if there is none."""

    lines: int
    code: int
    comments: int
    nodes: int
    longest: tuple


def measure(path):
    """Return the Figures of a python file."""
    source = path.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    # the numbers of the lines that belong to docstrings
    docstring_lines = set()
    for node in nodes:
        may_have_docstring = isinstance(node, ast.Module | ast.ClassDef | Function)
        if may_have_docstring and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            docstring_lines.update(range(docstring.lineno, docstring.end_lineno + 1))

    # every other line is blank, a comment or code
    lines = source.splitlines()
    others = [line.strip() for number, line in enumerate(lines, start=1) if number not in docstring_lines]
    blank = others.count('')
    comments = sum(line.startswith('#') for line in others)
    code = len(others) - blank - comments

    # max compares the sizes, which stand first in each pair
    functions = [node for node in nodes if isinstance(node, Function)]
    sizes = [(node.end_lineno - node.lineno + 1, node.name) for node in functions]
    longest = max(sizes, default=(0, ''))
    return Figures(len(lines), code, comments, len(nodes), longest)


def total(paths):
    """Return the Figures of several files together: sums, and the longest function of all. paths must not be empty."""
    columns = zip(*map(measure, paths), strict=True)
    lines, code, comments, nodes, longest = columns
    return Figures(sum(lines), sum(code), sum(comments), sum(nodes), max(longest))


def module_of(path):
    """Return the dotted name of the module in a file: hf.load for hf/load.py, hf for hf/__init__.py."""
    relative = path.relative_to(ROOT).with_suffix('')
    name = '.'.join(relative.parts)
    return name.removesuffix('.__init__')


def imported(path, modules, late=False):
    """Return the names in the set modules that the Python file at path imports.

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
    """Return the paths of all python files of the project itself: not experiments, configs or tests."""
    paths = sorted(ROOT.glob('*.py'))
    for name in FOLDERS:
        folder = ROOT / name
        paths += sorted(folder.glob('*.py'))
    return paths


def cycle(paths):
    """Return the sorted names of the modules that stand in the way of importing the files at paths in some order.

    These are the modules that import one another in a circle, and those that import such modules. Without a circle there is
    no name."""
    files = {module_of(path): path for path in paths}
    modules = set(files)
    # module -> the other modules here that it imports
    imports = {}
    for name, path in files.items():
        imports[name] = imported(path, modules) - {name}
    # a leaf imports none of those that are left: take the leaves away, again and again
    while True:
        leaves = {name for name, others in imports.items() if not others}
        if not leaves:
            return sorted(imports)
        for leaf in leaves:
            del imports[leaf]
        for others in imports.values():
            others -= leaves


def main():
    """Print a line for each group of files and for each file of the product, then the number of files and the cycle."""
    paths_of_product = product()
    top_level = sorted(ROOT.glob('*.py'))
    # name of the group -> paths of its files
    groups = {'product': paths_of_product, 'top level': top_level}
    groups['a DPO step'] = [ROOT / name for name in STEP]
    for name in ('experiments', 'tests'):
        groups[name] = sorted((ROOT / name).rglob('*.py'))
    for path in paths_of_product:
        groups[module_of(path)] = [path]

    print(f'{"":26s} files  lines  comments  nodes a code line  longest function')
    for name, paths in groups.items():
        figures = total(paths)
        # an empty file has no code to divide by
        code = figures.code or 1
        share = figures.comments / code
        density = figures.nodes / code
        size, function = figures.longest
        print(f'{name:26s} {len(paths):5d} {figures.lines:6d} {share:9.1%} {density:18.1f}  {function} {size}')
    names = ', '.join(cycle(paths_of_product))
    print(f'python files at the top: {len(top_level)}; import cycle: {names or "none"}')


if __name__ == '__main__':
    # figures | head: end without a word where nobody reads on
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
