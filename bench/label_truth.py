"""Labels of the models whose circuit is known: exact ablation of every node and edge, written where `truth` reads it.

    python bench/label_truth.py [NAME ...]
"""
import json
import sys

from circuitbench.file import beside
from circuitbench.truth import LABELS, make_labels, truth, truth_names

if __name__ == '__main__':
    known = json.loads(LABELS.read_text()) if LABELS.exists() else {}
    for name in sys.argv[1:] or truth_names():
        try: known[name] = make_labels(truth(name, n=64, labelled=False), progress=False)
        except ValueError as err:
            print(f'{name}: {err}')
            known.pop(name, None)
            continue
        with beside(LABELS) as new: new.write_text(json.dumps(known, indent=1, sort_keys=True) + '\n')
        count = {k: len(known[name][k]['in']) for k in ('nodes', 'edges')}
        print(name, known[name]['count'], 'in', count, flush=True)
