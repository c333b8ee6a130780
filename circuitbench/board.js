// Draws a circuit: `render` is what anywidget calls, `boards` what a page of its own does. No build step.

const CSS = `
body.cbv>:is(header,main,nav){max-width:80rem} @media(max-width:600px){body.cbv h1{font-size:1.35rem}}
.board [hidden]{display:none!important} .board .top{display:flex;gap:.4rem 1.4rem;align-items:flex-end;flex-wrap:wrap}
.board .size{flex:1 1 16rem;min-width:0} .board .curve{display:block;width:100%;height:84px;overflow:visible}
.board .curve text{font:11px system-ui,sans-serif;fill:var(--soft)} .board .n{display:block;width:100%;margin:0;accent-color:var(--s0)}
.board .now{flex:0 1 17rem;font-size:13px} .board .now b{font-size:1.15rem}
.board :is(button,select,input:not([type=range],[type=checkbox])){font:inherit;font-size:13px;padding:.2rem .55rem;border:1px solid var(--soft);
border-radius:6px;color:inherit;background:var(--back);min-width:0} .board button{cursor:pointer}
.board .count{width:5.4em} .board .bar{display:flex;flex-wrap:wrap;gap:.4rem .9rem;align-items:center;margin:.5rem 0;font-size:13px}
.board .bar label{display:inline-flex;align-items:center;gap:.3em;white-space:nowrap} .board .bar input[type=checkbox]{accent-color:var(--s0);margin:0}
.board .find{width:13em;flex:0 1 13em} .board .bar i,.board .lg i{display:inline-block;width:.9em;height:.9em;border-radius:3px;border:2px solid var(--c)}
.board .group{display:inline-flex;gap:.4rem .8rem;flex-wrap:wrap} .board .end{margin-left:auto;gap:.3rem}
.board .chips{display:flex;flex-wrap:wrap;gap:.3rem} .board .chips:not(:empty){margin-bottom:.4rem} .board .chips button{font-size:12px;padding:.05rem .5rem}
.board .stage{display:flex;gap:1.2rem;align-items:flex-start} .board .scene{position:relative;flex:1;min-width:0}
.board .side{flex:0 0 clamp(15rem,26%,21rem);min-width:0;position:sticky;top:.6rem;max-height:calc(100vh - 1.2rem);overflow-y:auto;padding-left:.2rem}
.board.slim .stage{display:block} .board.slim .side{position:static;max-height:none;margin-top:.6rem;padding:0}
.board.slim .side.has{position:sticky;bottom:0;z-index:1;max-height:42vh;background:var(--back);border-top:1px solid var(--soft);padding-top:.4rem}
.board canvas{position:absolute;left:0;top:0;pointer-events:none} .board .label{position:absolute;left:0;font-size:12px;line-height:1.2;color:var(--soft);white-space:pre}
.board .node{position:absolute;padding:0!important;border:2px solid var(--c)!important;border-radius:5px;line-height:1.2;font-size:13px!important;
overflow:hidden;white-space:pre;text-align:center;box-sizing:border-box} .board .node small{display:block;font-size:11px;line-height:1}
.board .node.off{border:1px dashed var(--line)!important;color:var(--soft)} .board .node.pill{font-size:11px;border-width:1.5px!important;border-radius:9px}
.board .node[aria-pressed=true]{outline:3px solid var(--ink);outline-offset:1px} .board .node.held::after{content:'';position:absolute;right:1px;top:1px;
width:6px;height:6px;border-radius:3px;background:currentColor}
.board .tip{position:absolute;z-index:2;pointer-events:none;font-size:12px;padding:.15rem .5rem;border:1px solid var(--soft);border-radius:6px;
background:var(--back);color:var(--ink);white-space:pre;max-width:100%;overflow:hidden;text-overflow:ellipsis;box-sizing:border-box}
.board h4{font:inherit;font-weight:600;margin:.8rem 0 .2rem;padding:0} .board .side h3{font-size:1.1rem;margin:0;padding:0;overflow-wrap:anywhere}
.board .list{display:grid;gap:1px;max-width:34rem} .board .list button{display:grid;grid-template-columns:minmax(0,1fr) 3.2rem 4em;gap:.5em;align-items:center;border:0;
padding:.1rem .2rem;text-align:left;border-radius:4px;font-size:13px} .board .list button:hover{background:color-mix(in srgb,var(--line) 45%,var(--back))}
.board .list span{white-space:pre;overflow:hidden;text-overflow:ellipsis} .board .list b{font-weight:400;text-align:right}
.board .list u{display:block;height:9px;border-radius:2px;min-width:1px} .board .do{display:flex;gap:.4rem;margin:.4rem 0;flex-wrap:wrap}
.board .lg .scale{position:relative;display:inline-block;vertical-align:top;width:25em;height:2.2em;max-width:calc(100% - 4em)} .board .lg .scale b{position:absolute;left:0;top:0;width:100%;margin:0}
.board .lg .scale em{position:absolute;top:1em;font-style:normal;transform:translateX(-50%);white-space:nowrap} .board .lg{align-items:flex-start;margin-top:.6rem}
.board.slim .lg .scale em:nth-of-type(even){display:none} .board .lg .scale em:first-of-type{transform:none} .board .lg .scale em:last-child{transform:translateX(-100%)}
.board .ask{overflow-wrap:anywhere} .board .told{overflow-x:auto} .board{--stream:light-dark(#b01e5d,#ff93bb)}
.board .lay{gap:0} .board .lay button{border-radius:0;margin-left:-1px} .board .lay button:first-child{border-radius:6px 0 0 6px} .board .lay button:last-child{border-radius:0 6px 6px 0}
.board .lay button[aria-pressed=true]{background:var(--ink);color:var(--back);border-color:var(--ink)}
.board.spread .scene{overflow-x:auto;overflow-y:hidden} .board.spread .label{z-index:1;background:var(--back);padding-right:.3em}
.board .lg i.along{width:1.8em;height:.45em;border:0;border-top:1.5px solid var(--s2);border-radius:0}
.board .word{position:absolute;font-size:11px;line-height:1;color:var(--soft);white-space:pre;cursor:default} .board .word.slant{transform:rotate(55deg);transform-origin:0 0}
.board.spread .node{text-overflow:ellipsis} .board.spread .node.pill{border-radius:8px}`

const HTML = `<div class="ask"></div><details class="asked" hidden><summary></summary><div class="sc" tabindex="0" role="group" aria-label="Prompts"></div></details>
<div class="top"><div class="size"><svg class="curve" role="img" aria-label="Faithfulness by number of edges"></svg><input class="n" type="range" min="0" max="1000" step="1" aria-label="Edges kept, the largest first"></div>
<div class="now"><div>largest <input class="count" type="number" min="1" aria-label="Edges kept"> <span class="all"></span></div><div class="kept"></div></div></div>
<div class="bar"><input class="find" type="search" placeholder="Filter: 2.ssm, gate" aria-label="Filter by name; a comma means or">
<span class="group lay" role="group" aria-label="Layout" hidden><button type="button" data-by="head">by head</button><button type="button" data-by="position">by position</button></span>
<span class="group kinds"></span><label class="few"><input type="checkbox" class="only">only parts in it</label><label class="both">show <select class="which"></select></label>
<span class="group end"><button type="button" class="given" title="The edges that the circuit came with">As found</button><button type="button" data-save="svg">SVG</button><button type="button" data-save="png">PNG</button><button type="button" data-save="json">JSON</button></span></div>
<div class="chips"></div><div class="stage"><div class="scene"><canvas class="edges"></canvas><canvas class="over"></canvas><canvas class="marks"></canvas>
<div class="nodes" role="group" aria-label="Nodes"></div><div class="tip" hidden></div></div><aside class="side" aria-label="The chosen node" aria-live="polite"></aside></div>
<div class="lg"></div><details class="rows"><summary>Strongest edges as a table</summary><div class="sc" tabindex="0" role="group" aria-label="Strongest edges"></div></details>`

// -- reading -----------------------------------------------------------------------------
async function read(bytes) {                                   // what is packed: words, and arrays with their shapes
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))
  const all = await new Response(stream).arrayBuffer(), size = new DataView(all).getUint32(0, true)
  const about = JSON.parse(new TextDecoder().decode(new Uint8Array(all, 4, size))), data = all.slice(4 + size), arrays = {}
  for (const [name, [kind, at, shape]] of Object.entries(about.parts))
    arrays[name] = new {u1: Uint8Array, i4: Int32Array, f4: Float32Array}[kind](data, at, shape.reduce((a, b) => a * b, 1))
  for (let i = 3; i < arrays.ramps.length; i++) arrays.ramps[i] += arrays.ramps[i - 3]     // they travel as steps
  return {...about, ...arrays}
}

// -- words -------------------------------------------------------------------------------
const num = x => x !== x ? '–' : Number.isInteger(x) && Math.abs(x) < 1e6 ? x.toLocaleString('en') : Math.abs(x) >= 1e6 || Math.abs(x) < 1e-3
  ? x.toExponential(1) : Math.abs(x) >= 1000 ? Math.round(x).toLocaleString('en') : String(+x.toPrecision(3))
const signed = x => x > 0 ? '+' + num(x) : num(x).replace('-', '−')
const SHORT = {gate: 'g', decay: 'a', erase: 'e', state: 's', write: 'w', rest: 'r'}
const PORTS = {x: 'written', B: 'where it is written', C: 'where it is read', dt: 'step size', decay: 'what is kept', erase: 'what is removed',
               gate: 'gate', q: 'query', k: 'key', v: 'value', write: 'all other writes', state: 'carried between two steps', rest: 'heard beside the other ports'}
