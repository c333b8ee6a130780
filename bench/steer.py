"""Steering: what a direction costs while text is generated, beside steering-vectors and repeng; beam search beside
random search and the best single direction; nine behaviours with their random controls; concepts taken out.

    python bench/steer.py                      # everything
    python bench/steer.py --only overhead      # with steering-vectors and repeng where they are installed
    python bench/steer.py --only search --seeds 3 --threads 1
"""
import random
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from timing import alternate, options, table
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from circuitbench.direction import Direction, mean_difference
from circuitbench.effect import measure
from circuitbench.hook import HookedModel
from circuitbench.interventions import plan, push, write
from circuitbench.load import load_model
from circuitbench.plan_search import as_candidates, propose, search_plans
from circuitbench.removal import find_removals, removed
from circuitbench.sae import SAE
from circuitbench.scores import NeutralText, keywords, log_prob, nats, prefers
from circuitbench.state_sae import wilson
from circuitbench.stream import shipped_text, token_rows
from circuitbench.task import Prompt, facts, indirect_object, tables

SMALL = dict(vocab_size=4096, pad_token_id=0, bos_token_id=1, eos_token_id=None)


def llama(d, layers):
    sizes = dict(hidden_size=d, intermediate_size=4*d, num_hidden_layers=layers)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, **SMALL)).eval()


def mamba2(d, layers):
    sizes = dict(hidden_size=d, num_hidden_layers=layers, num_heads=16, head_dim=d//8, state_size=64, n_groups=1)
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **SMALL)).eval()


def peers(hf, v, layer):
    "What else adds a vector to the stream of a transformer: context managers around a call of generate."
    out = {}
    try:
        from steering_vectors import SteeringVector
        out['steering-vectors'] = lambda: SteeringVector({layer: v}, 'decoder_block').apply(hf)
    except ImportError as err: print(f'steering-vectors is not here: {err}')
    try:
        np.float_ = np.float64                                  # repeng 0.4 asks for a name that numpy 2 has dropped
        from repeng import ControlModel, ControlVector
    except ImportError as err: print(f'repeng is not here: {err}')
    else:
        @contextmanager
        def _on():
            m = ControlModel(hf, [layer])
            m.set_control(ControlVector('llama', {layer: v.numpy()}), 1.)
            try: yield
            finally: m.unwrap()
        out['repeng'] = _on
    return out


def row(o, make):
    "One model: transformers alone, ours without a plan, under each plan, the peers."
    hf, n = make(*((64, 2) if o.quick else (512, 8))), 8 if o.quick else 64
    model, layer = HookedModel(hf, name=make.__name__), hf.config.num_hidden_layers//2
    ids, v, site = torch.randint(1, 4096, (1, 16)), torch.randn(hf.config.hidden_size), f'blocks.{layer}.ssm.state'
    d = Direction(v, f'blocks.{layer}.resid_post', model.name, 'a draw')
    plans = {'push': plan(push(d, d.norm))}
    if make is mamba2:
        s = Direction(torch.randn(model.site_shape(site, 1, 1)[2:]), site, model.name, 'a draw')
        plans['state write'] = plan(write(s, 1., at=15))
    bare = partial(hf.generate, ids, max_new_tokens=n, do_sample=False)
    calls = {'transformers': bare, 'unsteered': partial(model.generate, ids, n)}
    def under(on, call):
        with on(): return call()
    for k, p in plans.items(): calls[k] = partial(under, partial(p.on, model), calls['unsteered'])
    for k, on in (peers(hf, v, layer) if make is llama else {}).items(): calls[k] = partial(under, on, bare)
    with torch.no_grad(): t = alternate(calls, o.seconds, 5, time.process_time)
    return [{'model': model.name, 'generation': k, 'ms a token': s/n*1e3, 'of unsteered': s/t['unsteered'],
             'of transformers': s/t['transformers']} for k, s in t.items()]


def overhead(o):
    rows = [r for make in (llama, mamba2) for r in row(o, make)]
    table(rows, o, 'One direction while generating, processor time')


FACTS = ('France', 'Egypt'), ('Italy', 'Japan'), ('Germany', 'Russia')
NAMES = ('Esther', 'Ruth'), ('John', 'Mary'), ('Peter', 'Anna')


@dataclass(frozen=True)
class Swap:
    "One answer to be put in the place of another."
    kind: str
    name: str
    wanted: list[str]
    "Prompts that have the answer which is wanted, `asked` and `held` those that have the other one."
    asked: list[str]
    held: list[str]
    "Not searched on."
    answers: tuple[str, str]


