"""Runs the snippets of another library in the tutorial `coming_from` and compares each tensor with that of our cells.

    pip install transformer-lens==4.3.0 && python bench/coming_from.py transformer-lens
    pip install nnsight==0.8.1 && python bench/coming_from.py nnsight
    pip install sae-lens==6.54.0 && python bench/coming_from.py sae-lens     (an environment of its own)

Exits with 1 where a tensor of the same name differs by more than 1e-5 of its largest value.
"""
import argparse
import json
import os
import re
import runpy
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import torch

os.environ['HF_HUB_OFFLINE'] = '1'
PAGE = Path(__file__).parents[1]/'nbs/tutorials/coming_from.ipynb'
LABELS = {'transformer-lens': 'TransformerLens', 'nnsight': 'nnsight', 'sae-lens': 'SAELens'}
GIVEN = 'folder', 'mamba', 'text', 'other', 'short', 'right', 'wrong', 'work', 'rows', 'unit'
TURNED = {'attn.hook_pattern': lambda x: x.transpose(1, 2)}                  # layouts that the page tells apart
MAMBA1 = {f'mixer.hook_ssm_{n}': lambda x: x.transpose(1, 2)[:, :, :, None] for n in ('state', 'write')}


def cells(kind: str) -> list[str]:
    "The page's cells of a kind."
    page = json.loads(PAGE.read_text(encoding='utf-8'))
    return [''.join(c['source']) for c in page['cells'] if c['cell_type'] == kind]


def snippets(label: str) -> str:
    "The snippets of one library, in the order of the page."
    blocks = re.findall(r'```python\n# (\w+)\n(.*?)```', '\n'.join(cells('markdown')), re.S)
    return '\n'.join(code for name, code in blocks if name == label)


def ran(code: str, given: dict) -> dict:
    "What a script leaves; it lies in a file, since nnsight reads the source of its blocks."
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, 'snippets.py')
        path.write_text(code, encoding='utf-8')
        return runpy.run_path(str(path), given)


def apart(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    "The largest difference over the largest value."
    if theirs.shape != ours.shape: return float('inf')
    theirs, ours = theirs.detach().double(), ours.detach().double()
    return float((theirs - ours).abs().max()/ours.abs().max().clamp(min=1e-9))


def hook_points() -> dict[str, float]:
    "Every hook point of the bridge whose name we know, over four models: how far apart the tensors are at most."
    from transformer_lens.model_bridge import TransformerBridge

    from circuitbench import SiteError, load_model
    from circuitbench.load import tiny_path
    ids, found = torch.arange(20, 40)[None], {}
    for name in ('transformer', 'mamba1', 'mamba2', 'hybrid'):
        model = load_model(f'tiny://{name}')
        bridge = TransformerBridge.boot_transformers(str(tiny_path(name)), device='cpu')
        for block in bridge.blocks:
            if hasattr(block, 'mixer'): block.mixer.eager_scan = True
        with torch.no_grad(): cache = bridge.run_with_cache(ids, use_cache=False)[1]
        for hook in bridge.hook_dict:
            try: site, = model.site_names(hook)
            except SiteError: continue
            point = hook.split('.', 2)[-1] if hook.startswith('blocks.') else hook
            if hook not in cache or point == 'mixer.conv1d.hook_out': continue
            turn = (TURNED | (MAMBA1 if name == 'mamba1' else {})).get(point, lambda x: x)
            d = apart(turn(cache[hook]), model.run_with_cache(ids, site)[1][site])
            found[point] = max(found.get(point, 0.), d)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('library', choices=LABELS)
    library = parser.parse_args().library
    torch.set_num_threads(1)
    code = '\n'.join(c for c in cells('code') if c != 'disk.cleanup()')
    with redirect_stdout(None): ours = ran(code, {})
    from circuitbench.stream import shipped_text
    given = {**{n: ours[n] for n in GIVEN if n in ours}, 'verses': list(shipped_text('train')), 'torch': torch}
    theirs = ran(snippets(LABELS[library]), given)
    print(f'{library} {version(library)}, transformers {version("transformers")}, torch {torch.__version__}')
    is_tensor = lambda name: all(isinstance(side.get(name), torch.Tensor) for side in (theirs, ours))
    found = {n: apart(theirs[n], ours[n]) for n in theirs if n not in given and is_tensor(n)}
    if library == 'transformer-lens': found |= hook_points()
    if library == 'sae-lens':
        from circuitbench import SAE
        theirs['theirs'].save_inference_model(folder := ours['work']/'theirs_saved')
        found['theirs_codes'] = apart(theirs['theirs_codes'], SAE.load(folder).encode(ours['rows']))
    for name, d in found.items(): print(f'{name:28} {d:.1e}')
    ours['disk'].cleanup()
    sys.exit(max(found.values()) > 1e-5)


if __name__ == '__main__': main()
