"""Several agents with one dictionary: alignment by characters, planted shares, figures by numpy and scikit-learn, both controls."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LinearRegression

from circuitbench.agents import agent_controls, agent_report, compare_agents, train_agents
from circuitbench.align import align, token_ends
from circuitbench.coder import Place, SAEConfig
from circuitbench.hook import HookedModel
from circuitbench.load import byte_tokenizer, load_model
from circuitbench.planted import planted
from circuitbench.sae import SAE
from circuitbench.shares import KINDS, SHARED, AgentReport, agent_view, kinds_of
from circuitbench.stream import shipped_text, token_rows
from circuitbench.trainer import Trainer
from circuitbench.world import WorldTokenizer, world_tokenizer

TEXTS = ['In the beginning God created the heaven and the earth.', 'naïve café — “quoted” …', '日本語 and 한국어\tand\n\nעברית',
         'a👩‍👩‍👧b 🇩🇪 e\u0301 \u00a0x', '  indented,  1,000.50  \r\n\tend ', 'x', ' ', 'Zurishaddai\'s "thou" \ufffd!']
QUICK = dict(k=8, d_sae=128, tokens=20_000, batch_size=256, context=64, progress=False)
WORLD = Path(importlib.util.find_spec('rwkv').origin).parent/'rwkv_vocab_v20230424.txt'


@pytest.fixture(scope='module')
def small(): return [(load_model(f'mock://{name}-tiny'), 'blocks.1.resid_post') for name in ('mamba2', 'rwkv7')]


@pytest.fixture(scope='module')
def text(): return list(shipped_text())[:700]


@pytest.fixture(scope='module')
def cross(small, text): return train_agents(small, text, **QUICK)


@pytest.fixture(scope='module')
def bpe(): return load_model('tiny://mamba2').tokenizer


@pytest.fixture(scope='module')
def world(): return world_tokenizer(WORLD)


def with_tokenizer(name, tokenizer):
    "A random model that takes the ids of a tokenizer."
    hf = load_model(f'mock://{name}-tiny').hf
    hf.resize_token_embeddings(70_000)
    return HookedModel.from_module(hf, tokenizer, name=name)


@pytest.fixture(scope='module')
def three(bpe, world):
    return [with_tokenizer('mamba2', bpe), with_tokenizer('llama', byte_tokenizer()), with_tokenizer('mamba1', world)]


# -- ends of tokens ------------------------------------------------------------------------
def byte_ends(pieces, text):
    "The character at which each token ends, from the tokens' bytes; -1 for within a character."
    between, n = {0: 0}, 0
    for i, c in enumerate(text):
        n += len(c.encode())
        between[n] = i + 1
    return [between.get(int(n), -1) for n in np.cumsum([len(p) for p in pieces])]


@pytest.mark.parametrize('text', TEXTS)
def test_bytes_end_where_their_characters_do(text):
    (ids, ends), = token_ends(byte_tokenizer(), [text])
    assert len(ids) == len(text.encode()) and ends == byte_ends([b'.']*len(ids), text)


@pytest.mark.parametrize('text', TEXTS)
def test_world_tokens_end_where_their_bytes_do(world, text):
    (ids, ends), = token_ends(world, [text])
    assert ids == world(text, add_special_tokens=False)['input_ids']
    assert ends == byte_ends([t.encode('latin-1') for t in world.convert_ids_to_tokens(ids)], text)


@pytest.mark.parametrize('text', TEXTS)
def test_bpe_tokens_end_where_the_text_decodes(bpe, text):
    "The shipped tokenizer puts a space before a line; up to blanks, what has been read decodes to the text up to the end."
    (ids, ends), = token_ends(bpe, [text])
    assert ends[-1] == len(text) and len(ids) == len(ends)
    bare = lambda s: ''.join(s.split())
    for i, end in enumerate(ends):
        read = bpe.decode(ids[:i + 1])
        if end >= 0: assert bare(read) == bare(text[:end])
        else:                                                             # a part of a character; a space was put beside
            assert read.endswith('\ufffd') or not bare(read) or bare(read) == bare(bpe.decode(ids[:i + 2]))


def test_a_tokenizer_that_changes_the_text_is_refused():
    class Lower(WorldTokenizer):
        def _tokenize(self, text, **kwargs): return super()._tokenize(text.lower(), **kwargs)
    with pytest.raises(ValueError, match="got a Lower that makes 'one' of 'One'"): token_ends(Lower(str(WORLD)), ['One'])


# -- alignment -----------------------------------------------------------------------------
def test_pairs_are_all_common_ends_and_no_other(three):
    lines = [t + '\n' for t in TEXTS]
    pairs = align(three, lines, context=4096)
    assert (pairs.row == 0).all() and pairs.at.shape == (3, len(pairs))
    want, start = [], [0, 0, 0]
    for line in lines:
        ends = [token_ends(m.tokenizer, [line])[0][1] for m in three]
        for end in sorted(set(ends[0]) & set(ends[1]) & set(ends[2]) - {-1}):
            want.append([s + e.index(end) for s, e in zip(start, ends)])
        start = [s + len(e) for s, e in zip(start, ends)]
    assert pairs.at.T.tolist() == want and all((a.diff() > 0).all() for a in pairs.at)
    every = ''.join(lines)
    for j in range(0, len(pairs), 7):                                     # the same text, decoded whole
        read = [m.tokenizer.decode(ids[0, :p + 1]) for m, ids, p in zip(three, pairs.ids, pairs.at[:, j])]
        assert read[1] == read[2] and every.startswith(read[1]) and ''.join(read[0].split()) == ''.join(read[1].split())


@pytest.mark.parametrize('context', [12, 40, 300])
def test_rows_hold_the_same_text_and_fit(three, context):
    lines = (TEXTS + list(shipped_text('held'))[:12])*2
    whole, pairs = align(three, lines, context=100_000), align(three, lines, context=context)
    assert all(ids.shape[1] <= context and len(ids) == int(pairs.row[-1]) + 1 for ids in pairs.ids)
    assert (pairs.row.diff() >= 0).all() and len(pairs) >= .9*len(whole)
    bare, first = lambda s: ''.join(s.replace('\ufffd', '').split()), None
    for model, ids, at, all_ids, n in zip(three, pairs.ids, pairs.at, whole.ids, whole.read):
        rows = [ids[r, :int(at[pairs.row == r].max()) + 1] for r in range(len(ids))]
        kept = [bare(model.tokenizer.decode(r)) for r in rows]
        first = first or kept
        assert kept == first
        if context == 300: assert torch.equal(torch.cat(rows), all_ids[0, :n])              # nothing is left out


def test_equal_tokenizers_pair_every_token(small, text):
    pairs = align([m for m, _ in small], text, context=50, limit=2000)
    rows = token_rows(small[0][0], text, 50, 2000)
    assert torch.equal(pairs.ids[0], pairs.ids[1]) and torch.equal(pairs.ids[0], rows) and len(pairs) == 2000
    assert torch.equal(pairs.at[0], pairs.at[1]) and torch.equal(pairs.at[0], torch.arange(50).repeat(40))
    again = align([m for m, _ in small], rows, context=50)                # ids are taken as they are
    assert torch.equal(again.ids[1], rows) and torch.equal(again.at, pairs.at)


def test_text_that_cannot_be_aligned_is_refused(small, three):
    none = load_model('mock://mamba2-tiny')
    none.tokenizer = None
    with pytest.raises(ValueError, match='has no tokenizer'): align([none, small[0][0]], 'text')
    with pytest.raises(ValueError, match='expected more'): align(three, '')
    with pytest.raises(ValueError, match='within context=3'): align([m for m, _ in small], '👩', context=3)
    with pytest.raises(ValueError, match='got context=1'): align(three, 'text', context=1)


# -- what a dictionary says ----------------------------------------------------------------
@pytest.fixture(scope='module')
def truth():
    "Rows of two agents that share 12 of 36 directions, a coder trained on them; the second agent is 50 times as large."
    data = planted(d=64, n=36, k=3, rows=30_000)
    known = data.directions.clone()
    known[12:24, 32:], known[24:, :32] = 0, 0
    known = F.normalize(known, dim=1)
    known[:, 32:] *= 50
    x = data.codes() @ known
    cfg = SAEConfig(64, 64, 3, 'embed', 'one', shape=(32,), activation='batchtopk', beside=(Place('embed', (32,), 'two'),))
    t = Trainer(cfg, x[:4096], 400)
    for batch in (x.split(512)*8)[:400]: t.step(batch)
    return t.sae(), x[:8000], torch.arange(8000)//100, known


def test_planted_features_are_shared_or_specific_as_they_were_made(truth):
    sae, x, row, known = truth
    r = compare_agents(sae, x.split(1000), row, ('one', 'two'))
    unit = torch.tensor([1.]*32 + [50.]*32)
    cos = F.normalize(known/unit, dim=1) @ F.normalize(sae.W_dec/unit, dim=1).T
    best, j = cos.max(1)
    assert best.min() > .9 and r.kind[j].tolist() == [SHARED]*12 + [0]*12 + [1]*12
    assert (r.readable[j[12:24], 0] > .5).all() and (r.readable[j[12:24], 1] < .2).all() and r.fvu.max() < .05
    assert r.count()['shared by all'] in range(12, 15) and (r.agree[j[:12], 0] > r.chance.max()).all()


def test_figures_are_numpys(truth):
    sae, x, row, _ = truth
    r = compare_agents(sae, x.split(1000), row, ('one', 'two'), top=3)
    v, z, W = x.double().numpy(), sae.encode(x).double().numpy(), sae.W_dec.double().numpy()
    sides = slice(0, 32), slice(32, 64)
    total = [np.square(v[:, s] - v[:, s].mean(0)).sum() for s in sides]
    norm = np.stack([np.linalg.norm(W[:, s], axis=1)/np.sqrt(t/8000) for s, t in zip(sides, total)], 1)
    assert np.allclose(r.norm, norm, rtol=1e-4) and np.allclose(r.share, norm/norm.sum(1, keepdims=True), atol=1e-5)
    own = [v[:, s] @ W[:, s].T for s in sides]
    moved = np.roll(own[1], 4000, 0)                                      # half of the 80 rows further on
    for j in range(0, 64, 5):
        assert abs(np.corrcoef(own[0][:, j], own[1][:, j])[0, 1] - r.agree[j, 0]) < 1e-3
        assert abs(np.corrcoef(own[0][:, j], moved[:, j])[0, 1] - r.chance[j, 0]) < 1e-3
    for got, kept in ((r.fvu, 1.), (r.fvu_shared, (r.kind == SHARED).numpy())):
        rest = v - z*kept @ W - sae.b_dec.double().numpy()
        assert np.allclose(got, [np.square(rest[:, s]).sum()/t for s, t in zip(sides, total)], rtol=1e-3)
    A, B = (W[:, s]/np.linalg.norm(W[:, s], axis=1, keepdims=True) for s in sides)
    assert np.allclose(r.frequency, (z > 0).mean(0)) and np.allclose(r.cosine[:, 0], (A*B).sum(1), atol=1e-4)
    peak = z.reshape(80, 100, 64)
    for j in (r.frequency > .01).nonzero()[:10, 0].tolist():
        order = np.argsort(-peak[:, :, j].max(1))[:3]
        assert r.at[j].tolist() == [int(o)*100 + int(peak[o, :, j].argmax()) for o in order]


def test_what_an_agent_can_tell_is_scikit_learns_regression(truth):
    sae, x, row, _ = truth
    r, z, odd = compare_agents(sae, x.split(1000), row, ('one', 'two')), sae.encode(x).numpy(), np.arange(8000)//1000 % 2 == 1
    live = z[odd].std(0) > 0
    for i, v in enumerate(x.split(32, 1)):
        fit = LinearRegression().fit(v.numpy()[~odd], z[~odd])
        left = np.square(z[odd] - fit.predict(v.numpy()[odd])).sum(0)/np.square(z[odd] - z[odd].mean(0)).sum(0).clip(1e-9)
        assert np.abs(1 - left - r.readable[:, i].numpy())[live].max() < .01


def test_shares_do_not_depend_on_an_agents_units(truth):
    sae, x, row, _ = truth
    r = compare_agents(sae, x.split(1000), row, ('one', 'two'))
    unit, other = torch.tensor([.01]*32 + [7.]*32), SAE(sae.cfg)
    for name, v in sae.named_parameters(): getattr(other, name).data = v.clone()
    other.W_dec.data, other.b_dec.data, other.W_enc.data = sae.W_dec*unit, sae.b_dec*unit, sae.W_enc/unit[:, None]
    again = compare_agents(other, (x*unit).split(1000), row, ('one', 'two'))
    assert torch.allclose(again.share, r.share, atol=1e-4) and torch.allclose(again.fvu, r.fvu, atol=1e-3)
    assert (again.kind != r.kind).sum() <= 1


def test_kinds_at_their_thresholds():
    norm = torch.tensor([[.31, .69], [.29, .71], [.05, .95], [.95, .05], [.89, .11], [.5, .5], [.5, .5]])
    live, related = torch.tensor([1, 1, 1, 1, 1, 1, 0]) > 0, torch.tensor([1, 1, 1, 1, 1, 0, 1]) > 0
    named = lambda k: KINDS[k] if k < 0 else k
    assert [named(k) for k in kinds_of(norm, live, related, .6, .9).tolist()] == [
        'shared by all', 'between', 1, 0, 'between', 'even norms, unrelated', 'never fires']
    norm, yes = torch.tensor([[1., 1, 1], [1, 1, .4], [1, .01, .01]]), torch.ones(3) > 0
    assert kinds_of(norm, yes, yes, .6, .9).tolist() == [SHARED, -3, 0]


def test_rows_in_one_part_are_refused(truth):
    sae, x, row, _ = truth
    with pytest.raises(ValueError, match='in one part, expected more text'): compare_agents(sae, [x], row, ('one', 'two'))


# -- models --------------------------------------------------------------------------------
def test_activations_are_those_of_each_row_alone(three, text):
    "Of a coder whose latents read one channel of one agent each, the highest pair is found by runs of single rows, not filled up."
    agents, lines = [(m, 'blocks.1.resid_post') for m in three], TEXTS + text[:60]
    pairs = align(three, lines, 40, 1300)
    assert len({ids.shape[1] for ids in pairs.ids}) > 1 and len(pairs.ids[0]) > 110                # more than one part
    widths = [m.site_shape(s, 1, 1)[2] for m, s in agents]
    first, *others = (Place(s, (w,), m.name) for (m, s), w in zip(agents, widths))
    sae = SAE(SAEConfig(sum(widths), 3, 1, first.site, first.model, shape=first.shape, beside=tuple(others), activation='relu'))
    W = torch.zeros(3, sum(widths))
    for i in range(3): W[i, sum(widths[:i]) + i] = 1
    sae.W_dec.data, sae.W_enc.data = W, W.T.contiguous()
    report = agent_report(agents, sae, lines, tokens=1300, context=40, top=1)
    for i, (model, site) in enumerate(agents):
        best = -1.
        for r in range(len(pairs.ids[i])):
            at = pairs.at[i][pairs.row == r]
            x = model.run_with_cache(pairs.ids[i][r:r + 1, :int(at.max()) + 1], site)[1][site][0, at, i]
            if float(x.max()) > best: best, where = float(x.max()), int((pairs.row < r).sum() + x.argmax())
        assert int(report.at[i, 0]) == where
        for j, (m, ids, at) in enumerate(zip(three, pairs.ids, pairs.at)):
            assert report.words(i, j) == m.strings(ids[pairs.row[where], at[where]][None])


def test_a_crosscoder_is_trained_saved_and_read_again(small, text, cross, tmp_path):
    assert [(p.model, p.site, p.shape) for p in cross.cfg.reads] == [(m.name, s, (32,)) for m, s in small]
    r = agent_report(small, cross, text, tokens=5000, context=64)
    assert r.fvu.max() < .6 and sum(r.count().values()) == 128 and (r.fvu_shared >= r.fvu - 1e-3).all()
    again = agent_report(small, SAE.load(cross.save(tmp_path/'sae')), text, tokens=5000, context=64)
    assert torch.equal(again.kind, r.kind) and again.strings == r.strings
    back = AgentReport.load(r.save(tmp_path/'r.safetensors'))
    assert repr(back) == repr(r) and back.words(3, 1) == r.words(3, 1) and back.pairs == [(0, 1)]


def test_the_means_are_put_back(small, text, cross):
    "The coder takes activations as they come: the bias holds the means that were taken off in training."
    rows = token_rows(small[0][0], text, 64, 4000)
    x = torch.cat([m.run_with_cache(rows, s)[1][s].flatten(0, 1) for m, s in small], 1) + 0.
    assert (x - cross(x)).square().sum()/(x - x.mean(0)).square().sum() < .6


def test_controls_an_agent_with_itself_and_shuffled_tokens(small, text):
    c = agent_controls(small, 20_000, 5000, 64, **{k: v for k, v in QUICK.items() if k not in ('tokens', 'context')})
    itself, shuffled = c['itself'], c['shuffled']
    assert itself.count()['shared by all'] == int(itself.live.sum()) and (itself.share[itself.live] - .5).abs().max() < .15
    assert itself.agents[1] == itself.agents[0] + ' (2)' and itself.cosine[itself.live].median() > .8
    assert shuffled.count()['shared by all'] <= .05*int(shuffled.live.sum()) and shuffled.fvu_shared.min() > .9


def test_layers_of_one_model_are_agents_too(small, text):
    agents = [(small[0][0], f'blocks.{i}.resid_post') for i in (0, 1)]
    sae = train_agents(agents, text, **QUICK | {'tokens': 5000})
    r = agent_report(agents, sae, text, tokens=5000, context=64)
    assert r.agents == ('mock://mamba2-tiny blocks.0.resid_post', 'mock://mamba2-tiny blocks.1.resid_post')
    assert r.count()['shared by all'] > .5*int(r.live.sum()) and r.cosine.isfinite().all()


def test_a_training_follows_from_its_seed(small, text):
    quick = QUICK | {'tokens': 3000}
    a, b, c = (train_agents(small, text, seed=s, **quick) for s in (1, 1, 2))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)


def test_the_view_shows_the_shares_beside_the_controls(small, text, cross):
    r = agent_report(small, cross, text, tokens=5000, context=64)
    html = agent_view(r, {'shuffled': r}, 3)
    assert all(a in html for a in r.agents) and 'shuffled' in html and 'shared by all' in html and '<svg' in html
    j = r.examples(SHARED, 1)[0]
    assert repr(r.words(j, 0)[0]).replace("'", '&#x27;') in html
    assert len(r.plot({'shuffled': r}).axes) == 2


def test_what_cannot_be_is_refused(small, text, cross):
    (mamba, site), (rwkv, _) = small
    with pytest.raises(ValueError, match='got 1 agents'): train_agents(small[:1], text, **QUICK)
    with pytest.raises(ValueError, match='which means 2; expected one'): train_agents([(mamba, 'resid_post'), (rwkv, site)], text, **QUICK)
    twin = load_model('mock://mamba2-tiny')
    with pytest.raises(ValueError, match='two models of one name'): train_agents([(mamba, site), (twin, site)], text, **QUICK)
    with pytest.raises(ValueError, match='for a coder of'): agent_report(small[::-1], cross, text)
    with pytest.raises(ValueError, match='expected more'): agent_report(small, cross, '')


@pytest.mark.slow
def test_the_shipped_models_share_most_and_by_chance_nothing():
    agents = [(load_model('tiny://mamba2'), 'blocks.3.resid_post'), (load_model('tiny://rwkv7'), 'blocks.2.resid_post')]
    settings = dict(d_sae=1024, progress=False)
    r = agent_report(agents, train_agents(agents, tokens=60_000, **settings))
    c = agent_controls(agents, 60_000, **settings)
    share = lambda r: r.count()['shared by all']/int(r.live.sum())
    assert share(c['itself']) > .99 and share(c['shuffled']) < .03 < .4 < share(r)
