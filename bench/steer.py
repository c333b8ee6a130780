"""Steering: what a direction costs while text is generated, beside steering-vectors and repeng; beam search beside
random search and the best single direction; three behaviours with their random controls; concepts taken out.

    python bench/steer.py                      # everything
    python bench/steer.py --only overhead      # with steering-vectors and repeng where they are installed
"""
import time
from contextlib import contextmanager
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
from circuitbench.scores import keywords, log_prob, prefers
from circuitbench.stream import shipped_text, token_rows
from circuitbench.task import Prompt, facts, indirect_object

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


WAYS = (' Question: what is the capital of {}? Answer:', 'In {} the capital city is called', '{}: its capital is',
        'The chief city of {} is', 'The king of {} dwelt in', 'And the elders of {} were gathered in')


def coders_of(model):
    "All shipped coders of whole sites."
    out = []
    for b in range(model.n_layers):
        for site in ('resid_post', 'ssm.out_proj_in'):
            try: out.append(SAE.load(f'{model.name}/blocks.{b}.{site}'))
            except ValueError: continue
    return out


def flip(o, name):
    "The capital of France becomes that of Egypt: three ways to ask are searched on, three are held out."
    model = load_model(f'tiny://{name}')
    cairo, paris = (int(model.tokens(w)[0][0, 0]) for w in (' Cairo', ' Paris'))
    def flipped(logits): return logits[..., cairo] - logits[..., paris]
    def score(model, prompts): return torch.stack([flipped(model.run(p, last=True).logits[0, -1]) for p in prompts])
    asked, held = ([w.format('France') for w in ways] for ways in (WAYS[:3], WAYS[3:]))
    egypt = [w.format('Egypt') for w in WAYS[:3]]
    states = as_candidates(mean_difference(model, egypt, asked, 'ssm.state', b) for b in model.recurrent())
    space, text = [*propose(model, asked, flipped, coders_of(model), 24), *states], token_rows(model, None, 64, 256)
    clean, rows = float(score(model, held).mean()), []
    for method in ('single', 'random', 'beam'):
        found = search_plans(model, asked, score, space, text, method, .05, 20 if o.quick else 150, progress=False)
        with torch.no_grad(), found.plan().on(model): after = float(score(model, held).mean())
        rows.append({'model': name, 'search': method, 'runs': len(found.trials), 's': found.seconds,
                     'clean': found.clean, 'score': found.best.score, 'KL': found.best.kl,
                     'steps': len(found.best.steps), 'held out, clean': clean, 'held out': after})
    return rows


def search(o):
    rows = [r for name in ('mamba2', 'hybrid', 'rwkv7') for r in flip(o, name)]
    table(rows, o, 'France to Cairo: difference of logits at a KL of at most .05')


OPENINGS = (' And the', ' And it came to pass that the', ' Then said the', ' In those days the', ' Behold, the',
            ' And all the', ' Now the', ' And when the', ' And they brought it unto the', ' For the',
            ' And he spake unto the', ' So the')
KINGS = ('And the king sat upon his throne and reigned', 'The king and the princes of his kingdom came',
         'And he reigned as king over all the kingdom', 'The king commanded his servants')
OTHERS = ('And the shepherd sat upon the ground and slept', 'The men and the women of the village came',
          'And he walked as a stranger over all the land', 'The woman asked her neighbours')


def behaviours(o):
    "A fact flipped, a name swapped, a theme raised: searched on some prompts, measured on others."
    rows = []
    for name in ('mamba2', 'hybrid', 'rwkv7'):
        model = load_model(f'tiny://{name}')
        known = indirect_object(5000, 'train')
        esther, ruth = ([p.text for p in known if p.target == n][:24] for n in (' Esther', ' Ruth'))
        held = [p.text for p in indirect_object(500, 'held') if p.target == ' Esther']
        france, egypt = ([w.format(c) for w in WAYS] for c in ('France', 'Egypt'))
        tasks = {'fact flipped': (egypt[:3], france[:3], france[3:], prefers(' Cairo', ' Paris')),
                 'name swapped': (ruth, esther, held, prefers(' Ruth', ' Esther')),
                 'theme raised': (KINGS, OTHERS, OPENINGS[6:], keywords(('king', 'kings', 'kingdom', 'throne'), 16))}
        for task, (wanted, now, others, score) in tasks.items():
            asked, aim = (OPENINGS[:6], log_prob(' king')) if task == 'theme raised' else (now[:8], score)
            places = [('resid_post', b) for b in range(model.n_layers)] + [('ssm.state', b) for b in model.recurrent()]
            space = as_candidates(mean_difference(model, wanted, now, site, b) for site, b in places)
            text, runs, draws = token_rows(model, None, 64, 1024), *((8, 2) if o.quick else (60, 8))
            found = search_plans(model, asked, aim, space, text[:4], 'beam', .1, runs, depth=2, progress=False)
            e = measure(model, found.plan(), others, score, text, draws, progress=False)
            control = [c.score.value for c in e.controls]
            rows.append({'model': name, 'behaviour': task, 'prompts': len(others), 'clean': e.clean.score.value,
                         'steered': e.steered.score.value, 'random': sum(control)/max(1, len(control)),
                         'best random': max(control, default=float('nan')), 'success': e.steered.success,
                         'KL': e.steered.kl, 'ppl ratio': e.steered.ratio, 'steps': len(found.best.steps)})
            print(rows[-1], found.best.steps, [s.site for s in found.plan().steps], flush=True)
    table(rows, o, 'Three behaviours, on prompts that were not searched on')


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
    parts = {'overhead': overhead, 'search': search, 'behaviours': behaviours, 'removal': removal}
    o = options(__doc__, ','.join(parts))
    for k in o.only.split(','):
        start = time.perf_counter()
        parts[k](o)
        print(f'[{k}: {time.perf_counter() - start:.0f} s]')


if __name__ == '__main__': main()