def swaps(seed):
    "Three facts and three names; the seed draws which wordings and sentences are searched on and which held out."
    rng, capital = random.Random(seed), dict(map(tuple, tables()['facts']))
    ways = [w.split(' {p}')[0] for w in tables()['wordings'] if w.rindex('{p}') > w.rindex('{c}')]
    out = []
    for a, b in FACTS:
        rng.shuffle(ways)
        wanted, asked = ([w.format(c=c) for w in ways] for c in (b, a))
        answers = f' {capital[b]}', f' {capital[a]}'
        out.append(Swap('fact', f'{a} to {b}', wanted[:3], asked[:3], asked[3:], answers))
    known, held = (indirect_object(n, split, seed) for n, split in ((5000, 'train'), (1000, 'held')))
    for a, b in NAMES:
        wanted, asked = ([p.text for p in known if p.target == f' {n}'][:24] for n in (b, a))
        out.append(Swap('name', f'{a} to {b}', wanted, asked, [p.text for p in held if p.target == f' {a}'],
                        (f' {b}', f' {a}')))
    return out


def coders_of(model):
    "All shipped coders of whole sites."
    out = []
    for b in range(model.n_layers):
        for site in ('resid_post', 'ssm.out_proj_in'):
            try: out.append(SAE.load(f'{model.name}/blocks.{b}.{site}'))
            except ValueError: continue
    return out


def share(hits):
    "A share of prompts with its 95% interval (Wilson)."
    low, high = wilson(int(sum(hits)), len(hits))
    return f'{sum(hits)/len(hits):.0%} ({low:.0%} to {high:.0%})'


def cost_of(model, plan, text):
    "KL of a plan on neutral text, nats a token."
    return nats(text.cost(lambda ids, length: plan.on(model, length)))


WEAK, STRONG = (.25, .5, 1., 2.), (1., 2., 4., 8.)
SEARCHES = {'single': WEAK, 'random': WEAK, 'beam': WEAK, 'single, to 8': STRONG, 'beam, to 8': STRONG}


def found_by(model, swap, seed, coders, o):
    "The searches for one swap at the same budget: on 8 prompts at most and 4 rows of text; then on others."
    asked, score = swap.asked[:8], prefers(*swap.answers)
    target, other = (int(model.tokens(w)[0][0, 0]) for w in swap.answers)
    states = as_candidates(mean_difference(model, swap.wanted, swap.asked, 'ssm.state', b) for b in model.recurrent())
    latents = propose(model, asked, lambda logits: logits[..., target] - logits[..., other], coders, 12)
    rows = token_rows(model, None, 64, 4096)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    unseen, clean, out = NeutralText(model, rows[4:20]), float(score(model, swap.held).mean()), []
    for name, strengths in SEARCHES.items():
        method, budget = name.split(',')[0], 20 if o.quick else 100        # alone: every candidate at every strength
        found = search_plans(model, asked, score, [*latents, *states], rows[:4], method, .05, budget, seed=seed,
                             strengths=strengths, progress=False)
        with found.plan().on(model): after = score(model, swap.held)
        kl = cost_of(model, found.plan(), unseen)
        out.append({'model': model.name, 'kind': swap.kind, 'swap': swap.name, 'seed': seed, 'search': name,
                    'runs': len(found.trials), 's': found.seconds, 'clean': found.clean, 'score': found.best.score,
                    'KL': found.best.kl, 'steps': len(found.best.steps), 'held out, clean': clean,
                    'held out': float(after.mean()), 'turned': float((after > 0).float().mean()), 'KL, other text': kl})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in out[-1].items()}, flush=True)
    return out


def spread(values):
    "Median and range."
    return 'none' if not values else f'{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})'


def search(o):
    "Facts and names, each with several draws of prompts and text: medians over all of them, and how often each wins."
    rows = []
    for name in ('mamba2', 'hybrid', 'rwkv7'):
        model = load_model(f'tiny://{name}')
        coders = coders_of(model)
        for seed in range(o.seeds):
            for swap in swaps(seed)[::3 if o.quick else 1]: rows += found_by(model, swap, seed, coders, o)
    table(rows, o, 'One answer in the place of another: difference of logits at a KL of at most .05')
    summary = []
    for model, kind, method in dict.fromkeys((r['model'], r['kind'], r['search']) for r in rows):
        single = method.replace('random', 'single').replace('beam', 'single')
        own, best = ([r for r in rows if (r['model'], r['kind'], r['search']) == (model, kind, m)]
                     for m in (method, single))
        ahead, behind = (sum(sign*(a['held out'] - b['held out']) > .1 for a, b in zip(own, best)) for sign in (1, -1))
        summary.append({'model': model, 'kind': kind, 'search': method, 'searches': len(own),
                        **{k: spread([r[k] for r in own]) for k in ('clean', 'score', 'held out, clean', 'held out',
                                                                     'turned', 'KL, other text', 'steps', 's')},
                        'held out, ahead of single': ahead, 'behind': behind})
    table(summary, o, f'Median and range over {o.seeds} seeds and what is swapped')