const COLOURS = {ssm: '--s2', attn: '--s3', mlp: '--s4', stream: '--stream'}
const LAG = /@\d+(>\d+)?$/                                   // of a port's name: how far back it looks, or from which step to which it carries
function make(tag, props, ...inside) {
  const {data, aria, ...own} = props || {}, e = Object.assign(document.createElement(tag), own)
  for (const [k, v] of Object.entries(aria || {})) e.setAttribute(`aria-${k}`, v)
  Object.assign(e.dataset, data)
  e.append(...inside.filter(x => x !== null && x !== undefined && x !== ''))
  return e
}
const sheet = (names, rows) => make('table', null, make('tr', null, ...names.map(s => make('th', {scope: 'col'}, s))),
  ...rows.map(r => make('tr', null, ...r.map(s => make('td', {className: typeof s == 'number' ? 'n' : ''}, typeof s == 'number' ? signed(s) : s)))))

// -- the board ---------------------------------------------------------------------------
// start: {node, size}; ask(name): HTML of a node by a promise, or null; tell: is given {node, size} after a choice.
export async function mount(root, bytes, start, ask = null, tell = () => {}) {
  // an edge at a position is a number, edge * T + position; a circuit that is not by position has one position
  const c = await read(bytes), N = c.nodes.length, E = c.source.length, T = c.positions || 1, all = E * T, two = c.graphs.length > 1
  const sums = c.graphs.map((_, k) => c['score' + k]), fine = c.graphs.map((_, k) => c['scores' + k] || sums[k]), kept = c.graphs.map((_, k) => c['kept' + k]), worth = c.graphs.map((_, k) => c['node' + k])
  const rank = fine.map(v => { const s = v.map(x => Math.abs(x) || 0)
    return Uint32Array.from({length: all}, (_, j) => j).sort((a, b) => s[b] - s[a] || a - b) })
  const words = c.graphs[0].words || [], quoted = t => words[t] === undefined ? '' : ` ${JSON.stringify(words[t])}`
  root.innerHTML = `<style>${CSS}</style><div class="cbv board" data-lm-suppress-shortcuts="true">${HTML}<i style="display:none;color:light-dark(#000,#fff)"></i></div>`
  const box = root.querySelector('.board'), $ = s => box.querySelector(s), probe = box.lastElementChild, scene = $('.scene')
  box.addEventListener('focusin', e => { e.target.dataset.lmSuppressShortcuts = true })   // JupyterLab looks at the focused one first
  const st = {n: 1, given: true, which: two ? 2 : 0, spread: T > 1, unit: null, at: null, hidden: new Set(), pinned: new Set(), off: new Set(), text: '', only: false}

  // units: what is drawn; ports of one head are marks at it, a port that several heads share is a pill between them
  const units = [], unitOf = new Array(N), byName = new Map(), ends = c.nodes.map(() => [])
  for (let e = 0; e < E; e++) if (c.nodes[c.source[e]].kind == 'port') ends[c.source[e]].push(c.target[e])
  const add = (name, i, kind, n) => { const u = {name, kind, block: n.block, branch: n.branch, node: i, members: [], marks: [], over: [], k: units.length, at: null}
    u.unit = u; units.push(u); byName.set(name, u); return u }
  const stage = n => n.reads ?? (2 * n.block + (n.branch == 'mlp' ? 1 : 0))
  c.nodes.forEach((n, i) => { if (n.kind == 'port') return
    const u = add(n.id, i, n.kind, n)
    u.stage = n.kind == 'embed' ? -1 : n.kind == 'logits' ? 1e9 : n.kind == 'head' ? 2 * n.block : stage(n); unitOf[i] = u })
  c.nodes.forEach((n, i) => { if (n.kind != 'port') return
    const base = n.id.replace(LAG, '')
    let u = ends[i].length == 1 ? unitOf[ends[i][0]] : byName.get(base)
    if (!u) { u = add(base, i, 'pill', n); u.port = n.port; u.stage = 2 * n.block }
    u.members.push(i); unitOf[i] = u; byName.set(n.id, u); if (!byName.has(base)) byName.set(base, u)
    if (u.kind == 'pill') for (const t of ends[i]) if (!u.over.includes(unitOf[t])) u.over.push(unitOf[t]) })
  const seen = new Set()
  c.nodes.forEach((n, i) => { if (n.kind != 'port') return                                   // the marks of a head, a port and a lag each
    for (const t of ends[i]) { const u = unitOf[t]
      u.marks.push({port: n.port, lag: n.lag ?? null, i, own: unitOf[i] == u}); seen.add(n.port) } })
  for (const u of units) if (u.kind == 'pill') u.members.forEach(i => u.marks.push({port: u.port, lag: c.nodes[i].lag ?? null, i, own: true}))
  const branches = [...new Set(c.nodes.map(n => n.branch).filter(b => b))], heads = new Set(units.filter(u => u.kind == 'head').map(u => u.branch))
  const colour = b => `var(${COLOURS[b] || '--s5'})`
  const into = new Uint16Array(E), from = new Uint16Array(E)
  for (let e = 0; e < E; e++) { from[e] = unitOf[c.source[e]].k; into[e] = unitOf[c.target[e]].k }
  const inputs = units.map(() => []), outputs = units.map(() => [])
  for (let e = 0; e < E; e++) { inputs[into[e]].push(e); if (from[e] != into[e]) outputs[from[e]].push(e) }
  const largest = (v, fits = () => true) => v.reduce((m, x, i) => fits(i) && Math.abs(x) > m ? Math.abs(x) : m, 0) || 1
  const inside = i => units[i].kind != 'embed' && units[i].kind != 'logits'

  // -- two layouts: by head, where what is drawn are the units, and by position, where each unit is drawn at each position that
  // it takes part at. In both, place * D + position is the number of an edge or of what is drawn, in a layout of D positions
  const byHead = {D: 1, spots: units, score: sums, top: sums.map(v => largest(v)), node: worth.map(w => units.map(u =>
    u.kind == 'pill' ? u.members.reduce((s, i) => s + (w[i] || 0), 0) : w[u.node]))}
  const byPosition = {D: T, spots: [], score: fine, top: fine.map(v => largest(v)), node: fine.map(v => { const out = new Float32Array(units.length * T)
    for (let e = 0; e < E; e++) if (from[e] != into[e]) for (let t = 0; t < T; t++) out[from[e] * T + t] += v[e * T + t] || 0
    return out })}                                             // the edges that leave a node at a position sum to what it is worth there
  for (const l of [byHead, byPosition]) l.topNode = l.node.map(v => largest(v, k => inside(k / l.D | 0)))
  let lay = st.spread ? byPosition : byHead
  const edge = j => j / lay.D | 0, where = j => st.spread ? j % lay.D : null, tail = j => from[edge(j)] * lay.D + j % lay.D, head = j => into[edge(j)] * lay.D + j % lay.D
  const chip = k => lay.spots[k] ||= {...units[k / lay.D | 0], at: k % lay.D, k, marks: [], bar: false, x: undefined}
  const size = (k, j) => Math.abs(lay.score[k][j]) || 0, unitScore = (u, k) => lay.node[k][u.k]
  const source = j => c.source[edge(j)], target = j => c.target[edge(j)], there = t => t === null ? '' : ` at ${t}${quoted(t)}`
  const name = j => `${c.nodes[source(j)].id} → ${c.nodes[target(j)].id}${there(where(j))}`, title = u => u.name + there(u.at)
  const touching = (lists, u) => { const here = lists[u.unit.k]  // edges in or out of a unit; by position at one, or at all of them
    return !st.spread ? here : u.at !== null ? here.map(e => e * T + u.at) : here.flatMap(e => Array.from({length: T}, (_, t) => e * T + t)) }

  // -- which edges: the largest n, without hidden nodes, without those on no way through
  function chosen(k) {
    const on = new Uint8Array(all)
    if (st.given) on.set(kept[k]); else for (let j = 0; j < st.n; j++) on[rank[k][j]] = 1
    for (let e = 0; e < E; e++) if (gone(units[from[e]]) || gone(units[into[e]])) on.fill(0, e * T, e * T + T)
    return (c.graphs[k].ablation || 'patch') == 'patch' ? through(on) : on
  }
  const gone = u => st.hidden.has(u) || st.off.has(u.branch) && !st.pinned.has(u)
  const upward = Uint32Array.from({length: E}, (_, e) => e).sort((a, b) => c.target[a] - c.target[b]), downward = upward.slice().sort((a, b) => c.source[b] - c.source[a])
  function through(on) {                                       // on a way from the embedding to the logits that goes forward in time
    const first = new Float64Array(N).fill(T), last = new Float64Array(N).fill(-1), out = new Uint8Array(all)
    c.nodes.forEach((n, i) => { const held = st.pinned.has(unitOf[i]); if (n.kind == 'embed' || held) first[i] = 0; if (n.kind == 'logits' || held) last[i] = T - 1 })
    for (let more = true; more;) { more = false                // the first position that something comes to, the last that leads on
      for (const e of upward) for (let t = first[c.source[e]]; t < first[c.target[e]]; t++) if (on[e * T + t]) { first[c.target[e]] = t; more = true; break }
      for (const e of downward) for (let t = last[c.target[e]]; t > last[c.source[e]]; t--) if (on[e * T + t]) { last[c.source[e]] = t; more = true; break } }
    let any = 0
    for (let e = 0; e < E; e++) for (let t = first[c.source[e]]; t <= last[c.target[e]]; t++) if (on[e * T + t]) any = out[e * T + t] = 1
    through.any = any
    return any ? out : on
  }
  const hit = () => { const want = st.text.toLowerCase().split(',').map(s => s.trim()).filter(s => s)
    const ok = c.nodes.map(n => !want.length || want.some(w => n.id.toLowerCase().includes(w)))
    return j => ok[source(j)] || ok[target(j)] }
  let drawn = [], full = [], side = [], has = [], own = new Map(), order = '', sizes = [], cut = []
  function choose() {                                          // side: 1 in the first, 2 in the second, 3 in both
    full = new Uint8Array(all); sizes = []
    for (const k of st.which == 2 ? [0, 1] : [st.which]) { const on = chosen(k); let n = 0; cut[k] = through.any
      for (let j = 0; j < all; j++) if (on[j]) { full[j] |= 1 << k; n++ }
      sizes[k] = n }
    side = full
    if (lay.D < T) { side = new Uint8Array(E); for (let j = 0; j < all; j++) if (full[j]) side[j / T | 0] |= full[j] }
    const ok = hit(), by = new Float32Array(side.length); drawn = []; has = new Uint8Array(units.length * lay.D)
    for (let j = 0; j < side.length; j++) if (side[j] && ok(j)) { drawn.push(j); by[j] = strength(j); has[tail(j)] |= side[j]; has[head(j)] |= side[j] }
    drawn.sort((a, b) => by[a] - by[b] || b - a)
    for (const u of st.pinned) if (!has.subarray(u.k * lay.D, (u.k + 1) * lay.D).some(x => x)) has[(u.k + 1) * lay.D - 1] |= 4
    own = held()
  }
  const strength = j => st.which < 2 ? size(st.which, j) / lay.top[st.which] : Math.max(size(0, j) / lay.top[0], size(1, j) / lay.top[1])
  const valueOf = j => st.which < 2 ? lay.score[st.which][j] : side[j] == 2 ? lay.score[1][j] : lay.score[0][j]

  // -- where: rows from the embedding up, heads of a block beside each other, free lanes between them
  let W = 0, H = 0, rows = [], labels = [], placed = [], cols = [], gaps = [], rails = []
  const column = u => inside(u.unit.k) && u.kind != 'pill'
  const shown = u => !st.hidden.has(u.unit) && (st.spread || !st.only || has[u.k])
  function layout() {
    W = Math.max(300, scene.clientWidth); placed = units; cols = [[0, W]]; rails = []; gaps = []
    const slim = W < 620, gutter = slim ? 22 : 62, at = new Map()
    for (const u of units) if (column(u) && (!st.only || has[u.k])) { if (!at.has(u.stage)) at.set(u.stage, []); at.get(u.stage).push(u) }
    const stages = [...at.keys()].sort((a, b) => b - a), breaks = us => us.filter((u, i) => i && us[i - 1].branch != u.branch).length * .4
    const most = Math.max(1, ...[...at.values()].map(us => us.length + breaks(us))), pitch = Math.min(132, (W - gutter - 12) / most)
    const w = Math.max(4, Math.min(88, pitch * .68)), tall = w >= 44 ? 36 : 24, gap = Math.max(40, Math.min(78, 640 / (stages.length + 1) - 56))
    let y = 4
    const bar = kind => { for (const u of units) if (u.kind == kind) Object.assign(u, {x: gutter + (W - gutter) / 2, w: W - gutter - 2, y, h: 24, foot: y + 24, bar: true}) }
    rows = []; labels = []
    bar('logits'); rows.push({top: y, bottom: y + 24, free: []}); y += 24 + gap
    for (const s of stages) {
      const us = at.get(s), pills = units.filter(u => u.kind == 'pill' && u.stage == s && u.over.some(h => at.get(s).includes(h)) && (!st.only || has[u.k]))
      const strip = us.some(u => u.marks.length) ? 20 : 0, row = {top: y, bottom: y + tall + strip}, wide = us.length + breaks(us)
      let x = gutter + (W - gutter - 12 - wide * pitch) / 2 + pitch / 2
      us.forEach((u, i) => { if (i && us[i - 1].branch != u.branch) x += .4 * pitch
        Object.assign(u, {x, w: Math.max(w, Math.min(pitch * .9, u.kind == 'whole' ? 64 : u.kind == 'latent' ? textWidth(called(u)) + 6 : slots(u) > ports(u).length ? 9 * slots(u) : 0)), y, h: tall, r: rows.length, foot: y + tall + (u.marks.length ? strip : 0)}); place(u); x += pitch })
      const taken = us.map(u => [u.x - u.w / 2 - 3, u.x + u.w / 2 + 3])
      if (pills.length) { const groups = new Map()
        for (const u of pills) { const k = u.over.map(h => h.k).join(); groups.set(k, [...(groups.get(k) || []), u]) }
        const py = y + tall + strip + 16, used = new Set()
        for (const g of groups.values()) g.forEach((u, i) => { const there = u.over.filter(h => us.includes(h)).map(h => h.x)
          const a = Math.min(...there) - pitch / 2, b = Math.max(...there) + pitch / 2, want = a + (b - a) * (i + 1) / (g.length + 1)
          const spots = us.slice(1).map((h, j) => (h.x + us[j].x) / 2).concat(us[0].x - pitch / 2, us[us.length - 1].x + pitch / 2)
            .filter(s => !used.has(s) && s > gutter - 4 && s < W - 10).sort((p, q) => Math.abs(p - want) - Math.abs(q - want))
          const px = spots.length ? spots[0] : want; used.add(px)
          const pw = Math.max(6, Math.min(u.members.length > 1 ? 34 : 22, pitch - w - 6))
          Object.assign(u, {x: px, w: pw, y: py, h: 16, r: rows.length, foot: py + 16 + (u.members.length > 1 ? 6 : 0)}); place(u)
          taken.push([px - pw / 2 - 2, px + pw / 2 + 2]) })
        row.bottom = py + 22 }
      row.free = [between(taken, gutter, W)]
      labels.push(labelled(us, y + tall / 2, slim)); rows.push(row); y = row.bottom + gap }
    bar('embed'); rows.push({top: y, bottom: y + 24, free: []}); H = y + 28
    for (const u of units) if (u.kind == 'embed') u.r = rows.length - 1; else if (u.kind == 'logits') u.r = 0
    lines.clear()
  }
  function between(taken, l, r) {                              // what is free from l to r
    const out = [], start = l
    for (const [a, b] of [...taken.sort((p, q) => p[0] - q[0]), [r, r]]) { if (a - l > 1) out.push([l, a]); l = Math.max(l, b) }
    return out.length ? out : [[start, r]]
  }
  function labelled(us, y, slim) {                             // the block of a row and its branches
    const blocks = [...new Set(us.map(u => u.branch == 'stream' ? u.name.split('.')[0] : u.block))].join(), kinds = [...new Set(us.map(u => u.branch))].join('\n')
    const stream = us[0].branch == 'stream'
    return {y, text: slim ? blocks : stream ? 'stream' : `block ${blocks}`, more: slim ? '' : stream ? us[0].name.split('.').slice(0, 2).join(' ').replace('resid_', '') : kinds}
  }

  // by position: a column for each token, and in each cell of a row the parts that take part at it; columns without any are gaps
  const textWidth = text => 7.3 * text.length, mid = t => (cols[t][0] + cols[t][1]) / 2
  const widthOf = u => u.kind == 'pill' ? 20 : Math.max(26, textWidth(label(u)) + 10, 10.5 * slots(u))
  const firstOf = kind => units.find(u => u.kind == kind).k * T
  function spread() {
    const slim = scene.clientWidth < 620, gutter = slim ? 22 : 62, cells = new Map(), live = new Set([T - 1])    // cells: stage -> position -> chips
    placed = []; rails = []; rows = []; labels = []; gaps = []
    for (let k = 0; k < has.length; k++) { if (!has[k] || st.hidden.has(units[k / T | 0])) continue
      const u = chip(k), at = k % T; live.add(at); if (!inside(k / T | 0)) continue
      u.x = undefined; u.marks = u.unit.marks.filter(m => own.has(key(u, m))).map(m => ({...m})); placed.push(u)
      if (!cells.has(u.stage)) cells.set(u.stage, new Map())
      const row = cells.get(u.stage); row.set(at, [...row.get(at) || [], u]) }
    const [gap, stretch] = columns(live, [...cells.values()], gutter, slim), stages = [...cells.keys()].sort((a, b) => b - a)
    const apart = Math.max(40, Math.min(66, 640 / (stages.length + 1) - 56)), open = () => cols.map(([l, r]) => [[l, r]])
    const put = (u, props) => { Object.assign(u, {r: rows.length, foot: props.y + props.h}, props); place(u) }
    const alone = (k, w, y) => { const u = chip(k); u.marks = []; placed.push(u); put(u, {x: mid(k % T), w: Math.min(w, cols[k % T][1] - cols[k % T][0] - 4), y, h: 24}) }
    alone(firstOf('logits') + T - 1, 80, 4); rows.push({top: 4, bottom: 28, free: open()})
    let y = 28 + apart
    for (const s of stages) { const us = [...cells.get(s).values()].flat(), along = carriers(us), step = Math.min(4, 36 / Math.max(1, along.length)), top = y
      if (along.length) y += along.length * step + 5
      const strip = us.some(u => u.marks.length) ? 20 : 0, low = us.some(u => u.kind == 'pill') ? 32 : 0, row = {top, bottom: y + 24 + strip + low, free: open()}
      for (const [t, line] of cells.get(s)) {                  // ports that heads share stand lower and to the left
        line.sort((a, b) => (b.kind == 'pill') - (a.kind == 'pill'))
        const each = line.map(u => widthOf(u) * (u.kind == 'pill' ? 1 : Math.min(stretch, 1.4))), sum = each.reduce((a, b) => a + b, 0)
        const air = Math.min(16, (cols[t][1] - cols[t][0] - 6 - sum) / (line.length + 1))
        let x = mid(t) - (sum + air * (line.length - 1)) / 2
        line.forEach((u, i) => {
          if (u.kind == 'pill') put(u, {x: x + each[i] / 2, w: each[i], y: y + 34 + strip, h: 16, foot: y + 50 + strip + (u.members.length > 1 ? 6 : 0)})
          else put(u, {x: x + each[i] / 2, w: each[i], y, h: 24, foot: y + 24 + (u.marks.length ? strip : 0)})
          x += each[i] + air })
        row.free[t] = between(line.map(u => [u.x - u.w / 2 - 2, u.x + u.w / 2 + 2]), ...cols[t]) }
      along.forEach(([unit, first, to], i) => rails.push({unit, path: rail(first, to, top + 3 + i * step)}))
      labels.push(labelled(us, y + 12, slim)); rows.push(row); y = row.bottom + apart }
    for (const t of live) alone(firstOf('embed') + t, Math.max(34, textWidth(word(t)) + 14), y)
    rows.push({top: y, bottom: y + 24, free: open()}); foot(live, gap, y + 24); lines.clear()
  }
  function columns(live, rows, gutter, slim) {                 // each as wide as its fullest cell, stretched to the room there is, and narrow gaps between
    const room = scene.clientWidth, need = new Float64Array(T), dead = T - live.size
    for (const t of live) need[t] = Math.max(t == T - 1 ? 60 : 34, Math.min(92, textWidth(word(t)) + 12))
    for (const row of rows) for (const [t, line] of row) need[t] = Math.max(need[t], line.reduce((s, u) => s + widthOf(u) + 6, 2))
    let run = 1, x = gutter
    for (let t = 0, n = 0; t < T; t++) run = Math.max(run, n = live.has(t) ? 0 : n + 1)
    const natural = need.reduce((s, w) => s + (w && w + 8), 0), left = (room - gutter - 10 - natural) / (dead || 1)
    const gap = left > 12 ? Math.min(24, left) : dead <= 12 && !slim ? 13 : Math.min(8, Math.max(3, left), 44 / run)
    const stretch = Math.max(1, Math.min(2.4, (room - gutter - 10 - gap * dead) / natural))
    cols = Array.from(need, w => { const l = x; x += w ? (w + 8) * stretch : gap; return [l, x] })
    W = Math.max(300, room, Math.ceil(x) + 8)
    return [gap, stretch]
  }
  // what a part carries along a row: from the chip where something first comes in to those up to the last where it is used
  function carriers(us) {
    const of = new Map(), out = [], some = (lists, u, fits = () => true) => touching(lists, u).some(j => side[j] && fits(j))
    const used = u => some(outputs, u) || some(inputs, u, j => c.nodes[source(j)].kind == 'port')
    for (const u of us) of.set(u.unit, [...of.get(u.unit) || [], u])
    for (const [unit, at] of of) { if (at.length < 2 || unit.kind == 'latent' || unit.kind == 'expert' || unit.branch == 'mlp') continue
      at.sort((a, b) => a.at - b.at)
      const first = at.find(u => some(inputs, u)), last = at.filter(used).pop()
      if (first && last && first.at < last.at) out.push([unit, first, at.filter(u => u.at > first.at && u.at <= last.at)]) }
    return out
  }
  function rail(first, to, y) {                                // above the chips, in the form of `line`
    return to.map((b, i) => { const a = i ? to[i - 1] : first, turn = Math.min(9, (b.x - a.x) / 2)
      return [a.x, a.y, a.x, y, a.x, y, a.x + turn, y, a.x + turn, y, b.x - turn, y, b.x - turn, y, b.x, y, b.x, y, b.x, b.y] })
  }
  function foot(live, gap, y) {                                // the words of columns without chips: slanted, or on pointing at the gap
    let low = 0
    for (let t = 0; t < T; t++) { if (live.has(t)) continue
      let r = t; while (gap < 11 && r + 1 < T && !live.has(r + 1)) r++
      const slant = gap >= 11, wide = cols[r][1] - cols[t][0], span = r > t ? `${t}–${r}` : `${t}`
      const said = slant ? word(t).slice(0, 14) : wide > 32 ? span : wide > 9 ? '⋯' : ''
      gaps.push({x: cols[t][0] + wide / 2 - (slant ? 3 : 3.2 * said.length), y: y + (slant ? 3 : -17), text: said, title: `${span} ${JSON.stringify(words.slice(t, r + 1).join(''))}`, slant})
      if (slant) low = Math.max(low, said.length * 5 + 12)
      t = r }
    H = y + 6 + low
  }
  const word = t => words[t] === undefined ? String(t) : words[t].trim() || JSON.stringify(words[t]).slice(1, -1)
  const ports = u => [...new Set(u.marks.map(m => m.port))].map(p => u.marks.filter(m => m.port == p)), slots = u => ports(u).reduce((s, ms) => s + share(ms), 0)
  const share = ms => ms[0].port == 'state' ? Math.max(1, Math.min(2.5, .6 * ms.length)) : 1
  function place(u) {                                          // marks below a node, a group for each port
    const unit = u.w / slots(u); let l = u.x - u.w / 2
    for (const ms of ports(u)) { const room = unit * share(ms), each = (room - 2) / ms.length
      ms.forEach((m, q) => Object.assign(m, {x: l + 1 + (q + .5) * each, w: Math.max(1, each - (ms.length > 1 ? .6 : 0)), mid: l + room / 2, room, first: !q})); l += room }
  }
  const lane = (row, at, x, t) => { let best = null, far = 1e9
    for (const g of row.free[at]) { const d = x < g[0] ? g[0] - x : x > g[1] ? x - g[1] : 0; if (d < far) { far = d; best = g } }
    let [l, r] = best
    if (x >= l + 2 && x <= r - 2) return x
    if (x < l + 2) r = Math.min(r, l + 46); else l = Math.max(l, r - 46)
    const pad = Math.min(5, (r - l) / 4)
    return l + pad + (r - l - 2 * pad) * t }
  const lines = new Map()
  function line(j) {                                           // [x, y, then three points for each cubic]; null: inside a head
    if (lines.has(j)) return lines.get(j)
    const s = lay.spots[tail(j)], t = lay.spots[head(j)], at = where(j) ?? 0, [l, r] = cols[at], share = x => (x - l) / (r - l)
    let out = null
    if (s != t && s?.x !== undefined && t?.x !== undefined) {
      const inner = c.nodes[source(j)].kind == 'port', mark = t.marks.find(m => m.i == (inner ? source(j) : target(j)))
      const bar = s.bar, end = t.bar, between = rows.slice(t.r + 1, s.r).reverse()
      let X = mark ? mark.x : t.x + (share(s.x) - .5) * t.w * .6, x = s.x
      if (end) X = bar ? W - 14 : s.x
      const want = X, q = Math.min(1, Math.max(0, .85 * share(want) + .15 * share(s.x)))
      if (inner) x = s.marks.find(m => m.i == source(j))?.x ?? s.x
      else if (bar) x = X
      else if (!end) x = s.x + (share(X) - .5) * s.w * .6
      let y = s.y
      out = []
      const go = (a, b) => { const m = (y - b) / 2; out.push(x, y - m, a, b + m, a, b); x = a; y = b }
      let way = want                                           // one lane for all rows that it passes, where there is one
      for (const row of between) { const a = lane(row, at, want, q); if (a != want) way = a }
      if (bar && between.length) x = lane(between[0], at, way, q)
      out.push(x, y)
      for (const row of between) { const a = lane(row, at, way, q); go(a, row.bottom + 2); go(a, row.top - 2) }
      go(X, t.foot + 1) }
    lines.set(j, out); return out
  }

  // -- drawing
  let colours = {}, dark = false, frames = 0, due = 0, poly = null, hover = -1
  const ramp = (i, d = dark) => '#' + [0, 1, 2].map(k => c.ramps[768 * d + 3 * i + k].toString(16).padStart(2, '0')).join('')
  const spot = t => 1 + Math.round(127 + 127 * t)              // the place of -1 to 1 in the palette; 0 is its neutral middle
  const shade = x => spot(x ? Math.sign(x) * (.16 + .84 * Math.sqrt(Math.min(1, Math.abs(x)))) : 0)
  const bend = x => Math.sign(x) * Math.sqrt(Math.min(1, Math.abs(x)))
  const paper = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const hex = css => { paper.clearRect(0, 0, 1, 1); paper.fillStyle = css; paper.fillRect(0, 0, 1, 1)
    return '#' + [...paper.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v.toString(16).padStart(2, '0')).join('') }
  const ink = h => { const [r, g, b] = [1, 3, 5].map(i => { const v = parseInt(h.slice(i, i + 2), 16) / 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 })
    return .2126 * r + .7152 * g + .0722 * b < .179 ? '#fff' : '#000' }
  const SIDES = ['', 's0', 's1', 's5']
  function look(e) {
    const t = Math.sqrt(strength(e)), tint = st.which == 2 ? colours[SIDES[side[e]]] : ramp(shade(valueOf(e) / lay.top[st.which] || 0))
    return {tint, width: .8 + 5 * Math.max(0, t - .14),                            // up to 1 pixel a line is painted much faster
       alpha: Math.round(20 * (.55 + .45 * t)) / 20}
  }
  function canvas(s) {
    const e = $(s), d = Math.min(devicePixelRatio || 1, 16000 / W, 16000 / H)   // larger ones cannot be painted
    if (e.width != Math.round(W * d) || e.height != Math.round(H * d)) { e.width = Math.round(W * d); e.height = Math.round(H * d); e.style.width = W + 'px'; e.style.height = H + 'px' }
    const g = e.getContext('2d'); g.setTransform(d, 0, 0, d, 0, 0); g.clearRect(0, 0, W, H)
    return g
  }
  function trace(g, p) { g.moveTo(p[0], p[1]); for (let i = 2; i < p.length; i += 6) g.bezierCurveTo(p[i], p[i + 1], p[i + 2], p[i + 3], p[i + 4], p[i + 5]) }
  let moving = 0                                               // while the slider moves, only what is in sight is painted
  function sight() { const r = scene.getBoundingClientRect(); return [-r.top - 60, innerHeight - r.top + 60] }
  function strokes(g, edges, [high, low] = [0, H]) { g.lineCap = 'round'; g.save(); g.beginPath(); g.rect(0, high, W, low - high); g.clip()
    for (const e of edges) { const p = line(e); if (!p || p[1] < high || p[p.length - 1] > low) continue
      const {tint, width, alpha} = look(e)
      g.beginPath(); trace(g, p); g.strokeStyle = tint; g.lineWidth = width; g.globalAlpha = alpha; g.stroke() }
    g.restore() }
  const key = (u, m) => `${m.i} ${m.own ? '' : u.node} ${u.at ?? ''}`
  const held = () => { const own = new Map()                   // port -> what its edges are worth in the picture
    for (const j of drawn) { const a = source(j), b = target(j), t = where(j) ?? '', into = `${b}  ${t}`
      if (c.nodes[b].kind == 'port' && !own.has(into)) own.set(into, null)
      if (c.nodes[a].kind == 'port') { own.set(`${a} ${tail(j) == head(j) ? '' : b} ${t}`, j); if (tail(j) != head(j) && !own.has(`${a}  ${t}`)) own.set(`${a}  ${t}`, null) } }
    return own }
  function* marks() {                                          // squares under heads and pills, filled where they are in the circuit
    for (const u of placed) if (u.x !== undefined && shown(u)) for (const m of u.marks) {
      if (u.kind == 'pill' && u.members.length < 2) continue
      const on = own.has(key(u, m)), e = own.get(key(u, m))
      const y = u.kind == 'pill' ? u.y + u.h + 1 : u.y + u.h + 14
      yield {u, m, y, h: 5, on, fill: on ? e === null || e === undefined || st.which == 2 ? colours.soft : look(e).tint : null,
             text: u.kind != 'pill' && m.first && m.room >= 8.5 ? SHORT[m.port] || m.port : '', ty: u.y + u.h + 8} } }
  function paintMarks() {
    const g = canvas('.marks'); g.font = '10.5px system-ui,sans-serif'; g.textAlign = 'center'; g.textBaseline = 'middle'
    for (const k of marks()) { g.fillStyle = k.on ? k.fill : colours.back; g.strokeStyle = k.on ? k.fill : colours.line; g.lineWidth = 1
      g.fillRect(k.m.x - k.m.w / 2, k.y, k.m.w, k.h); if (k.m.w > 3) g.strokeRect(k.m.x - k.m.w / 2 + .5, k.y + .5, k.m.w - 1, k.h - 1)
      if (k.text) { g.fillStyle = has[k.u.k] ? colours.ink : colours.soft; g.fillText(k.text, k.m.mid, k.ty) } } }
  function paintRails(g, fits, width, alpha) { g.save(); g.lineWidth = width; g.globalAlpha = alpha
    for (const r of rails) if (fits(r)) { g.strokeStyle = colours[r.unit.branch]; g.beginPath(); for (const p of r.path) trace(g, p); g.stroke() }
    g.restore() }
  function paintUnder(g) {                                     // what is under the edges: columns of tokens, and what heads carry along a row
    g.globalAlpha = .05; g.fillStyle = colours.ink; for (const [l, r, h] of bands()) g.fillRect(l, 0, r - l, h); g.globalAlpha = 1
    paintRails(g, () => true, 1.3, .5) }
  const bands = () => st.spread ? placed.filter(u => u.kind == 'embed').map(u => [cols[u.at][0] + 2, cols[u.at][1] - 2, u.foot]) : []
  function paintOver() {
    const g = canvas('.over'), mine = picked()
    $('.edges').style.opacity = mine ? .13 : 1
    if (mine) paintRails(g, r => r.unit == st.unit, 2.5, .9)
    if (mine) strokes(g, drawn.filter(e => mine.has(e)))
    if (hover >= 0 && line(hover)) { g.beginPath(); trace(g, line(hover)); g.strokeStyle = colours.ink; g.lineWidth = look(hover).width + 1.5; g.stroke() } }
  const sel = () => st.unit && {...st.unit, at: st.at}           // the chosen unit, at a position
  const picked = () => st.unit && new Set([...touching(inputs, sel()), ...touching(outputs, sel())].filter(j => side[j]))
  const isPicked = u => u.unit == st.unit && (st.at === null || u.at == st.at)

  // -- nodes are buttons, in order of their score
  const buttons = new Map()
  const numbered = u => u.name.match(/\[(\w+)\]$/)?.[1]
  const called = u => u.kind == 'embed' ? (st.spread ? word(u.at) : 'embedding') : u.kind == 'logits' ? 'logits' : u.kind == 'pill' ? (u.w >= 10 ? SHORT[u.port] || u.port : '')
    : u.kind == 'whole' ? (u.w >= 30 ? u.branch : u.branch[0]) : !numbered(u) ? u.branch : (u.w >= 56 && heads.size > 1 && u.kind == 'head' ? u.branch + ' ' : '') + numbered(u)
  const label = u => !st.spread && u.kind == 'latent' && textWidth(called(u)) > u.w - 4 ? '' : called(u)
  const about = u => `${title(u)}${u.kind == 'pill' ? ', shared by ' + u.over.length + ' heads' : u.kind == 'latent' && c.nodes[u.node].latent == null ? ', what its latents leave' : ''}`
    + (u.kind == 'embed' || u.kind == 'logits' ? '' : `, score ${u.at === null ? '' : 'of what it writes here '}` + c.graphs.map((_, k) => signed(unitScore(u, k))).join(' and '))
  const tone = u => { const x = unitScore(u, st.which % 2) / lay.topNode[st.which % 2] || 0; return shade(st.spread && Math.abs(x) < .005 ? 0 : x) }
  const tintOf = u => { if (st.which == 2) return has[u.k] & 3 ? `color-mix(in srgb,${`var(--${SIDES[has[u.k] & 3]})`} 24%,var(--back))` : 'var(--back)'
    const i = tone(u); return u.kind == 'pill' || column(u) ? `light-dark(${ramp(i, 0)},${ramp(i, 1)})` : 'var(--back)' }
  function arrange() {
    const most = u => Math.max(...c.graphs.map((_, k) => Math.abs(unitScore(u, k)) || 0)), list = placed.filter(u => u.x !== undefined && shown(u) && (column(u) || u.kind != 'pill' || has[u.k] || !st.only))
      .sort((a, b) => most(b) - most(a)), now = list.map(u => u.k).join()
    for (const u of list) if (!buttons.has(u)) buttons.set(u, make('button', {type: 'button', onclick: () => select(st.unit == u.unit && st.at === u.at ? null : u),
      onpointerenter: e => say(about(u), e), onfocus: () => say(about(u), null, u), onblur: () => say('')}))
    if (now != order) { order = now; $('.nodes').replaceChildren(...list.map(u => buttons.get(u))) }
    for (const u of list) { const b = buttons.get(u), on = has[u.k], text = label(u), i = tone(u)
      b.className = `node${on ? '' : ' off'}${u.kind == 'pill' ? ' pill' : ''}${st.pinned.has(u.unit) ? ' held' : ''}`
      const css = `--c:${colour(u.branch)};left:${u.x - u.w / 2}px;top:${u.y}px;width:${u.w}px;height:${u.h}px;` + (on ? `background:${tintOf(u)};`
        + (st.which == 2 || u.kind == 'embed' || u.kind == 'logits' ? '' : `color:light-dark(${ink(ramp(i, 0))},${ink(ramp(i, 1))})`) : '')
      if (b.dataset.css != css) b.style.cssText = b.dataset.css = css
      const more = !st.spread && on && u.w >= 44 && u.h > 26 && st.which < 2 ? signed(+unitScore(u, st.which).toPrecision(2)) : ''
      if (b.dataset.t != text + more) { b.dataset.t = text + more; b.replaceChildren(...(more ? [text, make('small', null, more)] : [text])) }
      b.tabIndex = on ? 0 : -1; b.setAttribute('aria-pressed', isPicked(u)); b.setAttribute('aria-label', about(u)) }
    for (const old of scene.querySelectorAll('.label,.word')) old.remove()
    for (const l of labels) scene.append(make('div', {className: 'label', style: `left:${scene.scrollLeft}px;top:${l.y - (l.more ? 14 : 7)}px`}, l.text + (l.more ? '\n' + l.more : '')))
    for (const w of gaps) scene.append(make('div', {className: `word${w.slant ? ' slant' : ''}`, title: w.title, style: `left:${w.x + (w.slant ? 5 : 0)}px;top:${w.y}px`}, w.text))
    scene.style.height = H + (W > scene.clientWidth ? 16 : 0) + 'px'
    $('.nodes').setAttribute('aria-label', `${drawn.length} edges between ${list.filter(u => has[u.k]).length} nodes, strongest first; the table below lists them`)
  }
  function update() {
    const t0 = performance.now()
    choose()
    if (st.spread) spread(); else if (st.only || !rows.length) { for (const u of units) u.x = undefined; layout() }
    dark = getComputedStyle(probe).color.startsWith('rgb(255')
    for (const k of ['ink', 'soft', 'line', 'back', 's0', 's1', 's5']) { probe.style.setProperty('background-color', `var(--${k})`); colours[k] = hex(getComputedStyle(probe).backgroundColor) }
    for (const b of branches) { probe.style.setProperty('background-color', colour(b)); colours[b] = hex(getComputedStyle(probe).backgroundColor) }
    poly = null; hover = -1
    const g = canvas('.edges'); paintUnder(g); strokes(g, drawn, moving ? sight() : undefined); paintMarks(); paintOver(); arrange(); numbers(); panel()
    if ($('.rows').open) table()
    Object.assign(box.dataset, {edges: drawn.length, n: st.given ? 'given' : st.n, frames: ++frames, ms: (performance.now() - t0).toFixed(1)})
  }
  const draw = () => { due = 0; if (scene.clientWidth) update() }
  const later = () => { due ||= requestAnimationFrame(draw) }

  // -- how many, and what they carry
  const log = n => Math.log(Math.max(1, n)) / Math.log(all || 2), curves = c.graphs.map(g => (g.curve || []).map(([s, f]) => [Math.max(1, Math.round(s * all)), f]))
  function carried(k, n) {                                     // [faithfulness, was it measured]; between two budgets: along the line of the picture
    const v = curves[k]
    for (let i = 0; i < v.length; i++) { if (v[i][0] == n) return [v[i][1], true]
      if (i && v[i - 1][0] < n && n < v[i][0]) { const t = (log(n) - log(v[i - 1][0])) / (log(v[i][0]) - log(v[i - 1][0])); return [v[i - 1][1] + t * (v[i][1] - v[i - 1][1]), false] } }
    return [NaN, false]
  }
  const present = k => st.given ? began[k] : st.n
  function begin(k) {                                          // the number of largest edges that gives the circuit as it came
    const n = kept[k].reduce((a, b) => a + b, 0), same = m => { const on = new Uint8Array(all); for (let j = 0; j < m; j++) on[rank[k][j]] = 1
      const cut = (c.graphs[k].ablation || 'patch') == 'patch' ? through(on) : on; return cut.every((x, e) => x == kept[k][e]) }
    let last = 0; rank[k].forEach((e, j) => { if (kept[k][e]) last = j + 1 })
    return [...curves[k].map(v => v[0]).filter(m => m >= n), last].find(same) ?? n
  }
  const EDGES = T > 1 ? 'edges at positions' : 'edges'
  const began = c.graphs.map((_, k) => begin(k)), names = c.names
  const which = () => st.which == 2 ? [0, 1] : [st.which]
  function numbers() {
    const k0 = which()[0], n = present(k0)
    $('.n').value = Math.round(1000 * log(n)); $('.n').setAttribute('aria-valuetext', `${n} ${EDGES}`)
    if (document.activeElement != $('.count')) $('.count').value = n
    $('.kept').replaceChildren(...which().map(k => { const [f, real] = carried(k, present(k))
      return make('div', {title: real ? 'measured' : 'between two measured sizes'}, two ? names[k] + ': ' : '', make('b', null, num(sizes[k])), two ? ` ${EDGES}` : cut[k] ? ' of them on a way through' : ' edges, none on a way through',
        two ? ', ' : make('br'), ...(f === f ? [`faithfulness ${real ? '' : '≈ '}`, make('b', {className: 'faith'}, f.toFixed(2))] : [curves[k].length ? 'faithfulness not measured' : ''])) }))
    $('.given').disabled = st.given
    const svg = $('.curve'), w = svg.clientWidth || 300, h = 84, flat = curves.flat().map(v => v[1]), lo = Math.min(0, ...flat), hi = Math.max(1, ...flat)
    const X = m => 8 + (w - 16) * log(m), Y = f => 8 + (h - 26) * (hi - f) / (hi - lo), parts = []
    for (const f of [0, 1]) parts.push(`<path d="M8 ${Y(f)}H${w - 8}" stroke="var(--line)"/><text x="${w - 8}" y="${Y(f) - 3}" text-anchor="end">${flat.length ? f : ''}</text>`)
    for (let m = 1; m <= all; m *= 10) parts.push(`<path d="M${X(m)} ${h - 16}v4" stroke="var(--soft)"/><text x="${X(m)}" y="${h - 2}" text-anchor="${m > 1 ? 'middle' : 'start'}">${num(m)}</text>`)
    if (all > 30) parts.push(`<text x="${w - 8}" y="${h - 2}" text-anchor="end">${X(10 ** Math.floor(Math.log10(all))) > w - (T > 1 ? 190 : 112) ? '' : num(all) + ' ' + EDGES}</text>`)
    for (const k of which()) { const v = curves[k], tint = `var(--s${two ? k : 0})`
      parts.push(`<path d="M${v.map(([m, f]) => `${X(m)} ${Y(f)}`).join('L')}" stroke="${tint}" stroke-width="2"/>`, ...v.map(([m, f]) => `<circle cx="${X(m)}" cy="${Y(f)}" r="3" fill="${tint}"><title>${m} edges: ${f.toFixed(3)}</title></circle>`))
      const m = present(k), [f] = carried(k, m)
      parts.push(`<path class="here" data-n="${m}" d="M${X(m)} 4V${h - 16}" stroke="var(--ink)" stroke-dasharray="2 3"/>` + (f === f ? `<circle class="here" cx="${X(m)}" cy="${Y(f)}" r="5" fill="var(--back)" stroke="var(--ink)" stroke-width="2"/>` : '')) }
    if (flat.length) parts.push(`<text x="12" y="${Y(1) + 12}">faithfulness</text>`)
    svg.setAttribute('viewBox', `0 0 ${w} ${h}`); svg.innerHTML = parts.filter(p => !p.includes('d="M"')).join('')
    svg.setAttribute('aria-label', 'Faithfulness by number of edges: ' + which().flatMap(k => curves[k].map(([m, f]) => `${m} edges ${f.toFixed(2)}`)).join(', '))
  }

  // -- the chosen node, and lists
  const answers = new Map(Object.entries(c.details))
  const rowOf = (j, u) => { const other = units[from[edge(j)]] == u.unit ? head(j) : tail(j), via = c.nodes[target(j)], near = units[into[edge(j)]] == u.unit
    const text = (!near ? via.id : tail(j) == head(j) ? `its ${via.kind == 'port' ? via.id : c.nodes[source(j)].id}` : c.nodes[source(j)].id + (via.kind == 'port' && u.kind != 'pill' ? `  → ${portOf(via)}` : ''))
      + (st.spread && u.at === null ? there(where(j)) : '')
    return make('button', {type: 'button', title: name(j), onclick: () => select(chip(other)), onpointerenter: () => { hover = j; paintOver() }, onpointerleave: () => { hover = -1; paintOver() }},
      make('span', null, text), bar(valueOf(j) / Math.max(...lay.top)), make('b', null, signed(valueOf(j)))) }
  const portOf = n => n.port + (n.lag != null ? `@${n.lag}` : n.steps ? ` ${n.steps.join('>')}` : '')
  const portSaid = n => `${n.id}: ${n.steps ? `carried from step ${n.steps[0]}${quoted(n.steps[0])} to step ${n.steps[1]}${quoted(n.steps[1])}` : PORTS[n.port] || n.port}${n.lag != null ? `, ${n.lag} back` : ''}`
  const bar = x => { const t = bend(x) || 0, i = shade(x || 0); return make('u', {style: `width:${Math.abs(100 * t)}%;background:light-dark(${ramp(i, 0)},${ramp(i, 1)})`}) }
  const spotOf = u => st.spread ? u.unit.k * T + (u.at ?? T - 1) : u.unit.k
  const said = u => { const v = st.spread && u.at === null ? null : lay.spots[spotOf(u)], whole = c.graphs.map((_, k) => signed(byHead.node[k][u.unit.k])).join(' and ')
    return [st.spread ? (u.at === null ? 'at all tokens' : there(u.at).slice(1)) : '', v ? about(v).slice(title(v).length + 2) : '',
      st.spread && inside(u.unit.k) ? `${whole} over all tokens` : ''].filter(x => x).join(', ') }
  let listed = ''
  function panel() {
    const u = sel(), aside = $('.side'), key = [u?.k, st.at, st.spread, st.which, st.given, st.n, st.text, [...st.off], st.hidden.size, st.pinned.size].join()
    if (key == listed) return
    const at = aside.contains(document.activeElement) ? document.activeElement.className : ''
    listed = key
    aside.classList.toggle('has', !!u)
    if (!u) { const best = placed.filter(v => column(v) && has[v.k] && !st.hidden.has(v.unit)).sort((a, b) => Math.abs(unitScore(b, which()[0])) - Math.abs(unitScore(a, which()[0]))).slice(0, 8), k = which()[0]
      return aside.replaceChildren(make('h4', {style: 'margin-top:0', aria: {level: 3}}, 'Strongest parts'), make('div', {className: 'list'}, ...best.map(v => make('button', {type: 'button', title: title(v), onclick: () => select(v)},
        make('span', null, title(v)), bar(unitScore(v, k) / lay.topNode[k]), make('b', null, signed(unitScore(v, k)))))), make('p', {className: 'note'}, 'Choose a node to see its edges, to pin it or to hide it.')) }
    const part = (title, all) => { const some = all.filter(e => side[e]).sort((a, b) => strength(b) - strength(a)), rest = all.length - some.length
      return [make('h4', null, `${title}: ${some.length}` + (rest ? ` of ${all.length}` : '')), make('div', {className: 'list'}, ...some.slice(0, 12).map(e => rowOf(e, u))),
              some.length > 12 ? make('details', null, make('summary', null, `${Math.min(200, some.length) - 12} smaller ones`), make('div', {className: 'list'}, ...some.slice(12, 200).map(e => rowOf(e, u)))) : null] }
    const told = make('div', {className: 'told'})
    aside.replaceChildren(...[make('h3', null, u.name), make('div', {className: 'note'}, said(u)),
      make('div', {className: 'do'}, make('button', {type: 'button', className: 'pin', onclick: () => flip(st.pinned, u.unit)}, st.pinned.has(u.unit) ? 'Unpin' : 'Pin'),
        u.kind == 'embed' || u.kind == 'logits' ? null : make('button', {type: 'button', className: 'hide', onclick: () => { st.unit = null; flip(st.hidden, u.unit) }}, 'Hide'),
        make('button', {type: 'button', className: 'close', onclick: () => { const b = buttons.get(chip(spotOf(u))); select(null); b?.focus() }}, 'Close')),
      ...part('Edges in', touching(inputs, u)), ...part('Edges out', touching(outputs, u)), told].filter(x => x))
    if (at) aside.querySelector(`.${at}`)?.focus()
    tellOf(u, told)
  }
  async function tellOf(u, to) {
    if (!answers.has(u.name) && ask) { to.textContent = '…'; answers.set(u.name, ask(u.name)); answers.get(u.name).then(h => answers.set(u.name, h)) }
    if (answers.has(u.name)) { const h = await answers.get(u.name); to.innerHTML = h } }
  function table() {
    const some = drawn.slice(-100).reverse()
    $('.rows .sc').replaceChildren(sheet(['from', 'to', ...(st.spread ? ['at'] : []), ...(two && st.which == 2 ? [names[0], names[1], 'in'] : ['score'])], some.map(e => [c.nodes[source(e)].id, c.nodes[target(e)].id, ...(st.spread ? [there(where(e)).slice(4)] : []),
      ...(two && st.which == 2 ? [lay.score[0][e], lay.score[1][e], ['', names[0], names[1], 'both'][side[e]]] : [valueOf(e)])])))
  }
  const flip = (set, u) => { set.has(u) ? set.delete(u) : set.add(u); listed = ''; chips(); later() }
  function chips() {
    $('.chips').replaceChildren(...[[st.hidden, 'hidden'], [st.pinned, 'pinned']].flatMap(([set, word]) => [...set].map(u =>
      make('button', {type: 'button', title: `no longer ${word}`, onclick: () => flip(set, u)}, `${word} ${u.name} ✕`)))) }
  function select(u) {
    st.unit = u && u.unit; st.at = u ? u.at : null; listed = ''
    for (const [v, b] of buttons) b.setAttribute('aria-pressed', isPicked(v))
    panel(); paintOver(); send() }
  let sending = 0, last = null                                 // the size that is known outside
  const send = () => { clearTimeout(sending); sending = setTimeout(() => { last = st.given ? 0 : st.n; tell({node: st.unit ? st.unit.name : '', size: last}) }, 120) }
  const rest = () => { moving = 0; if (frames) { const g = canvas('.edges'); paintUnder(g); strokes(g, drawn) } }
  const count = n => { clearTimeout(moving); moving = setTimeout(rest, 160); st.given = false; st.n = Math.max(1, Math.min(all, Math.round(n) || 1)); send(); later() }
  function turn(by) {                                          // from one layout to the other
    st.spread = by == 'position'; lay = st.spread ? byPosition : byHead; st.at = null; rows = []; listed = ''; order = ''
    box.classList.toggle('spread', st.spread); $('.few').hidden = st.spread; scene.scrollLeft = 0
    for (const b of box.querySelectorAll('[data-by]')) b.setAttribute('aria-pressed', b.dataset.by == by)
    legend(); later() }

  // -- the pointer
  const inScene = e => { const b = scene.getBoundingClientRect(); return [e.clientX - b.left + scene.scrollLeft, e.clientY - b.top] }
  function say(text, e, u) {
    const tip = $('.tip'); tip.hidden = !text; if (!text) return
    tip.textContent = text
    const [x, y] = u ? [u.x, u.foot] : inScene(e), l = scene.scrollLeft, below = y + 16 + tip.offsetHeight
    tip.style.left = Math.max(l, Math.min(l + scene.clientWidth - tip.offsetWidth, x + 12)) + 'px'
    tip.style.top = (st.spread && below > H ? Math.max(0, y - 30) : y + 16) + 'px'
  }
  function flat(e) {                                           // points along an edge
    const p = line(e), out = []
    if (!p) return out
    let x = p[0], y = p[1]; out.push(x, y)
    for (let i = 2; i < p.length; i += 6) { const n = Math.abs(p[i + 4] - x) < 1 ? 1 : 14
      for (let j = 1; j <= n; j++) { const t = j / n, s = 1 - t, a = s * s * s, b = 3 * s * s * t, d = 3 * s * t * t, f = t * t * t
        out.push(a * x + b * p[i] + d * p[i + 2] + f * p[i + 4], a * y + b * p[i + 1] + d * p[i + 3] + f * p[i + 5]) }
      x = p[i + 4]; y = p[i + 5] }
    return out
  }
  function nearest(x, y) {
    poly ||= drawn.map(e => [e, Float32Array.from(flat(e))])
    const mine = picked(); let best = -1, near = 36
    for (const [e, p] of poly) { if (mine && !mine.has(e)) continue
      for (let i = 2; i < p.length; i += 2) { const ax = p[i - 2], ay = p[i - 1], dx = p[i] - ax, dy = p[i + 1] - ay
        if (Math.min(ay, p[i + 1]) > y + 6 || Math.max(ay, p[i + 1]) < y - 6) continue
        const t = Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy || 1))), d = (ax + t * dx - x) ** 2 + (ay + t * dy - y) ** 2
        if (d <= near) { near = d; best = e } } }
    return best
  }
  function markAt(x, y) {
    for (const u of placed) if (u.x !== undefined && shown(u) && Math.abs(x - u.x) < u.w / 2 && y > u.y + u.h && y < u.foot) {
      const near = u.marks.filter(m => Math.abs(m.x - x) <= Math.max(3, m.w / 2 + 1)).sort((a, b) => Math.abs(a.x - x) - Math.abs(b.x - x))[0]
      if (near) return near } }
  scene.onpointermove = ev => {
    if (ev.target.closest('.node')) return
    const [x, y] = inScene(ev), port = markAt(x, y), e = port ? -1 : nearest(x, y)
    if (e != hover) { hover = e; paintOver() }
    say(port ? portSaid(c.nodes[port.i]) : e < 0 ? '' : `${name(e)}   ${two ? c.graphs.map((_, k) => `${names[k]} ${signed(lay.score[k][e])}`).join(', ') : signed(valueOf(e))}`, ev)
  }
  scene.onpointerleave = () => { say(''); if (hover >= 0) { hover = -1; paintOver() } }
  scene.onscroll = () => { for (const l of scene.querySelectorAll('.label')) l.style.left = scene.scrollLeft + 'px' }
  scene.onclick = ev => { if (!ev.target.closest('.node') && st.unit) select(null) }

  // -- files
  const clean = s => String(s).replace(/[&<>"]/g, x => ({'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;'})[x])
  function svg() {
    const out = [], f = v => +v.toFixed(1)
    const way = p => { let d = `M${f(p[0])} ${f(p[1])}`; for (let i = 2; i < p.length; i += 6) d += `C${p.slice(i, i + 6).map(f).join(' ')}`; return d }
    for (const [l, r, h] of bands()) out.push(`<rect x="${f(l)}" y="0" width="${f(r - l)}" height="${f(h)}" fill="${colours.ink}" fill-opacity=".05"/>`)
    for (const r of rails) out.push(`<path class="rail" d="${r.path.map(way).join('')}" stroke="${colours[r.unit.branch]}" stroke-width="1.3" stroke-opacity=".5"><title>${clean(r.unit.name)}</title></path>`)
    for (const e of drawn) { const p = line(e); if (!p) continue
      const {tint, width, alpha} = look(e)
      out.push(`<path d="${way(p)}" stroke="${tint}" stroke-width="${f(width)}" stroke-opacity="${alpha}"><title>${clean(name(e))} ${signed(valueOf(e))}</title></path>`) }
    for (const k of marks()) { out.push(`<rect x="${f(k.m.x - k.m.w / 2)}" y="${k.y}" width="${f(k.m.w)}" height="${k.h}" fill="${k.on ? k.fill : 'none'}" stroke="${k.on ? 'none' : colours.line}"/>`)
      if (k.text) out.push(`<text x="${f(k.m.mid)}" y="${k.ty + 4}" font-size="11" fill="${has[k.u.k] ? colours.ink : colours.soft}">${clean(k.text)}</text>`) }
    for (const [u, b] of buttons) { if (!b.isConnected) continue
      const s = getComputedStyle(b), [text, more] = [label(u), b.querySelector('small')?.textContent], mid = u.y + u.h / 2 + (more ? -1 : 4.5)
      out.push(`<rect x="${f(u.x - u.w / 2)}" y="${f(u.y)}" width="${f(u.w)}" height="${u.h}" rx="${u.kind == 'pill' ? 8 : 5}"${has[u.k] ? '' : ' stroke-dasharray="3 2"'} fill="${hex(s.backgroundColor)}" stroke="${hex(s.borderTopColor)}" stroke-width="${has[u.k] ? 2 : 1}"><title>${clean(about(u))}</title></rect>`,
        `<text x="${f(u.x)}" y="${f(mid)}" font-size="${u.kind == 'pill' ? 11 : 13}" fill="${hex(s.color)}">${clean(text)}</text>`, more ? `<text x="${f(u.x)}" y="${f(mid + 12)}" font-size="11" fill="${hex(s.color)}">${clean(more)}</text>` : '') }
    for (const l of labels) out.push(...[l.text, ...l.more.split('\n')].filter(s => s).map((s, i) => `<text x="0" y="${f(l.y + (l.more ? -3 : 4) + 14 * i)}" font-size="12" text-anchor="start" fill="${colours.soft}">${clean(s)}</text>`))
    for (const w of gaps) if (w.text) out.push(`<text font-size="11" text-anchor="start" transform="translate(${f(w.x)} ${f(w.y + 9)})${w.slant ? ' rotate(55)' : ''}" fill="${colours.soft}">${clean(w.text)}<title>${clean(w.title)}</title></text>`)
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${W}" height="${H}" viewBox="0 0 ${W} ${H}" font-family="system-ui,sans-serif" text-anchor="middle" fill="none" stroke-linecap="round"><title>${clean(c.graphs[which()[0]].model)}: ${drawn.length} edges</title>`
      + `<rect width="${W}" height="${H}" fill="${colours.back}"/>${out.join('\n')}</svg>`
  }
  function json() {                                            // the circuit in the picture, in the form that it came in
    const k = which()[0], number = x => x === x ? x : null
    return JSON.stringify({...c.heads[k], graph: c.graphs[k], nodes: c.nodes.map((n, i) => ({...n, score: number(worth[k][i])})),
      edges: Array.from(sums[k], (v, e) => { const at = Array.from({length: T}, (_, t) => t).filter(t => full[e * T + t] >> k & 1)
        return {source: c.nodes[c.source[e]].id, target: c.nodes[c.target[e]].id, score: number(v), kept: at.length > 0,
          ...(c.positions ? {scores: Array.from(fine[k].subarray(e * T, e * T + T), number), kept_at: at} : {})} })})
  }
  function save(kind, blob) {
    const a = make('a', {href: URL.createObjectURL(blob), download: `${(c.graphs[0].model || 'circuit').replace(/[^\w.-]+/g, '-')}-circuit.${kind}`})
    box.append(a); a.click(); a.remove(); setTimeout(() => URL.revokeObjectURL(a.href), 10000) }
  for (const b of box.querySelectorAll('[data-save]')) b.onclick = async () => { const kind = b.dataset.save
    if (due) { cancelAnimationFrame(due); draw() }
    if (kind == 'json') return save(kind, new Blob([json()], {type: 'application/json'}))
    if (kind == 'svg') return save(kind, new Blob([svg()], {type: 'image/svg+xml'}))
    const image = new Image(), to = document.createElement('canvas')
    image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(svg()); await image.decode()
    const d = Math.min(2, 16000 / W); to.width = d * W; to.height = d * H; to.getContext('2d').drawImage(image, 0, 0, d * W, d * H)
    to.toBlob(blob => save(kind, blob), 'image/png') }

  // -- words around it, and listening
  const g0 = c.graphs[0], prompts = g0.prompts || []
  if (prompts.length) { $('.ask').append(make('b', null, JSON.stringify(prompts[0])), ` → ${JSON.stringify(g0.answers?.[0] ?? '')}`, g0.wrong?.[0] ? ` against ${JSON.stringify(g0.wrong[0])}` : '')
    $('.asked').hidden = false; $('.asked summary').textContent = prompts.length > 1 ? `All ${prompts.length} prompts, counterfactuals and answers` : 'The counterfactual'
    $('.asked .sc').append(sheet(['prompt', 'counterfactual', 'answer', 'against'], prompts.map((p, i) => [p, g0.counterfactuals?.[i] ?? '', g0.answers?.[i] ?? '', g0.wrong?.[i] ?? '']))) }
  $('.all').textContent = `of ${num(all)}`; $('.all').title = EDGES; $('.count').max = all
  $('.lay').hidden = T < 2
  for (const b of box.querySelectorAll('[data-by]')) b.onclick = () => turn(b.dataset.by)
  for (const b of branches) $('.kinds').append(make('label', {style: `--c:${colour(b)}`}, make('input', {type: 'checkbox', checked: true, onchange: e => { e.target.checked ? st.off.delete(b) : st.off.add(b); later() }, data: {branch: b}}), make('i'), b))
  $('.both').hidden = !two
  if (two) ['both compared', names[1], names[0]].forEach((s, i) => $('.which').append(make('option', {value: 2 - i}, s)))
  $('.which').value = st.which
  function legend() {
    const ports = [...seen].map(p => `${SHORT[p] || p} ${PORTS[p] || p}`).join(' · '), k = which()[0], bits = []
    if (st.which == 2) for (const [s, text] of [[3, 'in both'], [1, `only ${names[0]}`], [2, `only ${names[1]}`]]) bits.push(make('span', {style: `--c:var(--${SIDES[s]})`}, make('i', {style: 'background:var(--c)'}), ' ' + text))
    else { const stops = Array.from({length: 41}, (_, i) => { const t = i / 20 - 1, j = shade(t * Math.abs(t)); return `light-dark(${ramp(j, 0)},${ramp(j, 1)})` }), m = lay.top[k]
      bits.push(make('span', null, 'edge ', make('span', {className: 'scale'}, make('b', {style: `background:linear-gradient(90deg,${stops})`}), ...[[0, -m], [25, -m / 4], [50, 0], [75, m / 4], [100, m]].map(([p, v]) => make('em', {style: `left:${p}%`}, signed(v))))),
        make('span', null, `${st.spread ? 'part' : 'node'} ±${num(lay.topNode[k])} at the ends`)) }
    if (st.spread) bits.push(make('span', null, make('i', {className: 'along'}), ' along a row: what a part carries on to later tokens'))
    if (ports) bits.push(make('span', null, `into a head: ${ports}`))
    $('.lg').replaceChildren(...bits) }
  $('.n').oninput = e => { const now = present(which()[0]), n = Math.round(all ** (+e.target.value / 1000))
    count(n == now ? now + Math.sign(e.target.value - Math.round(1000 * log(now))) : n) }     // a key moves it by an edge at least
  $('.count').oninput = e => count(+e.target.value)
  $('.given').onclick = () => { st.given = true; send(); later() }
  $('.find').oninput = e => { st.text = e.target.value; later() }
  $('.only').onchange = e => { st.only = e.target.checked; rows = []; later() }
  $('.which').onchange = e => { st.which = +e.target.value; listed = ''; legend(); later() }
  $('.rows').ontoggle = () => $('.rows').open && table()
  box.onkeydown = e => { if (e.key == 'Escape' && st.unit) { select(null); e.stopPropagation() } }
  let wide = 0
  const resize = new ResizeObserver(() => { if (!box.clientWidth || box.clientWidth == wide) return
    wide = box.clientWidth; box.classList.toggle('slim', wide < 820); rows = []
    if (!frames) st.only = $('.only').checked = Math.max(...[...new Set(units.map(u => u.stage))].map(s => units.filter(u => u.stage == s && column(u)).length)) * 24 > scene.clientWidth
    later() })
  const theme = new MutationObserver(later), scheme = matchMedia('(prefers-color-scheme:dark)')
  for (const e of [document.documentElement, document.body]) theme.observe(e, {attributes: true})
  scheme.addEventListener('change', later)
  const set = s => { const u = s.node ? byName.get(s.node) || null : null
    if (s.size !== last) { last = s.size; st.given = !s.size; if (s.size) st.n = Math.min(all, s.size); later() }
    if (u != st.unit) { st.unit = u; st.at = null; listed = ''; later() } }
  const many = kept[0].reduce((a, b) => a + b, 0)
  set(start); if (!start.size && many > 2000) { st.given = false; st.n = 300 }
  turn(st.spread ? 'position' : 'head'); resize.observe(box)
  return {set, stop() { cancelAnimationFrame(due); clearTimeout(sending); clearTimeout(moving); resize.disconnect(); theme.disconnect(); scheme.removeEventListener('change', later) }}
}

// From a page or a saved notebook: every board that is not drawn yet, once it can be seen.
export function boards() {
  for (const e of document.querySelectorAll('.board-root:not([data-on])')) { e.dataset.on = 1
    const s = atob(e.querySelector('script[type="text/plain"]').textContent), start = JSON.parse(e.dataset.start)
    const watch = new ResizeObserver(() => { if (e.clientWidth) { watch.disconnect(); mount(e, Uint8Array.from(s, x => x.charCodeAt(0)), start) } })
    watch.observe(e) }
}

export default {
  async render({model, el}) {
    const waiting = new Map(), now = () => ({node: model.get('node'), size: model.get('size')}), data = model.get('data')
    const answered = m => { if (m?.name !== undefined && waiting.has(m.name)) { waiting.get(m.name)(m.html); waiting.delete(m.name) } }
    model.on('msg:custom', answered)
    const ask = model.get('asks') ? name => new Promise(done => { waiting.set(name, done); model.send({name}) }) : null
    const view = await mount(el, new Uint8Array(data.buffer, data.byteOffset, data.byteLength), now(), ask, s => {
      if (model.get('node') === s.node && model.get('size') === s.size) return
      model.set('node', s.node); model.set('size', s.size); model.save_changes() })
    const hear = () => view.set(now())
    for (const k of ['node', 'size']) model.on(`change:${k}`, hear)
    hear()                                                     // what was set while it was being read
    return () => { model.off('msg:custom', answered); for (const k of ['node', 'size']) model.off(`change:${k}`, hear); view.stop() }
  }
}
