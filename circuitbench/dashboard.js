// Draws the latents of one SAE from the numbers in its page: a list with search and order, and the latent that is chosen. No build step.

const ROW = 46                                                 // pixels of a row of the list

const CSS = `
header,main,nav{max-width:76rem} @media(max-width:600px){h1{font-size:1.35rem}} .dash{display:grid;grid-template-columns:20rem minmax(0,1fr);gap:0 1.6rem;align-items:start}
.dash .side{position:sticky;top:.6rem;display:flex;flex-direction:column;height:calc(100vh - 1.2rem);min-height:20rem}
.dash .ask{display:grid;grid-template-columns:1fr auto;gap:.4rem;margin-bottom:.4rem} .dash .ask input{grid-column:1/3}
.dash input,.dash select,.dash button{font:inherit;font-size:13px;padding:.3rem .6rem;border:1px solid var(--soft);
border-radius:6px;color:inherit;background:var(--back);min-width:0} .dash button{cursor:pointer}
.dash .count{align-self:center;font-size:12px;color:var(--soft)}
.dash .list{flex:1;overflow-y:auto;position:relative;border:1px solid var(--line);border-radius:6px;outline-offset:-2px}
.dash .tall{position:relative} .dash .row{position:absolute;left:0;right:0;height:${ROW}px;padding:0 .7rem;box-sizing:border-box;cursor:pointer;
font-size:14px;line-height:1.35;display:grid;grid-template-columns:3em minmax(0,1fr) auto;gap:0 .6em;align-content:center;align-items:baseline;border-bottom:1px solid var(--line)}
.dash .row>*{white-space:pre;overflow:hidden;text-overflow:ellipsis} .dash .row b{font-weight:600}
.dash .row small{grid-column:2/4;font-size:12px;color:var(--soft)} .dash .row i{font-style:normal;font-size:12px;color:var(--soft)}
.dash .row:hover{background:color-mix(in srgb,var(--line) 35%,var(--back))} .dash .row[aria-selected=true]{background:var(--mark)}
.dash .row[aria-selected=true] :is(small,i){color:inherit}
.dash .head{display:flex;flex-wrap:wrap;gap:.4rem .8rem;align-items:center} .dash h3{font-size:1.3rem;margin:0;scroll-margin-top:.6rem}
.dash .head span{flex:1;font-size:12px;color:var(--soft)} .dash .label{font-size:1.1rem;font-weight:600;margin:.5rem 0 .2rem}
.dash h4{font:inherit;font-weight:600;margin:1.4rem 0 .3rem} .dash h5{font:inherit;font-size:12px;color:var(--soft);margin:.6rem 0 .1rem}
.dash p{margin:.3rem 0} .dash .tk{line-height:1.75;padding:.15rem 0;border-bottom:1px solid var(--line);font-size:14px}
.dash .tk span{cursor:default} .dash output{position:fixed;right:1rem;bottom:1rem;z-index:1;max-width:calc(100vw - 2rem);box-sizing:border-box;
margin:0;min-height:0;padding:.3rem .7rem;border:1px solid var(--soft);border-radius:6px;background:var(--back);color:var(--ink);white-space:pre-wrap;
overflow-wrap:anywhere} .dash output:empty{display:none}
.dash .co{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,14rem),1fr));gap:0 1.8rem}
.dash .low{align-items:end} .dash .bars{display:grid;grid-template-columns:minmax(3em,auto) minmax(4rem,1fr) auto;gap:1px .6em;font-size:12px;align-items:center}
.dash .bars>span:nth-child(3n+1){text-align:right;white-space:pre;max-width:12em;overflow:hidden;text-overflow:ellipsis}
.dash .bars>span:nth-child(3n){color:var(--soft);text-align:right}
.dash .track{position:relative;height:17px} .dash .track u{position:absolute;top:2px;bottom:2px;background:var(--s1);min-width:1px}
.dash .track u.neg{background:var(--s0)} .dash .track s{position:absolute;top:0;bottom:0;width:1px;background:var(--soft)}
.dash svg{display:block;width:100%;height:120px;overflow:visible;border-bottom:1px solid var(--soft)}
.dash svg rect{fill:var(--s2)} .dash svg .hit{fill:transparent} .dash svg path{stroke:var(--s0);stroke-width:2}
.dash .ends{display:flex;justify-content:space-between;font-size:12px;color:var(--soft)} .dash .near{display:flex;flex-direction:column;gap:3px}
.dash .near button{display:grid;grid-template-columns:3.2em 3.2em minmax(0,1fr);gap:.5em;text-align:left;border-color:var(--line)}
.dash .near button *{white-space:pre;overflow:hidden;text-overflow:ellipsis} .dash .near i{font-style:normal;color:var(--soft)}
.dash .up{display:none}
@media(max-width:820px){.dash{grid-template-columns:minmax(0,1fr)} .dash .side{position:static;height:60vh;margin-bottom:1.4rem} .dash .up{display:inline-block}}`