def abreast(o):
    "What it saves to run plans of a search side by side: the same plans, by a score that can and by one that cannot."
    rows = []
    for name in ('mamba2', 'hybrid', 'rwkv7'):
        model, swap = load_model(f'tiny://{name}'), swaps(0)[0]
        space = as_candidates(mean_difference(model, swap.wanted, swap.asked, site, b)
                              for site in ('resid_post', 'ssm.state') for b in model.recurrent())
        together, text = prefers(*swap.answers), token_rows(model, None, 64, 256)
        def alone(model, prompts, score=together): return score(model, prompts)
        calls = {k: partial(search_plans, model, swap.asked, score, space, text, 'random', .05, 16 if o.quick else 48,
                            progress=False) for k, score in (('together', together), ('alone', alone))}
        a, b = (calls[k]().trials for k in calls)
        t = alternate(calls, o.seconds, 5, time.process_time)
        rows.append({'model': name, 'runs': len(a), 'alone, ms a run': t['alone']/len(b)*1e3,
                     'together': t['together']/len(a)*1e3, 'times faster': t['alone']/t['together'],
                     'same plans': [x.steps for x in a] == [x.steps for x in b],
                     'largest difference': max(max(abs(x.score - y.score), abs(x.kl - y.kl)) for x, y in zip(a, b))})
    table(rows, o, 'Plans of a search side by side, processor time')


OPENINGS = (' And the', ' And it came to pass that the', ' Then said the', ' In those days the', ' Behold, the',
            ' And all the', ' Now the', ' And when the', ' And they brought it unto the', ' For the',
            ' And he spake unto the', ' So the', ' And there was a', ' But the', ' And they went up to the',
            ' Then the', ' And he saw the', ' Thus saith the', ' And she said unto the', ' Let the',
            ' After these things the', ' And in the morning the', ' Hear now, O', ' And one of the',
            ' Woe unto the', ' And they that were with the', ' Who is the', ' These are the', ' And the sons of',
            ' This is the')
OTHERS = ('And the woman sat upon the ground and slept', 'The men and the women of the village came',
          'And he walked as a stranger over all the land', 'The woman asked her neighbours')
THEMES = {
    'kings': (' king', ('king', 'kings', 'kingdom', 'throne'),
              ('And the king sat upon his throne and reigned', 'The king and the princes of his kingdom came',
               'And he reigned as king over all the kingdom', 'The king commanded his servants')),
    'flocks': (' sheep', ('sheep', 'flock', 'flocks', 'shepherd', 'lambs', 'cattle'),
               ('And the shepherd sat by his flock and the sheep slept', 'The flocks and the herds of cattle came',
                'And he fed the sheep and the lambs over all the land', 'The shepherd asked for his sheep')),
    'waters': (' waters', ('water', 'waters', 'sea', 'river', 'rivers'),
               ('And the waters of the sea rose upon the ground', 'The rivers and the waters of the sea came',
                'And he passed over the river and the sea', 'The sea and the waters thereof'))}


def tasks():
    "Nine behaviours: kind, name, prompts wanted, prompts as they are, those searched on, those held out, aim, score."
    for s in swaps(0):
        score = prefers(*s.answers)
        yield s.kind, s.name, s.wanted, s.asked, s.asked[:8], s.held, score, score
    for theme, (word, words, some) in THEMES.items():
        yield 'theme', theme, some, OTHERS, OPENINGS[:6], OPENINGS[6:], log_prob(word), keywords(words, 16)


