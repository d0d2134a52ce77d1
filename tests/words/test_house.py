"""The house stays a house: few files at the top, arrows in one direction, functions of one page, lines within their limits."""

import ast
import graphlib
import re

import pytest
from helpers import ROOT

from tests.conftest import launching

STEP = 'dpo.py training.py losses.py data.py model.py fsdp.py configurator.py'.split()  # files of a DPO step
SCRIPTS = 'sft.py dpo.py reward.py ppo.py sample.py label.py'.split()
FOLDERS = ('', 'text', 'hf', 'runtime', 'feedback', 'rl', 'tools')  # of the product; '' is the top level
PRODUCT = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob('*.py'))]
EXPERIMENTS = sorted((ROOT / 'experiments').rglob('*.py'))
OURS = PRODUCT + EXPERIMENTS
# lines; of losses.py 175, and room for a loss of one's own
LIMITS = {'dpo.py': 300, 'sft.py': 135, 'reward.py': 115, 'ppo.py': 370, 'losses.py': 190}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure(path):
    """Figures of a Python file: all its lines, those of code (not blank, no comments, no docstrings), those with nothing but a
    comment, the nodes of ast.walk, and (lines, name) of the longest function."""
    source = path.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    docstring_lines = set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            docstring_lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [line.strip() for line in source.splitlines()]
    others = [line for number, line in enumerate(lines, start=1) if number not in docstring_lines]
    comments = sum(line.startswith('#') for line in others)
    code = len(others) - others.count('') - comments
    sizes = [(node.end_lineno - node.lineno + 1, node.name) for node in nodes if isinstance(node, Function)]
    return len(lines), code, comments, len(nodes), max(sizes, default=(0, ''))


def total(paths):
    """The figures of several files: sums, and the longest function of all."""
    *sums, longest = zip(*map(measure, paths), strict=True)
    return *map(sum, sums), max(longest)


def relative(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    """Return the dotted module name of a file: hf.load for hf/load.py, hf for hf/__init__.py."""
    return relative(path).removesuffix('.py').replace('/', '.').removesuffix('.__init__')


def imported(path, modules, late=False):
    """Return which of `modules` (dotted names) a Python file imports. late: also inside of functions."""
    nodes = set(ast.walk(ast.parse(path.read_text())))
    if not late:
        functions = [node for node in nodes if isinstance(node, Function)]
        nodes -= {inner for function in functions for inner in ast.walk(function)}
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            # in `from a import b`, b may be a submodule a.b or just a name in a
            names.add(node.module)
            names.update(f'{node.module}.{alias.name}' for alias in node.names)
    return names & modules


def test_top_level_and_lines():
    """Prints what it measures: pytest -s."""
    groups = {'product': PRODUCT, 'top level': sorted(ROOT.glob('*.py')), 'a DPO step': [ROOT / name for name in STEP]}
    groups['product without losses.py'] = [path for path in PRODUCT if path.name != 'losses.py']  # formulas are dense
    groups |= {'experiments': EXPERIMENTS, 'tests': sorted((ROOT / 'tests').rglob('*.py'))}
    density = {}  # syntax nodes a code line
    for name, paths in groups.items():
        lines, code, comments, nodes, longest = total(paths)
        density[name] = nodes / code
        shares = f'{nodes / code:.2f} nodes and {comments / code:.1%} comments a code line'
        print(f'{name}: {len(paths)} files, {lines} lines, {shares}, longest function {longest}')
    assert len(groups['top level']) <= 12
    assert {name: n for name, limit in LIMITS.items() if (n := measure(ROOT / name)[0]) > limit} == {}
    assert total(groups['a DPO step'])[0] <= 1800
    assert total(PRODUCT)[0] <= 16_035
    assert density['product without losses.py'] <= 11
    assert total(EXPERIMENTS)[0] <= 3300
    # the lines that docs/code.md names, to the nearest ten
    for name, lines in re.findall(r'^\| `(\w+\.py)` \| (\d+) \|', (ROOT / 'docs/code.md').read_text(), re.M):
        assert abs(int(lines) - measure(ROOT / name)[0]) <= 5, name


def test_who_prints():
    """Through say(), which goes on where nobody reads any more (`| head`) and takes control characters out; data.py does so itself.
    configurator.py stands below it."""
    printing = {relative(path) for path in PRODUCT if re.search(r'^ *print\(', path.read_text(), re.M)}
    assert printing == {'configurator.py', 'runtime/files.py', 'text/show.py'}


def test_no_import_cycle():
    files = {module_of(path): path for path in OURS}
    imports = {name: imported(path, set(files)) - {name} for name, path in files.items()}
    graphlib.TopologicalSorter(imports).prepare()  # a CycleError names the modules


def test_no_script_is_imported():
    """Neither by another one nor by a library; libraries import nothing else of tools/ and experiments/ either."""
    scripts = {name.removesuffix('.py') for name in SCRIPTS} | {'tools.bench', 'tools.plot', 'tools.report'}
    rooms = {module_of(p) for p in OURS if relative(p).startswith(('tools/', 'experiments/'))}
    for path in PRODUCT:
        is_library = relative(path) not in SCRIPTS and not relative(path).startswith('tools/')
        others = (scripts | rooms if is_library else scripts) - {module_of(path)}
        assert not imported(path, others, late=True), path


def test_losses_import_torch_alone():
    """At their head; run as a script the file imports what checks a loss."""
    nodes = ast.parse((ROOT / 'losses.py').read_text()).body
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition('.')[0] for name in names} == {'torch'}


@pytest.mark.parametrize('path', OURS, ids=relative)
def test_file(path):
    """No sys.path line, no function over 60 lines, no conditional expression in another."""
    source = path.read_text()
    outer = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.IfExp)]
    assert 'sys.path' not in source and measure(path)[-1][0] <= 60
    assert not [n.lineno for a in outer for n in ast.walk(a) if isinstance(n, ast.IfExp) and n is not a]


def test_tests_that_run_scripts_are_known(tmp_path):
    """make test-fast leaves them out: by themselves, by a function of their file, or by a fixture."""
    file = tmp_path / 'test_x.py'
    file.write_text(
        'def run(): python("x")\ndef made(): run()\ndef test_a(made): 0\ndef test_b(): forks.y()\ndef test_c(): 0\n'
        'def test_d(): helpers.python(x)\n'
    )
    found = launching(file)
    assert {'run', 'made', 'test_a', 'test_b', 'test_d'} < found and 'test_c' not in found