// -- reading -----------------------------------------------------------------------------
const bytes = id => { const s = atob(document.getElementById(id).textContent), out = new Uint8Array(s.length)
  for (let i = 0; i < s.length; i++) out[i] = s.charCodeAt(i)
  return out }

function halves(u16) {                                         // half-precision numbers
  return Float32Array.from(u16, u => { const e = u >> 10 & 31, m = u & 1023
    return (u >> 15 ? -1 : 1) * (e > 30 ? (m ? NaN : Infinity) : e ? 2 ** (e - 15) * (1 + m / 1024) : m * 2 ** -24) })
}

async function read(id) {                                      // what the page holds: words, and arrays with their shapes
  const stream = new Blob([bytes(id)]).stream().pipeThrough(new DecompressionStream('gzip'))
  const all = await new Response(stream).arrayBuffer(), size = new DataView(all).getUint32(0, true)
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(all, 4, size))), data = all.slice(4 + size), arrays = {}
  for (const [name, [kind, at, shape]] of Object.entries(about.parts)) {
    const n = shape.reduce((a, b) => a * b, 1), type = {u1: Uint8Array, i4: Int32Array, f2: Uint16Array, f4: Float32Array}[kind]
    const v = new type(data, at, n)
    arrays[name] = Object.assign(v, {dims: shape, half: kind == 'f2'})
  }
  return {...about, ...arrays}
}

// -- words -------------------------------------------------------------------------------
const num = x => Number.isInteger(x) ? x.toLocaleString('en') : !isFinite(x) ? String(x) : Math.abs(x) >= 1e6 || Math.abs(x) < 1e-3
  ? x.toExponential(1) : Math.abs(x) >= 1000 ? Math.round(x).toLocaleString('en') : String(+x.toPrecision(3))
const share = x => x >= .001 ? (100 * x).toFixed(2) + '%' : num(x)
const plain = s => s.replace(/[\n\r\t]/g, c => ({'\n': '⏎', '\t': '⇥', '\r': '␍'})[c]).replace(/[\x00-\x1f\x7f]/g, '□') || '∅'
const dotted = s => plain(s).replaceAll(' ', '·')
function make(tag, props, ...inside) {
  const {data, aria, ...own} = props || {}, e = Object.assign(document.createElement(tag), own)
  for (const [k, v] of Object.entries(aria || {})) e.setAttribute(k == 'role' ? k : `aria-${k}`, v)
  Object.assign(e.dataset, data)
  e.append(...inside.filter(x => x !== null && x !== undefined))
  return e
}

