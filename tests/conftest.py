import os
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SLOW = ['signals', 'lora', 'ppo', 'resume', 'law', 'parallel', 'attack', 'checkpoint', 'model']


def pytest_collection_modifyitems(items):
    """The slow files first, so that two processes that share the files out end at nearly the same time."""
    order = {f'test_{name}.py': i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(SLOW)))