def behaviours(o):
    "Three facts flipped, three names swapped, three themes raised: searched on some prompts, measured on others."
    rows = []
    for name in ('mamba2', 'hybrid', 'rwkv7'):
        model = load_model(f'tiny://{name}')
        places = [('resid_post', b) for b in range(model.n_layers)] + [('ssm.state', b) for b in model.recurrent()]
        text, runs, draws = token_rows(model, None, 64, 2048), *((8, 2) if o.quick else (60, 8))
        for kind, task, wanted, now, asked, held, aim, score in list(tasks())[::3 if o.quick else 1]:
            space = as_candidates(mean_difference(model, wanted, now, site, b) for site, b in places)
            found = search_plans(model, asked, aim, space, text[:4], 'beam', .1, runs, depth=2, progress=False)
            e = measure(model, found.plan(), held, score, text[4:], draws, progress=False)
            hits = {k: [v > 0 for v in one.scores] for k, one in (('clean', e.clean), ('steered', e.steered))}
            noise = [sum(v > 0 for v in c.scores)/len(held) for c in e.controls]
            rows.append({'model': model.name, 'kind': kind, 'behaviour': task, 'prompts': len(held),
                         'clean': e.clean.score.value, 'steered': e.steered.score.value,
                         'random': [c.score.value for c in e.controls], 'clean, share': share(hits['clean']),
                         'success': share(hits['steered']), 'hits': sum(hits['steered']), 'noise': noise,
                         'KL': e.steered.kl, 'random KL': [c.kl.value for c in e.controls],
                         'ppl ratio': e.steered.ratio, 'steps': [repr(s) for s in found.plan().steps]})
            print(rows[-1], flush=True)
    shown = [{k: spread(v) if k in ('random', 'noise', 'random KL') else len(v) if k == 'steps' else
              repr(v) if k in ('KL', 'ppl ratio') else v for k, v in r.items()} for r in rows]
    table(shown, o, 'Nine behaviours, on prompts that were not searched on')
    pooled = []                                            # prompts of one behaviour are alike: the three apart as well
    for model, kind in dict.fromkeys((r['model'], r['kind']) for r in rows):
        own = [r for r in rows if (r['model'], r['kind']) == (model, kind)]
        hits, n = (sum(r[k] for r in own) for k in ('hits', 'prompts'))
        pooled.append({'model': model, 'kind': kind, 'prompts': n, 'success': share([True]*hits + [False]*(n - hits)),
                       'each': ', '.join(f'{r["hits"]/r["prompts"]:.0%}' for r in own),
                       'clean': ', '.join(r['clean, share'].split()[0] for r in own),
                       'random': spread([v for r in own for v in r['noise']]),
                       'KL': spread([r['KL'].value for r in own]),
                       'random KL': spread([v for r in own for v in r['random KL']])})
    table(pooled, o, 'The three of a kind together')


SORROW = (' wept', ' weep', ' mourn', ' sorrow', ' grief', ' tears', ' mourning', ' weeping', ' lament')
JOY = (' joy', ' rejoice', ' rejoiced', ' glad', ' gladness', ' sing', ' praise', ' laugh', ' sang')


def said(model, split, words, n=60):
    "Places of the text where one of some words comes next, the 24 tokens before it as the prompt."
    ids = token_rows(model, shipped_text(split), 64, 400_000)
    known = [int(t[0, 0]) for t in (model.tokens(w)[0] for w in words) if t.shape[1] == 1]
    places = torch.isin(ids[:, 24:], torch.tensor(known)).nonzero().tolist()[:n]
    word = model.tokenizer.decode
    return [Prompt(word(ids[r, t:t + 24]), word(ids[r, t + 24:t + 25]), '', '', 'contrast') for r, t in places]


def removal(o):
    "One direction ablated: a fact among other facts, words of sorrow among words of joy; on prompts not looked at."
    model, rows = load_model('tiny://mamba2'), []
    text, n = token_rows(model, None, 128, 1024), 8 if o.quick else 60
    sets = [[[p for p in facts(split) if (p.target == ' Cairo') is own] for own in (True, False)]
            for split in ('train', 'held')]
    fact = [[a[:n], b[::max(1, len(b)//n)]] for a, b in sets]
    mood = [[said(model, split, words, n) for words in (SORROW, JOY)] for split in ('train', 'held')]
    for name, ((a, b), (c, d)) in {'the capital of Egypt': fact, 'sorrow, against joy': mood}.items():
        best = find_removals(model, a, b, text, progress=False)[0]
        r = removed(model, best.plan, c, d, text)
        rows.append({'concept': name, 'taken out at': best.direction.site, 'prompts': f'{len(c)}, {len(d)}',
                     'concept, nats': '{:.2f} to {:.2f}'.format(*r.concept),
                     'neighbours': '{:.2f} to {:.2f}'.format(*r.neighbours),
                     'of them right': '{:.0%} to {:.0%}'.format(*r.right), 'loss': '{:.3f} to {:.3f}'.format(*r.loss)})
    table(rows, o, 'A concept taken out of tiny://mamba2')


def main():
    parts = {'overhead': overhead, 'search': search, 'abreast': abreast, 'behaviours': behaviours, 'removal': removal}
    o = options(__doc__, ','.join(parts), seeds=(1, 'draws of prompts, text and random plans in search'))
    for k in o.only.split(','):
        start = time.perf_counter()
        parts[k](o)
        print(f'[{k}: {time.perf_counter() - start:.0f} s]')


if __name__ == '__main__': main()