// -- the page ----------------------------------------------------------------------------
function mount(root, r, ramps) {
  const N = r.frequency.length, C = r.start.dims[1], W = r.window, T = r.top, [Q, D] = r.intervals
  const css = (k, i) => '#' + [0, 1, 2].map(c => ramps[768 * k + 3 * i + c].toString(16).padStart(2, '0')).join('')
  const ink = (k, i) => { const [x, y, z] = [0, 1, 2].map(c => { const v = ramps[768 * k + 3 * i + c] / 255
    return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 }); return .2126 * x + .7152 * y + .0722 * z < .179 ? '#fff' : '#000' }
  const back = Array.from({length: 256}, (_, i) => `light-dark(${css(2, i)},${css(3, i)})`)
  const fore = Array.from({length: 256}, (_, i) => `light-dark(${ink(2, i)},${ink(3, i)})`)

  // what is known of a latent
  const row = (v, j) => { const n = v.dims.slice(1).reduce((a, b) => a * b, 1); const part = v.subarray(j * n, (j + 1) * n)
    return v.half ? halves(part) : part }
  const peakToken = (j, c) => r.text[r.start[j * C + c] + r.spot[j * C + c]]
  const words = (j, most) => { const seen = new Set()
    for (let c = 0; c < T && seen.size < most; c++) if (r.start[j * C + c] >= 0) seen.add(r.strings[peakToken(j, c)])
    return [...seen].map(dotted).join('  ') }
  const raised = (j, n) => r.up ? [...row(r.up, j).subarray(0, n)].map(i => dotted(r.strings[i])).join('  ') : ''
  const called = j => r.labels[j] || words(j, 4)

  // -- order and search
  const alive = [...Array(N).keys()].filter(j => r.frequency[j] > 0)
  const keys = {'most frequent': j => -r.frequency[j], 'rarest': j => r.frequency[j], 'strongest': j => -r.peak[j], 'number': j => j,
                'best told by its label': j => -(r.scores[j] ? r.scores[j][0] : -1)}
  function find(sort, text) {
    const by = keys[sort], order = alive.slice().sort((a, b) => by(a) - by(b) || a - b), want = text.toLowerCase()
    if (!want) return order
    const hit = r.strings.map(s => s.toLowerCase().includes(want))
    return order.filter(j => { if (String(j) == want || (r.labels[j] || '').toLowerCase().includes(want)) return true
      for (let c = 0; c < T; c++) if (r.start[j * C + c] >= 0 && hit[peakToken(j, c)]) return true
      return r.up ? row(r.up, j).some(i => hit[i]) : false })
  }

  // -- the frame
  root.innerHTML = `<style>${CSS}</style><div class="dash"><div class="side"><div class="ask">
<input type="search" placeholder="Search tokens, labels, numbers" aria-label="Search tokens, labels, numbers">
<select aria-label="Order"></select><span class="count" aria-live="polite"></span></div>
<div class="list" tabindex="0" role="listbox" aria-label="Latents"><div class="tall"></div></div></div>
<article aria-label="The chosen latent"></article><output></output></div>`
  const $ = s => root.querySelector(s), list = $('.list'), tall = $('.tall'), box = root.firstElementChild.nextElementSibling
  $('select').append(...r.orders.map(s => make('option', {}, s)))
  let order = [], chosen = -1

  // -- the list: only what is in sight is there
  function rows() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4), last = Math.min(order.length, first + Math.ceil(list.clientHeight / ROW) + 9)
    tall.replaceChildren(...order.slice(first, last).map((j, i) => {
      const label = r.labels[j], below = label ? words(j, 4) : r.up ? 'raises  ' + raised(j, 4) : `highest ${num(r.peak[j])}`
      return make('div', {className: 'row', id: `latent-${j}`, style: `top:${(first + i) * ROW}px`, onclick: () => go(j, true),
        aria: {role: 'option', selected: j == chosen, setsize: order.length, posinset: first + i + 1}},
        make('b', {}, String(j)), make('span', {title: called(j)}, called(j)), make('i', {}, share(r.frequency[j])), make('small', {}, below)) }))
    if (order.includes(chosen)) list.setAttribute('aria-activedescendant', `latent-${chosen}`)
    else list.removeAttribute('aria-activedescendant')
  }
  function search() {
    order = find($('select').value, $('input').value.trim())
    tall.style.height = `${order.length * ROW}px`; list.scrollTop = 0
    $('.count').textContent = order.length == alive.length ? `${num(order.length)} latents` : `${num(order.length)} of ${num(alive.length)}`
    rows(); place()
  }
  function reveal() {
    const y = order.indexOf(chosen) * ROW
    if (y >= 0 && (y < list.scrollTop || y + ROW > list.scrollTop + list.clientHeight)) list.scrollTop = y - list.clientHeight / 2 + ROW / 2
    rows()
  }
  function place() { const i = order.indexOf(chosen), e = $('.head span')
    if (e) e.textContent = i < 0 ? 'not among those found' : `${num(i + 1)} of ${num(order.length)}, ${$('select').value}` }

  // -- one latent
  function strip(j, c) {
    const at = r.start[j * C + c], spot = r.spot[j * C + c], e = make('div', {className: 'tk', aria: {role: 'group'}})
    let top = 0
    for (let k = 0; k < W; k++) {
      const q = r.acts[(j * C + c) * W + k], token = r.strings[r.text[at + k]], say = `${JSON.stringify(token)}: ${q ? num(q / 255 * r.peak[j]) : 'does not fire'}`
      const i = 1 + Math.round(254 * q / 255)
      top = Math.max(top, q)
      e.append(make('span', {className: k == spot ? 'mk' : '', tabIndex: k ? -1 : 0, title: say, data: {t: say},
                             style: q ? `background:${back[i]};color:${fore[i]}` : ''}, plain(token)))
    }
    e.setAttribute('aria-label', `${W} tokens, at most ${num(top / 255 * r.peak[j])} at ${JSON.stringify(r.strings[r.text[at + spot]])}`)
    return e
  }
  const more = (all, n, what) => { const box = make('div', {}, ...all.slice(0, n).map(f => f()))
    if (all.length > n) box.append(make('button', {type: 'button', style: 'margin-top:.5rem', onclick: e => { e.target.replaceWith(...all.slice(n).map(f => f())) }}, what))
    return box }
  const there = (j, from, to) => Array.from({length: to - from}, (_, k) => from + k).filter(c => r.start[j * C + c] >= 0)
  const legend = j => make('div', {className: 'lg', style: 'margin:.4rem 0 0', innerHTML: `<span>0 <b style="background:linear-gradient(90deg,${
    [1, 32, 64, 96, 128, 160, 192, 224, 255].map(i => back[i])})"></b> ${num(r.peak[j])} activation</span>`})
  function bars(names, values, title) {
    const lo = Math.min(0, ...values), hi = Math.max(0, ...values), span = hi - lo || 1, e = make('div', {className: 'bars'})
    names.forEach((name, i) => { const v = values[i], a = (Math.min(v, 0) - lo) / span, b = (Math.max(v, 0) - lo) / span
      e.append(make('span', {title: name}, name), make('div', {className: 'track'}, make('u', {className: v < 0 ? 'neg' : '',
        style: `left:${100 * a}%;width:${100 * (b - a)}%`}), make('s', {style: `left:${100 * (-lo / span)}%`})), make('span', {}, num(v))) })
    return make('div', {}, make('h4', {}, title), e)
  }
  function svg(title, inside, left, right, high) {
    const e = make('div', {innerHTML: `<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img">${inside}</svg>`})
    e.firstChild.setAttribute('aria-label', `${title}: ${high}, from ${left} to ${right}`)
    return make('div', {}, make('h4', {}, title), make('div', {className: 'ends'}, make('span', {}, high)), e,
      make('div', {className: 'ends'}, make('span', {}, left), make('span', {}, right)))
  }
  function histogram(j) {
    const counts = row(r.counts, j), last = counts.findLastIndex(n => n > 0) + 1, high = Math.max(...counts), w = 1000 / last, width = r.width[j]
    const bar = i => `<rect x="${w * i + .5}" width="${w - 1}" y="${100 - 100 * counts[i] / high}" height="${100 * counts[i] / high}"/>
<rect class="hit" x="${w * i}" width="${w}" y="0" height="100" data-t="${num(width * i)} to ${num(width * (i + 1))}: ${num(counts[i])} tokens"/>`
    return svg('Where it fires, how strongly', Array.from({length: last}, (_, i) => bar(i)).join(''), '0', `activation ${num(width * last)}`, `${num(high)} tokens`)
  }
  function curve(v, title) {
    const most = Math.max(...v), log = most > 0 && v.every(x => x >= 0), w = log ? v.map(x => Math.log10(Math.max(x, most * 1e-4))) : v
    const lo = log ? Math.min(...w) : Math.min(0, ...w), hi = log ? Math.max(...w) : Math.max(0, ...w), span = hi - lo || 1, S = v.length - 1
    const x = i => 1000 * i / S, y = i => 100 * (hi - w[i]) / span, ends = log ? [10 ** lo, 10 ** hi] : [lo, hi]
    const line = `<path d="M${Array.from(v, (_, i) => `${x(i).toFixed(1)} ${y(i).toFixed(2)}`).join('L')}"/>`, said = `${num(ends[0])} to ${num(ends[1])}${log ? ', logarithmic' : ''}`
    const hit = Array.from(v, (_, i) => `<rect class="hit" x="${x(i - .5)}" width="${1000 / S}" y="0" height="100" data-t="${i} steps after it: ${num(v[i])}"/>`).join('')
    return svg(title, line + hit, 'at its step', `${S} steps after`, said)
  }
  function near(j, name, title, said) {
    const by = row(r[name + '_by'], j), all = [...row(r[name], j)].map((i, k) => [i, by[k]]).filter(([i]) => i >= 0)
    return make('div', {}, make('h4', {}, title), make('div', {className: 'note'}, said), make('div', {className: 'near'}, ...all.map(([i, v]) =>
      make('button', {type: 'button', onclick: () => go(i, true)}, make('b', {}, String(i)), make('i', {}, num(v)), make('span', {}, called(i))))))
  }
  function details(j) {
    const n = Math.round(r.frequency[j] * r.tokens), score = r.scores[j], out = []
    const step = (by, name) => make('button', {type: 'button', aria: {label: by < 0 ? 'Previous latent' : 'Next latent'}, onclick: () => walk(by)}, name)
    out.push(make('div', {className: 'head'}, make('h3', {id: 'chosen', tabIndex: -1}, `Latent ${j}`), make('span', {}), step(-1, '‹'), step(1, '›'),
      make('button', {type: 'button', className: 'up', onclick: () => { root.scrollIntoView(); list.focus() }}, 'List')))
    if (r.labels[j]) out.push(make('p', {className: 'label'}, r.labels[j]))
    if (!n) return [...out, make('p', {}, `Fires on none of the ${num(r.tokens)} tokens.`)]
    out.push(make('p', {}, `Fires on ${share(r.frequency[j])} of ${num(r.tokens)} tokens (${num(n)}), ${num(r.mean[j])} on average and ${num(r.peak[j])} at most.`
      + (score ? ` Its contexts are told by the label in ${Math.round(100 * score[0])}% of cases, by the label of another in ${Math.round(100 * score[1])}%.` : '')))
    out.push(make('h4', {}, 'Where it is highest'), more(there(j, 0, T).map(c => () => strip(j, c)), 6, 'Show all'), legend(j))
    if (Q) {
      const groups = []
      for (let q = Q - 1; q >= 0; q--) { const cs = there(j, T + q * D, T + (q + 1) * D), e = row(r.edges, j)
        if (cs.length) groups.push(make('h5', {}, `activation ${num(e[q])} to ${num(e[q + 1])}`), more(cs.map(c => () => strip(j, c)), 2, 'Show more')) }
      if (groups.length) out.push(make('h4', {}, 'Drawn at random, by activation'), make('div', {className: 'note'},
        `Each interval holds equally many of its firings${r.sampled < r.tokens ? `, on ${num(r.sampled)} tokens` : ''}.`), ...groups)
    }
    const co = make('div', {className: 'co'}, histogram(j)), tokens = v => [...row(v, j)].map(i => dotted(r.strings[i]))
    if (r.up) co.append(bars(tokens(r.up), [...row(r.up_by, j)], 'Tokens that it raises'), bars(tokens(r.down), [...row(r.down_by, j)], 'Tokens that it lowers'))
    out.push(co)
    if (r.up) out.push(make('div', {className: 'note'}, 'Tokens: what a unit of the direction adds to the logits past all later blocks, the mean over the vocabulary taken off, the division by the final norm left out.'))
    const written = r.written && row(r.written, j)
    if (written && !isNaN(written[0])) {
      const most = [...written.keys()].sort((a, b) => Math.abs(written[b]) - Math.abs(written[a])).slice(0, 16).sort((a, b) => a - b)
      out.push(bars(most.map(k => r.writers[k]), most.map(k => written[k]), 'What writes it'), make('div', {className: 'note'},
        'Added to the pre-activation at its highest contexts, beyond what each adds on average.' + (most.length < written.length ? ` The ${most.length} largest of ${written.length}.` : '')))
    }
    const effects = r.effects && row(r.effects, j), S = effects ? r.effects.dims[2] : 0
    if (effects && !isNaN(effects[0])) {
      const charts = r.curve_names.map((name, k) => curve(Float32Array.from(effects.subarray(k * S, (k + 1) * S), v => v * r.effects_high[j * r.curves.length + k]), name))
      const kl = effects.subarray(0, S).reduce((a, b) => a + b, 0) * r.effects_high[j * r.curves.length]
      out.push(make('div', {className: 'co low'}, ...charts), make('div', {className: 'note'},
        `The direction is added once, as strong as the latent is on average (${num(r.mean[j])}), at the same places of the text for every latent.`
        + (kl > 0 ? ` Of the KL, ${Math.round(100 * (kl - r.effects_high[j * r.curves.length] * effects[0]) / kl)}% comes after the step itself.` : '')))
    }
    if (r.near || r.together) out.push(make('div', {className: 'co'}, r.near ? near(j, 'near', 'Closest in direction', 'cosine of the decoder directions') : null,
      r.together ? near(j, 'together', 'On the same tokens', 'tokens with both over tokens with either') : null))
    return out
  }
  function go(j, follow) {
    if (!(j >= 0 && j < N)) return
    chosen = j
    $('article').replaceChildren(...details(j))
    reveal(); place()
    if (location.hash != `#latent=${j}`) history.replaceState(null, '', `#latent=${j}`)
    box.dataset.latent = j
    if (follow && getComputedStyle($('.up')).display != 'none') $('#chosen').scrollIntoView()
  }
  function walk(by) { const i = order.indexOf(chosen), k = i < 0 ? 0 : i + by
    if (k >= 0 && k < order.length) go(order[k]) }

  // -- listening
  $('input').oninput = $('select').onchange = search
  $('input').onkeydown = e => { if (e.key == 'Enter' && order.length) go(order[0], true) }
  list.onscroll = rows
  list.onkeydown = e => { const by = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10}[e.key], i = order.indexOf(chosen)
    if (by && order.length) go(order[Math.max(0, Math.min(order.length - 1, i < 0 ? 0 : i + by))])
    else if (e.key == 'Home' && order.length) go(order[0])
    else if (e.key == 'End' && order.length) go(order[order.length - 1])
    else return
    e.preventDefault() }
  const say = e => { $('output').textContent = e.target.dataset?.t || '' }
  $('article').onpointerover = say
  $('article').onpointerleave = () => { $('output').textContent = '' }
  $('article').addEventListener('focusin', say)
  $('article').onkeydown = e => { const by = {ArrowLeft: -1, ArrowRight: 1}[e.key], from = e.target, next = by && from.parentElement.className == 'tk'
      && (by < 0 ? from.previousElementSibling : from.nextElementSibling)
    if (next) { e.preventDefault(); from.tabIndex = -1; next.tabIndex = 0; next.focus() } }
  const wanted = () => { const m = /^#latent=(\d+)$/.exec(location.hash); return m ? +m[1] : -1 }
  addEventListener('hashchange', () => { if (wanted() >= 0) go(wanted()) })
  new ResizeObserver(rows).observe(list)
  search()
  go(wanted() >= 0 && wanted() < N ? wanted() : order[0] ?? 0)
  box.dataset.ready = alive.length
  performance.mark('drawn')
}

const root = document.getElementById('dash')
read('dash-data').then(r => mount(root, r, bytes('dash-ramps'))).catch(e => { root.textContent = `This page cannot be drawn here: ${e}`; throw e })
