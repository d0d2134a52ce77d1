"""The house stays a house: few files at the top, arrows in one direction, functions of one page, lines within their limits."""

import ast

import pytest

from tools import figures

ROOT = figures.ROOT
OURS = figures.product() + sorted((ROOT / 'experiments').rglob('*.py'))
# lines; of losses.py 175, and room for a loss of one's own
LIMITS = {'dpo.py': 300, 'sft.py': 135, 'reward.py': 115, 'ppo.py': 400, 'losses.py': 190}


def relative(path):
    return str(path.relative_to(ROOT))


def test_top_level_and_lines():
    assert len(list(ROOT.glob('*.py'))) <= 12
    assert {name: n for name, limit in LIMITS.items() if (n := figures.measure(ROOT / name).lines) > limit} == {}
    assert figures.total([ROOT / name for name in figures.STEP]).lines <= 1810
    assert figures.total(figures.product()).lines <= 14975
    assert figures.total(sorted((ROOT / 'experiments').rglob('*.py'))).lines <= 3750


def test_no_import_cycle():
    assert figures.cycle(OURS) == []


def test_no_script_is_imported():
    """Neither by another one nor by a library; libraries import nothing else of tools/ and experiments/ either."""
    scripts = {name.removesuffix('.py') for name in figures.SCRIPTS} | {'tools.bench', 'tools.plot', 'tools.report'}
    rooms = {figures.module_of(p) for p in OURS if relative(p).startswith(('tools/', 'experiments/'))}
    for path in figures.product():
        is_library = relative(path) not in figures.SCRIPTS and not relative(path).startswith('tools/')
        others = (scripts | rooms if is_library else scripts) - {figures.module_of(path)}
        assert not figures.imported(path, others, late=True), path


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
    tree = ast.parse(source)
    assert 'sys.path' not in source
    assert figures.measure(path).longest[0] <= 60
    nested = [n.lineno for a in ast.walk(tree) if isinstance(a, ast.IfExp)
              for n in ast.walk(a) if isinstance(n, ast.IfExp) and n is not a]  # fmt: skip
    assert not nested
